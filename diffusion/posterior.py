"""What a measurement y = A x_0 + noise says of the image: wrappers of a denoiser.

Every method adds to the estimate x̂_0 of x_0 from x_t what y says beside it,

    x̂_0 + V Aᵀ C⁻¹ (y - A x̂_0)        C the covariance of y when x_t is known

With the true V, the covariance of x_0 when x_t is known, and C = A V Aᵀ + σ², this is the mean of x_0 given x_t and y,
if they are Gaussian. V is (1 - ᾱ_t) / √ᾱ_t ∂x̂_0/∂x_t, which is symmetric: V v is a gradient through the network, and
the correction is the score ∇ log p(y | x_t). Methods differ in what they take for V and C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import tensorflow as tf

from ddpm import Schedule, signal_and_noise
from diffusion import options
from diffusion.denoiser import Denoiser, Estimate, add_to_score

Linear = Callable[[tf.Tensor], tf.Tensor]


class Terms(NamedTuple):
    """What the covariance C of a measurement is made of, at one t.

    Attributes:
        measure, adjoint: A and Aᵀ, functions of images and of measurements.
        slope: a function of images that returns ∂x̂_0/∂x_t times them.
        ratio: (1 - ᾱ_t) / √ᾱ_t, so that V = ratio · slope; 0 where ᾱ_t = 0.
        pixel: 1 - ᾱ_t, the variance of x_0 when x_t is known, if pixels are independent, from N(0, 1).
        noise: σ², the variance of the noise in the measurement.
        residual: y - A x̂_0.
        rate: β_t / √α_t.
    """

    measure: Linear
    adjoint: Linear
    slope: Linear
    ratio: tf.Tensor
    pixel: tf.Tensor
    noise: tf.Tensor
    residual: tf.Tensor
    rate: tf.Tensor


def moments(terms: Terms, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """C = A V Aᵀ + σ² (MMPS: Rozet et al. 2024, arXiv 2405.13712, section 4.2)."""
    image = terms.slope(terms.adjoint(v))
    return terms.measure(terms.ratio * image) + _like(terms.noise, v) * v, image


def pixels(terms: Terms, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """C = r² A Aᵀ + σ², r² = 1 - ᾱ_t (ΠGDM: Song et al. 2023, Pseudoinverse-guided diffusion models, section 3.1)."""
    image = terms.adjoint(v)
    return terms.measure(terms.pixel * image) + _like(terms.noise, v) * v, image


STEP = 1 / math.sqrt(256 * 256 * 3)  # ζ of DPS, 1 for the images of its paper, divided by the size of noise in them


def residual(terms: Terms, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """C = ‖y - A x̂_0‖ β_t / (ζ √α_t), with which a step of DDPM moves x_{t-1} by -ζ ∇‖y - A x̂_0‖.

    DPS: Chung et al. 2023, arXiv 2209.14687, algorithm 1 and its step size.
    """
    image, size = terms.adjoint(v), tf.sqrt(_dot(terms.residual, terms.residual))
    zeta = STEP * math.sqrt(math.prod(image.shape[1:]))
    return size * _like(terms.rate / zeta, v) * v, image


@dataclass(frozen=True)
class Method:
    """What a method takes for C and V.

    Attributes:
        covariance: a function of `Terms` and a measurement v that returns C v, and Aᵀ v, or V Aᵀ v if C contains it.
        slope: where V is the slope of the network: `'inside'` C and outside, only `'outside'`, or None, where
            (1 - ᾱ_t) stands for V.
        iterations: at most so many of the conjugate gradients.
        revisits: how many steps a jump back takes, and how often it is done from there, see `sampling.revisit`.
    """

    covariance: Callable[[Terms, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
    slope: str | None = "outside"
    iterations: int = 50
    revisits: tuple[int, int] = (1, 0)


MMPS = Method(moments, slope="inside", iterations=2)
PIGDM = Method(pixels)
DPS = Method(residual, iterations=1)
# Replaces what is known, and goes back and forth so that the rest follows (Lugmayr et al. 2022, arXiv 2201.09865).
REPAINT = Method(pixels, slope=None, revisits=(5, 4))
METHODS = dict(zip(options.METHODS, (MMPS, PIGDM, DPS, REPAINT), strict=True))


def measured(
    denoise: Denoiser, sched: Schedule, method: Method, measure: Linear, y: tf.Tensor, noise: tf.Tensor
) -> Denoiser:
    """A denoiser that knows y = A x_0 + noise as well.

    Args:
        denoise: guided or not, not clipped.
        measure: A, a linear function of images, each by itself.
        y: (batch, …) float32.
        noise: (batch,) float32, σ².
    """

    def given_y(x_t, t, label=None):
        a, b = signal_and_noise(t, x_t, sched)
        estimate, slope = with_slope(denoise, x_t, t, label) if method.slope else (denoise(x_t, t, label), None)
        terms = Terms(
            measure=measure,
            adjoint=lambda v: adjoint(measure, v, x_t),
            slope=slope or (lambda image: a * image),  # as if ∂x̂_0/∂x_t were √ᾱ_t, and V = 1 - ᾱ_t
            ratio=tf.math.divide_no_nan(b**2, a),
            pixel=b**2,
            noise=noise,
            residual=y - measure(estimate.x_0),
            rate=tf.gather(sched["beta_t"] * sched["oneover_sqrta"], t),
        )
        image = solve(lambda v: method.covariance(terms, v), terms.residual, x_t, method.iterations)
        added = image if method.slope == "inside" else terms.slope(image)
        return add_to_score(estimate, t, added, sched)

    return given_y


def adjoint(operation: Linear, v: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Aᵀ v, of the shape of the images `like`: the gradient of v · A x."""
    x = tf.zeros_like(like)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        y = operation(x)
    return tape.gradient(y, x, v, unconnected_gradients="zero")


