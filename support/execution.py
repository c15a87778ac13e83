"""How steps are executed: batches in parts side by side, one per core; several reverse steps in one call.

The result does not depend on the number of parts, except for rounding; the same number, with as many threads each,
gives the same bits.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from ddpm import Schedule, hybrid_error
from diffusion import samplers
from diffusion.denoiser import Denoiser, autoguided, classifier_free, clipped, denoiser, split_output, with_classifier
from diffusion.sampling import standard_normal
from support import device

MEMORY = 2 * 2**30  # bytes that the feature maps of a batch may fill when nothing is trained
LARGEST_BATCH = 64
NARROWEST = 16  # rows and columns of a kernel that Muon trains


def split(tensor: tf.Tensor, parts: int) -> list[tf.Tensor]:
    """The tensor in `parts` pieces along its first axis, of sizes that differ by one at most."""
    size = tf.shape(tensor)[0]
    bounds = [size * k // parts for k in range(parts + 1)]
    return tf.split(tensor, [end - start for start, end in zip(bounds, bounds[1:], strict=False)], num=parts)


def even_batches(model: keras.Model, count: int) -> tuple[int, int]:
    """Number and size of equal batches that fit in memory, for `count` images when nothing is trained."""
    maps = [tensor.shape[1:] for layer in model.layers for tensor in keras.tree.flatten(layer.output)]
    floats = 4 * max(math.prod(shape) for shape in maps)  # a few of the largest feature maps exist at once
    batches = math.ceil(count / max(1, min(LARGEST_BATCH, MEMORY // (4 * floats))))
    return batches, math.ceil(count / batches)


def learns_variance(model: keras.Model) -> bool:
    """Whether a network also says how much noise a step adds, see `diffusion.denoiser.split_output`."""
    shape, of_output = model.inputs[0].shape, model.outputs[0].shape
    return len(of_output) == len(shape) and of_output[-1] == 2 * shape[-1]


def for_inference(model: Callable) -> Callable[..., tf.Tensor]:
    """A network as a function of its inputs, for batches of all sizes.

    Tracing takes a second. A model is traced once for all callers, and anew in another precision; a function without
    `inputs`, as new sizes occur.
    """
    policy, traced = getattr(model, "dtype_policy", None), getattr(model, "for_inference", None)
    if traced is None or traced.policy != policy:
        given = zip(getattr(model, "inputs", []), (tf.float32, tf.float32, tf.int32), strict=False)  # x_t, t/T, label
        signature = [tf.TensorSpec([None, *tensor.shape[1:]], dtype) for tensor, dtype in given] or None

        @tf.function(input_signature=signature, reduce_retracing=True, autograph=False)
        def of_piece(*inputs):
            return model(list(inputs), training=False)

        of_piece.policy = policy
        model.for_inference = of_piece
    return model.for_inference


def predictor(model: Callable, parts: int) -> Callable[[list[tf.Tensor]], tf.Tensor]:
    """A network for inference, as a function of its list of inputs such as [x_t, t/T], with batches in parts."""
    of_piece = for_inference(model)

    def predict(inputs):
        pieces = zip(*(split(tensor, parts) for tensor in inputs), strict=True)
        return tf.concat([of_piece(*piece) for piece in pieces], axis=0)

    return predict


def denoiser_of(model: keras.Model, sched: Schedule, target: str, parts: int) -> Denoiser:
    """The denoiser of a Keras model, with batches in parts; a model that takes labels and gets none gets "no class"."""
    predict, count = predictor(model, parts), len(model.inputs)

    def network(inputs):
        nothing = [tf.zeros_like(inputs[1], tf.int32)] * (count - 2)
        return predict([*inputs, *nothing][:count])

    return denoiser(network, sched, target)


class ReverseSteps:
    """The reverse steps of a model for batches of one size, as is fast on this machine.

    Where steps are quick, several are one call of TensorFlow, whose own loop saves a millisecond on each. One trace,
    which takes a second, serves all plans and seeds.

    Args:
        model: a network, see `diffusion.denoiser.denoiser`.
        sched: the schedule that it was trained with.
        batch_size: how many images.
        target: what it predicts.
        clip: whether the estimate of x_0 is clipped.
        noise: where all noise comes from, a function like `standard_normal`.
        xla: whether XLA compiles a step; None for what is faster.
        classifier: a network that guides towards the class of the labels, see `diffusion.denoiser.with_classifier`;
            without it a model that takes labels guides itself.
        weaker: a weaker network and what it predicts, which guides instead, see `diffusion.denoiser.autoguided`.

    Attributes:
        at_once: how many steps the next call should take.
        compiled: whether the first call, which takes seconds, is over.
    """

    MOST_AT_ONCE, QUICK = 10, 0.025  # steps, seconds for a step

    def __init__(
        self,
        model: keras.Model,
        sched: Schedule,
        batch_size: int,
        target: str = "eps",
        clip: bool = True,
        noise: Callable[..., tf.Tensor] = standard_normal,
        xla: bool | None = None,
        classifier: keras.Model | None = None,
        weaker: tuple[keras.Model, str] | None = None,
    ):
        shape = tuple(model.inputs[0].shape[1:])
        columns = self._columns = 6 if learns_variance(model) else 5
        xla = device.prefers_xla(batch_size) if xla is None else xla
        parts = 1 if xla else device.parts_for(batch_size)
        of_model, classify = denoiser_of(model, sched, target, parts), classifier and predictor(classifier, parts)
        of_weaker = weaker and denoiser_of(weaker[0], sched, weaker[1], parts)

        @tf.function(jit_compile=xla, autograph=False)
        def step(x_t, memory, t, coefficients, g, label, z):
            denoise = of_model
            if weaker:
                denoise = autoguided(denoise, of_weaker, g)
            elif classifier:
                denoise = with_classifier(denoise, classify, sched, g)
            elif len(model.inputs) > 2:
                denoise = classifier_free(denoise, g)
            denoise = clipped(denoise, sched) if clip else denoise
            return samplers.step(denoise, x_t, tf.repeat(t, batch_size), coefficients, z, memory, label)

        def spec(dtype, *shape):
            return tf.TensorSpec(shape, dtype)

        x = spec(tf.float32, batch_size, *shape)
        of_steps = spec(tf.int32, None), spec(tf.int32, None), spec(tf.float32, None, columns), spec(tf.float32, None)
        of_images = spec(tf.int32, batch_size), spec(tf.int64), spec(tf.int64, batch_size)

        @tf.function(input_signature=[x, x, *of_steps, *of_images], autograph=False)
        def take(x_t, memory, times, draws, coefficients, guidance, label, seed, index):
            def one(k, x_t, memory):
                needed = coefficients[k, 2] > 0  # σ
                z = tf.cond(needed, lambda: noise(seed, times[k], index, shape, draws[k]), lambda: tf.zeros_like(x_t))
                return k + 1, *step(x_t, memory, times[k], coefficients[k], guidance[k], label, z)

            return tf.while_loop(lambda k, *_: k < tf.shape(times)[0], one, (0, x_t, memory))[1:]

        self._take, self._draw = take, lambda seed, t, index: noise(seed, t, index, shape)
        self.at_once, self.compiled = 1, False

    def start(self, T: int, seed: int, index: Sequence[int]) -> tf.Tensor:
        """x_T, drawn as the noise of a step T + 1."""
        seed, index = _as_int64(seed, index)
        return self._draw(seed, tf.constant(T + 1), index)

    def __call__(
        self,
        x_t: tf.Tensor,
        memory: tf.Tensor,
        times: np.ndarray,
        draws: np.ndarray,
        coefficients: np.ndarray,
        guidance: np.ndarray,
        label: Sequence[int],
        seed: int,
        index: Sequence[int],
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Takes one step from each of the times, (S,) int, with draws, coefficients and guidance of a plan.

        Returns:
            The images after them, and their last estimate x̂_0, which is the `memory` of the next call.
        """
        start = time.perf_counter()
        label, coefficients = tf.cast(label, tf.int32), samplers.with_columns(coefficients, self._columns)
        x_t, memory = self._take(x_t, memory, times, draws, coefficients, guidance, label, *_as_int64(seed, index))
        quick = time.perf_counter() - start < self.QUICK * len(times)
        self.at_once, self.compiled = self.MOST_AT_ONCE if quick else 1, True
        return x_t, memory


