"""The variance of a reverse step that a network learns, and the loss that trains it.

The network has twice the output channels; the second half is 2u - 1, and σ_t² = β_t^u β̃_t^(1 - u) (Nichol & Dhariwal
2021, arXiv 2102.09672, equation 15).
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from ddpm import Schedule, divergence, log_variance_range
from diffusion.targets import find_target

BOUND_WEIGHT = 1e-3  # of the variational bound in the hybrid loss


def split_output(output: tf.Tensor, channels: int) -> tuple[tf.Tensor, tf.Tensor | None]:
    """What a network predicts, and u if it has twice the `channels`, else None."""
    if output.shape[-1] == channels:
        return output, None
    predicted, rest = tf.split(output, 2, axis=-1)
    return predicted, (rest + 1) / 2


def log_ratio(u: tf.Tensor, t: tf.Tensor, sched: Schedule) -> tf.Tensor:
    """log(σ_t² / β̃_t), like `u`, as `ddpm.p_sample` and the bound take a variance; t (batch,) int."""
    return u * tf.gather(tf.constant(log_variance_range(sched), u.dtype), t)[:, None, None, None]


def bound_tables(sched: Schedule, target: str = "eps", levels: int = 255) -> np.ndarray:
    """log(β_t / β̃_t), k and d at every t, (T + 1, 3) float64: what the bound of a step needs beside e and u.

    With an error e of the target the mean of a reverse step is wrong by (μ_q - μ_θ)² / β̃_t = k e². d corrects that at
    t = 1, where the term of the bound is the pixel's bin, of variance (2/levels)² / 12, and not a Gaussian of variance
    β̃; elsewhere it is 0.
    """
    alphabar, ratio = sched.alphabar, log_variance_range(sched)
    before = np.append(1.0, alphabar[:-1])
    noise, beta = np.append(1.0, 1 - alphabar[1:]), 1 - alphabar / before
    per_target = np.zeros(len(alphabar))
    per_target[1:] = 1 / find_target(target).error(np.maximum(alphabar[1:], 1e-300))
    k = before * beta * np.exp(ratio) / noise**2 * per_target
    bin_variance = (2 / levels) ** 2 / 12
    d = np.where(np.arange(len(alphabar)) == 1, bin_variance * np.exp(ratio) / np.append(1.0, beta[1:]) - 1, 0)
    return np.stack([ratio, k, d], axis=1)


def hybrid_loss(sched: Schedule, target: str = "eps", levels: int = 255) -> Callable[..., tf.Tensor]:
    """Hybrid loss: weighted squared error plus `BOUND_WEIGHT` times the variational bound, in bits.

    L_simple + λ L_vlb of Nichol & Dhariwal 2021, arXiv 2102.09672, equation 16. As there the bound teaches u alone, and
    not what is predicted. Its weight is a thousandth of the paper's for T = 1000: all layers but the output serve both,
    and a new network that predicts x_0 has a bound of thousands of bits. Adam rescales updates, so weights that only
    predict u still learn at full speed.

    Returns:
        A function of e² and u, (batch, height, width, channels) float32, weights (batch, 1, 1, 1) and t (batch,) int,
        that returns the loss of every value, like e².
    """
    tables = tf.constant(bound_tables(sched, target, levels), tf.float32)

    def loss(squared_error, u, weight, t):
        ratio, k, d = tf.split(tf.gather(tables, t)[:, None, None, :], 3, axis=-1)
        bound = divergence(k * tf.stop_gradient(squared_error) + d, ratio * u)
        return weight * squared_error + BOUND_WEIGHT * bound / np.log(2)

    return loss