def with_slope(denoise: Denoiser, x_t: tf.Tensor, t: tf.Tensor, label: tf.Tensor | None) -> tuple[Estimate, Linear]:
    """The estimate of a denoiser, and the function v → (∂x̂_0/∂x_t)ᵀ v of images.

    Its graph is traced once and called where it is needed. In the network v has size 1, as layers may have 16 bits.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x_t)
        estimate = denoise(x_t, t, label)
        x_0 = estimate.x_0

    @tf.function(autograph=False)
    def gradient(v):
        return tape.gradient(x_0, x_t, v, unconnected_gradients="zero")

    def slope(v):
        size = tf.sqrt(_dot(v, v) / math.prod(v.shape[1:]))
        return size * tf.ensure_shape(gradient(tf.math.divide_no_nan(v, size)), x_t.shape)

    return estimate, slope


def solve(
    apply: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]], b: tf.Tensor, image: tf.Tensor, iterations: int
) -> tf.Tensor:
    """B C⁻¹ b for each image of a batch by itself, by conjugate gradients (Hestenes & Stiefel 1952).

    An image stops where its residual has become a ten thousandth of b, and where C is not positive, as that of a
    network need not be.

    Args:
        apply: v → (C v, B v), with C symmetric, so that the result costs no call more.
        b: (batch, …) float32.
        image: like the result.
        iterations: at most so many.
    """
    square = _dot(b, b)
    enough = 1e-8 * square

    def improve(k, found, left, direction, square):
        applied, moves = apply(direction)
        curvature = _dot(direction, applied)
        going = (square > enough) & (curvature > 0)
        length = tf.where(going, tf.math.divide_no_nan(square, curvature), 0)
        found, left = found + _like(length, found) * moves, left - length * applied
        now = tf.where(going, _dot(left, left), 0)
        return k + 1, found, left, left + tf.math.divide_no_nan(now, square) * direction, now

    start = 0, tf.zeros_like(image), b, b, square
    more = lambda k, found, left, direction, square: tf.reduce_any(square > enough)  # noqa: E731
    return tf.while_loop(more, improve, start, maximum_iterations=iterations)[1]


def _dot(one, other):
    """The inner product of each image with the other, (batch, 1, …)."""
    return tf.reduce_sum(one * other, axis=tuple(range(1, len(one.shape))), keepdims=True)


def _like(numbers, x):
    """One number for each image, to multiply `x`."""
    return tf.reshape(numbers, (-1, *[1] * (len(x.shape) - 1)))
