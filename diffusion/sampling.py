"""From noise to images: where the noise comes from, and the one loop (slides "Reverse diffusion example, code")."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from ddpm import Schedule, n_steps
from diffusion import samplers


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a reverse process: `times` (S + 1,) int32 and `coefficients` (S, 4) float32."""

    times: np.ndarray
    coefficients: np.ndarray


def make_plan(
    sched: Schedule,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    variance: str = "beta",
) -> Plan:
    """The steps of a sampler.

    Args:
        sched: the noise schedule.
        sampler, eta, variance: see `samplers.coefficients`.
        steps: how many; None for all T.
        spacing: see `samplers.choose_times`; None for what suits the sampler, log-SNR for dpm++, else uniform.

    Raises:
        ValueError: for what these refuse, and a spacing without steps.
    """
    if spacing is not None and steps is None:
        raise ValueError(f"spacing {spacing} needs a number of steps")
    spacing = spacing or ("logsnr" if sampler == "dpm++" else "uniform")
    times = samplers.choose_times(sched, n_steps(sched) if steps is None else steps, spacing)
    return Plan(times, samplers.coefficients(sched, times, sampler, variance, eta))


def make_inversion(sched: Schedule, steps: int | None = None) -> Plan:
    """The steps from images to the noise that DDIM turns into them."""
    times = samplers.choose_times(sched, n_steps(sched) if steps is None else steps)[::-1]
    return Plan(times, samplers.inversion_coefficients(sched, times))


def sample(
    steps: Callable[..., tf.Tensor],
    plan: Plan,
    seed: int,
    index: Sequence[int],
    start: tf.Tensor | None = None,
    every: bool = False,
) -> Iterator[tuple[int, tf.Tensor]]:
    """The loop over the steps of a plan (DDPM algorithm 2): yields (t, x_t) from its first time to its last.

    Args:
        steps: a `support.execution.ReverseSteps`, which computes several steps at once where they are quick.
        plan: see `make_plan`.
        seed: an integer, see `standard_normal`.
        index: (batch,) int, the numbers of the images.
        start: (batch, height, width, channels) float32, where the process starts; None for noise, x_T.
        every: True to see x_t at every time, one step at a time.
    """
    times, coefficients = plan.times, plan.coefficients
    x_t = steps.start(times[0], seed, index) if start is None else start
    memory, k = tf.zeros_like(x_t), 0
    yield int(times[0]), x_t
    while k < len(coefficients):
        last = min(k + (1 if every else steps.at_once), len(coefficients))
        asked = np.maximum(times[k:last], 1)  # networks are not trained at t = 0, where an inversion starts
        (x_t, memory), k = steps(x_t, memory, asked, coefficients[k:last], seed, index), last
        yield int(times[k]), x_t
