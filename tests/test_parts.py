"""Batches divided among cores give what undivided ones give."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import device
import model_file
import parts
from unet import NaiveUnet


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_pieces_are_in_order_and_of_nearly_the_same_size(size):
    pieces = [piece.numpy() for piece in parts.split(tf.range(size), 3)]
    np.testing.assert_array_equal(np.concatenate(pieces), range(size))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def some_batches(sizes):
    rng = np.random.default_rng(1)
    for size in sizes:
        x_t, eps = rng.standard_normal((2, size, 32, 32, 3), np.float32)
        yield [x_t, rng.random((size, 1), np.float32)], eps


def trained_in(parts, sizes, precision="float32"):
    """The losses and the weights after each of some batches, trained in a number of parts."""
    keras.utils.set_random_seed(0)
    model = NaiveUnet((32, 32, 3), 8)
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)  # Adam would hide factors of gradients
    model_file.logbook(model)["progress"] = {}
    model_file.compile_for_run(model, optimizer, precision, xla=False, parts=parts)
    losses, weights = [], []
    for inputs, eps in some_batches(sizes):
        losses.append(model.train_on_batch(inputs, eps))
        weights.append(model.get_weights())
    return losses, weights


def trained_by_hand(sizes):
    """The same without Keras' training and without parts."""
    keras.utils.set_random_seed(0)
    model = NaiveUnet((32, 32, 3), 8)
    losses, weights = [], []
    for inputs, eps in some_batches(sizes):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(inputs, training=True) - eps))
        for weight, slope in zip(model.trainable_weights, tape.gradient(loss, model.trainable_weights), strict=True):
            weight.assign_sub(0.1 * slope)
        losses.append(float(loss))
        weights.append(model.get_weights())
    return losses, weights


def test_training_in_parts_is_training():
    """A batch of 2 is not divided into 3, and a second size of batches makes Keras trace the step for all sizes."""
    whole_losses, whole_weights = trained_by_hand([5, 2, 4])
    losses, weights = trained_in(3, [5, 2, 4])
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-5)
    for part, whole in zip(weights[-1], whole_weights[-1], strict=True):
        np.testing.assert_allclose(part, whole, atol=2e-6)

    (loss,), (weights,) = trained_in(2, [5], "float16")  # its scaled loss is divided out again
    assert loss == pytest.approx(whole_losses[0], rel=1e-2)
    *_, bias = whole_weights[0]
    assert np.abs(weights[-1] - bias).max() < 0.02 * np.abs(bias).max()


def test_prediction_in_parts_is_prediction():
    model = NaiveUnet((32, 32, 3), 8)
    model.layers[-1].set_weights([np.random.default_rng(0).normal(size=w.shape) for w in model.layers[-1].weights])
    inputs = [tf.random.normal((5, 32, 32, 3)), tf.random.uniform((5, 1))]
    np.testing.assert_allclose(parts.predictor(model, 3)(inputs), model(inputs), atol=1e-4)


def test_no_more_parts_than_pictures_or_cores():
    assert device.parts_for(1) == 1
    assert 1 <= device.parts_for(10**6) <= min(device.cores(), device.MOST_PARTS)
