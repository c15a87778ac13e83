"""Dropout whose masks depend on seed, step and place in the batch alone."""

import keras
import numpy as np
import tensorflow as tf

from diffusion.dropout import drop_features, keyed_dropout
from diffusion.layers import ResidualBlock
from training import checkpoint

ONES = tf.ones((6, 32, 32, 8))


def masks(seed=3, step=5, rows=range(6), rate=0.3, layers=1):
    """What is kept, (layers, rows, …) bool."""
    x = ONES[: len(rows)]
    with keyed_dropout(seed, step, tf.constant(list(rows))):
        return np.stack([drop_features(x, rate).numpy() > 0 for _ in range(layers)])


def test_a_fraction_is_dropped_and_the_rest_is_enlarged():
    with keyed_dropout(0, 0, tf.range(6)):
        x = drop_features(ONES, 0.3).numpy()
    assert set(np.unique(x)) == {0, np.float32(1 / 0.7)}
    assert abs((x == 0).mean() - 0.3) < 5 * (0.3 * 0.7 / x.size) ** 0.5


def test_masks_are_independent_of_each_other():
    """Those of another seed, step, image or layer, and neighbouring values of one; correlations are below 5 σ."""
    kept = masks(layers=2)
    others = [kept[1], masks(seed=4)[0], masks(step=6)[0], masks(rows=range(1, 7))[0][:, ::-1], np.roll(kept[0], 1, 0)]
    others += [np.roll(kept[0], 1, axis) for axis in (1, 2, 3)] + [masks(step=3, seed=5)[0]]
    for other in others:
        correlation = np.corrcoef(kept[0].ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / kept[0].size ** 0.5
    with keyed_dropout(0, 0, tf.range(2000)):
        many = drop_features(tf.ones((2000, 5, 5, 2)), 0.3).numpy() > 0
    assert abs(many.mean(axis=0) - 0.7).max() < 5 * (0.21 / 2000) ** 0.5  # of each value over the images


def test_masks_do_not_depend_on_the_division_of_a_batch():
    whole = masks()
    np.testing.assert_array_equal(np.concatenate([masks(rows=(0, 1)), masks(rows=(2, 3, 4, 5))], axis=1), whole)
    np.testing.assert_array_equal(masks(rows=(4,))[0, 0], whole[0, 4])


def test_blocks_drop_in_training_only():
    block, x, embedding = ResidualBlock(8, dropout=0.5), ONES[:2, :4, :4], tf.ones((2, 3))
    block([x, embedding])
    block.set_weights([np.random.default_rng(0).normal(size=w.shape) for w in block.get_weights()])
    plain = block([x, embedding]).numpy()
    np.testing.assert_array_equal(block([x, embedding], training=False), plain)
    with keyed_dropout(0, 0, tf.range(2)):
        first = block([x, embedding], training=True).numpy()
    with keyed_dropout(0, 1, tf.range(2)):
        second = block([x, embedding], training=True).numpy()
    assert np.abs(first - plain).max() > 0.1 and np.abs(first - second).max() > 0.1
    again = ResidualBlock.from_config(block.get_config())
    assert again.dropout == 0.5 and "dropout" in block.get_config()
    old = {name: value for name, value in block.get_config().items() if name != "dropout"}
    assert ResidualBlock.from_config(old).dropout == 0
    assert block([x, embedding], training=True).shape == plain.shape  # also without our training step


def test_training_drops_the_same_in_any_number_of_parts():
    """Losses and weights after two steps; without dropout the losses are others."""
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(2, 7, 4, 4, 8)).astype(np.float32)
    rate, image = 0.5, keras.Input((4, 4, 8))
    block = ResidualBlock(8, dropout=rate)
    model = keras.Model([image, time := keras.Input((1,))], block([image, time]))
    weights = [rng.normal(0, 0.2, w.shape) for w in model.get_weights()]

    def train(parts):
        model.set_weights(weights)
        optimizer = keras.optimizers.Adam(1e-2, use_ema=True)
        optimizer.build(model.trainable_variables)
        checkpoint.compile_for_run(model, optimizer, "float32", False, parts, False)
        losses = [model.train_on_batch([x, np.ones((7, 1), np.float32)], target) for _ in range(2)]
        return losses, model.get_weights()

    (losses, after), (same, theirs) = train(1), train(3)
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    for one, other in zip(after, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    block.dropout = 0
    assert abs(train(1)[0][0] / losses[0] - 1) > 1e-3
