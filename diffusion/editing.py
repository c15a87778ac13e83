"""What a trained model does beyond drawing from noise: restore, fill in, vary, interpolate.

Each takes the loop, the samplers and the denoiser of `my_sample`: to restore is to sample with a denoiser that also
knows the measurement (`diffusion/measurement.py`), to vary and to interpolate is to begin at another x_t. Options of
sampling are those of `my_sample`, see `diffusion.options.Sampling`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ddpm import n_steps, q_sample, to_pixels
from diffusion import generate, model_file
from diffusion.measurement import Task, as_masks, as_pictures, choose_task, measure
from diffusion.model_file import TrainedModel
from diffusion.options import Sampling
from diffusion.posterior import METHODS, Linear
from diffusion.sampling import make_inversion, make_plan, revisit, standard_normal
from support.checks import check_finite, check_number

HALF_A_LEVEL = 1 / 255  # of grey, in units of [-1, 1]
INVERSION_STEPS = 50  # of `interpolate`


def restore(
    measurement: Any,
    operation: str | Linear,
    deviation: float = 0.0,
    model: Any = "model.keras",
    *,
    method: str | None = None,
    mask: Any = None,
    factor: float | None = None,
    n_sample: int = 1,
    seed: int | None = None,
    progress: Callable[..., Any] | None = None,
    warn: Callable[[str], None] | None = None,
    **sampling: Any,
) -> np.ndarray:
    """Images x_0 from p(x_0 | y) for measurements y = A x_0 + noise, without training.

    Args:
        measurement: y, (n, height', width', channels'), integers 0 … 255 or floating-point numbers of images in
            [-1, 1], which noise may take beyond that; for a function as the operation any (n, …) floating-point
            numbers.
        operation: A. `'mask'` keeps the pixels where the mask is 1, `'downscale'` takes the means of squares of pixels,
            `'grey'` the mean of the channels, `'blur'` means with Gaussian weights; or a linear function of tensors,
            (batch, height, width, channels) float32 → (batch, …), each image by itself.
        deviation: standard deviation of the noise, in units of [-1, 1]. 0 stands for half a grey level.
        method: a name in `METHODS`; None for the best.
        mask: of the operation mask, (height, width) or (n, height, width): 1, True or 255 where the image is known,
            else 0.
        factor: of downscale, how many pixels become one in each direction; None for what the shape of the measurement
            says. Of blur, the standard deviation in pixels; None for 1.
        n_sample: how many images for each measurement.
        seed, model, sampling: see `reverse_diffusion.my_sample`.
        progress: see `generate.run_plan`.
        warn: called with sentences that the user should read.

    Returns:
        int16 (n · n_sample, height, width, channels), values 0 … 255, those of one measurement together.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `my_sample`, and for arguments that contradict each other.
    """
    asked = Sampling(**sampling)
    check_number("deviation", deviation, 0)
    check_number("n_sample", n_sample, 1, integer=True)
    trained = generate.open_model(model)
    task = choose_task(operation, method, factor, np.shape(measurement), trained.image_shape)
    y = as_measurement(measurement, task, trained.image_shape, deviation)
    masks = as_masks(mask, operation, len(y), trained.image_shape)
    noise = np.full(len(y), (deviation or HALF_A_LEVEL) ** 2)
    y = task.measure(tf.constant(y), tf.constant(masks)).numpy() if operation == "mask" else y
    given = tuple(np.repeat(np.float32(part), n_sample, axis=0) for part in (y, masks, noise))
    return _generate(trained, asked, n_sample * len(y), seed, progress, warn, task=task, measurement=given)


def as_measurement(measurement: Any, task: Task, image_shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """A measurement as float32 (n, …), in units of [-1, 1].

    Raises:
        ValueError: if no image of the model could give it.
    """
    shape, function = task.measured_shape(image_shape), callable(task.operation)
    y = generate.as_images("measurement", measurement, shape, kinds="f" if function else "uif")
    if function:
        return np.float32(y)
    return generate.to_range("measurement", y, beyond=8 * deviation)


def inpaint(images: Any, mask: Any, model: Any = "model.keras", *, n_sample: int = 1, **named: Any) -> np.ndarray:
    """Images whose unknown pixels are filled in; the known ones come back exactly.

    Args:
        images: (n, height, width, channels), integers 0 … 255 or floating-point numbers in [-1, 1], with anything where
            they are unknown.
        mask, model, n_sample, named: see `restore`.

    Returns, raises: as `restore`.
    """
    trained = generate.open_model(model)
    x_0 = generate.as_x_0(images, trained.image_shape)
    filled = restore(x_0, "mask", 0.0, model, mask=mask, n_sample=n_sample, **named)
    known, given = (
        np.repeat(part, n_sample, axis=0) for part in (as_masks(mask, "mask", len(x_0), x_0.shape[1:]), to_pixels(x_0))
    )
    return np.where(known == 1, given, filled)


def vary(
    images: Any,
    strength: float,
    model: Any = "model.keras",
    *,
    n_sample: int = 1,
    seed: int | None = None,
    progress: Callable[..., Any] | None = None,
    warn: Callable[[str], None] | None = None,
    **sampling: Any,
) -> np.ndarray:
    """Variations of images: noise to t = strength · T, and back (SDEdit: Meng et al. 2022, arXiv 2108.01073).

    Args:
        images: (n, height, width, channels), integers 0 … 255 or floating-point numbers in [-1, 1].
        strength: in (0, 1], how much of an image may change; 1 keeps nothing of it.
        n_sample: how many variations of each image.
        seed, model, sampling: see `reverse_diffusion.my_sample`. Of its steps those below t are taken.
        progress, warn: see `restore`.

    Returns:
        int16 (n · n_sample, height, width, channels), values 0 … 255, those of one image together.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `my_sample`.
    """
    asked, trained = Sampling(**sampling), generate.open_model(model)
    check_number("n_sample", n_sample, 1, integer=True)
    x_0, t, seed = generate.as_x_0(images, trained.image_shape), as_t(strength, trained), generate.choose_seed(seed)
    if warn and (sentence := generate.warn_of_range(images)):
        warn(sentence)
    x_0 = np.repeat(x_0, n_sample, axis=0)
    x_t = add_noise(x_0, t, range(len(x_0)), seed, trained)
    return _generate(trained, asked, len(x_0), seed, progress, warn, begin=t, start=x_t)


def interpolate(
    a: Any,
    b: Any,
    count: int,
    model: Any = "model.keras",
    *,
    strength: float | None = None,
    seed: int | None = None,
    progress: Callable[..., Any] | None = None,
    warn: Callable[[str], None] | None = None,
    **sampling: Any,
) -> np.ndarray:
    """Images on the way from one image to another, both included as they are.

    Without a strength DDIM turns both images into noise, and points on the great circle between these noises into
    images (DDIM, arXiv 2010.02502, section 5.3). With a strength both get the same noise to t = strength · T, and
    points on the straight line between them are denoised (DDPM, arXiv 2006.11239, section 4.3).

    Args:
        a, b: (height, width, channels) or (1, height, width, channels), integers 0 … 255 or floating-point numbers in
            [-1, 1].
        count: how many images, 2 or more.
        strength: in (0, 1], or None.
        seed, model, sampling: see `reverse_diffusion.my_sample`; without a strength only steps (50) and label.
        progress, warn: see `restore`.

    Returns:
        int16 (count, height, width, channels), values 0 … 255.

    Raises:
        FileNotFoundError, ValueError, FloatingPointError: as `my_sample`.
    """
    check_number("count", count, 2, integer=True)
    asked, trained, seed = Sampling(**sampling), generate.open_model(model), generate.choose_seed(seed)
    images = [np.asarray(image) for image in (a, b)]
    ends = [image if image.ndim == 4 else image[None] for image in images]
    if any(len(end) != 1 for end in ends):
        raise ValueError(f"a and b must be one image each, got {len(ends[0])} and {len(ends[1])}")
    ends = np.concatenate([generate.as_x_0(end, trained.image_shape) for end in ends])
    way = np.linspace(0, 1, count)[1:-1, None, None, None]
    run = {"progress": progress, "warn": warn}
    if strength is not None:
        t = as_t(strength, trained)
        x_t = add_noise(ends, t, [0, 0], seed, trained)
        between = {"begin": t, "start": (1 - way) * x_t[:1] + way * x_t[1:]}
    else:
        if asked != Sampling(steps=asked.steps, label=asked.label):
            raise ValueError(
                "without a strength, interpolate takes only steps and label; add a strength, or omit others"
            )
        asked = Sampling(
            "ddim", asked.steps or min(INVERSION_STEPS, n_steps(trained.sched)), label=asked.label, clip=False
        )
        noise = invert_images(ends, model, asked.steps, asked.label, progress)
        between = {"start": on_the_sphere(*noise, way)}
    found = _generate(trained, asked, count - 2, seed, **run, **between) if count > 2 else to_pixels(ends[:0])
    return np.concatenate([to_pixels(ends[:1]), found, to_pixels(ends[1:])])


def try_out(
    photo: np.ndarray, operation: str, factor: float | None, mask: Any, deviation: float | None, **named: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Measures a photo and restores it from that; of a mask without noise the known pixels come back exactly.

    Args:
        photo: uint8 (height, width, channels).
        operation, factor, mask, deviation, named: see `restore`.

    Returns:
        The photo and what was measured of it, int16 (2, height, width, channels), and what `restore` returns.
    """
    images = generate.as_x_0(photo[None], photo.shape)
    y = measure(images, operation, factor, mask)
    first = np.concatenate([to_pixels(images), as_pictures(y, photo.shape)])
    if operation == "mask" and not deviation:
        return first, inpaint(images, mask, **named)
    return first, restore(y, operation, deviation or 0.0, factor=factor, mask=mask, **named)


def _generate(trained, asked, count, seed, progress, warn, begin=None, task=None, **more):
    """Images of a model, int16, along the plan of a sampler, or of a method that goes back and forth."""
    plan = make_plan(trained.sched, trained.choose(asked), begin)
    if task and METHODS[task.method].revisits[1]:
        if asked.corrector:
            raise ValueError(f"method {task.method} cannot be combined with a corrector; omit one of them")
        plan = revisit(plan, trained.sched, *METHODS[task.method].revisits)
    run = {"seed": seed, "progress": progress, "warn": warn, "task": task, **more}
    return to_pixels(generate.sample_images(plan, trained, asked, count, **run))


def as_t(strength: float, trained: TrainedModel) -> int:
    """The t up to which noise of a strength goes. Raises ValueError if it does not lie in (0, 1]."""
    check_number("strength", strength, 0, 1)
    if strength == 0:
        raise ValueError("strength must be above 0, which would change nothing; 1 keeps nothing of the image")
    return max(1, round(strength * n_steps(trained.sched)))


def add_noise(x_0: np.ndarray, t: int, index: Sequence[int], seed: int, trained: TrainedModel) -> np.ndarray:
    """x_t of images whose numbers are in `index`, with the noise that they would begin with as samples."""
    eps = standard_normal(seed, n_steps(trained.sched) + 1, index, trained.image_shape)
    return q_sample(tf.constant(x_0), tf.fill([len(x_0)], t), eps, trained.sched).numpy()


def on_the_sphere(one: np.ndarray, other: np.ndarray, way: np.ndarray) -> np.ndarray:
    """Points on the great circle from one noise to another, for fractions of the way (Shoemake 1985)."""
    one, other = np.float64(one), np.float64(other)
    cosine = np.sum(one * other) / np.sqrt(np.sum(one**2) * np.sum(other**2))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6:
        return (1 - way) * one + way * other
    return (np.sin((1 - way) * angle) * one + np.sin(way * angle) * other) / np.sin(angle)


def invert_images(
    images: Any,
    model: Any,
    steps: int | None,
    label: Any,
    progress: Callable[..., Any] | None = None,
    warn: Callable[[str], None] | None = None,
) -> np.ndarray:
    """The noise that DDIM turns into given images, float32, see `reverse_diffusion.invert`.

    Estimates of x_0 are never clipped on this way. Models that predict x_0 begin at some noise, see `make_inversion`.

    Args:
        progress: see `run_plan`.
        warn: called with each sentence that the user should read.
    """
    trained = generate.open_model(model)
    x_0 = generate.as_x_0(images, trained.image_shape)
    labels = generate.as_labels(label, len(x_0), trained)
    for sentence in (generate.warn_of_range(images), model_file.warn_of_no_class(trained) if label is None else None):
        if warn and sentence:
            warn(sentence)
    plan = make_inversion(trained.sched, steps, trained.target)
    noise = generate.run_plan(plan, trained, labels, clip=False, start=x_0, progress=progress)
    check_finite(noise)
    return noise
