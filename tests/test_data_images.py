"""Single image files: formats, modes, transparency, orientation, value ranges, cropping."""

import re
import struct

import numpy as np
import pytest
from data_helpers import BLUE, GREEN, RED, WHITE, assert_plain, encode, noise, plain, png, stripes, write
from PIL import Image, features

from data import load_images

PINK = (255, 127, 127)  # red of half opacity on white: 255 · (1 - 128 / 255) = 127
BLACK, DUSK = (0, 0, 0), (10, 20, 30)
LOSSLESS = {"a.jpg": {"quality": 95, "subsampling": 0}, "a.webp": {"lossless": True}}  # or nearly


def load_one(folder, image, name="a.png", size=8, channels=3, **options):
    """Saves an image, or bytes, as the only file of a folder, and loads the folder."""
    if name.endswith(".webp") and not features.check("webp"):
        pytest.skip("this Pillow reads no WebP")
    for old in folder.iterdir():
        old.unlink()
    if isinstance(image, bytes):
        (folder / name).write_bytes(image)
    else:
        image.save(folder / name, **options)
    images, report = load_images(folder, size, channels)
    assert images.dtype == np.uint8 and images.shape == (1, size, size, channels) and report.skipped == []
    return images[0]


def filled(color, mode="RGB"):
    return plain((20, 20), color, mode)


def palette(*colors, size=(20, 20), index=0):
    image = plain(size, index, "P")
    image.putpalette(b"".join(map(bytes, colors)))
    return image


def row(values, dtype=np.uint8, height=10):
    """A grey image all of whose rows have these values."""
    return Image.fromarray(np.tile(np.array(values, dtype), (height, 1)))


def halves(low, high):
    """A TIFF image of floating-point numbers."""
    return row([low] * 5 + [high] * 5, np.float32), {0: BLACK, 9: WHITE}, 0, {"name": "a.tif", "size": 10}


def deep_tiff(mode):
    """A TIFF file of 16 bits in either byte order."""
    values = np.tile(np.repeat([257 * 77, 257 * 140], 15), (20, 1)).astype(">u2" if mode == "I;16B" else "<u2")
    content = encode(Image.frombytes(mode, (30, 20), values.tobytes()), "TIFF")
    assert content[:2] == (b"MM" if mode == "I;16B" else b"II")
    return content


def gif_of_parts():
    """The left half of the first frame is blue, the rest is transparent."""
    first = filled((0, 0, 0, 0), "RGBA")
    first.paste((*BLUE, 255), (0, 0, 10, 20))
    more = {"save_all": True, "append_images": [filled((*RED, 255), "RGBA")], "disposal": 2}
    return first, {range(9): BLUE, range(11, 20): WHITE}, 0, {"name": "a.gif", "size": 20, **more}


