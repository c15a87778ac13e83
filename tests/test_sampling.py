"""`my_sample` and the sampling script."""

import multiprocessing
import os
import shutil
import sys
import threading
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_earlier_files import FIXTURES, MODEL

import ddpm
import reverse_diffusion as rd
import unet
from diffusion import generate, model_file, reverse, sampling
from support import device
from training import checkpoint


@pytest.fixture
def model(tiny_trained):
    """The file of a tiny network, for what has nothing to do with the layers."""
    return str(tiny_trained / "model.keras")


def sample(model, n, **more):
    return rd.my_sample(None, n, model, seed=more.pop("seed", 5), verbose=0, **more)


def test_my_sample_returns_an_int16_array_of_images(model):
    images = sample(model, 2)
    assert images.shape == (2, 8, 8, 1) and images.dtype == np.int16
    assert images.min() >= 0 and images.max() <= 255 and images.std() > 5


def test_equal_seeds_give_equal_images_and_others_differ(model):
    np.testing.assert_array_equal(sample(model, 2), sample(model, 2))
    assert np.any(sample(model, 2) != sample(model, 2, seed=6))
    assert np.any(sample(model, 2, seed=None) != sample(model, 2, seed=None))


def test_images_depend_neither_on_n_sample_nor_on_batches(model, monkeypatch):
    seven = sample(model, 7)
    monkeypatch.setattr(reverse, "LARGEST_BATCH", 3)
    in_batches = sample(model, 7)
    assert np.abs(seven - in_batches).max() <= 1  # rounding
    assert np.abs(seven[:2] - sample(model, 2)).max() <= 1
    assert len({image.tobytes() for image in seven}) == 7


def test_compiled_step_is_cached_also_for_incomplete_batches(model, monkeypatch):
    monkeypatch.setattr(reverse, "LARGEST_BATCH", 4)
    generate.compiled_steps.cache_clear()
    sample(model, 6)
    sample(model, 5)
    loaded = generate.load(*generate.load_key(model))
    compiled = generate.compiled_steps(loaded, None, None)
    steps = compiled(True, 3, None)
    assert compiled.cache_info().misses == 1
    assert steps._take.experimental_get_tracing_count() == 1


def test_variance_and_clipping_matter(model):
    plain = sample(model, 2)
    assert np.any(sample(model, 2, variance="posterior") != plain)
    assert np.any(sample(model, 2, clip=False) != plain)


def test_a_changed_file_is_loaded_anew(model, tmp_path):
    copy = str(tmp_path / "model.keras")
    shutil.copy(model, copy)
    before = sample(copy, 2)
    assert generate.load(*generate.load_key(copy)) is generate.load(*generate.load_key(copy))
    changed = keras.models.load_model(copy)
    changed.set_weights([w + 0.05 for w in changed.get_weights()])
    changed.save(copy)
    assert np.any(sample(copy, 2) != before)


def test_a_loaded_model_does_as_well_as_its_path(model):
    np.testing.assert_array_equal(sample(keras.models.load_model(model), 2), sample(model, 2))


def forget():
    generate.load.cache_clear()
    generate.compiled_steps.cache_clear()


@pytest.fixture
def keras_settings():
    """Puts Keras' settings back after a test."""
    config = keras.config
    before = config.floatx(), config.image_data_format(), config.epsilon(), config.dtype_policy()
    yield
    config.set_floatx(before[0])
    config.set_image_data_format(before[1])
    config.set_epsilon(before[2])
    config.set_dtype_policy(before[3])


def test_keras_settings_change_no_image_and_are_kept(trained, keras_settings):
    """In the layers of `Unet`."""
    model = str(trained[0] / "model.keras")
    before = sample(model, 2)
    for floatx, data_format in ("float16", "channels_last"), ("float64", "channels_first"):
        forget()
        keras.config.set_floatx(floatx)
        keras.config.set_image_data_format(data_format)
        keras.config.set_epsilon(0.1)
        keras.config.set_dtype_policy("mixed_float16")
        np.testing.assert_array_equal(sample(model, 2), before)
        assert keras.config.dtype_policy().name == "mixed_float16"
        assert (keras.config.floatx(), keras.config.image_data_format()) == (floatx, data_format)


def test_a_debugger_of_tensorflow_is_no_obstacle():
    """XLA, which is for single images, cannot compile what it adds to every function."""
    tf.debugging.enable_check_numerics()
    try:
        watched = sample(light_model(), 1)
    finally:
        tf.debugging.disable_check_numerics()
    assert watched.shape == (1, 8, 8, 1)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "langevin"])
