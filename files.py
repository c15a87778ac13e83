"""Files out, always whole: whatever is interrupted, the old file or the new one is there, complete."""

import contextlib
import os
import shutil

import numpy as np
from PIL import Image, PngImagePlugin

SAMPLES = "diffusion model samples"  # what a grid names as its software, so that it is no training image


@contextlib.contextmanager
def replacing(path):
    """Gives a path to write to; when the block ends well, that file takes the place of `path`.

    The new file is made in a folder of its own beside the target, `.NAME.saving`, where everything
    else that a writer leaves (a killed one, too) is found and removed. A linked file stays a link.

    Raises:
        OSError: if it cannot be written; the old file is untouched then.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    workshop = os.path.join(folder, f".{name}.saving")
    shutil.rmtree(workshop, ignore_errors=True)
    os.mkdir(workshop)
    try:
        draft = os.path.join(workshop, name)
        yield draft
        _to_disk(draft)
        os.replace(draft, path)
        _to_disk(folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def check_writable(path):
    """Raises the OSError that writing to `path` would end in, and removes what a killed writer left."""
    with contextlib.suppress(_Unwritten), replacing(path):
        raise _Unwritten


class _Unwritten(Exception):
    pass


def _to_disk(path):
    if os.path.isdir(path) and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_array(array, path):
    """Writes an array as a `.npy` file."""
    with replacing(path) as draft, open(draft, "wb") as file:
        np.save(file, array, allow_pickle=False)


def grid(images, columns=None):
    """Images (n, height, width, 1 or 3), 0 … 255, as one uint8 image, about as wide as high if not told."""
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    cells = np.full((rows, columns, height + 2, width + 2, channels), 255, np.uint8)
    cells.reshape(-1, height + 2, width + 2, channels)[:n, 1:-1, 1:-1] = images
    return cells.swapaxes(1, 2).reshape(rows * (height + 2), columns * (width + 2), channels)


def save_grid(images, path, columns=None):
    """Writes images (n, height, width, 1 or 3), 0 … 255, as one picture, see `grid`."""
    picture, mark = grid(images, columns), PngImagePlugin.PngInfo()
    if len(images) > 1:
        mark.add_text("Software", SAMPLES)
    with replacing(path) as draft:
        Image.fromarray(picture.squeeze(axis=-1) if picture.shape[-1] == 1 else picture).save(draft, pnginfo=mark)
