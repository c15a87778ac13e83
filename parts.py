"""A batch divided into parts that go through the network side by side, each on a core of its own.

The sums over a batch do not care how it is divided, but for rounding; the same number of parts gives the same bits.
"""

import functools
import math

import keras
import tensorflow as tf

import device
from ddpm import reverse_step

MEMORY = 2 * 2**30  # bytes that the feature maps of a batch may fill when nothing is trained
LARGEST_BATCH = 64


def split(tensor, parts):
    """The tensor in `parts` pieces along its first axis, of sizes that differ by one at most."""
    size = tf.shape(tensor)[0]
    bounds = [size * k // parts for k in range(parts + 1)]
    return tf.split(tensor, [end - start for start, end in zip(bounds, bounds[1:], strict=False)], num=parts)


def even_batches(model, count):
    """How many batches to make of `count` pictures when nothing is trained, and how large: equal and fit for memory."""
    maps = [tensor.shape[1:] for layer in model.layers for tensor in keras.tree.flatten(layer.output)]
    floats = 4 * max(math.prod(shape) for shape in maps)  # a few of the largest feature maps are alive at once
    batches = math.ceil(count / max(1, min(LARGEST_BATCH, MEMORY // (4 * floats))))
    return batches, math.ceil(count / batches)


def predictor(model, parts):
    """A network where nothing is trained, as a function of its list of inputs, [x_t, t/T] say, with batches divided."""

    @tf.function(reduce_retracing=True, autograph=False)  # traced once for all pieces
    def of_piece(*inputs):
        return model(list(inputs), training=False)

    def predict(inputs):
        pieces = zip(*(split(tensor, parts) for tensor in inputs), strict=True)
        return tf.concat([of_piece(*piece) for piece in pieces], axis=0)

    return predict


def sampling_step(model, sched, batch_size, variance="beta", clip=True):
    """`ddpm.reverse_step` of a model for batches of that size, as it is fast on this machine."""
    xla = device.has_gpu() or batch_size == 1  # a single picture is nothing to divide
    return reverse_step(predictor(model, device.parts_for(batch_size)), sched, variance, clip, xla)


def divide_training(model, parts):
    """Gives a compiled model a training step like Keras' own, but for batches that are divided.

    Each part has its own gradient, so that none waits for the others before the weights change.
    """
    model.parts = parts
    if parts == 1:
        return

    @tf.function(reduce_retracing=True, autograph=False)  # traced once for all pieces
    def of_piece(x_t, t, eps, weight):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model([x_t, t], training=True) - eps)) * weight
            scaled = model.optimizer.scale_loss(loss)  # in float16
        return loss, tape.gradient(scaled, model.trainable_weights)

    def of_batch(x_t, t, eps, count):
        # A product, as TensorFlow makes one of a quotient whose divisor it knows beforehand, and rounds otherwise then.
        weight = 1 / tf.cast(tf.size(eps), tf.float32)
        pieces = zip(*(split(tensor, count) for tensor in (x_t, t, eps)), strict=True)
        losses, gradients = zip(*(of_piece(*piece, weight) for piece in pieces), strict=True)
        return tf.add_n(losses), [tf.add_n(of_pieces) for of_pieces in zip(*gradients, strict=True)]

    def train_step(batch):
        (x_t, t), eps, _ = keras.utils.unpack_x_y_sample_weight(batch)
        divided, whole = (functools.partial(of_batch, x_t, t, eps, count) for count in (parts, 1))
        if eps.shape[0] is None:  # the graph that Keras makes, from the second size on, for all sizes
            loss, gradients = tf.cond(tf.shape(eps)[0] >= parts, divided, whole)
        else:
            loss, gradients = divided() if eps.shape[0] >= parts else whole()
        model.optimizer.apply(gradients, model.trainable_weights)
        return {"loss": loss}

    model.train_step = train_step
