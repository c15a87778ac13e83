"""A measurement y = A x_0 + noise, and what it says of the image: wrappers of a denoiser.

Every method adds to the estimate x̂_0 of x_0 from x_t what y says beside it,

    x̂_0 + V Aᵀ C⁻¹ (y - A x̂_0)        C the covariance of y when x_t is known

With the true V, the covariance of x_0 when x_t is known, and C = A V Aᵀ + σ², this is the mean of x_0 given x_t and y,
if they are Gaussian. V is (1 - ᾱ_t) / √ᾱ_t ∂x̂_0/∂x_t, which is symmetric, so that V v is a gradient through the network,
and the correction is the score ∇ log p(y | x_t). Methods differ in what they take for V and C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import tensorflow as tf

from ddpm import Schedule, signal_and_noise
from diffusion.denoiser import Denoiser, add_to_score

Linear = Callable[[tf.Tensor], tf.Tensor]


def keep(x: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """The pixels where the mask is 1; the others are 0."""
    return x * mask


def downscale(x: tf.Tensor, factor: int) -> tf.Tensor:
    """The means of squares of `factor` by `factor` pixels."""
    _, height, width, channels = x.shape
    blocks = tf.reshape(x, (-1, height // factor, factor, width // factor, factor, channels))
    return tf.reduce_mean(blocks, axis=(2, 4))


def grey(x: tf.Tensor, _: object) -> tf.Tensor:
    """The mean of the channels."""
    return tf.reduce_mean(x, axis=-1, keepdims=True)


def blur(x: tf.Tensor, deviation: float) -> tf.Tensor:
    """Means with Gaussian weights of that standard deviation in pixels; at the edges over the pixels that exist."""
    for axis, product in (1, "ij,bjwc->biwc"), (2, "ij,bhjc->bhic"):
        place = tf.range(x.shape[axis], dtype=tf.float32)
        weights = tf.exp(-0.5 * tf.square((place[:, None] - place) / deviation))
        x = tf.einsum(product, weights / tf.reduce_sum(weights, axis=1, keepdims=True), x)
    return x


# Linear functions of images, (batch, height, width, channels), and of a mask or a factor.
OPERATIONS = {"mask": keep, "downscale": downscale, "grey": grey, "blur": blur}


def adjoint(operation: Linear, v: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Aᵀ v, of the shape of the images `like`: the gradient of v · A x."""
    x = tf.zeros_like(like)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        y = operation(x)
    return tape.gradient(y, x, v, unconnected_gradients="zero")


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


STEP = 1.0  # ζ of DPS


def residual(terms: Terms, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """C = ‖y - A x̂_0‖ β_t / (ζ √α_t), with which a step of DDPM moves x_{t-1} by -ζ ∇‖y - A x̂_0‖.

    DPS: Chung et al. 2023, arXiv 2209.14687, algorithm 1 and its step size.
    """
    size = tf.sqrt(_dot(terms.residual, terms.residual))
    return size * _like(terms.rate / STEP, v) * v, terms.adjoint(v)


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


METHODS = {
    "mmps": Method(moments, slope="inside", iterations=3),
    "pigdm": Method(pixels),
    "dps": Method(residual, iterations=1),
    # Replaces what is known, and goes back and forth so that the rest follows (Lugmayr et al. 2022, arXiv 2201.09865).
    "repaint": Method(pixels, slope=None, revisits=(5, 4)),
}


@dataclass(frozen=True)
class Task:
    """What a denoiser is asked to restore, all that is compiled into a step: `measured` tensors are given to it.

    Attributes:
        operation: a name in `OPERATIONS`, or a linear function of images, (batch, height, width, channels) float32.
        method: a name in `METHODS`.
        factor: of downscale, how many pixels become one in each direction; of blur, the deviation in pixels.
    """

    operation: str | Linear
    method: str
    factor: float | None = None

    def measure(self, x: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """A x for images and masks, (batch, height, width, 1) float32, which only the operation mask uses."""
        if callable(self.operation):
            return self.operation(x)
        return OPERATIONS[self.operation](x, mask if self.operation == "mask" else self.factor)

    def measured_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of A x for one image."""
        return tuple(self.measure(tf.zeros((1, *image_shape)), tf.zeros((1, *image_shape[:2], 1))).shape[1:])

    def specs(self, batch_size: int, image_shape: tuple[int, ...]) -> tuple[tf.TensorSpec, ...]:
        """Of the tensors of `measured`, y, mask and noise."""
        shapes = self.measured_shape(image_shape), (*image_shape[:2], 1), ()
        return tuple(tf.TensorSpec((batch_size, *shape), tf.float32) for shape in shapes)

    def measured(self, denoise: Denoiser, sched: Schedule, y: tf.Tensor, mask: tf.Tensor, noise: tf.Tensor) -> Denoiser:
        """A denoiser that knows y = A x_0 + noise as well.

        Args:
            denoise: guided or not, not clipped.
            y: (batch, …) float32.
            mask: (batch, height, width, 1) float32.
            noise: (batch,) float32, σ².
        """
        method = METHODS[self.method]

        def measure(x):
            return self.measure(x, mask)

        def given_y(x_t, t, label=None):
            a, b = signal_and_noise(t, x_t, sched)
            ratio = tf.math.divide_no_nan(b**2, a)
            estimate, slope = with_slope(denoise, x_t, t, label) if method.slope else (denoise(x_t, t, label), None)
            terms = Terms(
                measure,
                lambda v: adjoint(measure, v, x_t),
                slope or (lambda image: a * image),
                *(ratio, b**2, noise, y - measure(estimate.x_0)),
                tf.gather(sched["beta_t"] * sched["oneover_sqrta"], t),
            )
            image = solve(lambda v: method.covariance(terms, v), terms.residual, x_t, method.iterations)
            added = image if method.slope == "inside" else terms.slope(image)
            return add_to_score(estimate, t, added, sched)

        return given_y


def with_slope(denoise: Denoiser, x_t: tf.Tensor, t: tf.Tensor, label: tf.Tensor | None):
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
