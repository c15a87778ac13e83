"""How networks are executed when nothing is trained: batches in parts side by side, several reverse steps in one call.

There is one part for each core. The result does not depend on the number of parts, except for rounding.
"""

import math
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from diffusion import samplers
from diffusion.denoiser import Denoiser, autoguided, classifier_free, clipped, denoiser, with_classifier
from diffusion.measurement import Task
from diffusion.model_file import TrainedModel
from diffusion.sampling import standard_normal
from support import device

MEMORY = 2 * 2**30  # bytes that the feature maps of a batch may fill when nothing is trained
LARGEST_BATCH = 64


def split(tensor: tf.Tensor, parts: int) -> list[tf.Tensor]:
    """The tensor in `parts` pieces along its first axis, of sizes that differ by one at most."""
    size = tf.shape(tensor)[0]
    bounds = [size * k // parts for k in range(parts + 1)]
    return tf.split(tensor, [end - start for start, end in zip(bounds, bounds[1:], strict=False)], num=parts)


def even_batches(model: keras.Model, count: int, gradient: bool = False) -> tuple[int, int]:
    """Number and size of equal batches that fit in memory, for `count` images when nothing is trained.

    Args:
        gradient: whether gradients are taken through the network, for which all feature maps are kept.
    """
    sizes = [math.prod(tensor.shape[1:]) for layer in model.layers for tensor in keras.tree.flatten(layer.output)]
    floats = max(4 * max(sizes), 2 * sum(sizes) * gradient)  # else a few of the largest maps exist at once
    batches = math.ceil(count / max(1, min(LARGEST_BATCH, MEMORY // (4 * floats))))
    return batches, math.ceil(count / batches)


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
        def predict_part(*inputs):
            return model(list(inputs), training=False)

        predict_part.policy = policy
        model.for_inference = predict_part
    return model.for_inference


def predictor(model: Callable, parts: int) -> Callable[[list[tf.Tensor]], tf.Tensor]:
    """A network for inference, as a function of its list of inputs such as [x_t, t/T], with batches in parts."""
    predict_part = for_inference(model)

    def predict(inputs):
        batches = zip(*(split(tensor, parts) for tensor in inputs), strict=True)
        return tf.concat([predict_part(*batch) for batch in batches], axis=0)

    return predict


def denoiser_of(trained: TrainedModel, parts: int) -> Denoiser:
    """The denoiser of a model, with batches in parts; a network that takes labels and gets none gets "no class"."""
    predict, count = predictor(trained.network, parts), len(trained.network.inputs)

    def network(inputs):
        nothing = [tf.zeros_like(inputs[1], tf.int32)] * (count - 2)
        return predict([*inputs, *nothing][:count])

    return denoiser(network, trained.sched, trained.target)


class ReverseSteps:
    """The reverse steps of a model for batches of one size, executed as is fastest on this machine.

    Where steps are quick, one call of TensorFlow computes several, as its own loop saves a millisecond on each. One
    trace, which takes a second, serves all plans and seeds.

    Args:
        trained: the model.
        batch_size: how many images.
        clip: whether the estimate of x_0 is clipped.
        xla: whether XLA compiles a step; None for what is faster.
        classifier: a model that guides towards the class of the labels, see `diffusion.denoiser.with_classifier`;
            without it a model that takes labels guides itself.
        weaker: a weaker model, which guides instead, see `diffusion.denoiser.autoguided`.
        task: what is restored, see `diffusion.measurement`.

    Attributes:
        at_once: how many steps the next call should take.
        compiled: whether the first call, which takes seconds, is over.
    """

    MOST_AT_ONCE, QUICK = 10, 0.025  # steps, seconds for a step

    def __init__(
        self,
        trained: TrainedModel,
        batch_size: int,
        clip: bool = True,
        xla: bool | None = None,
        classifier: TrainedModel | None = None,
        weaker: TrainedModel | None = None,
        task: Task | None = None,
    ):
        shape, sched = trained.image_shape, trained.sched
        xla = device.prefers_xla(batch_size) if xla is None else xla
        parts = 1 if xla else device.parts_for(batch_size)
        model_denoiser = denoiser_of(trained, parts)
        classify = classifier and predictor(classifier.network, parts)
        weaker_denoiser = weaker and denoiser_of(weaker, parts)

        @tf.function(jit_compile=xla, autograph=False)
        def step(x_t, memory, t, coefficients, g, label, z, measurement):
            denoise = model_denoiser
            if weaker:
                denoise = autoguided(denoise, weaker_denoiser, g)
            elif classifier:
                denoise = with_classifier(denoise, classify, sched, g)
            elif trained.takes_labels:
                denoise = classifier_free(denoise, g)
            if task:
                denoise = task.measured(denoise, sched, *measurement)
            denoise = clipped(denoise, sched) if clip else denoise
            return samplers.step(denoise, x_t, tf.repeat(t, batch_size), coefficients, z, memory, label)

        def spec(dtype, *shape):
            return tf.TensorSpec(shape, dtype)

        x = spec(tf.float32, batch_size, *shape)
        step_specs = (
            spec(tf.int32, None),
            spec(tf.int32, None),
            spec(tf.float32, None, samplers.COLUMNS),
            spec(tf.float32, None),
        )
        image_specs = spec(tf.int32, batch_size), spec(tf.int64), spec(tf.int64, batch_size)
        task_specs = task.specs(batch_size, shape) if task else ()

        @tf.function(input_signature=[x, x, *step_specs, *image_specs, task_specs], autograph=False)
        def take(x_t, memory, times, draws, coefficients, guidance, label, seed, index, measurement):
            def one(k, x_t, memory):
                needed = coefficients[k, 2] > 0  # σ
                z = tf.cond(
                    needed, lambda: standard_normal(seed, times[k], index, shape, draws[k]), lambda: tf.zeros_like(x_t)
                )
                return k + 1, *step(x_t, memory, times[k], coefficients[k], guidance[k], label, z, measurement)

            return tf.while_loop(lambda k, *_: k < tf.shape(times)[0], one, (0, x_t, memory))[1:]

        self._take, self._shape = take, shape
        self.at_once, self.compiled = 1, False

    def start(self, T: int, seed: int, index: Sequence[int]) -> tf.Tensor:
        """x_T, drawn as the noise of a step T + 1."""
        seed, index = _as_int64(seed, index)
        return standard_normal(seed, tf.constant(T + 1), index, self._shape)

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
        measurement: tuple[tf.Tensor, ...] = (),
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Takes one step from each of the times, (S,) int, with draws, coefficients and guidance of a plan.

        Args:
            measurement: of a task, y, mask and noise, see `diffusion.measurement.Task.measured`.

        Returns:
            The images after them, and their last estimate x̂_0, which is the `memory` of the next call.
        """
        start = time.perf_counter()
        label = tf.cast(label, tf.int32)
        seed, index = _as_int64(seed, index)
        step = times, draws, coefficients, guidance
        x_t, memory = self._take(x_t, memory, *step, label, seed, index, measurement)
        quick = time.perf_counter() - start < self.QUICK * len(times)
        self.at_once, self.compiled = self.MOST_AT_ONCE if quick else 1, True
        return x_t, memory


def _as_int64(seed, index):
    return tf.constant(seed, tf.int64), tf.cast(index, tf.int64)
