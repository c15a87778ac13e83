"""What `my_sample` and `invert` stand on: models that stay open, compiled steps that are cached, batches, labels.

Nothing here prints: progress and warnings are functions that are given.
"""

import functools
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from ddpm import Schedule
from diffusion import model_file
from diffusion.reverse import ReverseSteps, even_batches
from diffusion.sampling import Plan, sample
from support import files

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of batches, as each costs 10 MiB that TensorFlow never gives back
MOST_CLASSES = 2**31 - 1  # that an int32 holds
MODELS = 2  # whose compiled steps are cached


def open_model(model: str | os.PathLike | keras.Model) -> tuple[keras.Model, tuple[int, ...]]:
    """A model given as itself or by its path, and the shape of its images."""
    model, name = as_model("model", model)
    model_file.check_network(model, name or "this")
    return model, tuple(model.inputs[0].shape[1:])


def open_guide(kind: str, guide: str | os.PathLike | keras.Model | None, model: keras.Model) -> keras.Model | None:
    """A `'classifier'` or a `'weaker'` model given as itself or by its path, or None.

    Raises:
        FileNotFoundError, ValueError: if there is none, or if it does not fit the model.
    """
    if guide is None:
        return None
    classifier = kind == "classifier"
    guide, name = as_model(kind, guide, classifier)
    model_file.check_guide(guide, name or f"this {'classifier' if classifier else 'weaker model'}", model, classifier)
    return guide


def as_model(
    kind: str, model: str | os.PathLike | keras.Model, classifier: bool = False
) -> tuple[keras.Model, str | None]:
    """A model given as itself or by its path, and the path, or None; raises ValueError if it is neither."""
    if isinstance(model, str | os.PathLike):
        return load(*load_key(model, classifier)), os.fspath(model)
    if not getattr(model, "inputs", None):
        raise ValueError(f"{kind} must be a path, or a Keras model that has been built, got {type(model).__name__}")
    return model, None


def load_key(path: str | os.PathLike, classifier: bool = False) -> tuple[str, tuple[int, ...] | None, bool]:
    """The arguments of `load`: a file's real path, a stamp that differs when it has changed, and what it must hold."""
    path = os.path.realpath(model_file.locate(path))
    status = os.stat(path) if os.path.exists(path) else None
    return path, status and (status.st_ino, status.st_mtime_ns, status.st_size), classifier


@functools.lru_cache(maxsize=2 * MODELS)  # each with one that guides it
def load(path: str, stamp: tuple[int, ...] | None, classifier: bool) -> keras.Model:
    """The model in a file, cached until two others or newer ones are asked for."""
    return model_file.open_model(path, classifier=classifier)


@functools.lru_cache(maxsize=MODELS)
def reverse_steps(
    model: keras.Model, classifier: keras.Model | None, weaker: keras.Model | None
) -> tuple[Schedule, Callable[[bool, int], ReverseSteps]]:
    """The schedule of a model, and a function of (clip, batch_size) that returns its compiled steps, guided or not.

    They are cached as long as the model is one of the latest, since they take seconds to compile.
    """
    sched, target = model_file.diffusion_of(model)
    weaker = weaker and (weaker, model_file.diffusion_of(weaker)[1])

    @functools.cache
    def steps_for(clip, batch_size):
        return ReverseSteps(model, sched, batch_size, target, clip, classifier=classifier, weaker=weaker)

    return sched, steps_for


def check_guidance(label: Any, guidance: float, classifier: keras.Model | None, weaker: keras.Model | None) -> None:
    """Raises ValueError if guidance has nothing to lead towards or away from, or no effect."""
    if weaker and guidance == 1:
        raise ValueError("with guidance 1 a weaker model has no effect; 1.5 to 2 is usual")
    if label is None and not weaker and (guidance != 1 or classifier):
        raise ValueError(
            "a classifier needs a label to guide to"
            if classifier
            else f"guidance {guidance} needs a label to guide to, or a weaker model to lead away from"
        )


