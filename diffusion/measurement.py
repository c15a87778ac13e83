"""Measurements y = A x_0 + noise of images: the operations A, and what users give for y, A and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from ddpm import Schedule, to_pixels
from diffusion import options
from diffusion.denoiser import Denoiser
from diffusion.posterior import METHODS, Linear, measured
from support.checks import check_choice, check_number

METHOD = "mmps"  # measured best, see `benchmarks/restore.py`


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
OPERATIONS = dict(zip(options.OPERATIONS, (keep, downscale, grey, blur), strict=True))


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
        return measured(denoise, sched, METHODS[self.method], lambda x: self.measure(x, mask), y, noise)


def choose_task(
    operation: str | Linear,
    method: str | None,
    factor: float | None,
    measured: tuple[int, ...],
    image_shape: tuple[int, ...],
) -> Task:
    """The task of an operation and a method, None for the best, and a factor, which `measured` may say.

    Args:
        measured: the shape of the measurement, which tells by how much images were downscaled.

    Raises:
        ValueError: if there is no such operation, method or factor, or not for images of this shape.
    """
    method = METHOD if method is None else method
    check_choice("method", method, METHODS)
    if callable(operation):
        _check_function(operation, image_shape)
    else:
        check_choice("operation", operation, OPERATIONS)
    if operation == "grey" and image_shape[-1] == 1:
        raise ValueError("operation grey needs a model of images with several channels, and this one has 1")
    return Task(operation, method, _choose_factor(operation, factor, measured, image_shape))


def _choose_factor(operation, factor, measured, image_shape):
    """The factor of an operation that has one, or None; or a ValueError."""
    if operation == "blur":
        check_number("factor", 1.0 if factor is None else factor, 0.1, max(image_shape))
        return 1.0 if factor is None else float(factor)
    if operation != "downscale":
        if factor is not None:
            raise ValueError(f"factor applies only to the operations downscale and blur, not to {operation}; omit it")
        return None
    height, width, channels = image_shape
    possible = [k for k in range(2, min(height, width) + 1) if height % k == width % k == 0]
    fitting = [k for k in possible if measured[1:] == (height // k, width // k, channels)]
    if factor is not None and factor not in possible:
        raise ValueError(f"factor must divide {height} by {width} pixels, such as {possible[:3]}, got {factor}")
    if not fitting or factor not in (None, *fitting):
        wanted = [("n", height // k, width // k, channels) for k in (possible[:3] if factor is None else [factor])]
        raise ValueError(f"measurement of downscale must have a shape such as {_words(wanted)}, got {measured}")
    return fitting[0]


def _check_function(operation, image_shape):
    """Raises ValueError if a function of images fails, mixes the images of a batch, or is not linear."""
    one, other = (tf.random.stateless_normal((2, *image_shape), (0, k)) for k in range(2))
    try:
        y_one, *rest = (tf.constant(operation(x)) for x in (one, other, one + 2 * other, one[:1]))
        if y_one.dtype != tf.float32 or len(y_one) != 2:
            raise TypeError(f"it returns {y_one.dtype.name} of shape {y_one.shape}, not float32 (2, …)")
    except (tf.errors.OpError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"operation fails for images of shape {(2, *image_shape)}: {why}") from error
    y_other, y_both, y_first = rest
    size = float(tf.reduce_max(tf.abs(y_both)))
    if not np.allclose(y_one[:1], y_first, atol=1e-3 * size):
        raise ValueError("operation must measure each image of a batch by itself")
    if not np.allclose(y_one + 2 * y_other, y_both, atol=1e-3 * size):
        raise ValueError("operation must be a linear function of images")


def as_masks(mask: Any, operation: str | Linear, count: int, image_shape: tuple[int, ...]) -> np.ndarray:
    """Masks of `count` images, float32 (count, height, width, 1), 1 where they are known; all 1 without a mask.

    Raises:
        ValueError: if it has another shape or other values, or is there without need.
    """
    height, width, _ = image_shape
    if (mask is None) == (operation == "mask"):
        raise ValueError("operation mask needs a mask" if mask is None else f"operation {operation} takes no mask")
    mask = np.ones((height, width)) if mask is None else np.asarray(mask)
    if mask.shape not in ((height, width), (count, height, width)):
        raise ValueError(
            f"mask must be an array of shape ({height}, {width}) or ({count}, {height}, {width}), got {mask.shape}"
        )
    white = 255 if mask.dtype.kind in "ui" and mask.max() > 1 else 1
    if mask.dtype.kind not in "buif" or not np.all((mask == 0) | (mask == white)):
        raise ValueError("mask must be 1, True or 255 where the image is known, and 0 elsewhere, with no other values")
    return np.broadcast_to(np.float32(mask == white)[..., None], (count, height, width, 1))


def measure(images: np.ndarray, operation: str, factor: float | None = None, mask: Any = None) -> np.ndarray:
    """The measurement A x of images in [-1, 1], (n, height, width, channels); arguments as in `editing.restore`."""
    shape = images.shape[1:]
    if operation == "downscale" and (factor is None or factor < 2 or factor % 1):
        raise ValueError(f"factor of downscale must be an integer of at least 2, got {factor:g}")
    measured = (len(images), *(side // int(factor) for side in shape[:2]), shape[2]) if operation == "downscale" else ()
    task = choose_task(operation, None, factor, measured, shape)
    masks = as_masks(mask, operation, len(images), shape)
    return task.measure(tf.constant(images, tf.float32), tf.constant(masks)).numpy()


def as_pictures(measurement: np.ndarray, image_shape: tuple[int, ...]) -> np.ndarray:
    """What was measured of images, as images: int16 (n, height, width, channels), with pixels and channels repeated."""
    for axis, size in enumerate(image_shape, 1):
        measurement = measurement.repeat(size // measurement.shape[axis], axis)
    return to_pixels(measurement)


def _words(shapes):
    return " or ".join("(" + ", ".join(map(str, shape)) + ")" for shape in shapes)
