"""Between a network and everything that uses it: one callable.

    denoise(x_t, t, label) → Estimate(x_0, eps, u)    images (batch, height, width, channels) float32, t (batch,) int

The two estimates belong together: √ᾱ_t x̂_0 + √(1 - ᾱ_t) ε̂ = x_t. u is None unless the network has learned the variance
of a step, see `diffusion/learned_variance.py`. The label, (batch,) int, is 0 for "no class" and k + 1 for class k;
without it, None, the denoiser is for all images. Samplers, the bound, evaluation and figures know only this, and no
network.

Guidance takes a denoiser and returns one (slide "Improvements"). Both kinds towards a class raise p(class | x_t) to
the power g at every t; the images that come of it do not have the density p(x) p(class | x)^g, as noise on that gives
another distribution. In both, g = 0 ignores the class, and g = 1 follows p(x | class). Autoguidance needs no
class: it leads away from what a weaker network would draw.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from ddpm import Schedule, network_time, predict_eps, signal_and_noise
from diffusion.learned_variance import split_output
from diffusion.targets import TARGETS, find_target


class Estimate(NamedTuple):
    """The estimates from x_t: the image x̂_0, the noise ε̂, and u of a learned variance, or None; all like x_t."""

    x_0: tf.Tensor
    eps: tf.Tensor
    u: tf.Tensor | None = None


Denoiser = Callable[..., Estimate]


def denoiser(network: Callable, sched: Schedule, target: str = "eps") -> Denoiser:
    """The denoiser of a network: the only place where a network's output is read.

    Args:
        network: a function of [x_t, t/T], t/T (batch, 1) float32, or of [x_t, t/T, label], label (batch, 1) int, that
            returns its prediction like x_t, or with twice the channels, see `learned_variance.split_output`.
        sched: the schedule that it was trained with.
        target: what it predicts, a name in `TARGETS`.

    Raises:
        ValueError: for another target, and for ε̂ where ᾱ_T = 0, as it says nothing of the image in x_T.
    """
    estimates = find_target(target).estimates
    if find_target(target).needs_signal and sched.alphabar[-1] == 0:
        others = " or ".join(name for name in TARGETS if not TARGETS[name].needs_signal)
        raise ValueError(f"with zero terminal SNR a network must predict {others}, not {target}")

    def denoise(x_t, t, label=None):
        output = network([x_t, network_time(t, sched), *([] if label is None else [label[:, None]])])
        predicted, u = split_output(output, x_t.shape[-1])
        return Estimate(*estimates(x_t, predicted, *signal_and_noise(t, x_t, sched)), u)

    return denoise


def score(denoise: Denoiser, sched: Schedule) -> Callable[..., tf.Tensor]:
    """The same network as a model of the score: a function of (x_t, t, label), t ≥ 1, that returns ∇ log p(x_t).

    It is -ε̂ / √(1 - ᾱ_t), like x_t; with a label, if the network takes them, that of p(x_t | class). Denoising score
    matching: Vincent 2011; Song & Ermon 2019, arXiv 1907.05600; for DDPM Luo 2022, arXiv 2208.11970.
    """
    return lambda x_t, t, label=None: -denoise(x_t, t, label).eps / signal_and_noise(t, x_t, sched)[1]


def add_to_score(estimate: Estimate, t: tf.Tensor, added: tf.Tensor, sched: Schedule) -> Estimate:
    """The estimate of x_t once `added` is added to its score -ε / √(1 - ᾱ_t) (ADM, arXiv 2105.05233, equation 14).

    ε̂ falls by √(1 - ᾱ_t) `added`, and x̂_0 rises by (1 - ᾱ_t) / √ᾱ_t `added`, so that both still make up x_t. Nothing is
    added where ᾱ_t = 0: x_t is pure noise there, whatever x_0 is.
    """
    a, b = signal_and_noise(t, added, sched)
    added = tf.where(a > 0, added, 0)
    return Estimate(estimate.x_0 + tf.math.divide_no_nan(b**2, a) * added, estimate.eps - b * added, estimate.u)


def extrapolate(start: Estimate, towards: Estimate, g: tf.Tensor) -> Estimate:
    """start + g (towards - start) of x̂_0 and ε̂; a learned variance is taken from `towards`."""
    x_0, eps = (a + g * (b - a) for a, b in zip(start[:2], towards[:2], strict=True))
    return Estimate(x_0, eps, towards.u)


def classifier_free(denoise: Denoiser, g: tf.Tensor) -> Denoiser:
    """Guidance without a classifier, by the network's own labels, ε̂ = ε_∅ + g (ε_c - ε_∅).

    Ho & Salimans 2022, arXiv 2207.12598, equation 6, with g = 1 + w. ε_∅ is the estimate for "no class". One batch of
    twice the size gives both; where g is 0 or 1, a batch of the usual size is enough.

    Args:
        denoise: of a network that takes labels, not clipped.
        g: () float32.
    """

    def guided(x_t, t, label):
        nothing = tf.zeros_like(label)

        def ask_for_both():
            both = denoise(*(tf.concat(pair, axis=0) for pair in ((x_t, x_t), (t, t), (label, nothing))))
            halves = [(None, None) if part is None else tf.split(part, 2) for part in both]
            with_class, without_class = (Estimate(*parts) for parts in zip(*halves, strict=True))
            return extrapolate(without_class, with_class, g)

        def ask_for_one():
            return denoise(x_t, t, tf.where(g == 0, nothing, label))

        return tf.cond((g == 0) | (g == 1), ask_for_one, ask_for_both)

    return guided


def with_classifier(denoise: Denoiser, classify: Callable, sched: Schedule, g: tf.Tensor) -> Denoiser:
    """Guidance by a classifier of noisy images, ε̂ = ε_∅ - g √(1 - ᾱ_t) ∇ log p(c | x_t).

    Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2; the denoiser is asked without a label.

    Args:
        classify: a function of [x_t, t/T] that returns log p(c | x_t) up to a constant, (batch, classes).
        g: () float32.
    """

    def guided(x_t, t, label):
        def gradient():
            with tf.GradientTape() as tape:
                tape.watch(x_t)
                log_p = tf.nn.log_softmax(classify([x_t, network_time(t, sched)]))
                total = tf.reduce_sum(tf.gather(log_p, label - 1, batch_dims=1))
            return tf.ensure_shape(tape.gradient(total, x_t), x_t.shape)

        added = g * tf.cond(g == 0, lambda: tf.zeros_like(x_t), gradient)
        return add_to_score(denoise(x_t, t), t, added, sched)

    return guided


def autoguided(denoise: Denoiser, weaker: Denoiser, g: tf.Tensor) -> Denoiser:
    """Guidance away from the mistakes of a weaker network, ε̂ = ε_weak + g (ε - ε_weak).

    Karras et al. 2024, arXiv 2406.02507, section 4. A smaller or less trained network errs in the same direction as the
    better one, and further; so their difference points from such errors to real images. Where g is 1, only the better
    one is asked.

    Args:
        denoise, weaker: of networks that were trained on the same images with the same schedule, not clipped.
        g: () float32; 1 is the better network alone, 1.5 to 2 help.
    """

    def guided(x_t, t, label=None):
        better = denoise(x_t, t, label)
        return tf.cond(g == 1, lambda: better, lambda: extrapolate(weaker(x_t, t, label), better, g))

    return guided


def clipped(denoise: Denoiser, sched: Schedule) -> Denoiser:
    """A denoiser whose x̂_0 is clipped to [-1, 1], and whose ε̂ goes with that; the outermost wrapper.

    As in the code of DDPM: without it an error of ε̂ near t = T, multiplied by 157, drives colours away.
    """

    return lambda x_t, t, label=None: clip_estimate(denoise(x_t, t, label), x_t, t, sched)


def clip_estimate(estimate: Estimate, x_t: tf.Tensor, t: tf.Tensor, sched: Schedule) -> Estimate:
    """An estimate with x̂_0 clipped to [-1, 1] and the ε̂ that goes with it, so that both make up x_t."""
    x_0 = tf.clip_by_value(estimate.x_0, -1, 1)
    return Estimate(x_0, predict_eps(x_t, t, x_0, sched), estimate.u)