def as_images(name: str, images: Any, shape: tuple[int, ...], kinds: str = "uif") -> np.ndarray:
    """Arrays, tensors or lists of numbers, of NumPy's `kinds`, as an array (n, *shape), n ≥ 1.

    Raises:
        ValueError: wrong shape or dtype, or non-finite values.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != shape or not len(images):
        wanted = ", ".join(map(str, ("n", *shape)))
        raise ValueError(f"{name} must be an array of shape ({wanted}), n at least 1, got {images.shape}")
    if images.dtype.kind not in kinds or not np.all(np.abs(images) < 1e30):
        what = "floating-point numbers" if kinds == "f" else "numbers"
        raise ValueError(f"{name} must be an array of finite {what}, got {images.dtype}")
    return images


def as_labels(label: Any, n_sample: int, model: keras.Model, classifier: keras.Model | None = None) -> np.ndarray:
    """The classes of `n_sample` images as networks take them, int32 (n_sample,): k + 1 for class k, 0 for none.

    Raises:
        ValueError: if the model, or the classifier that guides it, knows no such class.
    """
    if label is None:
        return np.zeros(n_sample, np.int32)
    if not classifier and len(model.inputs) < 3:
        raise ValueError(
            "this model knows no classes, so it takes no label; train one with --classes, or give a classifier"
        )
    names = model_file.classes_of(classifier or model)
    count = classifier.output_shape[-1] if classifier else MOST_CLASSES if names is None else len(names)
    one = isinstance(label, str) or np.ndim(label) == 0
    given = [label] * n_sample if one else list(label)
    if len(given) != n_sample:
        raise ValueError(f"label must be one class, or one for each of the {n_sample} images, got {len(given)}")
    given = [files.normalise_name(one) if isinstance(one, str) else one for one in given]
    return np.array([1 + class_number(one, names, count) for one in given], np.int32)


def class_number(label: str | int, names: Sequence[str] | None, count: int) -> int:
    """The number of one of `count` classes, from 0, given as that integer or by name; `names` is None if unknown."""
    known = ", ".join(names or [])
    if isinstance(label, str):
        if label in (names or []):
            return names.index(label)
        why = f"; the classes are {known}" if known else ": this model knows its classes by number only"
        raise ValueError(f"there is no class {label!r}{why}")
    if isinstance(label, bool) or not isinstance(label, numbers.Integral):
        raise ValueError(f"label must be the name or the number of a class, got {label!r}")
    if not 0 <= label < count:
        raise ValueError(f"label must be a class from 0 to {count - 1}{f' ({known})' if known else ''}, got {label}")
    return int(label)


def run_plan(
    plan: Plan,
    steps_for: Callable[[bool, int], ReverseSteps],
    model: keras.Model,
    labels: np.ndarray,
    *,
    seed: int = 0,
    clip: bool = True,
    start: np.ndarray | None = None,
    progress: Callable[..., Any] | None = None,
) -> np.ndarray:
    """Runs the steps of a plan for all images in batches.

    Args:
        plan: see `diffusion/sampling.py`.
        steps_for: see `reverse_steps`.
        labels: (n,) int32, one for each image, see `as_labels`.
        seed: whose noise the images get.
        clip: whether estimates of x_0 are clipped.
        start: (n, height, width, channels), where the process starts; None for noise.
        progress: makes of the times of the plan and a title something whose method `show` is called with every t, such
            as `console.Countdown`.

    Returns:
        float32 (n, height, width, channels).
    """
    n_sample = len(labels)
    _, batch_size = even_batches(model, n_sample)
    batch_size = min((size for size in SIZES if size >= batch_size), default=batch_size)
    batches, steps = -(-n_sample // batch_size), steps_for(clip, batch_size)
    done = []
    for batch in range(batches):
        # The last batch is filled up, not shorter, and so needs no compilation of its own.
        index = np.arange(batch * batch_size, (batch + 1) * batch_size)
        some = None if start is None else np.asarray(start, np.float32)[index % n_sample]
        title = f"{batch + 1}/{batches} " if batches > 1 else ""
        countdown = progress(plan.times, title) if progress else None
        for t, x_t in sample(steps, plan, seed, index, some, label=labels[index % n_sample]):
            if countdown:
                countdown.show(t)
        done.append(np.asarray(x_t))
    return np.concatenate(done)[:n_sample]