JPEG, TIFF, GREY = {"name": "a.jpg", "quality": 95}, {"name": "a.tif"}, {"channels": 1}
SIXTEEN = png(8, 8, 16, 0, [struct.pack(">8H", 0, 65535, 19789, 19889, 19989, 255, 128, 60000)] * 8)  # 19789 = 257·77
FRINGE = np.tile(np.uint8([(*RED, 255), (0, 0, 0, 0)]), (64, 32, 1))  # red and transparent black columns
CHUNKS = {"PLTE": bytes(RED + RED + BLUE + GREEN), "tRNS": bytes([0, 128, 255])}
PALETTE = png(8, 8, 8, 3, [bytes([0, 1, 2, 3] * 2)] * 8, **CHUNKS)
BOARD, AVERAGED = np.uint8(np.indices((250, 250)).sum(axis=0) % 2 * 255), ((127.5,) * 3, 6, {"size": 16})
BAD_EXIF = b"once upon a time", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 20, b"II*\0\xff\xff\xff\x7f", b""
# An image or a file, the colour of all pixels or of some columns, a tolerance, and arguments of `load_one`.
COLOURS = {
    "white": (filled(1, "1"), WHITE),
    "black": (filled(0, "1"), BLACK),
    "grey": (filled(93, "L"), (93, 93, 93)),
    "grey to grey": (filled(93, "L"), (93,), 0, GREY),
    **{
        f"palette in {n}": (palette(RED, DUSK, index=1), DUSK, 0, {"name": n})
        for n in ("a.png", "a.gif", "a.bmp", "a.tif")
    },
    "CMYK red": (filled((0, 255, 255, 0), "CMYK"), RED, 4, JPEG),
    "CMYK white": (filled((0, 0, 0, 0), "CMYK"), WHITE, 4, JPEG),
    "CMYK grey": (filled((0, 0, 0, 155), "CMYK"), (100,) * 3, 4, TIFF),
    "red to grey": (filled(RED), (76,), 1, GREY),  # by the weights of ITU-R BT.601
    "green to grey": (filled(GREEN), (150,), 1, GREY),
    "blue to grey": (filled(BLUE), (29,), 1, GREY),
    "white to grey": (filled(WHITE), (255,), 1, GREY),
    **{f"enlarged {size}": (plain(size, RED), RED) for size in [(1, 1), (3, 2), (1, 2000), (2000, 1)]},
    "no blur": (row([0] * 120 + [255] * 120, height=240), {range(9): BLACK, range(15, 24): WHITE}, 2, {"size": 24}),
    **{f"bad EXIF {k}": (filled(RED), RED, 0, {"exif": b"Exif\0\0" + exif}) for k, exif in enumerate(BAD_EXIF)},
    **{f"checkerboard {m}": (Image.fromarray(BOARD).convert(m), *AVERAGED) for m in ("RGB", "L", "1", "P", "RGBA")},
    "checkerboard of 16 bits": (Image.fromarray(BOARD.astype(np.uint16) * 257), *AVERAGED),
    "checkerboard of floats": (encode(Image.fromarray(np.float32(BOARD / 255)), "TIFF"), *AVERAGED),
    "half transparent": (filled((*RED, 128), "RGBA"), PINK, 1),
    "transparent": (filled((0, 0, 0, 0), "RGBA"), WHITE),
    "opaque": (filled((*BLUE, 255), "RGBA"), BLUE),
    "transparent grey": (filled((0, 0), "LA"), WHITE),
    "half transparent grey": (filled((0, 128), "LA"), (127,) * 3, 1),
    "half transparent to grey": (filled((0, 128), "LA"), (127,), 1, GREY),
    "half transparent TIFF": (filled((*RED, 128), "RGBA"), PINK, 1, TIFF),
    "transparent palette": (PALETTE, {0: WHITE, 1: PINK, 2: BLUE, 3: GREEN}, 1),
    "a transparent colour": (png(8, 8, 8, 2, [bytes(RED + BLUE) * 4] * 8, tRNS=b"\0\xff\0\0\0\0"), {0: WHITE, 1: BLUE}),
    "a transparent grey": (png(8, 8, 8, 0, [bytes([9, 200] * 4)] * 8, tRNS=b"\0\x09"), {0: WHITE, 1: (200,) * 3}),
    "transparent GIF": (palette(RED, BLUE), WHITE, 0, {"name": "a.gif", "transparency": 0}),
    "opaque GIF": (palette(RED, BLUE), RED, 0, {"name": "a.gif"}),
    "GIF of parts": gif_of_parts(),
    "no fringe": (Image.fromarray(FRINGE), PINK, 6),
    "16-bit PNG": (SIXTEEN, {k: (v,) * 3 for k, v in enumerate([0, 255, 77, 77, 78, 1, 0, 233])}),
    "16-bit PNG to grey": (SIXTEEN, {1: (255,)}, 0, GREY),
    "16-bit colour": (png(8, 8, 16, 2, [struct.pack(">3H", 51400, 25700, 0) * 8] * 8), (200, 100, 0)),
    "16-bit TIFF": (deep_tiff("I;16"), {0: (77,) * 3, -1: (140,) * 3}, 0, TIFF | {"size": 20}),
    "16-bit TIFF, big-endian": (deep_tiff("I;16B"), {0: (77,) * 3, -1: (140,) * 3}, 0, TIFF | {"size": 20}),
    "floats 0 … 200": (row([0] * 5 + [200] * 5, np.float32), {0: BLACK, 9: (200,) * 3}, 0, TIFF | {"size": 10}),
    "floats of 0.2": (row([0.2] * 10, np.float32), (51,), 0, TIFF | GREY),
    **{f"floats {a} … {b}": halves(a, b) for a, b in [(0, 1), (-1e-9, 1.000001), (-0.0019, 1.0019), (-0.4, 255.4)]},
}


@pytest.mark.parametrize("case", COLOURS)
def test_colours(tmp_path, case):
    image, expected, *more = COLOURS[case]
    tolerance, arguments = (*more, *(0, {})[len(more) :])
    loaded = load_one(tmp_path, image, **arguments)
    for place, color in expected.items() if isinstance(expected, dict) else [(slice(None), expected)]:
        assert_plain(loaded[:, place], color, tolerance)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, name):
    frames = [plain((20, 20), color) for color in (RED, GREEN, BLUE)]
    image = load_one(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **LOSSLESS.get(name, {}))
    with Image.open(tmp_path / name) as opened:
        assert opened.n_frames == 3
    assert_plain(image, RED)


# Cropping, resizing and orientation.


@pytest.mark.parametrize("side, upright", [(30, False), (30, True), (100, False), (400, False)])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_images_are_cropped_to_their_centre(tmp_path, side, upright, name):
    pixels = stripes(side).swapaxes(0, 1) if upright else stripes(side)
    image = load_one(tmp_path, Image.fromarray(np.ascontiguousarray(pixels)), name, **LOSSLESS.get(name, {}))
    assert_plain(image, GREEN, 25)  # the filter looks over the edges of the square
    assert_plain(image[1:-1, 1:-1], GREEN, 12 if name == "a.jpg" else 2)


