"""Image sources: drawings made by code, published sets, folders of photographs, and array files.

    images, report = load_images("drawings", image_size=32)     # uint8 (2048, 32, 32, 3)

`python -m data cats` prepares the cats of the slides (see `data/cats.py`).
"""

import hashlib
import os
from collections.abc import Callable, Iterator

import numpy as np

from data import arrays, image_files, listing, named, pixels
from data.cats import CATS as CATS
from data.classes import label_files, note_misplaced, read_labels
from data.report import Report as Report
from support.scale import Scale


def load_images(
    source: str | os.PathLike,
    image_size: int | str | tuple[int, int],
    channels: int = 3,
    classes: bool = False,
    recognise: Callable[[np.ndarray], bool] | None = None,
    bit_depth: int | None = 8,
    scale: Scale | None = None,
) -> tuple[np.ndarray, Report]:
    """Reads all images of a source, crops the middle of each to one shape and resizes it.

    Args:
        source: a name of `named.SOURCES` such as `'drawings'` or `'cifar10'`, a folder (with its sub-folders), or a
            `.npy` or `.npz` file. A folder called `drawings` is written as `'./drawings'` or as a `Path`.
        image_size: height and width of the result in pixels: one integer for both, a pair, or `'48x64'`.
        channels: 3 for colour, 1 for grey, which are converted into each other; any other number, up to 64, is that of
            the array, or of the bands and pages of the files.
        classes: whether the images must have classes, which the report then holds: those of a named set, sub-folders
            for a folder, the array `labels` for a `.npz` file.
        recognise: whether a model was trained on these images. Earlier versions sorted file names as they are stored; a
            folder whose images are recognised only in that order keeps it.
        bit_depth: 8; 16 to keep more of arrays and of files that have it; None for 16 where an array needs it.
        scale: of a model, whose images others are read for; with more than 8 bits it replaces `bit_depth`.

    Returns:
        The images, uint8 (N, height, width, channels), uint16 for more than 8 bits, and a `Report`.

    Raises:
        FileNotFoundError: if the source does not exist.
        OSError: if a published set cannot be downloaded.
        ValueError: if an argument is invalid, the source holds no images or no classes, or its values are not pixel
            values.
    """
    if not (isinstance(channels, int) and 1 <= channels <= pixels.MOST_CHANNELS):
        raise ValueError(f"channels must be an integer from 1 to {pixels.MOST_CHANNELS}, got {channels}")
    scale = None if scale and scale.levels == 255 else scale  # arrays of 8 bits each have a range of their own
    size, levels = (
        pixels.as_size(image_size),
        scale.levels if scale else pixels.LEVELS_OF_16_BITS if bit_depth == 16 else 255,
    )
    own = Scale(0, levels, levels)  # of images other than arrays
    if levels % 255 and not os.fspath(source).endswith((".npy", ".npz")):
        raise ValueError(
            f"{source}: the model was trained on values {scale.black:g} … {scale.white:g} of an array, which other "
            "images do not have; name a .npy or .npz file"
        )
    if named.find(source):
        images, report = named.read(source, size, channels, levels, classes)
        report.scale = own
        return images, report

    source = os.fspath(source)
    if not source:
        raise ValueError("the source of images is empty; name drawings, a folder, or a .npy or .npz file")
    path = os.path.abspath(source)
    name = image_files.escape_name(source)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no folder or file {name} to read images from{named.suggest(source)}")
    if os.path.isdir(path):
        images, names, skipped, notes = image_files.read_folder(path, size, channels, levels)
        order = listing.earlier_order(names) if recognise else None
        if order and not recognise(images) and recognise(images[order]):
            images, names = images[order], [names[k] for k in order]
        report = Report(path, photographs=True, notes=notes, skipped=skipped, scale=own)
        if classes:
            report.labels, report.classes = label_files(names, path)
            report.notes += note_misplaced(names, path)
        return images, report
    if os.path.isfile(path) and path.endswith((".npy", ".npz")):
        images, photographs, scale, notes = arrays.read_array_file(path, size, channels, bit_depth, scale)
        report = Report(path, photographs, notes, scale=scale)
        if classes:
            report.labels, report.classes = read_labels(path, len(images))
        return images, report
    raise ValueError(f"{name} is neither a folder of images nor a .npy or .npz file")


def digest(images: np.ndarray) -> str:
    """Returns a fingerprint of shape and pixels, independent of where the images are stored."""
    fingerprint = hashlib.blake2b(repr(images.shape).encode(), digest_size=16)
    fingerprint.update(np.ascontiguousarray(images))
    return fingerprint.hexdigest()


def batches(
    images: np.ndarray,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    flip: bool = False,
    labels: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yields the images of one epoch as training batches, in an order of its own, with their labels.

    Order and mirroring depend only on the seed, the epoch and the position in it, so that training can resume in the
    middle of an epoch.

    Args:
        images: uint8 (N, height, width, channels).
        start: how many images of the epoch have already been used.
        flip: whether to mirror half of the images, chosen at random, from left to right.
        labels: (N,) int, the class of each image, or None.

    Yields:
        uint8 (batch_size, height, width, channels), and (batch_size,) int or None; the last batch may be smaller.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(images))
    mirrored = rng.random(len(images)) < (0.5 if flip else 0)
    for first in range(start, len(images), batch_size):
        chosen = slice(first, first + batch_size)
        batch = images[order[chosen]]
        batch[mirrored[chosen]] = batch[mirrored[chosen], :, ::-1]
        yield batch, None if labels is None else labels[order[chosen]]
