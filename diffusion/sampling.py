"""From noise to images: where the noise comes from, and the one loop (slides "Reverse diffusion example, code")."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from ddpm import Schedule, n_steps
from diffusion import samplers
from diffusion.options import Sampling
from diffusion.targets import find_target

MOST_TIMES, MOST_DRAWS = 2**20, 2**12  # that the key of a draw has room for


def standard_normal(
    seed: int, t: int, index: Sequence[int], image_shape: tuple[int, int, int], draw: int = 0
) -> tf.Tensor:
    """Standard normal noise determined only by (seed, t, draw, image index), independent of batching.

    Args:
        seed, t: integers; t below 2³², or below 2²⁰ if there are further draws.
        index: (batch,) int, the numbers of the images, below 2³¹; batch must be known. Image k gets the same noise in
            every batch.
        image_shape: (height, width, channels).
        draw: 0 for the noise of a sampler's step from t, 1, 2, … below 2¹² for further steps at the same t.

    Returns:
        (batch, height, width, channels) float32.
    """
    seed, t, index, draw = (tf.cast(number, tf.int64) for number in (seed, t, index, draw))
    keys = tf.stack([tf.broadcast_to(seed, tf.shape(index)), index * 2**32 + draw * MOST_TIMES + t], axis=1)
    return tf.stack([tf.random.stateless_normal(image_shape, key) for key in tf.unstack(keys)])


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a reverse process: `times` (S + 1,) int32 and `coefficients` (S, 5) or (S, 6) float32.

    Where a time is repeated, a step stays at it. `guidance` is one number for all steps, or one for each, (S,). The
    network is asked at each time, but at none below `lowest`: it is not trained at t = 0, where an inversion starts.
    """

    times: np.ndarray
    coefficients: np.ndarray
    guidance: float | np.ndarray = 1.0
    lowest: int = 1

    @property
    def draws(self) -> np.ndarray:
        """Which draw of the noise at its t each step takes, (S,) int32: as many as later steps start at this t."""
        left, draws = collections.Counter(), []
        for t in reversed(self.times[:-1].tolist()):
            draws.append(left[t])
            left[t] += 1
        return np.array(draws[::-1], np.int32)


def make_plan(sched: Schedule, sampling: Sampling | None = None, begin: int | None = None) -> Plan:
    """The steps of a sampler.

    Args:
        sched: the noise schedule.
        sampling: how to sample; what it leaves open is as without a recommendation, see `Sampling.resolve`. Steps of a
            corrector are not counted among its steps. Its guidance holds where t lies in `guidance_interval`, and is 1
            elsewhere (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        begin: the t at which an image with noise is taken up, with the steps below it; None for T.

    Raises:
        ValueError: for more steps than T, an interval that is invalid or holds no step, and a T that is too large for
            Langevin steps.
    """
    sampling, T = (sampling or Sampling()).resolve(), n_steps(sched)
    sampler = samplers.SAMPLERS[sampling.sampler]
    if (sampling.corrector or sampler.repeats > 1) and T >= MOST_TIMES - 1:
        raise ValueError(f"Langevin steps need a T below {MOST_TIMES - 1}, got {T}")
    times = samplers.choose_times(sched, sampling.steps or T, sampling.spacing or sampler.spacing, sampler.repeats)
    if begin is not None:
        times = np.append(np.int32(begin), times[times < begin])
    coefficients = samplers.coefficients(sched, times, sampling.sampler, sampling.variance or "beta", sampling.eta)
    if sampling.corrector:
        times, coefficients = samplers.with_corrector(sched, times, coefficients, sampling.corrector, sampling.snr)
    return Plan(times, coefficients, _guidance_at(times[:-1], sampling.guidance, sampling.guidance_interval, T))


