"""Picture files of any size and kind, read with Pillow into squares of one size."""

import concurrent.futures
import contextlib
import functools
import itertools
import os
import re
import stat
import time
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from data import cache, listing
from support import console, device, files

MAX_PIXELS = 100_000_000  # more are taken for a decompression bomb: decoded, they would fill gigabytes
LARGE = 20_000_000  # pictures of more pixels are decoded one at a time, for the same reason

UNIT, SIGNED, BYTES = (0, 1), (-1, 1), (0, 255)  # what floating-point values mean: those of black and of white
DARK = 32  # gray levels, 1/8 of all: images without a brighter pixel are more likely read wrongly than dark
CLEARLY_NEGATIVE = -0.25  # the darkest of -1 … 1; resampling 0 … 1 overshoots by less

# What to do about files that Pillow cannot read, by their endings. HEIF and AVIF can be read with what is named.
HEIF, AVIF = (".heic", ".heics", ".heif", ".heifs", ".hif"), (".avif", ".avifs")
UNREADABLE = {
    "a RAW photograph; convert it to JPEG or PNG": (
        *(".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".dng", ".raf", ".orf", ".rw2", ".pef"),
        *(".srw", ".x3f", ".3fr", ".erf", ".kdc", ".mrw", ".raw", ".iiq", ".rwl"),
    ),
    "a vector drawing; export it as PNG": (".svg", ".svgz", ".eps", ".ps", ".ai", ".cdr", ".emf", ".wmf"),
    "a document; export its images as JPEG or PNG": (".pdf", ".djvu", ".doc", ".docx", ".ppt", ".pptx", ".odt", ".odp"),
    "a video; extract its frames as JPEG or PNG": (
        *(".mov", ".mp4", ".m4v", ".avi", ".mkv", ".webm", ".wmv", ".flv", ".mpg", ".mpeg", ".mts", ".m2ts", ".3gp"),
    ),
    "an archive; unpack it": (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"),
    "an array file; give it to --data itself": (".npy", ".npz"),
    "a kind that Pillow cannot read; convert it to JPEG or PNG": (
        *(".jxl", ".jxr", ".exr", ".hdr", ".xcf", ".kra", ".clip", ".afphoto", ".dcm", ".nii", ".mat"),
        *(".h5", ".hdf5", ".tfrecord", ".tfrecords", ".parquet"),
    ),
}


@functools.cache
def formats():
    """The formats that can be read, the common ones first, as Pillow asks one after the other."""
    Image.init()
    with contextlib.suppress(Exception):  # optional; a broken installation of it concerns no other files
        import pillow_heif

        pillow_heif.register_heif_opener()
    common = ("JPEG", "PNG", "WEBP")
    return [*common, *(name for name in Image.OPEN if name not in (*common, "EPS"))]  # EPS starts another program


def read_picture(file, image_size, channels, alone=True):
    """One picture, upright, on white, its central square reduced: uint8 (image_size, image_size, channels).

    Args:
        file: a path, or a binary file that can seek.
        alone: False while other threads read pictures; a large one then gives None, to be read later.

    Raises:
        Exception: Pillow raises nearly every kind on broken files.
    """
    with Image.open(file, formats=formats()) as image:
        if image.info.get("Software") == files.SAMPLES:
            raise ValueError("a grid of samples")
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
    if image.mode == "F" or image.mode.startswith("I"):
        factor = 255 / _white(image)
        return image.convert("F").point(lambda value: value * factor + 0)
    if image.has_transparency_data:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _white(image):
    """The value of white in an image file."""
    if image.mode == "F":
        return value_range(np.asarray(image), (UNIT, BYTES))[1]
    if image.mode == "I":  # 32 bits, which Pillow also uses for 16
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            raise ValueError(f"integers from {low} to {high}; 0 … 65535 can be read")
    return 65535 if image.mode.startswith("I") else 255


def value_range(values, ranges):
    """What floating-point values mean: the values of black and of white, one of `ranges`.

    A range fits if its values round to 0 … 255: rounding, of float16 too, may lead out of it by half a gray level.
    As 0 … 1 lies in the others, -1 … 1 must be clearly negative, and 0 … 255 must be integers or clearly more than 1.

    Raises:
        ValueError: if none fits.
    """
    low, high = float(np.min(values)), float(np.max(values))
    if not (np.isfinite(low) and np.isfinite(high)):
        which = "NaN (np.nan)" if np.isnan(low) else "infinity (np.inf)"
        raise ValueError(f"floating-point numbers with {which} among them; pixels have 0 … 1, -1 … 1 or 0 … 255")
    for black, white in ranges:
        half = (white - black) / 510
        if not (black - half < low and high < white + half):
            continue
        if (black, white) == SIGNED and low > CLEARLY_NEGATIVE:
            continue
        if (black, white) == BYTES and high < DARK and not all(np.array_equal(v, np.rint(v)) for v in values):
            continue
        return black, white
    meant = {
        UNIT: "0 … 1",
        SIGNED: f"-1 … 1 (with some below {CLEARLY_NEGATIVE})",
        BYTES: f"0 … 255 (integers, or with some of {DARK} or more)",
    }
    known = " or ".join(meant[pair] for pair in ranges)
    raise ValueError(f"floating-point numbers from {low:g} to {high:g}, not {known}; scale or clip them")


def darkness(name, high, black, white):
    """A list with a sentence if the largest of all values is so small that the images are nearly black; else empty."""
    if high - black >= (white - black) * DARK / 256:
        return []
    advice = (
        f"; multiply the values by {white / high:.4g} if {high:g} is meant to be white" if high > black == 0 else ""
    )
    return [f"{name}: the images are nearly black: the largest value is {high:g}, where {white:g} is white{advice}"]


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
            return _reason(error, name)

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
        Images and left-out files as `read_all` does, and sentences on what was skipped, or is odd.

    Raises:
        ValueError: if there is no picture in it.
    """
    names, closed, skipped = listing.list_files(folder)
    kept, stamp = cache.path_of(folder, image_size, channels), cache.stamp(folder, names, formats())

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
    notes = [skipped] if skipped else []
    if len(images) == 0:
        left_out = [(name, _reason(error, name)) for name, error in closed] + left_out
        reasons = "; ".join([*([summary(left_out)] if left_out else []), *notes]) or "it is empty"
        raise ValueError(f"there is no picture in the folder {printable(folder)}: {reasons}")
    if images.max() < DARK:
        missing = {name for name, _ in left_out}
        brightest = [name for name in names if name not in missing][images.max(axis=(1, 2, 3)).argmax()]
        notes += darkness(printable(brightest), *_largest_value(os.path.join(folder, brightest)))
    return images, [(name, _reason(error, name)) for name, error in closed] + left_out, notes


def _largest_value(path):
    """The largest value in an image file, and those of black and white, in the file's own units."""
    with Image.open(path, formats=formats()) as image:
        deep = image.mode == "F" or image.mode.startswith("I")
        extremes = np.reshape((image if deep else _smooth(image)).getextrema(), (-1, 2))[:3]  # without transparency
        return float(extremes.max()), 0, _white(image)


def _reason(error, name):
    """In a few words, why a file gave no picture."""
    if isinstance(error, FileNotFoundError):
        return "a link to nothing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, OSError) and (advice := _advice(name)):
        return advice
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    return printable(" ".join(str(error).split()))[:160] or type(error).__name__


def _advice(name):
    """What to do about a file of a kind that cannot be read here, or None."""
    ending = os.path.splitext(name)[1].lower()
    if ending in HEIF and "HEIF" not in formats():
        return "HEIF; convert it to JPEG or PNG, or pip install pillow-heif"
    if ending in AVIF and not features.check("avif"):
        return "AVIF; convert it to JPEG or PNG, or pip install --upgrade pillow"
    return next((advice for advice, endings in UNREADABLE.items() if ending in endings), None)


def summary(left_out, shown=3):
    """One sentence on the files that were left out: a few names, of each reason one before others, then a count."""
    first_of = {reason: name for name, reason in reversed(left_out)}
    chosen = sorted(left_out, key=lambda pair: pair[0] != first_of[pair[1]])[:shown]
    first = ", ".join(f"{printable(name)} ({reason})" for name, reason in chosen)
    more = f", and {len(left_out) - shown} more" if len(left_out) > shown else ""
    return f"{len(left_out)} file{'s' * (len(left_out) > 1)} left out: {first}{more}"


def printable(name):
    """A file name, whatever bytes it is made of, as text that a terminal can show on one line."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)
