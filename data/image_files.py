"""Reads image files of any size and format with Pillow, as images of one size."""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from data import cache, listing, pixels
from support import console, device, grids
from support.scale import Scale

T = TypeVar("T")

MAX_PIXELS = 100_000_000  # larger images are skipped as decompression bombs: decoded, they would fill gigabytes
LARGE = 20_000_000  # images of more pixels are decoded one at a time, to limit memory

# Advice on files that Pillow cannot read, by their extensions. HEIF and AVIF need the packages that `_suggest` names.
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
    "a format that Pillow cannot read; convert it to JPEG or PNG": (
        *(".jxl", ".jxr", ".exr", ".hdr", ".xcf", ".kra", ".clip", ".afphoto", ".dcm", ".nii", ".mat"),
        *(".h5", ".hdf5", ".tfrecord", ".tfrecords", ".parquet"),
    ),
}


@functools.cache
def readable_formats() -> list[str]:
    """Returns Pillow's names of the formats that can be read, the common ones first, as Pillow tries them in order."""
    Image.init()
    with contextlib.suppress(Exception):  # optional; other files do not need it, even if its installation is broken
        import pillow_heif

        pillow_heif.register_heif_opener()
    common = ("JPEG", "PNG", "WEBP")
    return [*common, *(name for name in Image.OPEN if name not in (*common, "EPS"))]  # EPS starts another program


def read_image(
    file: str | BinaryIO, size: tuple[int, int], channels: int, levels: int = 255, allow_large: bool = True
) -> np.ndarray | None:
    """Reads one image: upright, on white, its middle cropped to the shape of `size` and resized.

    Args:
        file: a path, or a seekable binary file.
        size: (height, width).
        channels: 1 for grey, 3 for colour; any other number is that of the bands and pages of the file.
        levels: 255, or 65535 to keep 16 bits.
        allow_large: False while other threads read images.

    Returns:
        uint8 or uint16 (*size, channels), or None if the image is large and `allow_large` is False.

    Raises:
        Exception: of nearly any kind, as Pillow does for broken files.
    """
    with Image.open(file, formats=readable_formats()) as image:
        if image.info.get("Software") == grids.SAMPLES:
            raise ValueError("a sample grid")
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}×{height} pixels are more than {MAX_PIXELS:,}")
        image.draft(None, (2 * max(size), 2 * max(size)))  # lets the JPEG decoder reduce the image, which is faster
        if image.width * image.height > LARGE and not allow_large:
            return None
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:  # broken EXIF data: the orientation is unknown, the pixels are not
            pass
        return pixels.crop_and_resize(image, size, channels, levels)


def read_one(path: str, size: tuple[int, int], channels: int) -> np.ndarray:
    """Reads one image as `read_image` does. Raises ValueError, which says in one sentence why it cannot be read."""
    try:
        return read_image(path, size, channels)
    except Exception as error:
        raise ValueError(f"{escape_name(path)} cannot be read: {_describe_error(error, path)}") from error


def read_mask(path: str, photo: str, size: tuple[int, int]) -> np.ndarray:
    """Where the pixels of a photo are known: where the mask is white, or, if that is the photo itself, not transparent.

    Returns:
        bool (height, width), cropped and resized as the photo is.

    Raises:
        ValueError: if it cannot be read, has another size than the photo, or a photo without transparency is its own.
    """
    try:
        with Image.open(path, formats=readable_formats()) as mask, Image.open(photo) as other:
            mask, wanted = ImageOps.exif_transpose(mask), ImageOps.exif_transpose(other).size
            transparent = mask.has_transparency_data
            plane = mask.convert("RGBA").getchannel("A") if path == photo else mask.convert("L")
    except Exception as error:
        raise ValueError(f"{escape_name(path)} cannot be read: {_describe_error(error, path)}") from error
    if path == photo and not transparent:
        raise ValueError(f"{escape_name(path)} has no transparent pixels to fill in; name a mask with --mask")
    if plane.size != wanted:
        raise ValueError(
            f"{escape_name(path)} has {plane.width}×{plane.height} pixels, and {escape_name(photo)} "
            f"{wanted[0]}×{wanted[1]}; a mask must have the size of the image"
        )
    limit = 254 if path == photo else 128  # half-transparent pixels were mixed with white
    return pixels.crop_and_resize(plane, size, 1)[..., 0] >= limit


