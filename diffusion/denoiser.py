"""Between a network and everything that uses it: one callable.

    denoise(x_t, t, label) → (x̂_0, ε̂)       x_t, x̂_0, ε̂: (batch, height, width, channels) float32, t: (batch,) int

The two estimates belong together: √ᾱ_t x̂_0 + √(1 - ᾱ_t) ε̂ = x_t. The label, (batch,) int, is 0 for "no class" and k + 1
for class k; without it, None, the denoiser is that of all images. Samplers, the bound, evaluation and figures know
only this, and no network.

Guidance takes a denoiser and returns one (slide "Improvements"). Both kinds towards a class raise p(class | x_t) to
the power g at every t; the images that come of it are not those of p(x) p(class | x)^g, as such a distribution with
noise on it is another one. In both, g = 0 ignores the class, and g = 1 follows p(x | class). Autoguidance needs no
class: it leads away from what a weaker network would draw.
"""

from collections.abc import Callable

import tensorflow as tf

from ddpm import (
    TARGETS,
    Schedule,
    add_to_score,
    check_choice,
    clip_estimate,
    estimates_from_velocity,
    network_time,
    predict_eps,
    predict_score,
    predict_x0,
)

Denoiser = Callable[..., tuple[tf.Tensor, tf.Tensor]]


def denoiser(network: Callable, sched: Schedule, target: str = "eps") -> Denoiser:
    """The denoiser of a network: the only place where a network's output is read.

    Args:
        network: a function of [x_t, t/T], t/T (batch, 1) float32, or of [x_t, t/T, label], label (batch, 1) int, that
            returns its prediction like x_t.
        sched: the schedule that it was trained with.
        target: what it predicts, `'eps'`, `'x0'` or `'v'`.

    Raises:
        ValueError: for another target, and for ε̂ where ᾱ_T = 0, as it says nothing of the image in x_T.
    """
    check_choice("target", target, TARGETS)
    if target == "eps" and sched.alphabar[-1] == 0:
        raise ValueError("a network that predicts the noise cannot have zero terminal SNR; x0 and v can")

    def denoise(x_t, t, label=None):
        predicted = network([x_t, network_time(t, sched), *([] if label is None else [label[:, None]])])
        if target == "eps":
            return predict_x0(x_t, t, predicted, sched), predicted
        if target == "x0":
            return predicted, predict_eps(x_t, t, predicted, sched)
        return estimates_from_velocity(x_t, t, predicted, sched)

    return denoise


def score(denoise: Denoiser, sched: Schedule) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The same network as a model of the score: a function of (x_t, t), t ≥ 1, that returns ∇ log p(x_t), like x_t."""
    return lambda x_t, t: predict_score(t, denoise(x_t, t)[1], sched)


def classifier_free(denoise: Denoiser, g: tf.Tensor) -> Denoiser:
    """Guidance by the network's own knowledge of classes, ε̂ = ε_∅ + g (ε_c - ε_∅).

    Ho & Salimans 2022, arXiv 2207.12598, equation 6, with g = 1 + w. ε_∅ is that of "no class". One batch of twice the
    size asks the network for both; where g is 0 or 1, one of the usual size.

    Args:
        denoise: of a network that takes labels, not clipped.
        g: () float32.
    """

    def guided(x_t, t, label):
        nothing = tf.zeros_like(label)

        def ask_for_both():
            of_both = denoise(*(tf.concat(pair, axis=0) for pair in ((x_t, x_t), (t, t), (label, nothing))))
            (x_0, x_0_of_all), (eps, eps_of_all) = (tf.split(estimate, 2) for estimate in of_both)
            return x_0_of_all + g * (x_0 - x_0_of_all), eps_of_all + g * (eps - eps_of_all)

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
                of_class = tf.reduce_sum(tf.gather(log_p, label - 1, batch_dims=1))
            return tf.ensure_shape(tape.gradient(of_class, x_t), x_t.shape)

        x_0, eps = denoise(x_t, t)
        return add_to_score(x_0, t, eps, g * tf.cond(g == 0, lambda: tf.zeros_like(x_t), gradient), sched)

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

        def lead_away():
            return tuple(bad + g * (good - bad) for good, bad in zip(better, weaker(x_t, t, label), strict=True))

        return tf.cond(g == 1, lambda: better, lead_away)

    return guided


def clipped(denoise: Denoiser, sched: Schedule) -> Denoiser:
    """A denoiser whose x̂_0 is clipped to [-1, 1], and whose ε̂ goes with that; the outermost wrapper.

    As in the code of DDPM: without it an error of ε̂ near t = T, multiplied by 157, drives colours away.
    """

    def denoise_and_clip(x_t, t, label=None):
        x_0, _ = denoise(x_t, t, label)
        return clip_estimate(x_t, t, x_0, sched)

    return denoise_and_clip