def revisit(plan: Plan, sched: Schedule, length: int, count: int) -> Plan:
    """A plan that goes back and forth: after `length` steps, `count` times the noise of these steps and they again.

    RePaint (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1), where `length` is the jump length, and `count` one
    less than its number of resamplings. A step to x_s and noise from there to x_t are one step with more noise, which
    asks the network once. Nothing goes back to T, where nothing of the image is left, nor from x_0.

    Raises:
        ValueError: for more draws of noise at a t than there are keys, see `standard_normal`.
    """
    last, visits = len(plan.coefficients), []  # numbers of a step and of the time where it lands
    for first in range(0, last, length):
        after = min(first + length, last)
        for k in range(count + 1 if first and after < last else 1):
            visits += [(step, step + 1) for step in range(first, after)]
            if k:
                visits[-length - 1] = after - 1, first
    order, lands = np.array(visits).T
    rows = plan.coefficients[order].astype(np.float64)
    kept = sched.alphabar[plan.times[lands]] / sched.alphabar[plan.times[order + 1]]  # of ᾱ, 1 without a jump
    jumps = lands <= order
    rows[:, [0, 1, 3]] *= np.sqrt(kept)[:, None]
    rows[:, 2] = np.sqrt(kept * rows[:, 2] ** 2 + 1 - kept)
    rows[jumps, 5] = 0  # added noise is not learned
    rows[1:, 3][jumps[:-1]] = 0  # there the step before was not at the time before
    times = np.append(plan.times[order], plan.times[-1])
    revisited = Plan(times, rows.astype(np.float32), plan.guidance[order], plan.lowest)
    if n_steps(sched) >= MOST_TIMES - 1 or revisited.draws.max() >= MOST_DRAWS:
        raise ValueError(f"going back and forth needs a T below {MOST_TIMES - 1} and fewer than {MOST_DRAWS} visits")
    return revisited


def _guidance_at(t, guidance, interval, T):
    """The guidance of each step, float32: as it is for t within the interval, None for all t, and else 1."""
    first, last = (0, T) if interval is None else _as_interval(interval, T)
    guided = (first <= t) & (t <= last)
    if not guided.any():
        raise ValueError(
            f"no step starts at a t within guidance_interval ({first}, {last}); choose a wider one within 1 to {T}"
        )
    return np.where(guided, guidance, 1).astype(np.float32)


def _as_interval(interval, T):
    """The first and the last t of an interval, or a ValueError; one below t = 2 is meant as fractions elsewhere."""
    try:
        first, last = interval
        if 0 <= first <= last and (last > 1 or T == 1):
            return first, last
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"guidance_interval must be two times t from 1 to {T}, first and last, such as ({T // 5}, {4 * T // 5}), not "
        f"fractions of T, got {interval}"
    )


def make_inversion(sched: Schedule, steps: int | None = None, target: str = "eps") -> Plan:
    """The steps from images to the noise that DDIM turns into them.

    All but the first are corrected once: near T a way back from noise that is off by a thousandth of its deviation can
    end in another image.

    Args:
        sched: the noise schedule.
        steps: how many, not counting corrections; None for all T.
        target: what the network predicts. Where its ε̂ of an image that is nearly clean cannot be trusted, the network
            is first asked, and x_t begins, at some noise, see `targets.Target`; steps before that are left out.
    """
    times = samplers.choose_times(sched, n_steps(sched) if steps is None else steps)[::-1]
    levels = np.append(sched["sqrtmab"][1:-1], 1)
    lowest, begins = (1 + int(np.argmax(levels >= level)) for level in find_target(target).inverted_from)
    times = np.append(times[:1], times[times >= begins])
    times = np.append(times[:2], np.repeat(times[2:], 2))
    return Plan(times, samplers.inversion_coefficients(sched, times, lowest), lowest=lowest)


def sample(
    reverse: Callable[..., tuple[tf.Tensor, tf.Tensor]],
    plan: Plan,
    seed: int,
    index: Sequence[int],
    start: tf.Tensor | None = None,
    every: bool = False,
    label: Sequence[int] | None = None,
    measurement: tuple[tf.Tensor, ...] = (),
) -> Iterator[tuple[int, tf.Tensor]]:
    """The loop over the steps of a plan (DDPM algorithm 2): yields (t, x_t) from its first time to its last.

    Args:
        reverse: a `diffusion.reverse.ReverseSteps`, which computes several steps at once where they are quick.
        plan: see `make_plan`.
        seed: an integer, see `standard_normal`.
        index: (batch,) int, the numbers of the images.
        start: (batch, height, width, channels) float32, where the process starts; None for noise, x_T.
        every: True to see x_t at every time, one step at a time.
        label: (batch,) int, 0 for "no class", k + 1 for class k; None for no class at all.
        measurement: what images are restored from, see `diffusion.measurement.Task.measured`.
    """
    times, draws = plan.times, plan.draws
    asked = np.maximum(times[:-1], plan.lowest)
    guidance = np.broadcast_to(np.float32(plan.guidance), len(asked))
    label = np.zeros(len(index), np.int32) if label is None else label
    x_t = reverse.start(times[0], seed, index) if start is None else start
    memory, k = tf.zeros_like(x_t), 0
    yield int(times[0]), x_t
    while k < len(asked):
        now = slice(k, min(k + (1 if every else reverse.at_once), len(asked)))
        part = asked[now], draws[now], plan.coefficients[now], guidance[now]
        (x_t, memory), k = reverse(x_t, memory, *part, label, seed, index, measurement), now.stop
        yield int(times[k]), x_t