def _as_int64(seed, index):
    return tf.constant(seed, tf.int64), tf.cast(index, tf.int64)


def ema_momentum(done: int | tf.Tensor, most: float) -> tf.Tensor:
    """The momentum of the EMA weights after `done` updates: min(most, (1 + done) / (10 + done)).

    While updates are few, EMA weights are a mean over the latest ninth of them or so, and forget how training began
    (the formula of `tf.train.ExponentialMovingAverage`).
    """
    done = tf.cast(done, tf.float32)
    return tf.minimum(most, (1 + done) / (10 + done))


def is_wide_kernel(shape: Sequence[int]) -> bool:
    """Whether a weight is the kernel of a convolution that Muon trains as a matrix; Keras leaves all of them to Adam.

    Its rows are the values that it sees, its columns the channels that it makes; in a transposed one vice versa.
    """
    return len(shape) == 4 and min(math.prod(shape[:-1]), shape[-1]) >= NARROWEST


@contextlib.contextmanager
def _fused(optimizer, ema_warmup):
    """While a step is traced: Keras' Adam or Muon and its EMA weights in few operations a weight instead of forty.

    The formulas are Keras' own, but for the momentum of the EMA weights, which rises if `ema_warmup`, and for kernels
    that Muon trains, see `is_wide_kernel`.
    """
    done, most = optimizer.iterations, optimizer.ema_momentum
    momentum = ema_momentum(done, most) if ema_warmup else most
    momentum = tf.where(tf.equal(done, 0), 0.0, momentum)  # EMA weights begin with the first weights

    steps = tf.cast(done + 1, tf.float32)

    def take_adam_step(gradient, variable, m, v, beta1, beta2, learning_rate):
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=m.handle,
            v=v.handle,
            beta1_power=tf.pow(beta1, steps),
            beta2_power=tf.pow(beta2, steps),
            lr=learning_rate,
            beta1=beta1,
            beta2=beta2,
            epsilon=optimizer.epsilon,
            grad=gradient,
        )

    def update_with_adam(gradient, variable, learning_rate):
        k, betas = optimizer._get_variable_index(variable), (optimizer.beta_1, optimizer.beta_2)
        m, v = optimizer._momentums[k].value, optimizer._velocities[k].value
        take_adam_step(gradient, variable, m, v, *betas, learning_rate)

    def update_with_muon(gradient, variable, learning_rate):
        k, betas = optimizer._get_variable_index(variable), (optimizer.adam_beta_1, optimizer.adam_beta_2)
        m, v = optimizer.momentums[k].value, optimizer.adam_velocities[k]
        if v is not None and not is_wide_kernel(variable.shape):
            take_adam_step(gradient, variable, m, v.value, *betas, learning_rate)
            return
        ahead = gradient + optimizer.momentum * m.assign(optimizer.momentum * m + gradient)
        matrix = tf.reshape(ahead, (-1, variable.shape[-1]))
        change = optimizer.lr_adjust(optimizer.zeropower_via_newtonschulz5(matrix, optimizer.ns_steps))
        variable.assign_sub(learning_rate * tf.reshape(change, variable.shape))

    def update_averages(variables):
        for variable, average in zip(variables, optimizer._model_variables_moving_average, strict=True):
            average.value.assign_sub((average.value - variable.value) * (1 - momentum))

    replaced = {"_update_model_variables_moving_average": update_averages}
    if isinstance(optimizer, keras.optimizers.Adam):
        replaced["update_step"] = update_with_adam
    if isinstance(optimizer, keras.optimizers.Muon):
        replaced["update_step"] = update_with_muon
    for name, function in replaced.items():
        setattr(optimizer, name, function)
    try:
        yield
    finally:
        for name in replaced:
            delattr(optimizer, name)


