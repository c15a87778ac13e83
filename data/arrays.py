"""Reads images from array files, `.npy` and `.npz`."""

import numpy as np

from data import image_files


def read_array_file(path: str, image_size: int, channels: int) -> tuple[np.ndarray, bool, list[str]]:
    """Reads images from an array (N, height, width) or (N, height, width, 1 or 3).

    Integers are pixel values 0 … 255, booleans are black and white. Floating-point numbers are 0 … 1, -1 … 1 or
    0 … 255, see `image_files.detect_value_range`. A `.npz` file must hold one array, or one called `images`.

    Returns:
        The images, uint8 (N, image_size, image_size, channels); whether the file marks them as photographs, as
        `python -m data cats` does; and notes on how the values were read.

    Raises:
        ValueError: for any other array, or a corrupt file.
    """
    array, photographs = _load(path)
    name, shape = image_files.escape_name(path), array.shape
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise ValueError(
            f"{name} holds an array of shape {shape}; images must have the shape (N, height, width), or "
            "(N, height, width, channels) with 1 or 3 channels"
        )
    black, white, notes = _find_value_range(array, name)

    images = np.empty((len(array), image_size, image_size, channels), np.uint8)
    for k, values in enumerate(array):
        if array.dtype.kind not in "ui":
            levels = (values.astype(np.float32) - black) * (255 / (white - black))
            values = np.clip(np.rint(levels), 0, 255)
        values = values.astype(np.uint8)
        fits = values.shape == images[k].shape
        images[k] = values if fits else image_files.crop_and_resize(values, image_size, channels)
    return images, photographs, notes


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


def _find_value_range(array, name):
    """The values of black and of white, and a list of notes."""
    if array.dtype.kind == "b":
        return 0, 1, [f"{name}: False and True, taken as black and white"]
    if array.dtype.kind not in "uif":
        raise ValueError(f"{name} holds values of type {array.dtype}; images must be arrays of numbers")
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind in "ui":
        if low < 0 or high > 255:
            raise ValueError(f"{name} holds integers from {low:g} to {high:g}, not 0 … 255; scale or clip them")
        return *image_files.BYTES, image_files.note_if_dark(name, high, *image_files.BYTES)
    try:
        black, white = image_files.detect_value_range(array, (image_files.UNIT, image_files.SIGNED, image_files.BYTES))
    except ValueError as error:
        raise ValueError(f"{name} holds {error}") from None
    notes = [f"{name}: floating-point numbers, taken as {black} … {white}"]
    return black, white, notes + image_files.note_if_dark(name, high, black, white)
