"""Pictures in: drawings made by code, a folder of photographs, or an array file.

    images, report = load_images("drawings", image_size=32)     # uint8 (2048, 32, 32, 3)

`python -m data cats` prepares the cats of the slides (see `data/cats.py`).
"""

import dataclasses
import hashlib
import os

import numpy as np

from data import arrays, drawings, image_files

CATS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cats64.npz")


@dataclasses.dataclass
class Report:
    """What was read, and what was left out of it.

    `source` is `'drawings'` or an absolute path, `photographs` says whether the pictures are such
    (they may be mirrored, drawings and unknown arrays not), `notes` are sentences on how the source
    was read, and `left_out` has a pair (file name, reason) for every file that gave no picture.
    """

    source: str
    photographs: bool = False
    notes: list = dataclasses.field(default_factory=list)
    left_out: list = dataclasses.field(default_factory=list)

    def __str__(self):
        return "\n".join([*self.notes, *([image_files.summary(self.left_out)] if self.left_out else [])])


def load_images(source, image_size, channels=3):
    """Reads all pictures of a source, each cropped to its central square and reduced.

    Args:
        source: `'drawings'`, `'new-drawings'` (as many others), a folder (with its sub-folders), or a `.npy` or
            `.npz` file. A folder called `drawings` is `'./drawings'`, or a `Path`.
        image_size: height and width of the result in pixels.
        channels: 3 for colour, 1 for gray.

    Returns:
        The images, uint8 (N, image_size, image_size, channels), and a `Report`.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: for a source that holds no pictures, or values that are none; the sentence says
            what was found.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (gray) or 3 (colour), got {channels}")
    if not (isinstance(image_size, int) and image_size > 0):
        raise ValueError(f"image_size must be a whole number of pixels, got {image_size}")
    if source in ("drawings", "new-drawings"):  # the second for what was trained on the first
        images = drawings.draw_cats(image_size, seed=int(source != "drawings"))
        report = Report(source, notes=namesake(source, "the built-in drawings"))
        if channels == 1:
            images = np.stack([image_files.fit(image, image_size, channels) for image in images])
        return images, report

    source = os.fspath(source)
    path = os.path.abspath(source)
    name = image_files.printable(source)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no folder or file {name}")
    if os.path.isdir(path):
        images, left_out, notes = image_files.read_folder(path, image_size, channels)
        return images, Report(path, photographs=True, notes=notes, left_out=left_out)
    if os.path.isfile(path) and path.endswith((".npy", ".npz")):
        images, photographs, notes = arrays.read_array_file(path, image_size, channels)
        return images, Report(path, photographs, notes)
    raise ValueError(f"{name} is neither a folder of pictures nor a .npy or .npz file")


def namesake(source, meaning):
    """A list with a sentence if a folder has the name of a source that is none; else empty."""
    if not os.path.isdir(source):
        return []
    return [f"{source} is taken as {meaning}; for the folder of that name write .{os.sep}{source}"]


def digest(images):
    """A fingerprint of the pixels: the same pictures in the same order have the same, wherever they lie."""
    fingerprint = hashlib.blake2b(repr(images.shape).encode(), digest_size=16)
    fingerprint.update(np.ascontiguousarray(images))
    return fingerprint.hexdigest()


def batches(images, batch_size, seed, epoch, start=0, flip=False):
    """The pictures of one epoch, in an order of its own, as batches for training.

    Order and mirroring depend on the seed, the epoch and the place in it alone, so that an epoch
    can be entered anywhere.

    Args:
        images: uint8 (N, height, width, channels).
        start: how many pictures of the epoch have been used before.
        flip: mirrors every second picture, at random.

    Yields:
        float32 (batch_size, height, width, channels) in [-1, 1]; the last batch may be smaller.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(images))
    mirrored = rng.random(len(images)) < (0.5 if flip else 0)
    for first in range(start, len(images), batch_size):
        place = slice(first, first + batch_size)
        batch = images[order[place]]
        batch[mirrored[place]] = batch[mirrored[place], :, ::-1]
        yield scaled(batch)


def scaled(images):
    """Pictures as the network sees them: uint8 0 … 255 → float32 in [-1, 1]. `ddpm.to_pixels` leads back."""
    return images / np.float32(127.5) - 1