def read_images(
    files: Iterable[tuple[str, T]],
    count: int,
    open_image: Callable[[T], str | BinaryIO],
    size: tuple[int, int],
    channels: int,
    levels: int = 255,
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Reads many images, in as many threads as there are cores.

    Threads suffice, as Pillow decodes and resizes outside Python's lock. Unlike processes they also work in a notebook,
    on standard input and in a script without a main guard.

    Args:
        files: pairs of a name and what `open_image` opens; a stream is read only some hundred images in advance.
        count: how many there are at most.
        open_image: a function that returns what `read_image` takes.
        size, channels, levels: see `read_image`.

    Returns:
        uint8 or uint16 (N, *size, channels) in the order of the files, and a pair (name, reason) for every
        image that could not be read.
    """

    def read(name, file, allow_large=False):
        try:
            return read_image(open_image(file), size, channels, levels, allow_large)
        except Exception as error:
            return _describe_error(error, name)

    def read_chunk(chunk):
        return [(name, file, read(name, file)) for name, file in chunk]

    images = np.empty((count, *size, channels), Scale(levels=levels).dtype)
    kept, skipped, files = 0, [], iter(files)
    chunks = iter(lambda: list(itertools.islice(files, 16)), [])  # a task for each image would take longer
    pool = concurrent.futures.ThreadPoolExecutor(device.cores())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of files that are skipped, or that it reads nevertheless
            results = itertools.chain.from_iterable(_map_ahead(pool, read_chunk, chunks, 2 * device.cores()))
            for name, file, result in _show_progress(results, count):
                if result is None:
                    result = read(name, file, allow_large=True)
                if isinstance(result, str):
                    skipped.append((name, result))
                else:
                    images[kept] = result
                    kept += 1
    finally:
        pool.shutdown(cancel_futures=True)
    return images[:kept], skipped


def _map_ahead(pool, function, items, ahead):
    """As `pool.map`, but takes only so many items in advance, so that a stream is not held in memory."""
    running = collections.deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _show_progress(results, total):
    """Yields the results, and shows a progress bar once they take longer than a moment."""
    bar, start = None, time.monotonic()
    for done, result in enumerate(results, 1):
        if bar is None and time.monotonic() - start > 2:
            bar = console.Bar(total, "image")
        if bar is not None:
            bar.update(done)
        yield result


def read_folder(
    folder: str, size: tuple[int, int], channels: int, levels: int = 255
) -> tuple[np.ndarray, list[str], list[tuple[str, str]], list[str]]:
    """Reads all images of a folder and its sub-folders, in the order of their names.

    What takes long to read is cached, see `data/cache.py`.

    Returns:
        Images and the names of their files, skipped files as from `read_images`, and notes on ignored files and on
        dark images.

    Raises:
        ValueError: if the folder holds no image.
    """
    names, unlisted, ignored = listing.list_files(folder)
    path = cache.cache_path(folder, size, channels, levels)
    fingerprint = cache.folder_fingerprint(folder, names, readable_formats())

    def open_image(name):
        path = os.path.join(folder, name)
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise ValueError("not a regular file")
        if status.st_size == 0:
            raise ValueError("empty")
        return path

    def read():
        return read_images(zip(names, names, strict=True), len(names), open_image, size, channels, levels)

    images, skipped, _ = cache.load_or_read(path, fingerprint, read)
    unreadable = {name for name, _ in skipped}
    names = [name for name in names if name not in unreadable]
    skipped = [(name, _describe_error(error, name)) for name, error in unlisted] + skipped
    notes = [ignored] if ignored else []
    if len(images) == 0:
        reasons = "; ".join([*([summarise_skipped(skipped)] if skipped else []), *notes]) or "it is empty"
        raise ValueError(f"there is no image in the folder {escape_name(folder)}: {reasons}")
    if images.max() < pixels.DARK * (levels // 255):
        brightest = names[images.max(axis=(1, 2, 3)).argmax()]
        notes += pixels.note_if_dark(escape_name(brightest), *_find_largest_value(os.path.join(folder, brightest)))
    return images, names, skipped, notes


def _find_largest_value(path):
    """The largest value in an image file, and the values of black and white, in the file's own units."""
    with Image.open(path, formats=readable_formats()) as opened:
        image = opened if pixels.is_deep(opened) else pixels.prepare_for_resizing(opened)
        extremes = np.reshape(image.getextrema(), (-1, 2))[:3]  # without transparency
        return float(extremes.max()), 0, pixels.find_white(image)


def _describe_error(error, name):
    """In a few words, why a file could not be read."""
    if isinstance(error, FileNotFoundError):
        return "a broken link"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, OSError) and (advice := _suggest(name)):
        return advice
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return escape_name(" ".join(str(error).split()))[:160] or type(error).__name__


def _suggest(name):
    """What to do about a file whose format cannot be read here, or None."""
    extension = os.path.splitext(name)[1].lower()
    if extension in HEIF and "HEIF" not in readable_formats():
        return "HEIF; convert it to JPEG or PNG, or pip install pillow-heif"
    if extension in AVIF and not features.check("avif"):
        return "AVIF; convert it to JPEG or PNG, or pip install --upgrade pillow"
    return next((advice for advice, extensions in UNREADABLE.items() if extension in extensions), None)


def summarise_skipped(skipped: Sequence[tuple[str, str]], shown: int = 3) -> str:
    """Returns one sentence on skipped files: their number and a few names, if possible each with another reason."""
    first_of = {reason: name for name, reason in reversed(skipped)}
    chosen = sorted(skipped, key=lambda pair: pair[0] != first_of[pair[1]])[:shown]
    first = ", ".join(f"{escape_name(name)} ({reason})" for name, reason in chosen)
    more = f", and {len(skipped) - shown} more" if len(skipped) > shown else ""
    return f"{len(skipped)} file{'s' * (len(skipped) > 1)} skipped: {first}{more}"


def escape_name(name: str) -> str:
    """Returns a file name of any bytes as text that a terminal can show on one line."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)
