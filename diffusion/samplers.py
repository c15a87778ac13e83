"""One step from x_t to x_s for each sampler, as one formula:

    x_s = a x̂_0 + b ε̂ + σ e^{ρu} z + c (x̂_0 - x̂_0 of the step before)      z from N(0, 1), x̂_0, ε̂, u from a denoiser

and for a Langevin step of a corrector, whose size κ depends on the image: x_s = a x̂_0 + b (1 - κ) ε̂ + σ √(2κ) z with
κ = r ‖z‖² / ‖ε̂‖². u and ρ are used only with a learned variance.

The coefficients a, b, σ, c, r and ρ are computed here in float64 and passed to the step, so that a compiled step
serves all samplers, numbers of steps, spacings, η and correctors.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diffusion.schedules import log_snr

if TYPE_CHECKING:  # a parser of options knows samplers without TensorFlow
    import tensorflow as tf

    from ddpm import Schedule
    from diffusion.denoiser import Denoiser

    Array = np.ndarray | float


def even_in_t(left: np.ndarray, T: int, alphabar: np.ndarray) -> np.ndarray:
    """Equal steps in t."""
    return left * T


def even_in_root(left: np.ndarray, T: int, alphabar: np.ndarray) -> np.ndarray:
    """Equal steps in √t."""
    return left**2 * T


def even_in_log_snr(left: np.ndarray, T: int, alphabar: np.ndarray) -> np.ndarray:
    """Equal steps in log(ᾱ / (1 - ᾱ)) from T to 1, and a step from there."""
    last = T if alphabar[-1] > 0 else T - 1  # where log-SNR is finite
    log_snrs = log_snr(alphabar[1 : last + 1])
    wanted = np.linspace(log_snrs[-1], log_snrs[0], len(left) - 1)
    return np.append(np.interp(-wanted, -log_snrs, np.arange(1, last + 1)), 0)


# Functions of the fraction of the steps that is left at each time, 1 … 0, of T and of ᾱ, that return t.
SPACINGS = {"uniform": even_in_t, "quadratic": even_in_root, "logsnr": even_in_log_snr}
VARIANCES = ("beta", "posterior", "learned")  # of the noise in a step of ddpm


def choose_times(sched: Schedule, steps: int, spacing: str = "uniform", repeats: int = 1) -> np.ndarray:
    """The times of `steps` steps: T at first, 0 at last, strictly falling unless they are repeated.

    Args:
        sched: the noise schedule.
        steps: how many, 1 … T. With T of them every spacing is every t.
        spacing: a name in `SPACINGS`.
        repeats: how many steps there are from each t below T; fewer from the last one where they do not divide evenly.

    Returns:
        (steps + 1,) int32.

    Raises:
        ValueError: for another number of steps.
    """
    from ddpm import n_steps

    T = n_steps(sched)
    if not (isinstance(steps, numbers.Integral) and 1 <= steps <= T):
        raise ValueError(f"steps must be an integer from 1 to {T}, the T that this model was trained with, got {steps}")
    count = 1 - (1 - steps) // repeats
    left = 1 - np.arange(count + 1) / count
    times = np.rint(SPACINGS["uniform" if count == T else spacing](left, T, sched.alphabar)).astype(np.int32)
    times[0], times[-1] = T, 0
    for k in range(count - 1, 0, -1):  # where rounding repeats a t, it moves to the next free one
        times[k] = max(times[k], times[k + 1] + 1)
    times = np.minimum(times, T - np.arange(count + 1, dtype=np.int32))
    return np.concatenate([times[:1], np.repeat(times[1:-1], repeats)[: steps - 1], times[-1:]])


COLUMNS = 6  # a, b, σ, c, r, ρ


def _rows(a, b, sigma, c=0.0, r=0.0, rho=0.0):
    """Coefficients of steps, (S, 6) float32, from arrays or numbers."""
    return np.stack(np.broadcast_arrays(a, b, sigma, c, r, rho), axis=1).astype(np.float32)


def step_variances(sched: Schedule, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 - ᾱ_t / ᾱ_s, the slides' β_t, and the variance of q(x_s | x_t, x_0), β̃_t, of every step, (S,) float64 each."""
    ab_t, ab_s = sched.alphabar[times[:-1]], sched.alphabar[times[1:]]
    beta = 1 - ab_t / ab_s
    return beta, beta * (1 - ab_s) / (1 - ab_t)


def step_rows(
    sched: Schedule, times: np.ndarray, taken: Array, variance: Array, c: Array = 0.0, rho: Array = 0.0
) -> np.ndarray:
    """The common step: x_s = √ᾱ_s x̂_0 + √(1 - ᾱ_s - taken) ε̂ + noise of a variance, but none in the step to 0."""
    ab_s = sched.alphabar[times[1:]]
    sigma = np.where(times[1:] == 0, 0, np.sqrt(variance))
    return _rows(np.sqrt(ab_s), np.sqrt(np.maximum(1 - ab_s - taken, 0)), sigma, c=c, rho=rho)