def test_numpy_that_raises_every_warning_is_no_obstacle(monkeypatch, sampler):
    """Nor one that is an error, with schedules that end in pure noise; in place of the network nothing happens."""
    x_T = np.random.default_rng(0).standard_normal((2, 8, 8, 1))

    def steps(x_t, memory, *_):
        return x_t, memory

    steps.at_once = 10
    monkeypatch.setattr(generate, "ReverseSteps", lambda *_, **__: steps)
    for T in 1, 2, 1000:
        light = light_model(T)
        model_file.metadata(light)["diffusion"] |= {"target": "v", "schedule": "cosine", "zero_snr": True}
        with np.errstate(all="raise"), warnings.catch_warnings(action="error"):
            same = sample(light, 2, sampler=sampler, noise=x_T)
        np.testing.assert_array_equal(same, ddpm.to_pixels(x_T))


def test_slides_network_is_channels_last_for_any_keras_setting(keras_settings):
    forget()
    keras.config.set_image_data_format("channels_first")
    with np.load(os.path.join(FIXTURES, "before-packages.npz")) as then:
        assert np.abs(sample(MODEL, 3, seed=7) - then["default"]).max() <= 1


def test_a_program_sets_keras_to_what_its_networks_are_made_for(keras_settings):
    keras.config.set_floatx("float16")
    keras.config.set_image_data_format("channels_first")
    device.start_tensorflow()
    assert keras.config.floatx() == "float16"
    device.start_tensorflow(parts=1)
    assert (keras.config.floatx(), keras.config.image_data_format()) == ("float32", "channels_last")


@pytest.mark.parametrize("where", ["environment", "file", "Keras itself"])
def test_another_backend_of_keras_is_refused_in_a_sentence(monkeypatch, tmp_path, where):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "keras")
    device.check_backend()
    (tmp_path / "keras.json").write_text("{" if where == "environment" else '{"backend": "jax"}')
    if where == "environment":
        device.check_backend()
        monkeypatch.setenv("KERAS_BACKEND", "jax")
    elif where == "Keras itself":
        (tmp_path / "keras.json").unlink()
        other = types.SimpleNamespace(config=types.SimpleNamespace(backend=lambda: "jax"))
        monkeypatch.setitem(sys.modules, "keras", other)
    setting = {"environment": "by KERAS_BACKEND", "file": f"by {tmp_path}/keras.json"}.get(where, "jax")
    for start in device.start_tensorflow, rd.my_sample:
        with pytest.raises(ValueError, match=setting + ".*set KERAS_BACKEND=tensorflow"):
            start()


def test_the_threads_of_the_users_process_are_left_alone(model, monkeypatch):
    monkeypatch.setattr(device, "cores", lambda: 8)
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    asked = []
    monkeypatch.setattr(tf.config.threading, "set_intra_op_parallelism_threads", asked.append)
    sample(model, 2)
    assert asked == []
    device.start_tensorflow(parts=4)  # as a program of ours does
    assert asked == [2] or device.has_gpu()


@pytest.mark.parametrize("action", ["default", "error"])
def test_warning_while_loading_does_not_refuse_the_model(model, monkeypatch, action):
    load, seen = keras.models.load_model, []

    def load_and_warn(*arguments, **named):
        seen.append(list(warnings.filters))
        warnings.warn("this will go one day", DeprecationWarning, stacklevel=1)
        return load(*arguments, **named)

    monkeypatch.setattr(keras.models, "load_model", load_and_warn)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        filters = list(warnings.filters)
        with warnings.catch_warnings(record=action == "default"):
            model_file.open_model(model)
        assert warnings.filters == filters
        checkpoint.open_for_training(model)
    if action == "default":  # other threads see the filters too
        assert seen[0] == filters


def light_model(T=20):
    """A network of a few weights, with a schedule of T steps."""
    image, t = keras.Input((8, 8, 1)), keras.Input((1,))
    logged = unet.Logbook({"diffusion": {"beta1": 0.5 if T == 1 else 1e-4, "beta2": 0.5, "T": T}})(t)
    scale = keras.layers.Reshape((1, 1, 1))(keras.layers.Dense(1)(logged))
    return keras.Model([image, t], keras.layers.Conv2D(1, 3, padding="same")(image) * scale)


