"""Files out, always whole: whatever is interrupted, the old file or the new one is there, complete."""

import contextlib
import io
import os
import shutil

import numpy as np
from PIL import Image


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
    """Raises the OSError that writing to `path` would end in, and removes what a killed writer left.

    Raises:
        ValueError: if it is a folder.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; name a file")
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


def check_image_name(option, path):
    """Checks that the ending of `path` names an image format that Pillow can write, in grey and in colour.

    Pillow also lists formats that it only reads, that need a plug-in, or that take few colours, so this is a trial.

    Raises:
        ValueError: if it does not; the sentence names the option.
    """
    format_name = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    try:
        for mode in "L", "RGB":
            Image.new(mode, (8, 8)).save(io.BytesIO(), format_name)
    except Exception as error:  # each format fails in its own way
        raise ValueError(
            f"{option} must end in the name of an image format that can be written, such as .png, got {path}"
        ) from error


def save_grid(images, path, columns=None):
    """Writes images (n, height, width, 1 or 3), 0 … 255, as one picture, see `grid`."""
    picture = grid(images, columns)
    with replacing(path) as draft:
        Image.fromarray(picture.squeeze(axis=-1) if picture.shape[-1] == 1 else picture).save(draft)
