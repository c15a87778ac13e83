"""The parts of `my_sample` and `invert`: opening and caching models and compiled steps, batches, labels.

Nothing here prints: callers pass functions that show progress, and print the returned sentences.
"""

import functools
import numbers
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from ddpm import from_pixels
from diffusion import model_file
from diffusion.measurement import Task
from diffusion.model_file import TrainedModel
from diffusion.options import Sampling
from diffusion.reverse import ReverseSteps, even_batches
from diffusion.sampling import Plan, sample
from support import files
from support.checks import MOST, check_number, one_for_each

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of batches, as each costs 10 MiB that TensorFlow never gives back
MOST_CLASSES = 2**31 - 1  # that an int32 holds
MODELS = 2  # whose compiled steps are cached


def open_model(model: str | os.PathLike | keras.Model) -> TrainedModel:
    """Opens a model, given as a path or as a Keras model."""
    trained, name = as_trained("model", model)
    model_file.check_network(trained, name or "this")
    return trained


def open_guide(kind: str, guide: str | os.PathLike | keras.Model | None, trained: TrainedModel) -> TrainedModel | None:
    """Opens a `'classifier'` or a `'weaker'` model, given as a path or as a Keras model; None for None.

    Raises:
        FileNotFoundError, ValueError: if there is none, or if it does not fit the model.
    """
    if guide is None:
        return None
    classifier = kind == "classifier"
    guide, name = as_trained(kind, guide, classifier)
    name = name or f"this {'classifier' if classifier else 'weaker model'}"
    model_file.check_guide(guide, name, trained, classifier)
    return guide


def as_trained(
    kind: str, model: str | os.PathLike | keras.Model, classifier: bool = False
) -> tuple[TrainedModel, str | None]:
    """A model, given as a path or as a Keras model, and its path or None. Raises ValueError if it is neither."""
    if isinstance(model, str | os.PathLike):
        return load(*load_key(model, classifier)), os.fspath(model)
    if not getattr(model, "inputs", None):
        raise ValueError(f"{kind} must be a path, or a Keras model that has been built, got {type(model).__name__}")
    return model_file.describe(model), None


def load_key(path: str | os.PathLike, classifier: bool = False) -> tuple[str, tuple[int, ...] | None, bool]:
    """The arguments of `load`: a file's real path, a stamp that changes with it, and whether it is a classifier."""
    path = os.path.realpath(model_file.locate(path))
    status = os.stat(path) if os.path.exists(path) else None
    return path, status and (status.st_ino, status.st_mtime_ns, status.st_size), classifier


@functools.lru_cache(maxsize=2 * MODELS)  # each with one that guides it
def load(path: str, stamp: tuple[int, ...] | None, classifier: bool) -> TrainedModel:
    """The model in a file, from a cache of the latest ones."""
    return model_file.open_model(path, classifier=classifier)


def check_shape(image_shape: Sequence[int] | None, trained: TrainedModel) -> None:
    """Raises ValueError if a shape is given that is not the shape of the model's images."""
    if image_shape is not None and (np.ndim(image_shape) != 1 or tuple(image_shape) != trained.image_shape):
        raise ValueError(f"image_shape must be {trained.image_shape} for this model, or omitted, got {image_shape}")


@functools.lru_cache(maxsize=MODELS)
def compiled_steps(
    trained: TrainedModel, classifier: TrainedModel | None = None, weaker: TrainedModel | None = None
) -> Callable[[bool, int, Task | None], ReverseSteps]:
    """A function of (clip, batch_size, task) that returns the compiled steps of a model, guided or not.

    They are cached as long as the model is one of the latest, since they take seconds to compile.
    """

    @functools.cache
    def compiled(clip, batch_size, task):
        return ReverseSteps(trained, batch_size, clip, classifier=classifier, weaker=weaker, task=task)

    return compiled


def as_images(name: str, images: Any, shape: tuple[int, ...], kinds: str = "uif") -> np.ndarray:
    """An array, tensor or list of numbers, of NumPy's `kinds`, as an array (n, *shape), n ≥ 1.

    Raises:
        ValueError: wrong shape or dtype, or non-finite values.
    """
    images = np.asarray(images)
    if images.ndim != 1 + len(shape) or images.shape[1:] != shape or not len(images):
        wanted = ", ".join(map(str, ("n", *shape)))
        raise ValueError(f"{name} must be an array of shape ({wanted}), n at least 1, got {images.shape}")
    if images.dtype.kind not in kinds or not np.all(np.abs(images) < 1e30):
        what = "floating-point numbers" if kinds == "f" else "numbers"
        raise ValueError(f"{name} must be an array of finite {what}, got {images.dtype}")
    return images