def test_threads_may_sample_at_once():
    light, got = light_model(), {}
    wanted = {n: sample(light, n, seed=n) for n in (1, 2, 3, 5)}
    forget()
    threads = [threading.Thread(target=lambda n=n: got.update({n: sample(light, n, seed=n)})) for n in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for n, images in wanted.items():
        np.testing.assert_array_equal(got[n], images)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_is_told_to_spawn(model):
    """Also while a thread of the parent samples, whose lock the child would wait for."""
    device.start_tensorflow()
    context, at_work, over = multiprocessing.get_context("fork"), threading.Event(), threading.Event()
    answers, end = context.Pipe(duplex=False)

    def answer():
        for function in lambda: rd.my_sample(model=model), lambda: rd.invert([], model):
            with pytest.raises(ValueError) as refused:
                function()
            end.send(str(refused.value))

    other = threading.Thread(target=rd.one_at_a_time(lambda: [at_work.set(), over.wait(60)]))
    other.start()
    at_work.wait()
    child = context.Process(target=answer)
    child.start()
    try:
        for _ in range(2):
            assert answers.poll(20) and 'multiprocessing.get_context("spawn")' in answers.recv()
    finally:
        over.set()
        child.kill()
    sample(model, 1)  # the parent works on


def test_few_sizes_of_batches_are_compiled_and_few_models_kept(monkeypatch):
    """Each compilation costs memory that TensorFlow never gives back."""
    made, models = [], [light_model() for _ in range(3)]

    def fake_steps(trained, batch_size, clip, classifier, weaker, task):
        made.append((trained.network, batch_size))
        return trained.image_shape

    def fake_sample(shape, plan, seed, index, start, label, measurement):
        yield 0, np.zeros((len(index), *shape))

    forget()
    monkeypatch.setattr(generate, "ReverseSteps", fake_steps)
    monkeypatch.setattr(generate, "sample", fake_sample)
    for n in (*range(1, 65), *range(64, 0, -1), 200, 1000):
        assert len(sample(models[0], n)) == n
    assert [size for _, size in made] == list(generate.SIZES)
    assert all(larger <= 1.5 * size for size, larger in zip(generate.SIZES[1:], generate.SIZES[2:], strict=False))
    for model in models[0], models[1], models[0]:
        sample(model, 1)
    assert len(made) == len(generate.SIZES) + 1
    sample(models[2], 1)
    assert generate.compiled_steps.cache_info().currsize == generate.MODELS
    sample(models[0], 1)  # the latest two are still there
    assert len(made) == len(generate.SIZES) + 2
    forget()


def test_sampling_leaves_no_traces_behind_in_functions_that_stay(caplog):
    light = light_model()
    forget()
    sample(light, 3)
    compiled = generate.compiled_steps(model_file.describe(light), None, None)
    steps = compiled(True, 3, None)
    sample(light, 3, variance="posterior", seed=9)
    assert compiled(True, 3, None) is steps and steps._take.experimental_get_tracing_count() == 1
    for n in 1, 2, 3, 4, 6, 8:
        sample(light, n)
    assert caplog.text == ""  # TensorFlow warns of functions that are traced again and again
    assert not hasattr(sampling.standard_normal, "experimental_get_tracing_count")


def broken_model(constant=np.nan):
    """`light_model` whose prediction is that constant everywhere."""
    model = light_model()
    for layer in model.layers:
        if layer.weights:
            kernel, bias = layer.get_weights()
            layer.set_weights([0 * kernel, 0 * bias + constant])
    return model


def test_images_that_are_not_finite_are_failed_work():
    for make in (
        lambda: sample(broken_model(), 2),
        lambda: sample(broken_model(1e20), 2, clip=False),
        lambda: rd.invert(np.zeros((1, 8, 8, 1)), broken_model(), verbose=0),
        lambda: sample(light_model(), 2, weaker=broken_model(1.0), guidance=1e38, clip=False),
    ):
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            make()


@pytest.mark.parametrize("compiled", [False, True])
def test_files_with_weights_that_are_not_finite_are_refused(model, tmp_path, compiled):
    changed = keras.models.load_model(model)
    if compiled:  # the raw weights, from which training resumes
        changed.optimizer.variables[-1].assign(np.full(changed.optimizer.variables[-1].shape, np.inf))
    else:
        changed.trainable_variables[1].assign(np.full(changed.trainable_variables[1].shape, np.nan))
    changed.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="m.keras has NaN or infinite values in the weight .*; use another file"):
        model_file.open_model(str(tmp_path / "m.keras"), compile=compiled)


@pytest.mark.parametrize("name", rd.OURS)
@pytest.mark.parametrize("how", ["beside the notebook", "imported before"])
def test_a_module_of_the_user_in_the_way_of_ours_is_named(tmp_path, monkeypatch, name, how):
    path = tmp_path / f"{name}.py"
    path.write_text("")
    monkeypatch.delitem(sys.modules, name, raising=False)
    if how == "imported before":
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[name].__file__ = str(path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=rf"{path} hides the module {name} in .*rename it"):
        rd.my_sample()


