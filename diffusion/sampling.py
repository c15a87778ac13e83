"""From noise to images: where the noise comes from, and the one loop (slides "Reverse diffusion example, code")."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from ddpm import Schedule, n_steps
from diffusion.samplers import ancestral_coefficients


def standard_normal(seed: int, t: int, index: Sequence[int], image_shape: tuple[int, int, int]) -> tf.Tensor:
    """Standard normal noise determined only by (seed, t, image index), independent of batching.

    Args:
        seed, t: integers; t below 2³².
        index: (batch,) int, the numbers of the images, below 2³¹; batch must be known. Image k gets the same noise in
            every batch.
        image_shape: (height, width, channels).

    Returns:
        (batch, height, width, channels) float32.
    """
    seed, t, index = tf.cast(seed, tf.int64), tf.cast(t, tf.int64), tf.cast(index, tf.int64)
    keys = tf.stack([tf.broadcast_to(seed, tf.shape(index)), index * 2**32 + t], axis=1)
    return tf.stack([tf.random.stateless_normal(image_shape, key) for key in tf.unstack(keys)])


def sample(
    steps: Callable[..., tf.Tensor],
    sched: Schedule,
    seed: int,
    index: Sequence[int],
    variance: str = "beta",
    every: bool = False,
) -> Iterator[tuple[int, tf.Tensor]]:
    """The reverse process (DDPM algorithm 2): yields (t, x_t) from t = T down to t = 0.

    Args:
        steps: a `support.execution.ReverseSteps`, which computes several steps at once where they are quick.
        sched: the noise schedule.
        seed: an integer, see `standard_normal`.
        index: (batch,) int, the numbers of the images.
        variance: see `ancestral_coefficients`.
        every: True to see x_t at every t, one step at a time.
    """
    times = np.arange(n_steps(sched), -1, -1, dtype=np.int32)
    coefficients = ancestral_coefficients(sched, times, variance)
    x_t, k = steps.start(n_steps(sched), seed, index), 0
    yield int(times[0]), x_t
    while k < len(coefficients):
        last = min(k + (1 if every else steps.at_once), len(coefficients))
        x_t, k = steps(x_t, times[k:last], coefficients[k:last], seed, index), last
        yield int(times[k]), x_t
