"""Batches divided among cores give what undivided ones give."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import Oracle

import ddpm
from diffusion import reverse
from diffusion.layers import GroupNormalization, Logbook
from diffusion.model_file import TrainedModel
from diffusion.options import Sampling
from diffusion.sampling import make_plan, sample
from support import device
from training import checkpoint


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_pieces_are_in_order_and_of_nearly_the_same_size(size):
    pieces = [piece.numpy() for piece in reverse.split(tf.range(size), 3)]
    np.testing.assert_array_equal(np.concatenate(pieces), range(size))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def some_batches(counts, size=32):
    rng = np.random.default_rng(1)
    for count in counts:
        x_t, eps = rng.standard_normal((2, count, size, size, 3), np.float32)
        yield [x_t, rng.random((count, 1), np.float32)], eps


def trained_in(parts, sizes, precision="float32", sequential=False):
    """The losses and the weights after each of some batches, trained in a number of parts."""
    keras.utils.set_random_seed(0)
    model = small_network(32)
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)  # Adam would hide factors of gradients
    checkpoint.compile_for_run(model, optimizer, precision, xla=False, parts=parts, sequential=sequential)
    losses, weights = [], []
    for inputs, eps in some_batches(sizes):
        losses.append(model.train_on_batch(inputs, eps))
        weights.append(model.get_weights())
    return losses, weights


def trained_by_hand(sizes):
    """The same without Keras' training and without parts."""
    keras.utils.set_random_seed(0)
    model = small_network(32)
    losses, weights = [], []
    for inputs, eps in some_batches(sizes):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(inputs, training=True) - eps))
        for weight, slope in zip(model.trainable_weights, tape.gradient(loss, model.trainable_weights), strict=True):
            weight.assign_sub(0.1 * slope)
        losses.append(float(loss))
        weights.append(model.get_weights())
    return losses, weights


@pytest.mark.parametrize("sequential", [False, True])
def test_training_in_parts_is_training(sequential):
    """A batch of 2 is not divided into 3."""
    whole_losses, whole_weights = trained_by_hand([5, 2, 4])
    losses, weights = trained_in(3, [5, 2, 4], sequential=sequential)
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-5)
    for part, whole in zip(weights[-1], whole_weights[-1], strict=True):
        np.testing.assert_allclose(part, whole, atol=2e-6)

    (loss,), (weights,) = trained_in(2, [5], "float16", sequential)  # its scaled loss is divided out again
    assert loss == pytest.approx(whole_losses[0], rel=1e-2)
    *_, bias = whole_weights[0]
    assert np.abs(weights[-1] - bias).max() < 0.02 * np.abs(bias).max()


def test_prediction_in_parts_is_prediction():
    model = small_network(8)
    inputs = [tf.random.normal((5, 8, 8, 3)), tf.random.uniform((5, 1))]
    np.testing.assert_allclose(reverse.predictor(model, 3)(inputs), model(inputs), atol=1e-4)


def test_a_model_is_traced_once_for_inference():
    """By the first who asks; no further number of images or parts, and nobody else who asks, traces it again."""
    traced = []

    def network(inputs):
        traced.append(inputs[0].shape)
        return inputs[0]

    oracle, sched = Oracle(network, (4, 4, 1)), ddpm.ddpm_schedule(0.01, 0.3, 20)
    for count, parts in (3, 2), (1, 1), (8, 3):
        x_t, t = tf.ones((count, 4, 4, 1)), tf.ones((count, 1))
        np.testing.assert_array_equal(reverse.predictor(oracle, parts)([x_t, t]), x_t)
    steps = reverse.ReverseSteps(TrainedModel(oracle, sched), 5)
    *_, (_, x_0) = sample(steps, make_plan(sched, Sampling(steps=3)), 0, range(5))
    assert x_0.shape == (5, 4, 4, 1) and traced == [(None, 4, 4, 1)]


def test_a_model_is_traced_anew_in_another_precision():
    model = small_network(8)
    inputs = [tf.random.stateless_normal((2, 8, 8, 3), (0, 0)), tf.fill((2, 1), 0.5)]
    found = {}
    for precision in "float32", "bfloat16", "float32":
        checkpoint.set_precision(model, precision)
        found[precision] = reverse.predictor(model, 1)(inputs)
        np.testing.assert_allclose(found[precision], model(inputs), atol=1e-4 if precision == "float32" else 0.1)
    assert np.abs(found["bfloat16"] - found["float32"]).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_a_model_may_have_inputs_of_other_dtypes(dtype):
    """Such as a label that is a float32, which is what Keras makes of an input that says nothing else."""
    image, t, label = keras.Input((4, 4, 1)), keras.Input((1,), dtype="float16"), keras.Input((1,), dtype=dtype)
    embedded = keras.layers.Embedding(3, 1, embeddings_initializer="ones")(label)
    model = keras.Model([image, t, label], keras.layers.Add()([image, keras.layers.Reshape((1, 1, 1))(embedded)]))
    denoise = reverse.denoiser_of(TrainedModel(model, ddpm.ddpm_schedule(0.01, 0.3, 20)), 1)
    eps = denoise(tf.ones((2, 4, 4, 1)), tf.constant([3, 4]), tf.constant([0, 1])).eps
    np.testing.assert_array_equal(eps, 2 * np.ones((2, 4, 4, 1)))