@keras.saving.register_keras_serializable("Tests")
class GaussianPredictor(keras.layers.Layer):
    """The best noise predictor there is for data N(mean, deviation²), with the slides' schedule."""

    MEAN, DEVIATION = -0.2, 0.25

    def call(self, inputs):
        x_t, t_input = inputs
        alphabar = np.cumprod([1, *(1 - np.linspace(1e-4, 0.02, 1000))])
        t = keras.ops.cast(keras.ops.round(t_input * 1000), "int32")
        ab = keras.ops.reshape(keras.ops.take(keras.ops.convert_to_tensor(alphabar, "float32"), t), (-1, 1, 1, 1))
        return (1 - ab) ** 0.5 * (x_t - ab**0.5 * self.MEAN) / (ab * self.DEVIATION**2 + 1 - ab)


def test_model_without_settings_samples_with_the_slides_schedule():
    image, t = keras.Input((64, 64, 1)), keras.Input((1,))
    model = keras.Model([image, t], GaussianPredictor()([image, t]))
    values = sample(model, 8) / 127.5 - 1
    assert values.mean() == pytest.approx(GaussianPredictor.MEAN, abs=0.005)
    assert values.std() == pytest.approx(GaussianPredictor.DEVIATION, abs=0.005)


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"image_shape": (64, 64, 3)}, r"\(8, 8, 1\)"),
        ({"n_sample": 0}, "n_sample"),
        ({"n_sample": 1.5}, "n_sample"),
        ({"seed": -1}, "seed"),
        ({"variance": "small"}, "beta, posterior"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(model, wrong, word):
    with pytest.raises(ValueError, match=word):
        rd.my_sample(**{"model": model, "verbose": 0, **wrong})


def test_a_missing_model_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="python diffusion_model.py"):
        rd.my_sample(model=tmp_path / "model.keras")


def test_importing_takes_no_time_and_prints_nothing(run):
    code = (
        "import time; start = time.perf_counter(); import reverse_diffusion, sys; "
        "assert not {'tensorflow', 'keras', 'unet', 'ddpm'} & set(sys.modules); print(time.perf_counter() - start)"
    )
    process = run("-c", code)
    assert process.returncode == 0 and process.stderr == ""
    assert float(process.stdout) < 0.3


def test_code_lines_of_the_slides_run(run, tiny_folder):
    process = run(
        "-c", "import matplotlib.pyplot as plt\nimport reverse_diffusion as rd\na = rd.my_sample()\nplt.imshow(a[0])"
    )
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout.splitlines()[0] == "t = 20" and process.stdout.splitlines()[-1] == "t = 0"


def test_the_script_writes_a_grid_and_the_array(run, tiny_folder):
    command = "reverse_diffusion.py", "--n-sample", "5", "--out", "grid.png", "--npy", "a.npy", "--seed", "5"
    process = run(*command, fresh=True, MPLBACKEND="nowhere")  # as of a notebook that another Python runs
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout.startswith("reverse_diffusion.py: starting TensorFlow")
    images = np.load(tiny_folder / "a.npy")
    np.testing.assert_array_equal(images, sample(str(tiny_folder / "model.keras"), 5))
    grid = np.asarray(Image.open(tiny_folder / "grid.png"))
    assert grid.shape == (2 * 98, 3 * 98)
    np.testing.assert_array_equal(grid[1:97:12, 99:195:12], images[1, :, :, 0])


@pytest.mark.parametrize(
    "options, status, words",
    [
        (("--model", "nowhere.keras"), 2, ("nowhere.keras", "diffusion_model.py")),
        (("--model", "text.keras"), 2, ("text.keras", "not a complete Keras model")),
        (("--n-sample", "0"), 2, ("--n-sample",)),
        (("--out", "grid"), 2, ("--out", "grid")),
        (("--out", "nowhere/grid.png"), 2, ("nowhere",)),
        (("--npy", "a.txt"), 2, ("--npy", "a.txt")),
        (("--variance", "small"), 2, ("--variance", "small")),
    ],
)
def test_wrong_use_of_the_script_is_answered_in_one_sentence(run, tmp_path, options, status, words):
    (tmp_path / "text.keras").write_text("hello")
    process = run("reverse_diffusion.py", *options)
    assert process.returncode == status
    assert len(process.stderr.splitlines()) == 1
    for word in words:
        assert word in process.stderr