def squared_errors(output: tf.Tensor, target: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """Of every value of the images, (batch, height, width, channels), times the weight of its image.

    Args:
        output: of the network; where that learns the variance of a step too, see `ddpm.hybrid_error`.
        target: (batch, height, width, channels).
        weight: (batch, 1, 1, 1), or (batch, 1, 1, 4) with `ddpm.bound_weights`.
    """
    predicted, *learned = split_output(output, target.shape[-1])
    errors = tf.square(predicted - target)
    return hybrid_error(errors, *learned, *tf.split(weight, 4, axis=-1)) if learned else weight * errors


def cross_entropies(logits: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """-log p(class) of every image, (batch, 1, 1, 1), from logits (batch, classes) and classes (batch,) int."""
    errors = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(target, 0), logits)
    return errors[:, None, None, None]


def divide_training(model: keras.Model, parts: int, ema_warmup: bool = False) -> None:
    """Replaces the training step of a compiled model by one that computes a batch in parts, for its `train_on_batch`.

    Each part has its own gradient, so that none waits for the others before the weights change. One trace serves
    batches of all sizes: otherwise the order in which sizes come would decide which graph computes them, and a resumed
    run would differ in the last bits. The loss is the mean of the errors, squared ones of images or the cross
    entropy of classes, each multiplied by the `sample_weight` of its image, (batch, 1, 1, 1), if given; a network that
    learns the variance of a step needs one, see `squared_errors`.

    Args:
        model: compiled, with an optimizer that keeps EMA weights.
        parts: how many.
        ema_warmup: whether their momentum is that of `ema_momentum`, instead of the same in every step.
    """
    model.parts = parts
    of_images = len(model.output.shape) == 4
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # in float16 it is wrapped
    inputs = [tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype) for tensor in model.inputs]
    target = inputs[0] if of_images else tf.TensorSpec([None], tf.int32)
    signature = [*inputs, target, tf.TensorSpec([None, 1, 1, 4 if learns_variance(model) else 1])]

    def errors_of(output, target, weight):
        return squared_errors(output, target, weight) if of_images else weight * cross_entropies(output, target)

    @tf.function(reduce_retracing=True, autograph=False)  # traced once for all pieces
    def of_piece(*piece):
        *inputs, target, sample_weight, factor = piece
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(errors_of(model(inputs, training=True), target, sample_weight)) * factor
            scaled = model.optimizer.scale_loss(loss)  # in float16
        return loss, tape.gradient(scaled, model.trainable_weights)

    @functools.cache  # a smaller batch than that many parts stays whole
    def step_in(parts):
        @tf.function(input_signature=signature, jit_compile=model.jit_compile, autograph=False)
        def step(*batch):
            factor = 1 / tf.cast(tf.size(batch[-2]), tf.float32)
            pieces = zip(*(split(tensor, parts) for tensor in batch), strict=True)
            losses, gradients = zip(*(of_piece(*piece, factor) for piece in pieces), strict=True)
            total = [tf.add_n(of_pieces) for of_pieces in zip(*gradients, strict=True)]
            with _fused(optimizer, ema_warmup):
                model.optimizer.apply(total, model.trainable_weights)
            return {"loss": tf.add_n(losses)}

        return step

    def train_function(data):
        inputs, target, sample_weight = next(data)
        if sample_weight is None:
            sample_weight = tf.ones((len(target), 1, 1, 1))
        return step_in(parts if len(target) >= parts else 1)(*inputs, target, sample_weight)

    def make_train_function(force=False):
        model.train_function = train_function

    model.make_train_function = make_train_function
