"""One reverse step from x_t to x_s, s < t, for each sampler.

x_s = a x̂_0 + b ε̂ + σ z with z from N(0, 1) and (x̂_0, ε̂) from a denoiser. The coefficients are computed here in float64
and passed to the step, so that a compiled step serves all of them.
"""

import numpy as np
import tensorflow as tf

from ddpm import Schedule
from diffusion.denoiser import Denoiser


def ancestral_coefficients(sched: Schedule, times: np.ndarray, variance: str = "beta") -> np.ndarray:
    """The steps of DDPM (algorithm 2): a and b give the mean of q(x_s | x_t, x_0), equation 7 for s = t - 1.

    Args:
        sched: the noise schedule.
        times: (S + 1,) int, falling from T to 0.
        variance: σ², `'beta'` for 1 - ᾱ_t / ᾱ_s, the slides' β_t, `'posterior'` for the variance of q(x_s | x_t, x_0),
            β̃_t. It is 0 in the step that ends in x_0.

    Returns:
        (S, 3) float32: a, b, σ of every step.

    Raises:
        ValueError: for another `variance`.
    """
    if variance not in ("beta", "posterior"):
        raise ValueError(f"variance must be 'beta' or 'posterior', got {variance!r}")
    alphabar = sched.alphabar
    ab_t, ab_s = alphabar[times[:-1]], alphabar[times[1:]]
    beta = 1 - ab_t / ab_s
    posterior = beta * (1 - ab_s) / (1 - ab_t)
    a, b = np.sqrt(ab_s), np.sqrt(np.maximum(1 - ab_s - posterior, 0))
    sigma = np.where(np.asarray(times[1:]) > 0, np.sqrt(beta if variance == "beta" else posterior), 0)
    return np.stack([a, b, sigma], axis=1).astype(np.float32)


def step(denoise: Denoiser, x_t: tf.Tensor, t: tf.Tensor, coefficients: tf.Tensor, z: tf.Tensor) -> tf.Tensor:
    """x_s, (batch, height, width, channels) float32.

    Args:
        denoise: see `diffusion/denoiser.py`.
        x_t, z: (batch, height, width, channels) float32.
        t: (batch,) int.
        coefficients: (3,) float32, a, b, σ.
    """
    x_0, eps = denoise(x_t, t)
    a, b, sigma = tf.unstack(coefficients)
    return a * x_0 + b * eps + sigma * z