def ddpm(sched: Schedule, times: np.ndarray, variance: str, eta: float) -> np.ndarray:
    """Algorithm 2 of DDPM, for strides from q(x_s | x_t, x_0)."""
    beta, posterior = step_variances(sched, times)
    if variance != "learned":
        return step_rows(sched, times, posterior, beta if variance == "beta" else posterior)
    rho = 0.5 * np.log(beta / np.where(times[1:] == 0, beta, posterior))
    return step_rows(sched, times, posterior, posterior, rho=rho)


def ddim(sched: Schedule, times: np.ndarray, variance: str, eta: float) -> np.ndarray:
    """DDIM (Song, Meng & Ermon 2021, arXiv 2010.02502, equation 12)."""
    _, posterior = step_variances(sched, times)
    return step_rows(sched, times, eta**2 * posterior, eta**2 * posterior)


def dpm_solver(sched: Schedule, times: np.ndarray, variance: str, eta: float) -> np.ndarray:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Of first order, which is DDIM, in the first step and in the one to 0, where log-SNR is infinite.
    """
    ab_t, ab_s = sched.alphabar[times[:-1]], sched.alphabar[times[1:]]
    return step_rows(sched, times, 0.0, 0.0, c=_second_order(ab_t, ab_s))


def _second_order(ab_t, ab_s):
    """√ᾱ_s (1 - e^{-h}) / 2r of DPM-Solver++(2M): h is a step in λ = log √(ᾱ / (1 - ᾱ)), r h the one before."""
    h = 0.5 * (log_snr(ab_s) - log_snr(ab_t))
    previous = np.concatenate([[np.inf], h[:-1]])
    finite = np.isfinite(h) & np.isfinite(previous)
    h, previous = np.where(finite, h, 0), np.where(finite, previous, 1)
    return np.sqrt(ab_s) * -np.expm1(-h) * h / (2 * previous)


def langevin(sched: Schedule, times: np.ndarray, variance: str, eta: float) -> np.ndarray:
    """Annealed Langevin sampling (Song & Ermon 2020, arXiv 2006.09011, algorithm 1).

    x_t / √ᾱ_t is an image with noise of deviation σ_t = √((1 - ᾱ_t) / ᾱ_t) on it. Each step moves it by κσ_t² along the
    score, -ε̂ / σ_t, with noise of variance 2κσ_t². The first step, from pure noise to the first noise level, and the
    last one, to x̂_0, are DDIM steps without noise.

    Args:
        times: (S + 1,) int, falling from T to 0, several steps from each t between them, see `choose_times`.
    """
    ab_s = sched.alphabar[times[1:]]
    a, b, sigma = np.sqrt(ab_s), np.sqrt(1 - ab_s), np.zeros(len(ab_s))
    between, ab_t, kappa = slice(1, -1), sched.alphabar[times[1:-2]], langevin_step_sizes(sched, times[1:-2])
    scale = a[between] * np.sqrt((1 - ab_t) / ab_t)
    b[between], sigma[between] = scale * (1 - kappa), scale * np.sqrt(2 * kappa)
    return _rows(a, b, sigma)


def langevin_step_sizes(sched: Schedule, t: np.ndarray) -> np.ndarray:
    """κ of each step from a time in `t`, (S,) int, falling, with repeats; float64.

    The n steps at a noise level begin with the variance of the level before, γ² times as large; the first level takes
    γ from the second. κ is chosen on a grid so that they end as near as possible to the variance of this level
    (NCSNv2, arXiv 2006.09011, technique 4: its equation is to equal 1).
    """
    levels, place, n = np.unique(-t, return_inverse=True, return_counts=True)
    ab = sched.alphabar[-levels]
    variances = (1 - ab) / ab
    gamma2 = np.ones(len(levels))
    gamma2[1:] = variances[:-1] / variances[1:]
    gamma2[:1] = gamma2[1:2] if len(levels) > 1 else 1
    kappa = np.linspace(0, 1, 1001) ** 2
    left, stationary = (1 - kappa) ** (2 * n[:, None]), 2 / (2 - kappa)
    end = left * (gamma2[:, None] - stationary) + stationary
    return kappa[np.argmin(end, axis=1)][place]


@dataclass(frozen=True)
class Sampler:
    """How a sampler steps.

    Attributes:
        coefficients: a function of schedule, times, variance and eta that returns a, b, σ, c, r and ρ of every step.
        takes: which of the options eta, variance and corrector apply to it.
        spacing: of its steps, where none is asked for.
        repeats: how many steps it takes at each noise level.
    """

    coefficients: Callable[[Schedule, np.ndarray, str, float], np.ndarray]
    takes: tuple[str, ...] = ("corrector",)
    spacing: str = "uniform"
    repeats: int = 1


SAMPLERS = {
    "ddpm": Sampler(ddpm, takes=("variance", "corrector")),
    "ddim": Sampler(ddim, takes=("eta", "corrector")),
    "dpm++": Sampler(dpm_solver, spacing="logsnr"),
    "langevin": Sampler(langevin, takes=(), spacing="logsnr", repeats=5),  # repeats as in the paper of NCSNv2
}


def coefficients(
    sched: Schedule, times: np.ndarray, sampler: str = "ddpm", variance: str = "beta", eta: float = 0.0
) -> np.ndarray:
    """a, b, σ, c, r and ρ of every step, (S, 6) float32.

    Args:
        sched: the noise schedule.
        times: (S + 1,) int, falling from T to 0.
        sampler: a name in `SAMPLERS`.
        variance: of ddpm, `'beta'` for 1 - ᾱ_t / ᾱ_s, the slides' β_t, `'posterior'` for the variance of
            q(x_s | x_t, x_0), β̃_t, or `'learned'` for β_t^u β̃_t^(1 - u) of a network that has learned u (improved DDPM,
            arXiv 2102.09672, equation 15). It is 0 in the step that ends in x_0.
        eta: of ddim, 0 for no noise, 1 for the variance of q(x_s | x_t, x_0).
    """
    return SAMPLERS[sampler].coefficients(sched, np.asarray(times), variance, eta)


def inversion_coefficients(sched: Schedule, times: np.ndarray, lowest: int = 1) -> np.ndarray:
    """Coefficients of DDIM without noise in the other direction, (S, 6) float32, for `times` rising from 0 to T.

    The network is not trained at t = 0. The first step asks it at t = `lowest`, for whose estimates a and b are
    adapted, so that x_s = √ᾱ_s x_0 + √(1 - ᾱ_s) ε̂ with x_0 as it is.

    The way back asks the network in x_s and not in x_t. So a step that stays at its time s puts the estimate from
    there into the step that led to it, x_s = √((1 - ᾱ_s) / (1 - ᾱ_t)) x_t + c x̂_0, solved for x_t.
    """
    ab_s, stays = sched.alphabar[times[1:]], np.flatnonzero(np.diff(times) == 0)
    a, b, c = np.sqrt(ab_s), np.sqrt(1 - ab_s), np.zeros(len(ab_s))
    ab_t = sched.alphabar[times[stays - 1]]
    c[stays] = a[stays] - b[stays] * np.sqrt(ab_t / (1 - ab_t))
    ab_asked = sched.alphabar[lowest]
    a[0], b[0] = a[0] * np.sqrt(ab_asked), b[0] + a[0] * np.sqrt(1 - ab_asked)
    return _rows(a, b, 0.0, c)


def with_corrector(
    sched: Schedule, times: np.ndarray, coefficients: np.ndarray, count: int, snr: float
) -> tuple[np.ndarray, np.ndarray]:
    """Times and coefficients with `count` Langevin steps after every step but the last.

    Song et al. 2021, arXiv 2011.13456, algorithm 5: x + ε g + √(2ε) z, g the score, ε = 2 α_t (snr ‖z‖ / ‖g‖)².
    """
    t = times[1:-1]
    ab, alpha = sched.alphabar[t], sched.alphabar[t] / sched.alphabar[t - 1]
    steps = _rows(np.sqrt(ab), np.sqrt(1 - ab), np.sqrt(1 - ab), r=2 * alpha * snr**2)
    both = np.concatenate([coefficients[:-1, None], np.repeat(steps[:, None], count, axis=1)], axis=1)
    both = np.concatenate([both.reshape(-1, COLUMNS), coefficients[-1:]])
    return np.concatenate([times[:1], np.repeat(t, count + 1), times[-1:]]), both


def step(
    denoise: Denoiser,
    x_t: tf.Tensor,
    t: tf.Tensor,
    coefficients: tf.Tensor,
    z: tf.Tensor,
    before: tf.Tensor,
    label: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """x_s and the estimate x̂_0 for the step after it, (batch, height, width, channels) float32.

    Args:
        denoise: see `diffusion/denoiser.py`.
        x_t, z, before: (batch, height, width, channels) float32; x̂_0 of the step before.
        t, label: (batch,) int.
        coefficients: (6,) float32, a, b, σ, c, r and ρ.
    """

    import tensorflow as tf

    def norm2(x):  # of each image, so that none depends on the others of its batch
        return tf.reduce_sum(tf.square(x), axis=(1, 2, 3), keepdims=True)

    x_0, eps, u = denoise(x_t, t, label)
    a, b, sigma, c, r, rho = tf.unstack(coefficients)
    corrects = r > 0
    kappa = tf.math.divide_no_nan(r * norm2(z), norm2(eps))
    sigma = sigma if u is None else sigma * tf.exp(rho * u)
    x_s = a * x_0 + b * (1 - kappa) * eps + sigma * tf.where(corrects, tf.sqrt(2 * kappa), 1) * z
    return x_s + c * (x_0 - before), tf.where(corrects, before, x_0)
