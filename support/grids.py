"""Grids of images and animations: what a person looks at."""

import io
import os
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, PngImagePlugin

from support.files import replacing

SAMPLES = "diffusion model samples"  # marks a grid, so that it is not taken for a training image
VISIBLE = 96  # pixels, the least width of an image in a grid


def parse_shown(text: str | None, channels: int) -> tuple[int, ...] | None:
    """Which channels to show, from 0: of the option `--show`, `'3,2,1'` as red, green and blue, or one as grey.

    None stands for all of 1 or 3 channels, and for the first of any other number.

    Raises:
        ValueError: if there are no such channels.
    """
    if text is None:
        return None
    shown = tuple(int(word) - 1 for word in text.split(","))
    if len(shown) not in (1, 3) or not all(0 <= channel < channels for channel in shown):
        raise ValueError(
            f"--show must name one channel, or three separated by commas, each from 1 to {channels}, got {text}"
        )
    return shown


def describe_shown(shown: Sequence[int] | None, channels: int) -> str | None:
    """A sentence on which channels are shown, None if they are all."""
    if shown is None and channels in (1, 3):
        return None
    names = ", ".join(str(channel + 1) for channel in shown or (0,))
    plural = "s" * (len(shown or (0,)) > 1)
    return f"showing channel{plural} {names} of {channels}; --show chooses others"


def visible(images: np.ndarray, shown: Sequence[int] | None = None) -> np.ndarray:
    """The channels of images (…, channels) that are shown, (…, 1 or 3), see `parse_shown`."""
    if shown is None:
        return images if images.shape[-1] in (1, 3) else images[..., :1]
    return images[..., list(shown)]


def grid(images: np.ndarray, columns: int | None = None, shown: Sequence[int] | None = None) -> np.ndarray:
    """Images (n, height, width, channels), 0 … 255, as one uint8 image, as many in a row as in a column by default."""
    images = visible(images, shown)
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    cells = np.full((rows, columns, height + 2, width + 2, channels), 255, np.uint8)
    cells.reshape(-1, height + 2, width + 2, channels)[:n, 1:-1, 1:-1] = images
    return cells.swapaxes(1, 2).reshape(rows * (height + 2), columns * (width + 2), channels)


def check_image_name(option: str, path: str) -> None:
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
            f"{option} must end in .png or another image format that can be written, got {path}"
        ) from error


def enlarged(images: np.ndarray, width: int = VISIBLE) -> np.ndarray:
    """Images (n, height, width, channels), each pixel repeated until they are at least `width` pixels wide."""
    factor = -(-width // images.shape[2])
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def as_pillow(image: np.ndarray) -> Image.Image:
    """A grid as a Pillow image, grey or in colour."""
    return Image.fromarray(image.squeeze(axis=-1) if image.shape[-1] == 1 else image)


def save_grid(images: np.ndarray, path: str, columns: int | None = None, shown: Sequence[int] | None = None) -> None:
    """Writes images (n, height, width, channels), 0 … 255, as one image, enlarged so that a person sees them.

    Args:
        columns: how many stand in a row.
        shown: see `parse_shown`.
    """
    image, mark = grid(enlarged(visible(np.asarray(images), shown)), columns), PngImagePlugin.PngInfo()
    if len(images) > 1:
        mark.add_text("Software", SAMPLES)
    with replacing(path) as draft:
        as_pillow(image).save(draft, pnginfo=mark)


def save_animation(batches: Iterable[np.ndarray], path: str) -> None:
    """Writes batches of images, each as for `save_grid`, as the frames of a GIF that pauses at its end."""
    frames = []
    for images in batches:
        frame = as_pillow(grid(enlarged(visible(images))))
        frames.append(frame.quantize(64, dither=Image.Dither.NONE))
    first, *rest = frames
    durations = [80] * len(rest) + [2500]  # milliseconds
    with replacing(path) as draft:
        first.save(draft, save_all=True, append_images=rest, duration=durations, loop=0)
