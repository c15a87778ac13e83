"""Reads images from array files, `.npy` and `.npz`."""

import numpy as np

from data import image_files, pixels
from data.pixels import BYTES, LEVELS_OF_16_BITS, SIGNED, UNIT, crop_and_resize, detect_value_range, note_if_dark
from support.scale import Scale


def read_array_file(
    path: str, size: tuple[int, int], channels: int, bit_depth: int | None = 8, scale: Scale | None = None
) -> tuple[np.ndarray, bool, Scale, list[str]]:
    """Reads images from an array (N, height, width) or (N, height, width, channels) with 1 to 64 channels.

    Integers are pixel values 0 … 255, booleans are black and white. Floating-point numbers are 0 … 1, -1 … 1 or
    0 … 255, see `pixels.detect_value_range`. With more than 8 bits any other range is that of the array's own least to
    largest value. A `.npz` file must hold one array, or one called `images`.

    Args:
        bit_depth: 8, 16, or None for 8 where that loses nothing, else 16.
        scale: how to store the values, as of a model with more than 8 bits; None to find it.

    Returns:
        The images, integers (N, *size, channels), see `Scale`; whether the file marks them as photographs, as
        `python -m data cats` does; how they are stored; and notes on how the values were read.

    Raises:
        ValueError: for any other array, or a corrupt file.
    """
    array, photographs = _load(path)
    name, shape = image_files.escape_name(path), array.shape
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = array[..., None]
    count = array.shape[-1] if array.ndim == 4 and 1 <= array.shape[-1] <= pixels.MOST_CHANNELS else None
    if not count or 0 in shape or count != channels and not {count, channels} <= {1, 3}:
        wanted = "1 or 3 channels" if channels in (1, 3) else f"{channels} channels"
        way_out = f"; add --channels {count} for images with {count}" if count and 0 not in shape else ""
        raise ValueError(
            f"{name} holds an array of shape {shape}; images must have the shape (N, height, width), or "
            f"(N, height, width, channels) with {wanted}{way_out}"
        )
    notes = []
    if scale is None:
        scale, notes = _find_scale(array, name, bit_depth)
    else:
        _check_scale(array, name, scale)
    images = np.empty((len(array), *size, channels), scale.dtype)
    for k, values in enumerate(array):
        images[k] = crop_and_resize(scale.store(values), size, channels, scale.levels)
    return images, photographs, scale, notes


def _load(path):
    """The array in the file, and whether it is marked as photographs."""
    name = image_files.escape_name(path)
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, False
        with loaded as archive:
            members = archive.files
            chosen = "images" if "images" in members else members[0] if len(members) == 1 else None
            if chosen is not None:
                array = archive[chosen]
                if not isinstance(array, np.ndarray):  # NumPy returns members that are no arrays as bytes
                    raise ValueError(f"its member {chosen} is not an array")
                return array, "photographs" in members and bool(archive["photographs"])
    except Exception as error:  # corrupt files raise nearly every kind, even MemoryError
        if "pickle" in str(error).lower():
            raise ValueError(
                f"{name} is corrupt, or holds Python objects; save the images as an array of numbers"
            ) from error
        raise ValueError(f"{name} cannot be read as an array file: {error}") from error
    raise ValueError(
        f"{name} holds {len(members)} arrays ({', '.join(members[:5])}); call the one with the images 'images'"
    )


def _check_scale(array, name, scale):
    """Raises ValueError if values of the array lie outside a scale."""
    low, high, half = array.min(), array.max(), scale.step / 2
    if not (scale.black - half <= low and high <= scale.white + half):
        raise ValueError(
            f"{name} holds values from {low:g} to {high:g}, and the model was trained on {scale.black:g} … "
            f"{scale.white:g}; scale or clip them"
        )


def _find_scale(array, name, bit_depth):
    """How to store the values of an array, and a list of notes."""
    if array.dtype.kind == "b":
        return Scale(0, 1), [f"{name}: False and True, taken as black and white"]
    if array.dtype.kind not in "uif":
        raise ValueError(f"{name} holds values of type {array.dtype}; images must be arrays of numbers")
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind in "ui" and low >= 0 and high <= 255:
        return Scale(), note_if_dark(name, high, *BYTES)
    if array.dtype.kind in "ui":
        if bit_depth == 8:
            raise ValueError(f"{name} holds integers from {low:g} to {high:g}, not 0 … 255; scale or clip them")
        scale = Scale(low, high, int(min(high - low, LEVELS_OF_16_BITS)) or 1)
        return scale, [f"{name}: integers, taken as {low:g} … {high:g}, their least and largest value"]
    try:
        black, white = detect_value_range(array, (UNIT, SIGNED, BYTES))
        meaning, dark = f"{black} … {white}", note_if_dark(name, high, black, white)
    except ValueError as error:
        if bit_depth == 8 or not low < high < np.inf:
            raise ValueError(f"{name} holds {error}") from None
        black, white, meaning, dark = low, high, f"{low:g} … {high:g}, their least and largest value", []
    scale = Scale(black, white)
    if bit_depth == 16 or bit_depth is None and not _loses_nothing(array, scale):
        scale = Scale(black, white, LEVELS_OF_16_BITS)
    return scale, [f"{name}: floating-point numbers, taken as {meaning}", *dark]


def _loses_nothing(array, scale):
    """Whether an array of floating-point numbers holds nothing but the values of a scale, but for rounding."""
    tolerance = 2 * np.finfo(array.dtype).eps * max(abs(scale.black), abs(scale.white))
    return all(
        np.allclose(scale.store(values) * scale.step + scale.black, values, rtol=0, atol=tolerance) for values in array
    )
