"""The network: sizes and counts, what is saved and loaded, precision, other backends."""

import importlib.util

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import tiny_network

import unet
from diffusion import model_file, networks
from diffusion.layers import LearnedSchedule
from training import checkpoint


def some_inputs(shape, n=2):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, *shape), dtype=np.float32), rng.random((n, 1), dtype=np.float32)]


def randomized(model):
    """The model with no weight at zero, so that an output tells which weights it has."""
    rng = np.random.default_rng(1)
    model.set_weights([w + 0.1 * rng.standard_normal(w.shape) for w in model.get_weights()])
    return model


def test_the_slides_network_has_129_million_parameters():
    assert unet.NaiveUnet((64, 64, 3), 512).count_params() == 129_329_667
    assert unet.NaiveUnet((64, 64, 3), 32).count_params() == 510_627


@pytest.mark.parametrize("shape", [(32, 32, 3), (64, 32, 1), (32, 96, 5)])
def test_a_new_network_predicts_no_noise(shape):
    noise = unet.NaiveUnet(shape, 8)(some_inputs(shape))
    assert noise.shape == (2, *shape) and noise.dtype == "float32" and not np.any(noise)


def test_every_weight_reaches_the_output():
    """An input, an image or t, or a weight that changes nothing would be a broken connection."""
    model = randomized(unet.NaiveUnet((32, 32, 3), 8))
    image, t = some_inputs((32, 32, 3))
    predict = tf.function(model)  # 96 times
    before = predict([image, t]).numpy()
    assert np.any(predict([image, t / 2]).numpy() != before)
    for weight in model.trainable_variables:
        value = weight.numpy()
        weight.assign(value + 0.5 * np.random.default_rng(2).standard_normal(value.shape))
        assert np.any(predict([image, t]).numpy() != before), weight.path
        weight.assign(value)


def test_neighbouring_steps_have_different_embeddings():
    embed = unet.TimeLayer(64)
    t = np.linspace(0, 1, 1001, dtype=np.float32)[:, None]
    change = np.abs(np.diff(embed(t), axis=0)).max(axis=1)
    assert change.min() > 0.01


@pytest.mark.parametrize("shape", [(48, 64, 3), (64, 16, 3), (0, 32, 3), (64, 64), (None, None, 3), (32.0, 32, 3)])
def test_sizes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 32|three integers"):
        unet.NaiveUnet(shape, 8)


@pytest.mark.parametrize("n_feat", [0, 4, 12, -8, 8.0])
def test_widths_that_do_not_fit_are_refused(n_feat):
    with pytest.raises(ValueError, match="multiple of 8"):
        unet.NaiveUnet((32, 32, 3), n_feat)


@pytest.mark.parametrize(
    "layer, inputs, output",
    [
        (unet.Conv3Layer(16, is_res=True), [(2, 8, 8, 3)], (2, 8, 8, 16)),
        (unet.UnetDownLayer(16), [(2, 8, 8, 3)], (2, 4, 4, 16)),
        (unet.UnetUpLayer(16), [(2, 8, 8, 3), (2, 8, 8, 5)], (2, 16, 16, 16)),
        (unet.TimeLayer(24), [(2, 1)], (2, 24)),
        (unet.Logbook({"a": [1, {"b": None}]}), [(2, 1)], (2, 1)),
        (LearnedSchedule(-6.0, 3.0, units=5), [(2, 8, 8, 3)], (2, 8, 8, 3)),
    ],
)
def test_layers_have_their_shapes_and_survive_their_config(layer, inputs, output):
    rng = np.random.default_rng(0)
    arrays = [rng.random(shape, dtype=np.float32) for shape in inputs]
    arrays = arrays if len(arrays) > 1 else arrays[0]
    assert layer(arrays).shape == output
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(twin) is type(layer) and twin.get_config() == layer.get_config()
    twin(arrays)
    twin.set_weights(layer.get_weights())
    np.testing.assert_array_equal(twin(arrays), layer(arrays))


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("mixed_bfloat16", 0.02), ("mixed_float16", 3e-3)])
def test_normalization_has_the_values_and_gradients_of_keras(precision, tolerance):
    rng = np.random.default_rng(0)
    x = (3 * rng.standard_normal((2, 8, 8, 24)) + rng.uniform(-20, 20, 24)).astype(np.float32)
    weights = [rng.standard_normal(24), rng.standard_normal(24)]
    direction = rng.standard_normal(x.shape).astype(np.float32)
    results = []
    for layer in unet.GroupNormalization(8, dtype=precision), keras.layers.GroupNormalization(8, dtype="float32"):
        layer.build(x.shape)
        layer.set_weights(weights)
        variable = tf.Variable(x)
        with tf.GradientTape() as tape:
            y = layer(variable)
            loss = tf.reduce_sum(tf.cast(y, tf.float32) * direction)
        results.append([y, *tape.gradient(loss, [variable, *layer.trainable_variables])])
        assert y.dtype == layer.compute_dtype
    for ours, theirs in zip(*results, strict=True):
        ours, theirs = np.asarray(tf.cast(ours, tf.float32)), np.asarray(theirs)
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def test_normalization_does_not_overflow_in_float16():
    x = np.full((1, 4, 4, 8), 3e4, np.float16)
    x[:, ::2] *= -1
    y = unet.GroupNormalization(8, dtype="mixed_float16")(x).numpy().astype(np.float32)
    np.testing.assert_allclose(np.abs(y), 1, atol=2e-3)