def test_no_more_parts_than_images_or_cores():
    assert device.parts_for(1) == 1
    assert 1 <= device.parts_for(10**6) <= min(device.cores(), device.MOST_PARTS)


def small_network(size):
    """Two convolutions and a normalization: what a step is made of, and traced in a moment."""
    image, t = keras.Input((size, size, 3)), keras.Input((1,))
    x = keras.layers.Conv2D(8, 3, padding="same")(image)
    t_emb = keras.layers.Dense(8)(Logbook({"progress": {}})(t))
    x = keras.layers.Add()([x, keras.layers.Reshape((1, 1, 8))(t_emb)])
    x = keras.layers.ReLU()(GroupNormalization(groups=2)(x))
    x = keras.layers.Conv2D(3, 3, padding="same", dtype="float32")(x)
    return keras.Model([image, t], x)


def compiled(parts, optimizer, size):
    keras.utils.set_random_seed(0)
    model = small_network(size)
    optimizer.build(model.trainable_variables)
    checkpoint.compile_for_run(model, optimizer, "float32", xla=False, parts=parts)
    return model


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("stops", [(2,), (1, 3)])
def test_resuming_before_any_batch_gives_the_same_bits(parts, stops):
    """Sizes are no powers of two, and the last of an epoch is smaller; after a stop the step is traced anew."""
    batches = [(inputs, eps) for inputs, eps in some_batches([13, 13, 5, 13])]
    ends = []
    for interrupted in False, True:
        model = compiled(parts, keras.optimizers.Adam(0.01), 32)
        for k, (inputs, eps) in enumerate(batches):
            if interrupted and k in stops:
                checkpoint.compile_for_run(model, model.optimizer, "float32", xla=False, parts=parts)
            model.train_on_batch(inputs, eps)
        ends.append([variable.numpy() for variable in (*model.variables, *model.optimizer.variables)])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("parts, precision", [(1, "float32"), (2, "float32"), (1, "float16")])
def test_ema_weights_after_five_steps(parts, precision):
    """The momenta by hand, at most 0.27; resumed after two steps, with a new trace. Without warm-up all are 0.27."""
    batches = list(some_batches([4] * 5, size=8))
    for warmup, momenta in (True, [0, 2 / 11, 3 / 12, 0.27, 0.27]), (False, [0, 0.27, 0.27, 0.27, 0.27]):
        keras.utils.set_random_seed(0)
        model, optimizer = small_network(8), keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.27)
        optimizer.build(model.trainable_variables)
        expected = 0
        for k, (inputs, eps) in enumerate(batches):
            if k in (0, 2):
                checkpoint.compile_for_run(model, optimizer, precision, False, parts, warmup)
            model.train_on_batch(inputs, eps)
            weights = np.concatenate([w.ravel() for w in model.get_weights()])
            expected = momenta[k] * expected + (1 - momenta[k]) * weights
        checkpoint.swap_ema_weights(model)
        averages = np.concatenate([w.ravel() for w in model.get_weights()])
        np.testing.assert_allclose(averages, expected, atol=1e-6)
        assert np.abs(averages - weights).max() > 1e-4  # weights moved
        assert optimizer.get_config()["ema_momentum"] == 0.27


def test_an_optimizer_has_its_own_methods_after_a_step():
    """A step of Keras' own after one of ours; without momentum it is the gradient's sign times the learning rate."""
    ((inputs, eps),) = some_batches([4], size=8)
    model = compiled(1, keras.optimizers.Adam(0.25, beta_1=0.0, beta_2=0.0, use_ema=True), 8)
    model.train_on_batch(inputs, eps)
    before = model.get_weights()
    model.optimizer.apply([keras.ops.ones_like(w) for w in model.trainable_weights], model.trainable_weights)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_allclose(new, old - 0.25, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_weight_counts_for_a_whole_image(parts):
    """As many images as pixels in a row: a weight that multiplied columns instead would go unnoticed elsewhere."""
    rng = np.random.default_rng(2)
    (inputs, eps), weights = next(some_batches([32])), rng.random((32, 1, 1, 1)).astype(np.float32)
    model = compiled(parts, keras.optimizers.SGD(0.0), 32)
    expected = np.mean(weights * (np.asarray(model(inputs)) - eps) ** 2, dtype=np.float64)
    assert model.train_on_batch(inputs, eps, sample_weight=weights) == pytest.approx(expected, rel=1e-5)
