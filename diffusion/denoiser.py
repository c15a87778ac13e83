"""Between a network and everything that uses it: one callable.

    denoise(x_t, t) → (x̂_0, ε̂)       x_t, x̂_0, ε̂: (batch, height, width, channels) float32, t: (batch,) int

The two estimates belong together: √ᾱ_t x̂_0 + √(1 - ᾱ_t) ε̂ = x_t. Samplers, the bound, evaluation and figures know only
this, and no network.
"""

from collections.abc import Callable

import tensorflow as tf

from ddpm import (
    TARGETS,
    Schedule,
    check_choice,
    clip_estimate,
    estimates_from_velocity,
    network_time,
    predict_eps,
    predict_score,
    predict_x0,
)

Denoiser = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def denoiser(network: Callable, sched: Schedule, target: str = "eps") -> Denoiser:
    """The denoiser of a network: the only place where a network's output is read.

    Args:
        network: a function of [x_t, t/T], t/T (batch, 1) float32, that returns its prediction like x_t.
        sched: the schedule that it was trained with.
        target: what it predicts, `'eps'`, `'x0'` or `'v'`.

    Raises:
        ValueError: for another target, and for ε̂ where ᾱ_T = 0, as it says nothing of the image in x_T.
    """
    check_choice("target", target, TARGETS)
    if target == "eps" and sched.alphabar[-1] == 0:
        raise ValueError("a network that predicts the noise cannot have zero terminal SNR; x0 and v can")

    def denoise(x_t, t):
        predicted = network([x_t, network_time(t, sched)])
        if target == "eps":
            return predict_x0(x_t, t, predicted, sched), predicted
        if target == "x0":
            return predicted, predict_eps(x_t, t, predicted, sched)
        return estimates_from_velocity(x_t, t, predicted, sched)

    return denoise


def score(denoise: Denoiser, sched: Schedule) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The same network as a model of the score: a function of (x_t, t), t ≥ 1, that returns ∇ log p(x_t), like x_t."""
    return lambda x_t, t: predict_score(t, denoise(x_t, t)[1], sched)


def clipped(denoise: Denoiser, sched: Schedule) -> Denoiser:
    """A denoiser whose x̂_0 is clipped to [-1, 1], and whose ε̂ goes with that; the outermost wrapper.

    As in the code of DDPM: without it an error of ε̂ near t = T, multiplied by 157, drives colours away.
    """

    def denoise_and_clip(x_t, t):
        x_0, _ = denoise(x_t, t)
        return clip_estimate(x_t, t, x_0, sched)

    return denoise_and_clip