def test_the_residual_is_the_first_half_added():
    plain, residual = unet.Conv3Layer(8), unet.Conv3Layer(8, is_res=True)
    x = some_inputs((8, 8, 3))[0]
    plain(x), residual(x)
    residual.set_weights(plain.get_weights())
    first = keras.ops.relu(plain.Norm_1(plain.Conv2D_1(x)))
    np.testing.assert_allclose(residual(x), plain(x) + first, rtol=1e-6)


def test_up_layers_make_each_pixel_from_exactly_one():
    up = unet.UnetUpLayer(8)
    x = np.zeros((1, 4, 4, 3), np.float32)
    up([x, x])
    spread = up.Conv2DTranspose(np.ones((1, 4, 4, 6), np.float32)).numpy()
    for row in range(2):
        for column in range(2):  # no seams: every pixel of a kind has the same value
            assert np.ptp(spread[0, row::2, column::2], axis=(0, 1)).max() < 1e-6


LOAD = """
import sys, warnings
import numpy as np, keras
warnings.simplefilter("error")
import unet
assert keras.config.floatx() == "float32"
for name in "unet", "model":
    model, inputs = keras.models.load_model(f"{name}.keras"), np.load(f"{name}.npz")
    out = model([inputs[key] for key in sorted(inputs)])
    np.save(f"{name}-out.npy", keras.ops.convert_to_numpy(out))
print({layer.compute_dtype for layer in model._flatten_layers()}, int(model.optimizer.iterations), model.jit_compile)
print(model.get_layer("logbook").entries["x"])
"""


def save_unet(folder):
    """Saves a small `Unet` with every layer of ours as plain Keras does, and its inputs; returns both."""
    network = randomized(networks.Unet((8, 8, 3), 16, classes=2, widths=(1,), patch=2))
    inputs = some_inputs((8, 8, 3))
    inputs.append(np.array([[1], [2]], np.int32))
    network.save(folder / "unet.keras")
    np.savez(folder / "unet.npz", *inputs)
    return network, inputs


def test_a_loaded_model_is_float32_and_predicts_the_same_bits(run, tmp_path):
    from training import checkpoint

    save_unet(tmp_path)
    image, t = some_inputs((32, 32, 3))
    model = randomized(unet.NaiveUnet((32, 32, 3), 8))
    optimizer = keras.optimizers.Adam(1e-3, use_ema=True, ema_momentum=0.0)
    optimizer.build(model.trainable_variables)
    model_file.metadata(model).update(x={"loss": 0.1 + 0.2, "n": [1, 2], "none": None}, progress={})
    checkpoint.compile_for_run(model, optimizer, "float16", xla=True)
    for _ in range(2):
        model.optimizer.apply([keras.ops.sign(w) for w in model.trainable_weights], model.trainable_weights)
    checkpoint.save(model, tmp_path / "model.keras")

    assert model.dtype_policy.compute_dtype == "float16" and model.jit_compile  # the run goes on as it was
    np.savez(tmp_path / "model.npz", image, t)
    threads = str(tf.config.threading.get_intra_op_parallelism_threads())  # the order of sums depends on both
    loaded = run("-c", LOAD, TF_NUM_INTRAOP_THREADS=threads, TF_ENABLE_ONEDNN_OPTS="1")
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines() == [
        "{'float32'} 2 False",
        "{'loss': 0.30000000000000004, 'n': [1, 2], 'none': None}",
    ]
    checkpoint.set_precision(model, "float32")  # momentum 0: the averages are the weights
    np.testing.assert_array_equal(np.load(tmp_path / "model-out.npy"), model([image, t]))


def test_plain_keras_keeps_the_logbook(tmp_path):
    model = tiny_network((8, 8, 1))
    model.get_layer("logbook").entries["diffusion"] = {"T": 7}
    for name in "a.keras", "b.keras":
        model.save(tmp_path / name)
        model = keras.models.load_model(tmp_path / name)
    assert model.get_layer("logbook").entries == {"diffusion": {"T": 7}}


def test_parts_take_the_policy_of_their_layer():
    layer = unet.UnetDownLayer(8, dtype="mixed_bfloat16")
    assert {part.compute_dtype for part in layer._flatten_layers()} == {"bfloat16"}
    assert layer(np.zeros((1, 8, 8, 3), np.float32)).dtype == "bfloat16"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_predicts_nearly_the_same_in_float32(precision):
    model = randomized(unet.NaiveUnet((32, 32, 3), 8))
    inputs = some_inputs((32, 32, 3))
    exact = model(inputs).numpy()
    checkpoint.set_precision(model, precision)
    rough = model(inputs)
    assert rough.dtype == "float32"
    difference = np.abs(rough.numpy() - exact).max() / exact.std()
    assert 0 < difference < {"bfloat16": 0.3, "float16": 0.05}[precision]
    assert {layer.compute_dtype for layer in model.layers if isinstance(layer, unet.TimeLayer)} == {"float32"}
    assert model.layers[-1].compute_dtype == "float32"


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_predict_the_same(run, tmp_path, backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    network, inputs = save_unet(tmp_path)
    image, t = some_inputs((32, 32, 3))
    model = randomized(unet.NaiveUnet((32, 32, 3), 8))
    model.get_layer("logbook").entries["x"] = 1
    model.compile(loss="mse", optimizer="adam")
    model.train_on_batch([image, t], image)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "model.npz", image, t)
    loaded = run("-c", LOAD.replace('simplefilter("error")', 'simplefilter("ignore")'), KERAS_BACKEND=backend)
    assert loaded.returncode == 0, loaded.stderr
    np.testing.assert_allclose(np.load(tmp_path / "model-out.npy"), model([image, t]), atol=1e-4)
    np.testing.assert_allclose(np.load(tmp_path / "unet-out.npy"), network(inputs), atol=1e-4)
