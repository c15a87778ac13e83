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
    """Gives a compiled model a training step in which a batch is divided into parts, for its `train_on_batch`.

    Each part has its own gradient, so that none waits for the others before the weights change. The step is traced
    for batches of every size at once: otherwise the order in which sizes come would decide which graph computes them,
    and a resumed run would differ in the last bits. The loss is the mean of the squared errors, each multiplied by
    the `sample_weight` of its image, (batch, 1, 1, 1), if there is one.
    """
    model.parts = parts
    x_t, t = ([None, *tensor.shape[1:]] for tensor in model.inputs)
    signature = [tf.TensorSpec(shape) for shape in (x_t, t, x_t, [None, 1, 1, 1])]

    @tf.function(reduce_retracing=True, autograph=False)  # traced once for all pieces
    def of_piece(x_t, t, target, sample_weight, factor):
        with tf.GradientTape() as tape:
            errors = tf.square(model([x_t, t], training=True) - target)
            loss = tf.reduce_sum(errors * sample_weight) * factor
            scaled = model.optimizer.scale_loss(loss)  # in float16
        return loss, tape.gradient(scaled, model.trainable_weights)

    @functools.cache  # a smaller batch than that many parts stays whole
    def step_in(parts):
        @tf.function(input_signature=signature, jit_compile=model.jit_compile, autograph=False)
        def step(*batch):
            factor = 1 / tf.cast(tf.size(batch[0]), tf.float32)
            pieces = zip(*(split(tensor, parts) for tensor in batch), strict=True)
            losses, gradients = zip(*(of_piece(*piece, factor) for piece in pieces), strict=True)
            total = [tf.add_n(of_pieces) for of_pieces in zip(*gradients, strict=True)]
            model.optimizer.apply(total, model.trainable_weights)
            return {"loss": tf.add_n(losses)}

        return step

    def train_function(data):
        (x_t, t), target, sample_weight = next(data)
        if sample_weight is None:
            sample_weight = tf.ones((len(target), 1, 1, 1))
        return step_in(parts if len(target) >= parts else 1)(x_t, t, target, sample_weight)

    def make_train_function(force=False):
        model.train_function = train_function

    model.make_train_function = make_train_function