def as_x_0(images: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Images as networks take them, float32 in [-1, 1], from integers 0 … 255 or numbers in that range.

    Raises:
        ValueError: as `as_images`, and for values outside the range.
    """
    return to_range("images", as_images("images", images, shape))


def to_range(name: str, images: np.ndarray, beyond: float = 0.0) -> np.ndarray:
    """Integers 0 … 255 or numbers in [-1, 1], which may lie `beyond` that by so much, as float32 in [-1, 1].

    Raises:
        ValueError: for values outside the range.
    """
    integers = images.dtype.kind in "ui"
    low, high = (0, 255) if integers else (-1 - beyond, 1 + beyond)
    if not np.all((images >= low) & (images <= high)):
        raise ValueError(f"{name} must lie in {low:g} … {high:g}, got {images.min():g} … {images.max():g}")
    return from_pixels(images) if integers else np.float32(images)


def warn_of_range(images: Any) -> str | None:
    """The sentence to say if floating-point images have no negative values, and perhaps mean 0 … 1; else None."""
    images = np.asarray(images)
    if images.dtype.kind != "f" or images.min() < 0:
        return None
    return (
        "images has no negative values, and is read as grey to white, since black is -1; if 0 is black, pass "
        "2 * images - 1"
    )


def as_x_T(noise: Any, n_sample: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """The given noise as an array, or None; `n_sample` must be its number of images, or 1 for all of them.

    Raises:
        ValueError: as `as_images`, and for another `n_sample`.
    """
    if noise is None:
        return None
    noise = as_images("noise", noise, shape, kinds="f")
    if n_sample not in (1, len(noise)):
        raise ValueError(
            f"noise is for {len(noise)} images, so n_sample must be {len(noise)} or omitted, got {n_sample}"
        )
    return noise


def as_labels(label: Any, n_sample: int, trained: TrainedModel, classifier: TrainedModel | None = None) -> np.ndarray:
    """The classes of `n_sample` images as networks take them, int32 (n_sample,): k + 1 for class k, 0 for none.

    Raises:
        ValueError: if the model, or the classifier that guides it, knows no such class.
    """
    if label is None:
        return np.zeros(n_sample, np.int32)
    if not classifier and not trained.takes_labels:
        raise ValueError(
            "this model was trained without classes, so it takes no label; omit label, give a classifier, or train a "
            "model with --classes"
        )
    names = (classifier or trained).classes
    count = classifier.network.output_shape[-1] if classifier else MOST_CLASSES if names is None else len(names)
    given = [files.normalise_name(one) if isinstance(one, str) else one for one in one_for_each(label, n_sample)]
    return np.array([1 + class_number(one, names, count) for one in given], np.int32)


def class_number(label: str | int, names: Sequence[str] | None, count: int) -> int:
    """The number of one of `count` classes, from 0, given as that integer or by name; `names` is None if unknown."""
    known = ", ".join(names or [])
    if isinstance(label, str):
        if label in (names or []):
            return names.index(label)
        why = f"; the classes are {known}" if known else "; this model knows its classes by number only"
        raise ValueError(f"there is no class {label!r}{why}")
    if isinstance(label, bool) or not isinstance(label, numbers.Integral):
        raise ValueError(f"label must be the name or the number of a class, got {label!r}")
    if not 0 <= label < count:
        raise ValueError(f"label must be a class from 0 to {count - 1}{f' ({known})' if known else ''}, got {label}")
    return int(label)


def read_label(word: str, names: Sequence[str] | None) -> tuple[str | int, str | None]:
    """A label from the command line, where digits are a class's name if there is such a name, else its number.

    Returns:
        The label, and for digits a sentence that says what they mean, else None.
    """
    if not word.isdecimal():
        return word, None
    if word in (names or []):
        return names.index(word), f"--label {word} means the class named {word}, which is number {names.index(word)}"
    number = int(word)
    known = number < len(names or [])
    return number, f"--label {word} means class number {word}, {names[number]}" if known else None


def read_labels(words: Sequence[str], model: str, classifier: str | None) -> tuple[Any, list[str]]:
    """Labels from the command line, for a model or for the classifier that guides it.

    Returns:
        A label, or a list of several, and the sentences of `read_label`.
    """
    trained = open_model(model)
    names = (open_guide("classifier", classifier, trained) or trained).classes
    labels, notes = zip(*(read_label(word, names) for word in words), strict=True)
    return labels[0] if len(words) == 1 else list(labels), list(dict.fromkeys(filter(None, notes)))


def choose_seed(seed: int | None) -> int:
    """The seed itself, or a new one for None. Raises ValueError if it is not an integer from 0."""
    seed = secrets.randbits(31) if seed is None else seed
    check_number("seed", seed, 0, MOST, integer=True)
    return seed


def sample_images(
    plan: Plan,
    trained: TrainedModel,
    asked: Sampling,
    n_sample: int,
    seed: int | None,
    warn: Callable[[str], None] | None = None,
    **run: Any,
) -> np.ndarray:
    """Images of a model along the steps of a plan, with what guides them.

    Args:
        plan, run: see `run_plan`.
        asked: options of sampling, for all that does not concern the plan.
        seed: an integer, or None for another one every time.
        warn: called with a sentence that the user should read, if there is one.

    Returns:
        x_0, float32 (n_sample, height, width, channels).

    Raises:
        FileNotFoundError, ValueError: see `reverse_diffusion.my_sample`.
    """
    guides = {kind: open_guide(kind, guide, trained) for kind, guide in asked.guides().items()}
    labels = as_labels(asked.label, n_sample, trained, guides["classifier"])
    without_class = asked.label is None or (asked.guidance != 1 and not guides["weaker"])
    if warn and without_class and (sentence := model_file.warn_of_no_class(trained)):
        warn(sentence)
    return run_plan(plan, trained, labels, seed=choose_seed(seed), clip=asked.clip, **guides, **run)


def run_plan(
    plan: Plan,
    trained: TrainedModel,
    labels: np.ndarray,
    *,
    seed: int = 0,
    first: int = 0,
    clip: bool = True,
    start: np.ndarray | None = None,
    classifier: TrainedModel | None = None,
    weaker: TrainedModel | None = None,
    task: Task | None = None,
    measurement: tuple[np.ndarray, ...] = (),
    progress: Callable[..., Any] | None = None,
) -> np.ndarray:
    """Runs the steps of a plan for all images in batches.

    Args:
        plan: see `diffusion/sampling.py`.
        labels: (n,) int32, one for each image, see `as_labels`.
        seed: of the noise.
        first: the number of the first image among those of the seed.
        clip: whether estimates of x_0 are clipped.
        start: (n, height, width, channels), where the process starts; None for noise.
        classifier, weaker: what guides, see `open_guide`.
        task, measurement: what images are restored from, if at all: y, mask and noise of each image, float32, see
            `diffusion.measurement.Task.measured`.
        progress: called with the times of the plan and a title, returns an object whose method `show` is called with
            every t, such as `console.Countdown`.

    Returns:
        float32 (n, height, width, channels).
    """
    n_sample = len(labels)
    _, batch_size = even_batches(trained.network, n_sample, gradient=task is not None)
    batch_size = min((size for size in SIZES if size >= batch_size), default=batch_size)
    batches = -(-n_sample // batch_size)
    reverse = compiled_steps(trained, classifier, weaker)(bool(clip), batch_size, task)
    done = []
    for batch in range(batches):
        # The last batch is filled up, not shorter, and so needs no compilation of its own.
        place = np.arange(batch * batch_size, (batch + 1) * batch_size)
        some = None if start is None else np.asarray(start, np.float32)[place % n_sample]
        title = f"{batch + 1}/{batches} " if batches > 1 else ""
        countdown = progress(plan.times, title) if progress else None
        given = {
            "label": labels[place % n_sample],
            "measurement": tuple(part[place % n_sample] for part in measurement),
        }
        for t, x_t in sample(reverse, plan, seed, first + place, some, **given):
            if countdown:
                countdown.show(t)
        done.append(np.asarray(x_t))
    return np.concatenate(done)[:n_sample]
