"""Picture files of any size and kind, read with Pillow into squares of one size."""

import concurrent.futures
import itertools
import os
import re
import stat
import time
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

import console
import device
from data import cache

MAX_PIXELS = 100_000_000  # more are taken for a decompression bomb: decoded, they would fill gigabytes
LARGE = 20_000_000  # pictures of more pixels are decoded one at a time, for the same reason

Image.init()
COMMON = ("JPEG", "PNG", "WEBP")  # tried first: Pillow asks one format after the other
FORMATS = [*COMMON, *(name for name in Image.OPEN if name not in (*COMMON, "EPS"))]  # EPS starts another program


def read_picture(file, image_size, channels, alone=True):
    """One picture, upright, on white, its central square reduced: uint8 (image_size, image_size, channels).

    Args:
        file: a path, or a binary file that can seek.
        alone: False while other threads read pictures; a large one then gives None, to be read later.

    Raises:
        Exception: Pillow raises nearly every kind on broken files.
    """
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}×{height} pixels are more than {MAX_PIXELS:,}")
        image.draft(None, (2 * image_size, 2 * image_size))  # lets the JPEG decoder skip what is reduced away
        if image.width * image.height > LARGE and not alone:
            return None
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:  # a picture whose orientation cannot be read is used as it lies
            pass
        return fit(image, image_size, channels)


def fit(image, image_size, channels):
    """The central square of a Pillow image or a uint8 array (height, width, 1 or 3), reduced, on white."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze(axis=-1) if image.shape[-1] == 1 else image)
    image = ImageOps.fit(_smooth(image), (image_size, image_size), Image.Resampling.LANCZOS)
    if image.mode == "F":
        image = Image.fromarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(image).reshape(image_size, image_size, channels)


def _smooth(image):
    """The picture in a mode whose values can be averaged: L, RGB, RGBA, or F for more than 8 bits."""
    if image.mode.startswith("I"):  # 16 bits
        return image.convert("F").point(lambda value: value * (1 / 257) + 0)
    if image.mode == "F":
        low, high = np.min(image), np.max(image)  # NaN if there is one, unlike getextrema()
        if not (0 <= low <= high <= 255):
            raise ValueError(f"floating-point pixels from {low:g} to {high:g}; 0 … 1 or 0 … 255 can be read")
        return image.point(lambda value: value * 255 + 0) if high <= 1 else image
    if image.has_transparency_data:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def read_all(names, open_picture, image_size, channels):
    """Reads many pictures, as many at a time as there are cores.

    In threads: Pillow decodes and resizes outside Python's lock, and threads work in a notebook, on
    standard input and in a script without a main guard, where new processes would not.

    Args:
        names: their names.
        open_picture: a function of a name that returns what `read_picture` takes.

    Returns:
        uint8 (N, image_size, image_size, channels) in the order of the names, and a list of pairs
        (name, reason) of those that gave no picture.
    """

    def read(name, alone=False):
        try:
            return read_picture(open_picture(name), image_size, channels, alone)
        except Exception as error:
            return _reason(error)

    def read_some(some):
        return [read(name) for name in some]

    images = np.empty((len(names), image_size, image_size, channels), np.uint8)
    kept, left_out = 0, []
    some_at_a_time = [names[k : k + 16] for k in range(0, len(names), 16)]  # handing over each alone takes time
    pool = concurrent.futures.ThreadPoolExecutor(device.cores())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of files that are left out, or read all the same
            results = itertools.chain.from_iterable(pool.map(read_some, some_at_a_time))
            for name, result in zip(names, _with_progress(results, len(names)), strict=True):
                if result is None:
                    result = read(name, alone=True)
                if isinstance(result, str):
                    left_out.append((name, result))
                else:
                    images[kept] = result
                    kept += 1
    finally:
        pool.shutdown(cancel_futures=True)
    return images[:kept], left_out


def _with_progress(results, count):
    """Passes the results on, with a progress bar once it takes more than a moment."""
    bar, start = None, time.monotonic()
    for done, result in enumerate(results, 1):
        if bar is None and time.monotonic() - start > 2:
            bar = console.Bar(count, "picture")
        if bar is not None:
            bar.update(done)
        yield result


def read_folder(folder, image_size, channels):
    """All pictures of a folder and its sub-folders, in the order of their names.

    What took long to read is kept, see `data/cache.py`.

    Returns:
        Images and left-out files as `read_all` does.

    Raises:
        ValueError: if there is no picture in it.
    """
    names, closed = _files(folder)
    kept, stamp = cache.path_of(folder, image_size, channels), cache.stamp(folder, names)

    def open_picture(name):
        path = os.path.join(folder, name)
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise ValueError("not a regular file")
        if status.st_size == 0:
            raise ValueError("empty")
        return path

    found, start = cache.load(kept, stamp), time.monotonic()
    images, left_out = found or read_all(names, open_picture, image_size, channels)
    if not found and time.monotonic() - start > cache.WORTH:
        cache.save(kept, stamp, images, left_out)
    left_out = closed + left_out
    if len(images) == 0:
        reasons = summary(left_out) if left_out else "it is empty"
        raise ValueError(f"there is no picture in the folder {printable(folder)}: {reasons}")
    return images, left_out


def _files(folder):
    """Names of all files below a folder, relative to it, and what could not be listed, with the reason."""
    names, closed, seen = [], [], set()

    def note(error):
        closed.append((os.path.relpath(error.filename, folder), _reason(error)))

    for root, folders, files in os.walk(folder, onerror=note, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        names += [os.path.relpath(os.path.join(root, file), folder) for file in files]
    return sorted(names), closed


def _reason(error):
    """In a few words, why a file gave no picture."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, FileNotFoundError):
        return "a link to nothing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return printable(" ".join(str(error).split()))[:100] or type(error).__name__


def summary(left_out, shown=3):
    """One sentence on the files that were left out: the first few names, then a count."""
    first = ", ".join(f"{printable(name)} ({reason})" for name, reason in left_out[:shown])
    more = f", and {len(left_out) - shown} more" if len(left_out) > shown else ""
    return f"{len(left_out)} file{'s' * (len(left_out) > 1)} left out: {first}{more}"


def printable(name):
    """A file name, whatever bytes it is made of, as text that a terminal can show on one line."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)
