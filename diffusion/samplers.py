"""One step from x_t to x_s for each sampler, as one formula:

    x_s = a x̂_0 + b ε̂ + σ z + c (x̂_0 - x̂_0 of the step before)      z from N(0, 1), (x̂_0, ε̂) from a denoiser

The coefficients are computed here in float64 and passed to the step, so that a compiled step serves all samplers,
numbers of steps, spacings and η.
"""

import numpy as np
import tensorflow as tf

from ddpm import Schedule, n_steps
from diffusion.denoiser import Denoiser

SAMPLERS = ("ddpm", "ddim", "dpm++")
SPACINGS = ("uniform", "quadratic", "logsnr")


def choose_times(sched: Schedule, steps: int, spacing: str = "uniform") -> np.ndarray:
    """The times of `steps` steps: T at first, 0 at last, strictly falling.

    Args:
        sched: the noise schedule.
        steps: how many, 1 … T. With T of them every spacing is every t.
        spacing: equal steps in t, `'uniform'`; in √t, `'quadratic'`; or in log(ᾱ / (1 - ᾱ)), `'logsnr'`, which ends
            with a step from t = 1.

    Returns:
        (steps + 1,) int32.

    Raises:
        ValueError: for another number of steps or spacing.
    """
    T = n_steps(sched)
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be 1 … {T}, the number of steps that this model was trained with, got {steps}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    left = 1 - np.arange(steps + 1) / steps
    if spacing == "uniform" or steps == T:
        times = T * left
    elif spacing == "quadratic":
        times = T * left**2
    else:
        ab = sched.alphabar[1:]
        last = T if ab[-1] > 0 else T - 1  # where log-SNR is finite
        log_snr = np.log(ab[:last]) - np.log1p(-ab[:last])
        wanted = np.linspace(log_snr[-1], log_snr[0], steps)
        times = np.append(np.interp(-wanted, -log_snr, np.arange(1, last + 1)), 0)
    times = np.rint(times).astype(np.int32)
    times[0], times[-1] = T, 0
    for k in range(steps - 1, 0, -1):  # where rounding repeats a t, it moves to the next free one
        times[k] = max(times[k], times[k + 1] + 1)
    return np.minimum(times, T - np.arange(steps + 1, dtype=np.int32))


def coefficients(
    sched: Schedule, times: np.ndarray, sampler: str = "ddpm", variance: str = "beta", eta: float = 0.0
) -> np.ndarray:
    """a, b, σ, c of every step, (S, 4) float32.

    Args:
        sched: the noise schedule.
        times: (S + 1,) int, falling from T to 0.
        sampler: `'ddpm'`, algorithm 2 of DDPM, for strides from q(x_s | x_t, x_0); `'ddim'` (Song, Meng & Ermon 2021,
            arXiv 2010.02502, equation 12); `'dpm++'`, DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2),
            of first order in the first step and in the one to 0, where log-SNR is infinite.
        variance: of ddpm, `'beta'` for 1 - ᾱ_t / ᾱ_s, the slides' β_t, or `'posterior'` for the variance of
            q(x_s | x_t, x_0), β̃_t. It is 0 in the step that ends in x_0.
        eta: of ddim, 0 for no noise, 1 for the variance of q(x_s | x_t, x_0).

    Raises:
        ValueError: for another `sampler` or `variance`, an `eta` outside [0, 1], or one of a sampler that has none.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if variance not in ("beta", "posterior"):
        raise ValueError(f"variance must be 'beta' or 'posterior', got {variance!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 and 1, got {eta}")
    if eta and sampler != "ddim":
        raise ValueError(f"eta is of the sampler ddim, and {sampler} has none; leave it out, or choose ddim")
    ab_t, ab_s = sched.alphabar[times[:-1]], sched.alphabar[times[1:]]
    beta = 1 - ab_t / ab_s
    posterior = beta * (1 - ab_s) / (1 - ab_t)
    direction = {"ddpm": posterior, "ddim": eta**2 * posterior, "dpm++": 0 * posterior}[sampler]
    noise = beta if sampler == "ddpm" and variance == "beta" else direction
    a, b = np.sqrt(ab_s), np.sqrt(np.maximum(1 - ab_s - direction, 0))
    sigma = np.where(np.asarray(times[1:]) > 0, np.sqrt(noise), 0)
    c = _second_order(ab_t, ab_s) if sampler == "dpm++" else 0 * a
    return np.stack([a, b, sigma, c], axis=1).astype(np.float32)


def _second_order(ab_t, ab_s):
    """√ᾱ_s (1 - e^{-h}) / 2r of DPM-Solver++(2M): h is a step in λ = log √(ᾱ / (1 - ᾱ)), r h the one before."""
    with np.errstate(divide="ignore"):
        h = 0.5 * (np.log(ab_s) - np.log1p(-ab_s) - np.log(ab_t) + np.log1p(-ab_t))
    before = np.concatenate([[np.inf], h[:-1]])
    finite = np.isfinite(h) & np.isfinite(before)
    h, before = np.where(finite, h, 0), np.where(finite, before, 1)
    return np.sqrt(ab_s) * -np.expm1(-h) * h / (2 * before)


def inversion_coefficients(sched: Schedule, times: np.ndarray) -> np.ndarray:
    """Those of DDIM without noise in the other direction, (S, 4) float32, for `times` rising from 0 to T.

    The network is not trained at t = 0. The first step asks it at t = 1, for whose estimates a and b are adapted, so
    that x_s = √ᾱ_s x_0 + √(1 - ᾱ_s) ε̂ with x_0 as it is.
    """
    ab_s = sched.alphabar[times[1:]]
    a, b = np.sqrt(ab_s), np.sqrt(1 - ab_s)
    ab_1 = sched.alphabar[1]
    a[0], b[0] = a[0] * np.sqrt(ab_1), b[0] + a[0] * np.sqrt(1 - ab_1)
    return np.stack([a, b, 0 * a, 0 * a], axis=1).astype(np.float32)


def step(
    denoise: Denoiser, x_t: tf.Tensor, t: tf.Tensor, coefficients: tf.Tensor, z: tf.Tensor, before: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """x_s and x̂_0, (batch, height, width, channels) float32.

    Args:
        denoise: see `diffusion/denoiser.py`.
        x_t, z, before: (batch, height, width, channels) float32; x̂_0 of the step before.
        t: (batch,) int.
        coefficients: (4,) float32, a, b, σ, c.
    """
    x_0, eps = denoise(x_t, t)
    a, b, sigma, c = tf.unstack(coefficients)
    return a * x_0 + b * eps + sigma * z + c * (x_0 - before), x_0
