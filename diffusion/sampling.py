"""From noise to images: where the noise comes from, and the one loop (slides "Reverse diffusion example, code")."""

import dataclasses
import numbers
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from ddpm import Schedule, n_steps
from diffusion import samplers

MOST_DRAWS, MOST_TIMES = 2**12, 2**20
TRUSTED = 0.056, 0.13  # √(1 - ᾱ_t), see `make_inversion`: noise of deviation 0.8 to 1 and the truest way back
SNR = 0.16  # of a corrector, where none is asked for
LANGEVIN_REPEATS = 5  # steps at each noise level of annealed Langevin sampling, as in the paper of NCSNv2


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
        """Which draw of the noise at its t each step takes, (S,) int32: 0 for the step that leaves t."""
        _, counts = np.unique(self.times[:-1], return_counts=True)
        return np.concatenate([np.arange(n, dtype=np.int32)[::-1] for n in counts[::-1]])


def make_plan(
    sched: Schedule,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    variance: str = "beta",
    corrector: int = 0,
    snr: float = SNR,
    guidance: float = 1.0,
    guidance_interval: tuple[int, int] | None = None,
) -> Plan:
    """The steps of a sampler.

    Args:
        sched: the noise schedule.
        sampler, eta, variance: see `samplers.coefficients`.
        steps: how many, not counting steps of the corrector; None for all T.
        spacing: see `samplers.choose_times`; None for what suits the sampler, log-SNR for dpm++ and langevin, else
            uniform.
        corrector: how many Langevin steps follow each step but the last; see `samplers.with_corrector`.
        snr: of the corrector, how large they are.
        guidance: see `diffusion.denoiser`; 1 follows the class as it is.
        guidance_interval: the first and the last t at which it is not 1 (Kynkäänniemi et al. 2024, arXiv 2404.07724);
            None for all.

    Raises:
        ValueError: for what these refuse, a spacing without steps, and a corrector, `snr` or guidance that cannot be.
    """
    if not (isinstance(guidance, numbers.Real) and abs(guidance) < float(np.finfo(np.float32).max)):
        raise ValueError(f"guidance must be a finite number, got {guidance}")
    first, last = (0, n_steps(sched)) if guidance_interval is None else _as_interval(guidance_interval, n_steps(sched))
    if guidance_interval is not None and guidance == 1:
        raise ValueError("guidance_interval has no effect with guidance 1; choose another guidance, or omit it")
    if not (isinstance(corrector, numbers.Integral) and 0 <= corrector < MOST_DRAWS):
        raise ValueError(f"corrector must be an integer from 0 to {MOST_DRAWS - 1}, got {corrector}")
    if not (isinstance(snr, numbers.Real) and 1e-6 <= snr <= 10):
        raise ValueError(f"snr must be a number from 1e-6 to 10, got {snr}")
    if snr != SNR and not corrector:
        raise ValueError("snr is the size of the corrector's steps, and there is no corrector; add one, or omit snr")
    if corrector and sampler == "langevin":
        raise ValueError("the sampler langevin takes no corrector, as it consists of such steps; choose another one")
    if (corrector or sampler == "langevin") and n_steps(sched) >= MOST_TIMES - 1:
        raise ValueError(f"Langevin steps need a T below {MOST_TIMES - 1}, got {n_steps(sched)}")
    if spacing is not None and steps is None:
        raise ValueError(f"spacing {spacing} needs a number of steps")
    spacing = spacing or ("logsnr" if sampler in ("dpm++", "langevin") else "uniform")
    repeats = LANGEVIN_REPEATS if sampler == "langevin" else 1
    times = samplers.choose_times(sched, n_steps(sched) if steps is None else steps, spacing, repeats)
    coefficients = samplers.coefficients(sched, times, sampler, variance, eta)
    if corrector:
        times, coefficients = samplers.with_corrector(sched, times, coefficients, corrector, snr)
    guided = (first <= times[:-1]) & (times[:-1] <= last)
    if guidance != 1 and not guided.any():
        raise ValueError(
            f"no step starts within guidance_interval ({first}, {last}); it is of t, 1 to {n_steps(sched)}"
        )
    return Plan(times, coefficients, np.where(guided, guidance, 1).astype(np.float32))


def _as_interval(interval, T):
    """The first and the last t of an interval, or a ValueError; one below t = 2 is meant as fractions elsewhere."""
    try:
        first, last = interval
        if 0 <= first <= last and (last > 1 or T == 1):
            return first, last
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"guidance_interval must be the first and the last t of 1 to {T}, such as ({T // 5}, {4 * T // 5}), and not "
        f"fractions of it, got {interval}"
    )


def make_inversion(sched: Schedule, steps: int | None = None, target: str = "eps") -> Plan:
    """The steps from images to the noise that DDIM turns into them.

    All but the first are corrected once: near T a way back from noise that is off by a thousandth of its deviation can
    end in another image.

    Args:
        sched: the noise schedule.
        steps: how many, not counting corrections; None for all T.
        target: what the network predicts. Where it is x_0, ε̂ = (x_t - √ᾱ_t x̂_0) / √(1 - ᾱ_t) multiplies the error of an
            image that is nearly clean, so the network is first asked, and x_t begins, at `TRUSTED` levels of noise;
            steps before that are left out.
    """
    times = samplers.choose_times(sched, n_steps(sched) if steps is None else steps)[::-1]
    asked, begins = (1 + np.argmax(np.append(sched["sqrtmab"][1:-1], 1) >= level) for level in TRUSTED)
    lowest, begins = (asked, begins) if target == "x0" else (1, 1)
    times = np.append(times[:1], times[times >= begins])
    times = np.append(times[:2], np.repeat(times[2:], 2))
    return Plan(times, samplers.inversion_coefficients(sched, times, lowest), lowest=lowest)


def sample(
    steps: Callable[..., tf.Tensor],
    plan: Plan,
    seed: int,
    index: Sequence[int],
    start: tf.Tensor | None = None,
    every: bool = False,
    label: Sequence[int] | None = None,
) -> Iterator[tuple[int, tf.Tensor]]:
    """The loop over the steps of a plan (DDPM algorithm 2): yields (t, x_t) from its first time to its last.

    Args:
        steps: a `diffusion.reverse.ReverseSteps`, which computes several steps at once where they are quick.
        plan: see `make_plan`.
        seed: an integer, see `standard_normal`.
        index: (batch,) int, the numbers of the images.
        start: (batch, height, width, channels) float32, where the process starts; None for noise, x_T.
        every: True to see x_t at every time, one step at a time.
        label: (batch,) int, 0 for "no class", k + 1 for class k; None for no class at all.
    """
    times, draws = plan.times, plan.draws
    asked = np.maximum(times[:-1], plan.lowest)
    guidance = np.broadcast_to(np.float32(plan.guidance), len(asked))
    label = np.zeros(len(index), np.int32) if label is None else label
    x_t = steps.start(times[0], seed, index) if start is None else start
    memory, k = tf.zeros_like(x_t), 0
    yield int(times[0]), x_t
    while k < len(asked):
        now = slice(k, min(k + (1 if every else steps.at_once), len(asked)))
        part = asked[now], draws[now], plan.coefficients[now], guidance[now]
        (x_t, memory), k = steps(x_t, memory, *part, label, seed, index), now.stop
        yield int(times[k]), x_t
