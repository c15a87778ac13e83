"""The classes of images: sub-folders of a folder, or an array of labels beside the images.

Labels are the numbers of classes, int32 (N,), 0 for the first; -1 means no class.
"""

import os
from collections.abc import Sequence

import numpy as np

from data import image_files
from support.files import normalise_name

ADVICE = "or omit --classes"
OWN = f"put the images of each class into a folder of its own, {ADVICE}"
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}  # names of folders
ARRAYS = "labels", "class_names", "photographs"


def label_files(names: Sequence[str], folder: str) -> tuple[np.ndarray, list[str]]:
    """The classes of image files, each the first sub-folder on its path. Files beside the sub-folders have none.

    Args:
        names: of the files, relative to the folder.

    Returns:
        The labels, and the names of the classes in alphabetical order.

    Raises:
        ValueError: if there are no sub-folders.
    """
    first = [normalise_name(name.split(os.sep)[0]) if os.sep in name else None for name in names]
    classes = sorted({name for name in first if name is not None})
    if not classes:
        raise ValueError(f"{image_files.escape_name(folder)} has no sub-folders with images, so no classes; {OWN}")
    number = {None: -1, **{name: k for k, name in enumerate(classes)}}
    return np.array([number[name] for name in first], np.int32), [image_files.escape_name(name) for name in classes]


def note_misplaced(names: Sequence[str], folder: str) -> list[str]:
    """A list with a note if the first sub-folders are probably not classes (splits, or a single one), else empty.

    Args:
        names: of the image files, relative to the folder.
    """
    first = list(dict.fromkeys(name.split(os.sep)[0] for name in names if os.sep in name))
    splits = all(name.casefold() in SPLITS for name in first)
    if len(first) != 1 and not splits:
        return []
    inner = min(first, key=lambda name: not name.casefold().startswith("train"))
    has_folders = any(name.startswith(inner + os.sep) and name.count(os.sep) > 1 for name in names)
    what = f"classes {', '.join(first)}, which look like splits of the images" if splits else f"one class, {inner}"
    way_out = f"if its folders are the classes, give {os.path.join(folder, inner)} instead" if has_folders else OWN
    return [image_files.escape_name(f"{folder} has {what}; {way_out}")]


def read_labels(path: str, count: int) -> tuple[np.ndarray, list[str]]:
    """The classes in a `.npz` file: its arrays `labels`, integers from 0, and `class_names`, if it has that.

    Without names they are called "0", "1", …, except in files of earlier `python -m data cats`: there cat and dog.

    Args:
        count: how many images there are.

    Raises:
        ValueError: if there is no such array, or it does not fit the images.
    """
    name = image_files.escape_name(path)
    members = {}
    if path.endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as archive:
                members = {key: archive[key] for key in ARRAYS if key in archive.files}
        except Exception as error:  # corrupt files raise nearly every kind
            raise ValueError(f"{name}: the array labels cannot be read: {error}") from error
    if "labels" not in members:
        raise ValueError(
            f"{name} has no array labels, so no classes; add one with an integer from 0 for each image, {ADVICE}"
        )
    labels = np.asarray(members["labels"])
    if labels.shape != (count,) or labels.dtype.kind not in "ui" or labels.min() < 0:
        raise ValueError(
            f"{name}: labels must be {count:,} integers of at least 0, one for each image, got {labels.dtype} of shape "
            f"{labels.shape}"
        )
    needed = int(labels.max()) + 1
    if "class_names" in members:
        given = members["class_names"].ravel()
        classes = [normalise_name(text.decode() if isinstance(text, bytes) else str(text)) for text in given]
    else:
        cats_or_dogs = "photographs" in members and needed <= 2
        classes = ["cat", "dog"][:needed] if cats_or_dogs else [str(k) for k in range(min(needed, count + 1))]
    if len(classes) < needed or len(set(classes)) < len(classes):
        raise ValueError(
            f"{name}: class_names must hold at least {needed} names, all different, as labels go up to {needed - 1}, "
            f"got {len(classes)} names, {len(set(classes))} of them different"
        )
    return labels.astype(np.int32), classes


def match_classes(labels: np.ndarray | None, classes: Sequence[str], known: Sequence[str]) -> np.ndarray | None:
    """Labels renumbered from positions in `classes` to positions in `known`, which contains all of them."""
    number = {name: k for k, name in enumerate(known)}
    numbers = np.array([*(number[name] for name in classes), -1], np.int32)  # the last one for -1, no class
    return None if labels is None else numbers[labels]


def describe_classes(labels: np.ndarray, classes: Sequence[str]) -> str:
    """How many images each class has: `cat 10,000, dog 5,000`."""
    counts = [f"{name} {np.sum(labels == k):,}" for k, name in enumerate(classes)]
    if len(counts) > 12:
        counts = [*counts[:11], f"and {len(counts) - 11} more"]
    without = int(np.sum(labels < 0))
    return ", ".join([*counts, *([f"none {without:,}"] if without else [])])