@pytest.mark.parametrize("width", [40, 60])
def test_the_pixels_of_a_square_of_the_right_size_are_unchanged(tmp_path, width):
    pixels, left = noise(40, width, 3), (width - 40) // 2
    np.testing.assert_array_equal(load_one(tmp_path, Image.fromarray(pixels), size=40), pixels[:, left : left + 40])


def load_oriented(folder, upright, orientation, name="a.png", size=8):
    """Loads an image whose pixels are stored as the EXIF standard says, its rows and columns reversed or exchanged."""
    p, q = upright, upright.swapaxes(0, 1)
    stored = [p, p[:, ::-1], p[::-1, ::-1], p[::-1], q, q[::-1], q[::-1, ::-1], q[:, ::-1]][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(stored))
    return load_one(folder, stored, name, size, exif=exif, **LOSSLESS.get(name, {}))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_orientation_is_applied(tmp_path, name):
    upright = np.uint8([[RED, GREEN], [BLUE, WHITE]]).repeat(16, axis=0).repeat(16, axis=1)
    for orientation in range(1, 9):
        image = load_oriented(tmp_path, upright, orientation, name, size=32)
        for middle in (8, 8), (8, 24), (24, 8), (24, 24):
            assert np.abs(image[middle].astype(int) - upright[middle]).max() <= 10, f"orientation {orientation}"


def test_orientation_comes_before_cropping_also_for_16_bits(tmp_path):
    upright = np.zeros((90, 30), np.uint16)
    upright[30:60] = 65535
    assert_plain(load_oriented(tmp_path, upright, 6)[1:-1], WHITE, 2)


# Value ranges.


@pytest.mark.parametrize(
    ("dtype", "value", "reason"),
    [
        ("f4", 256, "from 0.5 to 256, not 0 … 1 or 0 … 255"),
        ("f4", 1.0312, "from 0.5 to 1.0312, not"),
        ("f4", -0.5, "from -0.5 to 0.5"),
        ("f4", 1e30, "1e+30"),
        ("f4", np.nan, "NaN"),
        ("f4", -np.inf, "infinity"),
        ("i4", 70_000, "integers from 0 to 70000; 0 … 65535 can be read"),
        ("i4", -1, "integers from -1 to 0;"),
    ],
)
def test_files_with_other_values_are_skipped(tmp_path, dtype, value, reason):
    values = np.full((10, 10), 0.5, np.float32).astype(dtype)
    values[4, 4] = value
    write(tmp_path, {"odd.tif": Image.fromarray(values), "good.png": RED})
    images, report = load_images(tmp_path, 8)
    ((name, said),) = report.skipped
    assert len(images) == 1 and name == "odd.tif" and reason in said


DARK = {
    "12 bits of 16": ("a.png", np.full((9, 9), 4095, np.uint16), "4095, where 65535 is white; multiply .* by 16 "),
    "8 bits of 32": ("a.tif", np.full((9, 9), 255, np.int32), "255, where 65535 is white; multiply .* by 257 "),
    "masks": ("a.png", np.eye(9, dtype=np.uint8), "1, where 255 is white; multiply .* by 255 "),
    "masks in RGBA": ("a.png", np.full((9, 9, 4), (1, 1, 1, 255), np.uint8), "1, where 255 is white"),
    "floats": ("a.tif", np.full((9, 9), 0.01, np.float32), "0.01, where 1 is white"),
    "a dark photograph": ("a.png", np.full((9, 9, 3), (8, 20, 33), np.uint8), None),
    "stars": ("a.png", np.uint8(255) * (np.indices((90, 90)) == 45).all(axis=0), None),
    "14 bits of 16": ("a.tif", np.full((9, 9), 16383, np.uint16), None),
}


@pytest.mark.parametrize("case", DARK)
def test_folders_of_nearly_black_images_are_reported(tmp_path, case):
    name, values, said = DARK[case]
    darker = Image.fromarray(values // (1 if values.shape[-1] == 4 else 2))
    write(tmp_path, {name: Image.fromarray(values), "darker" + name: darker, "0.png": b"none"})
    notes = load_images(tmp_path, 6)[1].notes
    assert len(notes) == bool(said)
    assert not said or re.match(f"{name}: the images are nearly black: the largest value is {said}", notes[0])
    if said:  # over all images
        write(tmp_path, {"z.png": RED})
        assert load_images(tmp_path, 6)[1].notes == []


def test_photographs_are_reduced_with_lanczos(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8))
    np.testing.assert_array_equal(load_one(tmp_path, image), image.resize((8, 8), Image.Resampling.LANCZOS))
