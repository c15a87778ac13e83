"""What pixel values mean, and how images are cropped and resized.

Images are stored as integers 0 … levels, which stand for black … white, the lowest and the highest value of a source.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from support.scale import Scale

MOST_CHANNELS = 64
LEVELS_OF_16_BITS = 65535
UNIT, SIGNED, BYTES = (0, 1), (-1, 1), (0, 255)  # value ranges: black and white
DARK = 32  # grey levels, 1/8 of all: images without a brighter pixel were more likely scaled wrongly than dark
CLEARLY_NEGATIVE = -0.25  # some values of -1 … 1 are below this; resampling 0 … 1 overshoots by less
GREY = np.array([0.299, 0.587, 0.114])  # of red, green and blue: ITU-R 601-2, as in Pillow


def as_size(image_size: int | str | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels: from one integer for both, from a pair, or from `'48x64'`.

    Raises:
        ValueError: if they are not positive integers.
    """
    sides = image_size
    if isinstance(image_size, str):
        sides = [int(side) if side.isdecimal() else 0 for side in image_size.split("x")]
    sides = tuple(sides) if isinstance(sides, list | tuple) else (sides, sides)
    if len(sides) != 2 or not all(isinstance(side, int | np.integer) and side > 0 for side in sides):
        raise ValueError(f"image_size must be a positive integer, or a height and a width, got {image_size}")
    return sides


def crop_and_resize(
    image: Image.Image | np.ndarray, size: tuple[int, int], channels: int, levels: int = 255
) -> np.ndarray:
    """Crops the middle of an image to the shape of `size`, resizes it, and puts transparent pixels on white.

    Grey and colour are converted into each other; other numbers of channels must be those of the image, whose bands and
    pages are then channels as they are.

    Args:
        image: a Pillow image of any mode, or integers (height, width, channels), 0 … levels.
        size: (height, width).

    Returns:
        (*size, channels), 0 … levels: uint8 for at most 255 levels, else uint16.

    Raises:
        ValueError: if the image has other channels.
    """
    if isinstance(image, np.ndarray):
        if image.shape == (*size, channels):
            return image
        if levels == 255 and {image.shape[-1], channels} <= {1, 3}:
            return _fit_colours(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image), size, channels)
        planes = [Image.fromarray(np.float32(plane)) for plane in np.moveaxis(image, -1, 0)]
        return _fit_planes(planes, size, channels, levels)
    if channels in (1, 3) and (levels == 255 or not is_deep(image)):
        return _stretch(_fit_colours(image, size, channels), levels)
    return _fit_planes(_read_planes(image, levels, channels), size, channels, levels)


def fit_images(images: np.ndarray, size: tuple[int, int], channels: int, levels: int = 255) -> np.ndarray:
    """Many images as from `crop_and_resize`; the same array if they have that shape already.

    Args:
        images: uint8 (N, height, width, 1 or 3).
        channels: 1 or 3.
        levels: 255 or 65535.

    Returns:
        uint8 or uint16 (N, *size, channels), 0 … levels.
    """
    if levels == 255 and images.shape[1:] == (*size, channels):
        return images
    fitted = np.empty((len(images), *size, channels), Scale(levels=levels).dtype)
    for k, image in enumerate(images):
        fitted[k] = _stretch(crop_and_resize(image, size, channels), levels)
    return fitted


def _stretch(image, levels):
    """An image of 8 bits, uint8, as integers 0 … levels, a multiple of 255."""
    return image * Scale(levels=levels).dtype(levels // 255)


def _fit_colours(image, size, channels):
    """Grey or colour of 8 bits, uint8 (*size, 1 or 3)."""
    image = ImageOps.fit(prepare_for_resizing(image), size[::-1], Image.Resampling.LANCZOS)
    if image.mode == "F":
        image = Image.fromarray(np.clip(np.rint(image), 0, 255).astype(np.uint8))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(image).reshape(*size, channels)


def _read_planes(image, levels, channels):
    """All bands of all pages of an image, as Pillow images of floating-point numbers 0 … levels.

    For grey and colour only those of the first page, as for 8 bits.
    """
    planes = []
    for page in ImageSequence.Iterator(image):
        with contextlib.suppress(Exception):  # broken EXIF data: the orientation is unknown, the pixels are not
            page = ImageOps.exif_transpose(page)
        if not is_deep(page) and page.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
            page = prepare_for_resizing(page)
        factor = levels / find_white(page)
        planes += [band.convert("F").point(lambda value, factor=factor: value * factor + 0) for band in page.split()]
        if channels in (1, 3) or len(planes) > channels:  # hundreds of pages would fill the memory
            break
    return planes


def _fit_planes(planes, size, channels, levels):
    """Planes, Pillow images of floating-point numbers 0 … levels, as one image (*size, channels)."""
    fitted = np.stack([ImageOps.fit(plane, size[::-1], Image.Resampling.LANCZOS) for plane in planes], axis=-1)
    if (len(planes), channels) == (1, 3):
        fitted = fitted.repeat(3, axis=-1)
    elif (len(planes), channels) == (3, 1):
        fitted = (fitted @ GREY)[..., None]
    elif len(planes) != channels:
        raise ValueError(f"{len(planes)} channel{'s' * (len(planes) > 1)}, not {channels}")
    return np.clip(np.rint(fitted), 0, levels).astype(Scale(levels=levels).dtype)


def is_deep(image: Image.Image) -> bool:
    """Whether a Pillow image has more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def prepare_for_resizing(image: Image.Image) -> Image.Image:
    """The image in a mode whose values can be averaged: L, RGB, RGBA, or F for more than 8 bits, 0 … 255."""
    if is_deep(image):
        factor = 255 / find_white(image)
        return image.convert("F").point(lambda value: value * factor + 0)
    if image.has_transparency_data:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def find_white(image: Image.Image) -> int:
    """The value of white in an image, in the units of its file."""
    if image.mode == "F":
        return detect_value_range(np.asarray(image), (UNIT, BYTES))[1]
    if image.mode == "I":  # 32 bits, which Pillow also uses for 16
        low, high = image.getextrema()
        if low < 0 or high > LEVELS_OF_16_BITS:
            raise ValueError(f"integers from {low} to {high}; 0 … 65535 can be read")
    return LEVELS_OF_16_BITS if image.mode.startswith("I") else 255


def detect_value_range(values: np.ndarray, ranges: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns which of the possible ranges floating-point pixel values have, as the values of black and of white.

    A range fits if all values round to 0 … 255 in it, so values may leave it by half a grey level: rounding, as
    to float16, does that. Because 0 … 1 lies within the others, -1 … 1 needs clearly negative values, and 0 … 255 needs
    integers, or values clearly above 1.

    Raises:
        ValueError: if no range fits.
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
    described = {
        UNIT: "0 … 1",
        SIGNED: f"-1 … 1 (with some below {CLEARLY_NEGATIVE})",
        BYTES: f"0 … 255 (integers, or with some of {DARK} or more)",
    }
    known = " or ".join(described[pair] for pair in ranges)
    raise ValueError(f"floating-point numbers from {low:g} to {high:g}, not {known}; scale or clip them")


def note_if_dark(name: str, high: float, black: float, white: float) -> list[str]:
    """Returns a list with a note if the largest of all values, `high`, is nearly black, else an empty list."""
    if high - black >= (white - black) * DARK / 256:
        return []
    advice = (
        f"; multiply the values by {white / high:.4g} if {high:g} is meant to be white" if high > black == 0 else ""
    )
    return [f"{name}: the images are nearly black: the largest value is {high:g}, where {white:g} is white{advice}"]
