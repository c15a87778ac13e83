"""One step from x_t to x_s for each sampler, as one formula:

    x_s = a x̂_0 + b ε̂ + σ e^{ρu} z + c (x̂_0 - x̂_0 of the step before)      z from N(0, 1), x̂_0, ε̂, u from a denoiser

and for a Langevin step of a corrector, whose size κ depends on the image: x_s = a x̂_0 + b (1 - κ) ε̂ + σ √(2κ) z with
κ = r ‖z‖² / ‖ε̂‖². u and ρ are used only with a learned variance.

The coefficients a, b, σ, c, r and ρ are computed here in float64 and passed to the step, so that a compiled step
serves all samplers, numbers of steps, spacings, η and correctors.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING

import numpy as np

from diffusion.schedules import log_snr
from support.checks import check_choice

if TYPE_CHECKING:  # a parser of options knows samplers without TensorFlow
    import tensorflow as tf

    from ddpm import Schedule
    from diffusion.denoiser import Denoiser

SAMPLERS = ("ddpm", "ddim", "dpm++", "langevin")
SPACINGS = ("uniform", "quadratic", "logsnr")
VARIANCES = ("beta", "posterior", "learned")  # of the noise in a step of ddpm


def choose_times(sched: Schedule, steps: int, spacing: str = "uniform", repeats: int = 1) -> np.ndarray:
    """The times of `steps` steps: T at first, 0 at last, strictly falling unless they are repeated.

    Args:
        sched: the noise schedule.
        steps: how many, 1 … T. With T of them every spacing is every t.
        spacing: equal steps in t, `'uniform'`; in √t, `'quadratic'`; or in log(ᾱ / (1 - ᾱ)), `'logsnr'`, which ends
            with a step from t = 1.
        repeats: how many steps there are from each t below T; fewer from the last one where they do not divide evenly.

    Returns:
        (steps + 1,) int32.

    Raises:
        ValueError: for another number of steps or spacing.
    """
    T = len(sched.alphabar) - 1
    if not (isinstance(steps, numbers.Integral) and 1 <= steps <= T):
        raise ValueError(f"steps must be 1 … {T}, the number of steps that this model was trained with, got {steps}")
    check_choice("spacing", spacing, SPACINGS)
    count = 1 - (1 - steps) // repeats
    left = 1 - np.arange(count + 1) / count
    if spacing == "uniform" or count == T:
        times = T * left
    elif spacing == "quadratic":
        times = T * left**2
    else:
        last = T if sched.alphabar[-1] > 0 else T - 1  # where log-SNR is finite
        log_snrs = log_snr(sched.alphabar[1 : last + 1])
        wanted = np.linspace(log_snrs[-1], log_snrs[0], count)
        times = np.append(np.interp(-wanted, -log_snrs, np.arange(1, last + 1)), 0)
    times = np.rint(times).astype(np.int32)
    times[0], times[-1] = T, 0
    for k in range(count - 1, 0, -1):  # where rounding repeats a t, it moves to the next free one
        times[k] = max(times[k], times[k + 1] + 1)
    times = np.minimum(times, T - np.arange(count + 1, dtype=np.int32))
    return np.concatenate([times[:1], np.repeat(times[1:-1], repeats)[: steps - 1], times[-1:]])


def coefficients(
    sched: Schedule, times: np.ndarray, sampler: str = "ddpm", variance: str = "beta", eta: float = 0.0
) -> np.ndarray:
    """a, b, σ, c, r and ρ of every step, (S, 6) float32.

    Args:
        sched: the noise schedule.
        times: (S + 1,) int, falling from T to 0.
        sampler: `'ddpm'`, algorithm 2 of DDPM, for strides from q(x_s | x_t, x_0); `'ddim'` (Song, Meng & Ermon 2021,
            arXiv 2010.02502, equation 12); `'dpm++'`, DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2),
            of first order in the first step and in the one to 0, where log-SNR is infinite; `'langevin'`, see
            `langevin_coefficients`.
        variance: of ddpm, `'beta'` for 1 - ᾱ_t / ᾱ_s, the slides' β_t, `'posterior'` for the variance of
            q(x_s | x_t, x_0), β̃_t, or `'learned'` for β_t^u β̃_t^(1 - u) of a network that has learned u (improved DDPM,
            arXiv 2102.09672, equation 15). It is 0 in the step that ends in x_0.
        eta: of ddim, 0 for no noise, 1 for the variance of q(x_s | x_t, x_0).

    Raises:
        ValueError: for another `sampler` or `variance`, an `eta` outside [0, 1], or one of a sampler that has none.
    """
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("variance", variance, VARIANCES)
    if not (isinstance(eta, numbers.Real) and 0 <= eta <= 1):
        raise ValueError(f"eta must lie between 0 and 1, got {eta}")
    if eta and sampler != "ddim":
        raise ValueError(f"eta is of the sampler ddim, and {sampler} has none; leave it out, or choose ddim")
    if sampler == "langevin":
        return langevin_coefficients(sched, times)
    ab_t, ab_s = sched.alphabar[times[:-1]], sched.alphabar[times[1:]]
    beta = 1 - ab_t / ab_s
    posterior = beta * (1 - ab_s) / (1 - ab_t)
    direction = {"ddpm": posterior, "ddim": eta**2 * posterior, "dpm++": 0 * posterior}[sampler]
    noise = beta if sampler == "ddpm" and variance == "beta" else direction
    a, b = np.sqrt(ab_s), np.sqrt(np.maximum(1 - ab_s - direction, 0))
    ends = np.asarray(times[1:]) == 0
    sigma = np.where(ends, 0, np.sqrt(noise))
    if sampler == "ddpm" and variance == "learned":
        return _rows(a, b, sigma, rho=0.5 * np.log(beta / np.where(ends, beta, posterior)))
    return _rows(a, b, sigma, c=_second_order(ab_t, ab_s) if sampler == "dpm++" else 0)


COLUMNS = 6  # a, b, σ, c, r, ρ


def _rows(a, b, sigma, c=0.0, r=0.0, rho=0.0):
    """Coefficients of steps, (S, 6) float32, from arrays or numbers."""
    return np.stack(np.broadcast_arrays(a, b, sigma, c, r, rho), axis=1).astype(np.float32)


def _second_order(ab_t, ab_s):
    """√ᾱ_s (1 - e^{-h}) / 2r of DPM-Solver++(2M): h is a step in λ = log √(ᾱ / (1 - ᾱ)), r h the one before."""
    h = 0.5 * (log_snr(ab_s) - log_snr(ab_t))
    previous = np.concatenate([[np.inf], h[:-1]])
    finite = np.isfinite(h) & np.isfinite(previous)
    h, previous = np.where(finite, h, 0), np.where(finite, previous, 1)
    return np.sqrt(ab_s) * -np.expm1(-h) * h / (2 * previous)


def inversion_coefficients(sched: Schedule, times: np.ndarray, lowest: int = 1) -> np.ndarray:
    """Those of DDIM without noise in the other direction, (S, 6) float32, for `times` rising from 0 to T.

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


def langevin_coefficients(sched: Schedule, times: np.ndarray) -> np.ndarray:
    """Coefficients of annealed Langevin sampling, (S, 6) float32 (Song & Ermon 2020, arXiv 2006.09011, algorithm 1).

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
