"""Tests of the data package: what it reads, what it leaves out, and what it says about it."""

import collections
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import pickle
import random
import re
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, features

import data
from data import batches, digest, drawings, image_files, load_images
from support import device, files

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PHOTOS = os.path.join(REPO, "..", "shared", "data", "photos")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)

not_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes or limits of POSIX systems")


# Helpers.


def plain(size, color, mode="RGB"):
    return Image.new(mode, size, color)


def load_one(image, tmp_path, name="a.png", size=8, channels=3, **options):
    """Saves an image, or bytes, as the only file of a folder, and loads the folder."""
    folder = tmp_path / f"folder{len(os.listdir(tmp_path))}"
    folder.mkdir()
    if isinstance(image, bytes):
        (folder / name).write_bytes(image)
    else:
        image.save(folder / name, **options)
    images, report = load_images(folder, size, channels)
    assert images.dtype == np.uint8 and images.shape == (1, size, size, channels) and report.skipped == []
    return images[0]


def assert_plain(picture, color, tolerance=0):
    assert np.abs(picture.astype(int) - color).max() <= tolerance, f"{picture[0, 0]} is not {color}"


def png(width, height, depth=8, color_type=0, rows=None, **chunks):
    """A PNG file made by hand: all zeros, or the given rows; color_type 0 is gray, 2 RGB, 3 palette, 6 RGBA."""
    samples = {0: 1, 2: 3, 3: 1, 6: 4}[color_type]
    compressor = zlib.compressobj(9)
    row = bytes(-(-width * samples * depth // 8))
    body = b"".join(compressor.compress(b"\0" + r) for r in (rows if rows is not None else [row] * height))

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    extra = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    picture = chunk(b"IHDR", header) + extra + chunk(b"IDAT", body + compressor.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + picture


def jpeg(color, size=(40, 30)):
    file = io.BytesIO()
    plain(size, color).save(file, "JPEG", quality=95)
    return file.getvalue()


def python(*arguments, stdin=None, timeout=120, env=None, **options):
    """Runs Python in the repository's root, and returns the finished process."""
    env = {**os.environ, "PYTHONPATH": REPO, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    stdin = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    command = [sys.executable, *map(os.fspath, arguments)]
    return subprocess.run(
        command, cwd=REPO, env=env, capture_output=True, timeout=timeout, text=True, **stdin, **options
    )


def save_array(tmp_path, array, name="pictures.npy", **others):
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, array)
    else:
        np.savez(path, images=array, **others)
    return path


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# The drawings.


@pytest.fixture(scope="module")
def drawn():
    return load_images("drawings", 16)


def test_drawings_are_2048_different_colour_pictures(drawn):
    images, report = drawn
    assert images.shape == (2048, 16, 16, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 2048
    assert report.source == "drawings" and not report.photographs
    assert report.notes == [] and report.skipped == [] and str(report) == ""


def test_load_images_gives_the_drawings_of_seed_zero(drawn):
    np.testing.assert_array_equal(drawn[0][:3], drawings.draw_cats(16, count=3, seed=0))


def test_a_drawing_depends_on_the_seed_and_its_number_alone():
    random.seed(1)
    np.random.seed(1)
    few = drawings.draw_cats(32, count=5, seed=3)
    random.seed(2)
    np.random.seed(2)
    many = drawings.draw_cats(32, count=12, seed=3)
    np.testing.assert_array_equal(few, many[:5])
    other = drawings.draw_cats(32, count=5, seed=4)
    assert all((a != b).any() for a, b in zip(few, other, strict=True))


def test_drawings_are_pictures_of_something_and_antialiased():
    flat = {tuple(c) for fur in drawings.FURS for c in fur} | {tuple(c) for c in drawings.BACKGROUNDS + drawings.EYES}
    for image in drawings.draw_cats(32, count=20):
        colors = collections.Counter(map(tuple, image.reshape(-1, 3).tolist()))
        mixed = set(colors) - flat
        assert len(mixed) > 60, "without antialiasing, a drawing has some 12 colours"
        assert set(drawings.BACKGROUNDS) & set(colors) and max(colors.values()) < 0.8 * 32 * 32


def test_drawings_in_gray_are_the_colour_drawings_weighted(drawn):
    images, _ = load_images("drawings", 16, channels=1)
    assert images.shape == (2048, 16, 16, 1) and images.dtype == np.uint8
    expected = drawn[0] @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert np.abs(images[..., 0] - expected).max() <= 1


# A folder of pictures: cropping, reducing, and all kinds of files.


@pytest.mark.parametrize("size", [(90, 30), (30, 90), (300, 100), (1200, 400)])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_pictures_are_cropped_to_their_centre(tmp_path, size, name):
    width, height = size
    stripes = np.zeros((height, width, 3), np.uint8)
    side = min(size)
    for k, color in enumerate([RED, GREEN, BLUE]):
        place = slice(k * side, (k + 1) * side)
        stripes[(place, slice(None)) if height > width else (slice(None), place)] = color
    options = {"quality": 95, "subsampling": 0} if name == "a.jpg" else {}
    picture = load_one(Image.fromarray(stripes), tmp_path, name, **options)
    assert_plain(picture, GREEN, 25)  # the filter looks over the edges of the square
    assert_plain(picture[1:-1, 1:-1], GREEN, 12 if name == "a.jpg" else 2)


def test_cropping_keeps_left_and_right_top_and_bottom(tmp_path):
    quarters = np.zeros((40, 60, 3), np.uint8)
    quarters[:20, :30], quarters[:20, 30:], quarters[20:, :30], quarters[20:, 30:] = RED, GREEN, BLUE, WHITE
    picture = load_one(Image.fromarray(quarters), tmp_path, size=40)
    np.testing.assert_array_equal(picture, quarters[:, 10:50])


def test_a_picture_of_the_right_size_is_unchanged(tmp_path):
    pixels = noise(16, 16, 3)
    np.testing.assert_array_equal(load_one(Image.fromarray(pixels), tmp_path, size=16), pixels)


def test_small_and_extreme_pictures_are_enlarged(tmp_path):
    for size in (1, 1), (3, 2), (1, 2000), (2000, 1):
        assert_plain(load_one(plain(size, RED), tmp_path), RED)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "I;16", "F", "RGBA"])
def test_a_fine_checkerboard_comes_out_gray_not_aliased(tmp_path, mode):
    board = (np.indices((250, 250)).sum(axis=0) % 2 * 255).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(board.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(board.astype(np.float32) / 255)
    elif mode == "P":
        image = Image.fromarray(board // 255)
        image.putpalette([0, 0, 0, 255, 255, 255])
    else:
        image = Image.fromarray(board).convert(mode)
    picture = load_one(image, tmp_path, "a.tif" if mode == "F" else "a.png", size=16)
    assert_plain(picture, (127.5,) * 3, 6)


def test_reducing_is_no_blur_of_what_is_large_enough_to_see(tmp_path):
    halves = np.zeros((240, 240), np.uint8)
    halves[:, 120:] = 255
    picture = load_one(Image.fromarray(halves), tmp_path, size=24)
    assert_plain(picture[:, :9], (0, 0, 0), 2)
    assert_plain(picture[:, 15:], WHITE, 2)


def oriented(upright, orientation):
    """How the pixels of an upright picture are stored, by the EXIF standard.

    Which sides of the picture the 0th row and the 0th column are: 1 top left, 2 top right,
    3 bottom right, 4 bottom left, 5 left top, 6 right top, 7 right bottom, 8 left bottom.
    """
    if orientation >= 5:  # rows of the file are columns of the picture
        stored = upright.swapaxes(0, 1)
        right, bottom = orientation in (6, 7), orientation in (7, 8)
        return stored[:: -1 if right else 1, :: -1 if bottom else 1]
    right, bottom = orientation in (2, 3), orientation in (3, 4)
    return upright[:: -1 if bottom else 1, :: -1 if right else 1]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_orientation_is_applied(tmp_path, name):
    if name == "a.webp" and not features.check("webp"):
        pytest.skip("this Pillow reads no WebP")
    upright = np.full((32, 32, 3), 128, np.uint8)
    upright[:16, :16], upright[:16, 16:], upright[16:, :16] = RED, GREEN, BLUE  # the fourth is gray
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(oriented(upright, orientation)))
        options = {"a.jpg": {"quality": 95, "subsampling": 0}, "a.webp": {"lossless": True}}.get(name, {})
        picture = load_one(stored, tmp_path, name, size=32, exif=exif, **options)
        for middle in (8, 8), (8, 24), (24, 8), (24, 24):
            assert np.abs(picture[middle].astype(int) - upright[middle]).max() <= 10, f"orientation {orientation}"


def test_orientation_turns_before_cropping_and_also_16_bits(tmp_path):
    upright = np.zeros((90, 30), np.uint16)
    upright[30:60] = 65535
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(oriented(upright, 6)))
    assert_plain(load_one(stored, tmp_path, exif=exif)[1:-1], WHITE, 2)


def test_broken_exif_does_not_lose_the_picture(tmp_path):
    for exif in b"once upon a time", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 20, b"II*\0\xff\xff\xff\x7f", b"":
        assert_plain(load_one(plain((20, 20), RED), tmp_path, exif=b"Exif\0\0" + exif), RED)


def test_transparency_is_put_on_white(tmp_path):
    half = (255, 127, 127)  # 255 · (1 - 128 / 255) = 127
    assert_plain(load_one(plain((20, 20), (*RED, 128), "RGBA"), tmp_path), half, 1)
    assert_plain(load_one(plain((20, 20), (0, 0, 0, 0), "RGBA"), tmp_path), WHITE)
    assert_plain(load_one(plain((20, 20), (*BLUE, 255), "RGBA"), tmp_path), BLUE)
    assert_plain(load_one(plain((20, 20), (0, 0), "LA"), tmp_path), WHITE)
    assert_plain(load_one(plain((20, 20), (0, 128), "LA"), tmp_path), (127, 127, 127), 1)
    assert_plain(load_one(plain((20, 20), (0, 128), "LA"), tmp_path, channels=1), (127,), 1)
    assert_plain(load_one(plain((20, 20), (*RED, 128), "RGBA"), tmp_path, "a.tif"), half, 1)


def test_transparency_of_palettes_and_of_a_colour_is_put_on_white(tmp_path):
    rows = [bytes([0, 1, 2, 3] * 2)] * 8
    palette = {"PLTE": bytes(RED + RED + BLUE + GREEN), "tRNS": bytes([0, 128, 255])}
    picture = load_one(png(8, 8, 8, 3, rows, **palette), tmp_path)
    for k, color in enumerate([WHITE, (255, 127, 127), BLUE, GREEN]):
        assert_plain(picture[:, k], color, 1)
    rows = [bytes((*RED, *BLUE) * 4)] * 8
    picture = load_one(png(8, 8, 8, 2, rows, tRNS=struct.pack(">HHH", *RED)), tmp_path)
    assert_plain(picture[:, 0], WHITE)
    assert_plain(picture[:, 1], BLUE)
    rows = [bytes([9, 200] * 4)] * 8
    picture = load_one(png(8, 8, 8, 0, rows, tRNS=struct.pack(">H", 9)), tmp_path)
    assert_plain(picture[:, 0], WHITE)
    assert_plain(picture[:, 1], (200,) * 3)
    image = plain((8, 8), 0, "P")
    image.putpalette(RED + BLUE)
    assert_plain(load_one(image, tmp_path, "a.gif", transparency=0), WHITE)
    assert_plain(load_one(image, tmp_path, "a.gif"), RED)


def test_what_is_hidden_under_transparency_leaves_no_fringe(tmp_path):
    stripes = np.zeros((64, 64, 4), np.uint8)
    stripes[:, ::2] = (*RED, 255)  # between them transparent black
    assert_plain(load_one(Image.fromarray(stripes), tmp_path), (255, 127, 127), 6)


def test_16_bit_gray_png_is_scaled_by_257(tmp_path):
    values = [0, 65535, 257 * 77, 257 * 77 + 100, 257 * 77 + 200, 255, 128, 60000]
    picture = load_one(png(8, 8, 16, 0, [struct.pack(">8H", *values)] * 8), tmp_path)
    np.testing.assert_array_equal(picture[3, :, 0], [0, 255, 77, 77, 78, 1, 0, 233])
    np.testing.assert_array_equal(picture[..., 0], picture[..., 2])
    assert load_one(png(8, 8, 16, 0, [struct.pack(">8H", *values)] * 8), tmp_path, channels=1)[0, 1, 0] == 255


def test_16_bit_colour_png_is_scaled(tmp_path):
    rows = [struct.pack(">3H", 257 * 200, 257 * 100, 0) * 8] * 8
    assert_plain(load_one(png(8, 8, 16, 2, rows), tmp_path), (200, 100, 0))


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_of_either_byte_order(tmp_path, order):
    values = np.full((20, 30), 257 * 77, np.uint16)
    values[:, 15:] = 257 * 140
    mode = "I;16B" if order == ">" else "I;16"
    image = Image.frombytes(mode, (30, 20), values.astype(f"{order}u2").tobytes())
    picture = load_one(image, tmp_path, "a.tif", size=20)
    with open(tmp_path / "folder0" / "a.tif", "rb") as file:
        assert file.read(2) == (b"MM" if order == ">" else b"II")
    assert_plain(picture[:, 0], (77,) * 3)
    assert_plain(picture[:, -1], (140,) * 3)


def test_float_tiff_is_0_to_1_or_0_to_255(tmp_path):
    values = np.zeros((10, 10), np.float32)
    values[:, 5:] = 1
    picture = load_one(Image.fromarray(values), tmp_path, "a.tif", size=10)
    assert picture[0, 0, 0] == 0 and picture[0, 9, 0] == 255
    picture = load_one(Image.fromarray(values * 200), tmp_path, "a.tif", size=10)
    assert picture[0, 0, 0] == 0 and picture[0, 9, 0] == 200
    picture = load_one(Image.fromarray(np.full((10, 10), 0.2, np.float32)), tmp_path, "a.tif", channels=1)
    assert_plain(picture, (51,))
    for low, high in (-1e-9, 1.000001), (-0.0019, 1.0019), (-0.4, 255.4):
        values[:, 5:], values[:, :5] = high, low
        picture = load_one(Image.fromarray(values), tmp_path, "a.tif", size=10)
        assert picture[0, 0, 0] == 0 and picture[0, 9, 0] == 255


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (256, "from 0.5 to 256, not 0 … 1 or 0 … 255"),
        (1.0312, "from 0.5 to 1.0312, not"),
        (-0.5, "from -0.5 to 0.5"),
        (1e30, "1e+30"),
        (np.nan, "NaN"),
        (-np.inf, "infinity"),
        (np.int32(70_000), "integers from 0 to 70000; 0 … 65535 can be read"),
        (np.int32(-1), "integers from -1 to 0;"),
    ],
)
def test_deep_tiff_with_other_values_is_left_out(tmp_path, value, reason):
    values = np.full((10, 10), 0.5, np.asarray(value, None if isinstance(value, np.int32) else np.float32).dtype)
    values[4, 4] = value
    Image.fromarray(values).save(tmp_path / "odd.tif")
    plain((10, 10), RED).save(tmp_path / "good.png")
    images, report = load_images(tmp_path, 8)
    ((name, said),) = report.skipped
    assert len(images) == 1 and name == "odd.tif" and reason in said


dark_files = {
    "12 bits of 16": ("a.png", np.full((9, 9), 4095, np.uint16), "4095, where 65535 is white; multiply .* by 16 "),
    "8 bits of 32": ("a.tif", np.full((9, 9), 255, np.int32), "255, where 65535 is white; multiply .* by 257 "),
    "masks": ("a.png", np.eye(9, dtype=np.uint8), "1, where 255 is white; multiply .* by 255 "),
    "masks in RGBA": ("a.png", np.full((9, 9, 4), (1, 1, 1, 255), np.uint8), "1, where 255 is white"),
    "floats": ("a.tif", np.full((9, 9), 0.01, np.float32), "0.01, where 1 is white"),
    "a dark photograph": ("a.png", np.full((9, 9, 3), (8, 20, 33), np.uint8), None),
    "stars": ("a.png", np.uint8(255) * (np.indices((90, 90)) == 45).all(axis=0), None),
    "14 bits of 16": ("a.tif", np.full((9, 9), 16383, np.uint16), None),
}


@pytest.mark.parametrize("case", dark_files)
def test_folders_of_nearly_black_images_are_named(tmp_path, case):
    name, values, said = dark_files[case]
    Image.fromarray(values).save(tmp_path / name)
    Image.fromarray(values // (1 if values.shape[-1] == 4 else 2)).save(tmp_path / ("darker" + name))
    (tmp_path / "0.png").write_bytes(b"none")
    report = load_images(tmp_path, 6)[1]
    assert len(report.notes) == bool(said)
    assert not said or re.match(f"{name}: the images are nearly black: the largest value is {said}", report.notes[0])
    if said:  # over all images
        plain((9, 9), RED).save(tmp_path / "z.png")
        assert load_images(tmp_path, 6)[1].notes == []


def test_1_bit_gray_and_palette_pictures(tmp_path):
    assert_plain(load_one(plain((20, 20), 1, "1"), tmp_path), WHITE)
    assert_plain(load_one(plain((20, 20), 0, "1"), tmp_path), (0, 0, 0))
    assert_plain(load_one(plain((20, 20), 93, "L"), tmp_path), (93,) * 3)
    assert_plain(load_one(plain((20, 20), 93, "L"), tmp_path, channels=1), (93,))
    image = plain((20, 20), 1, "P")
    image.putpalette(RED + (10, 20, 30))
    for name in "a.png", "a.gif", "a.bmp", "a.tif":
        assert_plain(load_one(image, tmp_path, name), (10, 20, 30))


def test_cmyk_jpeg(tmp_path):
    assert_plain(load_one(plain((20, 20), (0, 255, 255, 0), "CMYK"), tmp_path, "a.jpg", quality=95), RED, 4)
    assert_plain(load_one(plain((20, 20), (0, 0, 0, 0), "CMYK"), tmp_path, "a.jpg", quality=95), WHITE, 4)
    assert_plain(load_one(plain((20, 20), (0, 0, 0, 155), "CMYK"), tmp_path, "a.tif"), (100,) * 3, 4)


def test_colour_becomes_gray_by_the_eye_s_weights(tmp_path):
    for color, expected in (RED, 76), (GREEN, 150), (BLUE, 29), (WHITE, 255):
        assert_plain(load_one(plain((20, 20), color), tmp_path, channels=1), (expected,), 1)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_of_animated_files_the_first_frame_is_read(tmp_path, name):
    if name == "a.webp" and not features.check("webp"):
        pytest.skip("this Pillow reads no WebP")
    frames = [plain((20, 20), color) for color in (RED, GREEN, BLUE)]
    options = {"lossless": True} if name == "a.webp" else {}
    picture = load_one(frames[0], tmp_path, name, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / "folder0" / name) as image:
        assert image.n_frames == 3
    assert_plain(picture, RED)


def test_an_animated_gif_whose_frames_are_parts_with_transparency(tmp_path):
    frames = [plain((20, 20), (0, 0, 0, 0), "RGBA"), plain((20, 20), (*RED, 255), "RGBA")]
    frames[0].paste((*BLUE, 255), (0, 0, 10, 20))
    picture = load_one(frames[0], tmp_path, "a.gif", size=20, save_all=True, append_images=frames[1:], disposal=2)
    assert_plain(picture[:, :9], BLUE)
    assert_plain(picture[:, 11:], WHITE)


def test_sub_folders_are_included_and_everything_comes_in_the_order_of_its_name(tmp_path, monkeypatch):
    names = ["b.png", "a/z.png", "a/b/c.png", "a.png", "B.jpg", "c/a.png", "é.png", "10.png", "9.png"]
    random.Random(0).shuffle(names)
    for k, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        plain((10, 10), (20 * k,) * 3).save(tmp_path / name)
    expected = [20 * k for _, k in sorted((name, k) for k, name in enumerate(names))]
    read_picture, delays = image_files.read_image, random.Random(1)

    def slowly(file, *arguments, **options):
        time.sleep(delays.choice([0, 0.02, 0.05]))
        return read_picture(file, *arguments, **options)

    monkeypatch.setattr(image_files, "read_image", slowly)
    for cores in 1, 2, 9:
        monkeypatch.setattr(device, "cores", lambda cores=cores: cores)
        images, report = load_images(tmp_path, 8)
        assert report.photographs and report.notes == [] and report.skipped == []
        assert report.source == str(tmp_path)
        assert np.abs(images[:, 4, 4, 0].astype(int) - expected).max() <= 2


def test_large_pictures_keep_their_place_in_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "LARGE", 500)
    for k, size in enumerate([10, 40, 10, 40, 40]):
        plain((size, size), (20 * k,) * 3).save(tmp_path / f"{k}.png")
    whole = png(40, 40)
    (tmp_path / "2b.png").write_bytes(whole[: len(whole) // 2])
    images, report = load_images(tmp_path, 8)
    assert images[:, 4, 4, 0].tolist() == [0, 20, 40, 60, 80]
    assert [name for name, _ in report.skipped] == ["2b.png"]


def test_left_out_files_leave_no_gap_in_the_pictures(tmp_path):
    for k in range(9):
        if k % 3 == 1:
            (tmp_path / f"{k}.png").write_text("no picture")
        else:
            plain((10, 10), (20 * k,) * 3).save(tmp_path / f"{k}.png")
    images, report = load_images(tmp_path, 8)
    assert images[:, 4, 4, 0].tolist() == [20 * k for k in (0, 2, 3, 5, 6, 8)]
    assert [name for name, _ in report.skipped] == ["1.png", "4.png", "7.png"]


def test_source_may_be_a_relative_path(tmp_path, monkeypatch):
    plain((10, 10), RED).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    images, report = load_images(".", 8)
    assert len(images) == 1 and report.source == str(tmp_path)


@pytest.mark.skipif(not os.path.isdir(PHOTOS), reason="the photographs are not here")
def test_real_photographs_are_all_read():
    images, report = load_images(PHOTOS, 32)
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    assert report.photographs and report.skipped == [] and str(report) == ""
    assert len({image.tobytes() for image in images}) == 200
    assert 60 < images.mean() < 200 and images.std(axis=(1, 2, 3)).min() > 5


# What is no picture is skipped, counted and named.


LOAD_AND_TELL = """
import json, sys
from data import load_images, image_files
from support import device; device.cores = lambda: 4
image_files._show_progress = lambda results, count: results  # its bar would bring TensorFlow, and its memory
images, report = load_images(sys.argv[1], 8)
peak = 0
try:
    with open("/proc/self/status") as file:
        peak = int(file.read().split("VmHWM:")[1].split()[0]) // 1024
except OSError:
    pass
print(json.dumps({"count": len(images), "left_out": report.skipped, "said": str(report), "megabytes": peak}))
"""


def load_elsewhere(folder):
    """Loads a folder in a process of its own, that may take two minutes; the peak memory is 0 where it is not known."""
    done = python("-c", LOAD_AND_TELL, folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_what_gives_no_picture_is_skipped_counted_and_named(tmp_path):
    good = jpeg(RED, (200, 200))
    (tmp_path / "good.jpg").write_bytes(good)
    bad = {
        "broken.png": png(200, 200)[:40] + b"\xff" * 30 + png(200, 200)[70:],
        "empty.png": b"",
        "text.png": b"Once upon a time\n" * 100,
        "truncated.gif": b"GIF89a\x10\0\x10\0",
        "truncated.jpg": good[: len(good) // 2],
        "truncated.png": png(200, 200, rows=map(bytes, noise(200, 200)))[:20_000],
        "zero.jpg": bytes(10_000),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    found = load_elsewhere(tmp_path)
    assert found["count"] == 1
    assert [name for name, _ in found["left_out"]] == sorted(bad)
    assert all(reason for _, reason in found["left_out"])
    assert dict(found["left_out"])["empty.png"] == "empty"
    first = ["broken.png", "empty.png", "truncated.jpg"]  # of each reason one
    assert found["said"].startswith("7 files skipped: ") and found["said"].endswith(", and 4 more")
    assert all(name in found["said"] for name in first) and "text.png" not in found["said"]


def test_the_summary_names_all_where_they_are_few(tmp_path):
    assert image_files.summarise_skipped([("a", "empty")]) == "1 file skipped: a (empty)"
    three = image_files.summarise_skipped([("a", "empty"), ("b", "x"), ("c", "y")])
    assert three == "3 files skipped: a (empty), b (x), c (y)"
    four = image_files.summarise_skipped([("a", "empty"), ("b", "x"), ("c", "y"), ("d", "z")])
    assert four == "4 files skipped: a (empty), b (x), c (y), and 1 more"
    same = image_files.summarise_skipped([("a", "x"), ("b", "x"), ("c", "x"), ("d", "y")])
    assert same == "4 files skipped: a (x), d (y), b (x), and 1 more"


@posix
def test_pipes_and_links_in_circles_or_to_nothing_are_skipped_without_hanging(tmp_path):
    plain((10, 10), RED).save(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("nowhere.png", tmp_path / "nothing.png")
    os.symlink("circle.png", tmp_path / "circle.png")
    (tmp_path / "sub").mkdir()
    plain((10, 10), RED).save(tmp_path / "sub" / "good.png")
    os.symlink("..", tmp_path / "sub" / "back")
    os.symlink(tmp_path, tmp_path / "sub" / "self")
    os.symlink("pipe.png", tmp_path / "to_pipe.png")
    found = load_elsewhere(tmp_path)
    assert found["count"] == 2
    reasons = dict(found["left_out"])
    assert sorted(reasons) == ["circle.png", "nothing.png", "pipe.png", "to_pipe.png"]
    assert reasons["pipe.png"] == reasons["to_pipe.png"] == "not a regular file"
    assert reasons["nothing.png"] == "a broken link"


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        plain((10, 10), RED).save(folder / name, "PNG")


@pytest.mark.parametrize(
    ("names", "read", "said"),
    [
        (
            ["a.png", ".b.png", "c/._d.png", "c/.e/f.png", "c/.e/g.png"],
            1,
            "3 hidden or system files or folders ignored",
        ),
        (["a.png", ".ipynb_checkpoints/a-checkpoint.png"], 1, "1 hidden or system file or folder ignored"),
        (["a.png", ".Trash-1000/files/a.png", "__MACOSX/a.png", "@eaDir/a.png/SYNO.jpg"], 1, "3 hidden .*"),
        (
            ["a.png", "Thumbs.db", "b/DESKTOP.INI", "$RECYCLE.BIN/a.png", "lost+found/a.png", "#recycle/b.png"],
            1,
            "5 .*",
        ),
        (["a.png", "macosx/thumbs.db.png", "eaDir/b.png", "a..png", "desktop.png"], 5, ""),
        (
            ["a.png", "samples.png", "samples-epoch0010.png", "b/samples-epoch12345.png"],
            1,
            "3 sample grids ignored",
        ),
        (["samples-of-cats.png", "samples.jpg", "samples-epoch1.png", "Samples.png", "samples1.png"], 5, ""),
        (["my-samples.png", "mysamples.png", "samples-epoch0001.png.png", "other.keras", "sub/my.keras"], 3, ".*"),
        (
            ["a.png", "my-samples.png", "my-samples-epoch0010.png", "my.keras"],
            1,
            "2 sample grids ignored\n1 file .*",
        ),
        (["a.png", ".b.png", "samples.png"], 1, "1 hidden or system file or folder ignored; 1 sample grid ignored"),
    ],
)
def test_hidden_and_system_files_and_our_own_grids_are_no_training_images(tmp_path, names, read, said):
    folder = tmp_path / ".hidden"  # what is named by the user is read
    put(folder, *(name for name in names if not name.endswith(".keras")))
    for name in names:
        if name.endswith(".keras"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"a model")
    images, report = load_images(folder, 8)
    assert len(images) == read and re.fullmatch(said, str(report), re.DOTALL)


def test_a_folder_of_hidden_files_says_so(tmp_path):
    put(tmp_path, ".a.png")
    with pytest.raises(ValueError, match="no image .*: 1 hidden or system file or folder ignored"):
        load_images(tmp_path, 8)


def test_grids_of_any_name_are_known_by_what_they_hold(tmp_path):
    put(tmp_path, "a.png")
    files.save_grid(noise(4, 8, 8, 3), tmp_path / "more.png")
    files.save_grid(noise(4, 8, 8, 1), tmp_path / "of-a-deleted-model-samples.png")
    files.save_grid(noise(1, 8, 8, 3), tmp_path / "single.png")  # as `evaluate.py --samples` may read it
    images, report = load_images(tmp_path, 8)
    assert len(images) == 2 and {reason for _, reason in report.skipped} == {"a sample grid"}
    assert len(report.skipped) == 2


@posix
def test_folders_without_inodes_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    put(tmp_path, "a.png", "b/c.png", "b/d/e.png", "f/g.png")
    os.symlink("..", tmp_path / "b" / "back")
    os.symlink(tmp_path / "f", tmp_path / "b" / "second")
    stat = os.stat

    def without_inode(*arguments, **options):
        status = stat(*arguments, **options)
        return os.stat_result([status.st_mode, 0, *status[2:]], {"st_mtime_ns": 0, "st_ctime_ns": 0})

    expected = len(load_images(tmp_path, 8)[0])
    monkeypatch.setattr(os, "stat", without_inode)
    assert len(load_images(tmp_path, 8)[0]) == expected == 4


@pytest.mark.parametrize("name", ["drawings", "new-drawings"])
def test_a_folder_called_as_the_drawings_is_told_apart(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawings, "COUNT", 2)
    monkeypatch.setattr(drawings.draw_cats, "__defaults__", (2, 0))
    assert load_images(name, 8)[1].notes == []
    put(tmp_path, f"{name}/a.png")
    images, report = load_images(name, 8)
    assert len(images) == 2 and report.source == name
    note = f"{name} means the built-in drawings; for the folder of that name write .{os.sep}{name}"
    assert report.notes == [note]
    for folder in f"./{name}", f"{name}/", tmp_path / name, pathlib.Path(name):
        images, report = load_images(folder, 8)
        assert len(images) == 1 and report.source == str(tmp_path / name) and report.notes == []


kinds = {
    "IMG_1.HEIC": "HEIF; convert it to JPEG or PNG, or pip install pillow-heif",
    "a.heif": "HEIF; convert it to JPEG or PNG, or pip install pillow-heif",
    "a.avif": "AVIF; convert it to JPEG or PNG, or pip install --upgrade pillow",
    "a.CR2": "a RAW photograph; convert it to JPEG or PNG",
    "a.svg": "a vector drawing; export it as PNG",
    "a.pdf": "a document; export its images as JPEG or PNG",
    "a.mov": "a video; extract its frames as JPEG or PNG",
    "a.zip": "an archive; unpack it",
    "a.npy": "an array file; give it to --data itself",
    "a.txt": "not an image",
    "heic": "not an image",
}


@pytest.fixture
def without_codecs(monkeypatch):
    """A Pillow that reads neither HEIF nor AVIF."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(features, "check", lambda feature: False)
    image_files.readable_formats.cache_clear()
    yield monkeypatch
    image_files.readable_formats.cache_clear()


@pytest.mark.parametrize("name", kinds)
def test_files_of_other_kinds_say_what_to_do(tmp_path, without_codecs, name):
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftyp or any other contents")
    with pytest.raises(ValueError) as error:
        load_images(tmp_path, 8)
    assert str(error.value).endswith(f": 1 file skipped: {name} ({kinds[name]})")
    put(tmp_path, "good.png")
    (tmp_path / f"empty{name}").write_bytes(b"")
    assert load_images(tmp_path, 8)[1].skipped == sorted([(name, kinds[name]), (f"empty{name}", "empty")])


def test_heif_is_read_where_pillow_heif_is_installed(kept, without_codecs):
    folder, _ = kept
    (folder / "a.heic").write_bytes(b"HEIF!")
    assert ("a.heic", kinds["a.heif"]) in load_images(folder, 8)[1].skipped
    heif = types.ModuleType("pillow_heif")

    def register_heif_opener():
        Image.register_open("HEIF", lambda file, name: plain((9, 9), GREEN), lambda prefix: prefix.startswith(b"HEIF!"))

    heif.register_heif_opener = register_heif_opener
    without_codecs.setitem(sys.modules, "pillow_heif", heif)
    without_codecs.setattr(Image, "OPEN", dict(Image.OPEN))
    without_codecs.setattr(Image, "ID", list(Image.ID))
    image_files.readable_formats.cache_clear()
    images, report = load_images(folder, 8)  # although the images are cached
    assert len(images) == 4 and report.skipped == [("broken.png", "not an image")]
    assert [tuple(image[4, 4].tolist()) for image in images if image[4, 4, 1]] == [GREEN]


@posix
def test_a_link_to_nothing_is_a_missing_path(tmp_path):
    os.symlink(tmp_path / "nowhere.npy", tmp_path / "link.npy")
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        load_images(tmp_path / "link.npy", 8)


@posix
def test_links_to_pictures_and_folders_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    plain((10, 10), RED).save(tmp_path / "elsewhere" / "a.png")
    plain((10, 10), GREEN).save(tmp_path / "b.png")
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "folder" / "first")
    os.symlink(tmp_path / "b.png", tmp_path / "folder" / "second.png")
    images, report = load_images(tmp_path / "folder", 8)
    assert images[:, 4, 4].tolist() == [list(RED), list(GREEN)] and report.skipped == []


def test_decompression_bombs_are_skipped_without_taking_memory(tmp_path):
    plain((10, 10), RED).save(tmp_path / "good.png")
    (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000, depth=1))
    (tmp_path / "header.png").write_bytes(png(2**31 - 1, 2**31 - 1, rows=[b"\0" * 100]))
    (tmp_path / "medium.png").write_bytes(png(12_000, 12_000, depth=1))
    assert os.path.getsize(tmp_path / "bomb.png") < 2_000_000
    found = load_elsewhere(tmp_path)
    assert found["count"] == 1
    assert [name for name, _ in found["left_out"]] == ["bomb.png", "header.png", "medium.png"]
    assert found["megabytes"] < 300


def test_several_large_pictures_do_not_take_memory_at_the_same_time(tmp_path):
    bomb = png(6000, 6000, color_type=2)  # 144 MB in Pillow, and some copies
    for k in range(4):
        (tmp_path / f"{k}.png").write_bytes(bomb)
    found = load_elsewhere(tmp_path)
    assert found["count"] == 4 and found["left_out"] == []
    assert found["megabytes"] < 400


@not_root
def test_unreadable_files_and_folders_are_left_out(tmp_path):
    plain((10, 10), RED).save(tmp_path / "good.png")
    plain((10, 10), RED).save(tmp_path / "closed.png")
    (tmp_path / "closed").mkdir()
    plain((10, 10), RED).save(tmp_path / "closed" / "a.png")
    os.chmod(tmp_path / "closed.png", 0)
    os.chmod(tmp_path / "closed", 0)
    try:
        images, report = load_images(tmp_path, 8)
    finally:
        os.chmod(tmp_path / "closed", 0o700)
    assert len(images) == 1
    assert dict(report.skipped) == {"closed": "permission denied", "closed.png": "permission denied"}


def assert_printable_on_one_line(text):
    assert len(text.splitlines()) == 1
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp")], repr(text)
    text.encode("utf-8")  # no bytes in the guise of characters


@pytest.mark.parametrize(
    "name",
    [
        b"two\nlines.png",
        b"\r\t\x1b[31mred\x07\x7f.png",
        b"\xff\xfe.png",
        "next\u0085 line\u2028 separator\u2029.png".encode(),
        "Käse 猫.png".encode(),
        b" %s {0} \\ ' \" .png",
    ],
)
def test_file_names_may_hold_anything_and_the_summary_is_one_line(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    try:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(b"no picture")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(ValueError, match="no image") as error:
        load_images(folder, 8)
    assert_printable_on_one_line(str(error.value))

    with open(os.path.join(os.fsencode(folder), b"z" + name), "wb") as file:
        plain((10, 10), RED).save(file, "PNG")
    images, report = load_images(folder, 8)
    assert_plain(images[0], RED)
    assert report.skipped == [(os.fsdecode(name), "not an image")]
    assert_printable_on_one_line(str(report))
    try:
        readable = name.decode()
    except UnicodeDecodeError:
        readable = "\x00"
    if readable.isprintable():
        assert readable in str(report), "what can be printed should be shown as it is"


def test_what_a_broken_file_makes_pillow_say_is_printable_too(tmp_path, monkeypatch):
    plain((10, 10), RED).save(tmp_path / "good.png")
    (tmp_path / "bad.ppm").write_bytes(b"P6\n\x1b[31m\x07999999999999\n")
    _, report = load_images(tmp_path, 8)
    assert [name for name, _ in report.skipped] == ["bad.ppm"]
    assert_printable_on_one_line(str(report))

    def fail(*arguments, **options):
        raise ValueError("unknown \x1b[31m token\nof \x07 " + 1000 * "many ")

    monkeypatch.setattr(image_files, "read_image", fail)
    with pytest.raises(ValueError, match="unknown .* token of ") as error:
        load_images(tmp_path, 8)
    assert_printable_on_one_line(str(error.value))
    assert len(str(error.value)) < 600


def test_folders_of_any_name_are_read_and_named_printably(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"\xff\n.npy")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(ValueError, match="it is empty") as error:
        load_images(os.fsdecode(folder), 8)
    assert_printable_on_one_line(str(error.value))
    with open(os.path.join(folder, b"a.png"), "wb") as file:
        plain((10, 10), RED).save(file, "PNG")
    assert len(load_images(os.fsdecode(folder), 8)[0]) == 1


def test_a_folder_without_pictures_says_what_was_found(tmp_path):
    with pytest.raises(ValueError, match="no image in the folder .*: it is empty"):
        load_images(tmp_path, 8)
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match="it is empty"):
        load_images(tmp_path, 8)
    for k in range(5):
        (tmp_path / "sub" / f"note{k}.txt").write_text("no picture")
    with pytest.raises(ValueError, match="5 files skipped: .*note0.txt .*and 2 more"):
        load_images(tmp_path, 8)


def test_a_missing_path_and_other_kinds_of_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder or file .*missing"):
        load_images(tmp_path / "missing", 8)
    with pytest.raises(FileNotFoundError):
        load_images(tmp_path / "missing.npy", 8)
    with pytest.raises(FileNotFoundError):
        load_images("Drawings", 8)
    plain((10, 10), RED).save(tmp_path / "single.png")
    with pytest.raises(ValueError, match="neither a folder"):
        load_images(tmp_path / "single.png", 8)
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="neither a folder"):
        load_images(tmp_path / "photos.zip", 8)


@posix
def test_a_pipe_named_like_an_array_is_refused_without_hanging(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    done = python("-c", "import sys; from data import load_images; load_images(sys.argv[1], 8)", tmp_path / "pipe.npy")
    assert done.returncode == 1 and "ValueError: " in done.stderr


@pytest.mark.parametrize("channels", [0, 2, 4, "3"])
def test_other_numbers_of_channels_are_refused(channels):
    with pytest.raises(ValueError, match="channels"):
        load_images("drawings", 8, channels)


@pytest.mark.parametrize("size", [0, -8, 8.5, "8", None])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="image_size"):
        load_images("drawings", size)


SCRIPT = """
import sys
print("started")
from data import load_images
images, report = load_images(sys.argv[1], 8)
print(images.shape, images[:, 4, 4, 0].tolist())
"""


@pytest.mark.parametrize("way", ["script without a main guard", "standard input"])
def test_loading_works_from_a(way, tmp_path):
    (tmp_path / "photos").mkdir()
    for k in range(12):
        plain((50, 40), (20 * k,) * 3).save(tmp_path / "photos" / f"{k:02}.png")
    (tmp_path / "script.py").write_text(SCRIPT)
    if way == "standard input":
        done = python("-", tmp_path / "photos", stdin=SCRIPT)
    else:
        done = python(tmp_path / "script.py", tmp_path / "photos")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == ["started", f"(12, 8, 8, 3) {[20 * k for k in range(12)]}"]


# Array files.


@pytest.mark.parametrize("name", ["pictures.npy", "pictures.npz"])
@pytest.mark.parametrize("kind", ["uint8", "int64", "uint16", ">i4", "int8"])
def test_whole_numbers_are_taken_as_they_are(tmp_path, name, kind):
    pixels = noise(5, 8, 8, 3) // (2 if kind == "int8" else 1)
    images, report = load_images(save_array(tmp_path, pixels.astype(kind), name), 8)
    np.testing.assert_array_equal(images, pixels)
    assert images.dtype == np.uint8 and images.flags.writeable
    assert report.source == str(tmp_path / name) and not report.photographs
    assert report.notes == [] and report.skipped == []


@pytest.mark.parametrize("kind", ["float32", "float64", ">f4"])
def test_floats_from_0_to_1_are_recognised_and_said(tmp_path, kind):
    pixels = noise(5, 8, 8, 3)
    images, report = load_images(save_array(tmp_path, (pixels / 255).astype(kind)), 8)
    np.testing.assert_array_equal(images, pixels)
    assert len(report.notes) == 1 and report.notes[0].endswith("pictures.npy: floating-point numbers, taken as 0 … 1")
    assert str(report) == report.notes[0]


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_floats_from_minus_1_to_1_are_recognised_and_said(tmp_path, kind):
    pixels = noise(5, 8, 8, 3)
    images, report = load_images(save_array(tmp_path, (pixels / 127.5 - 1).astype(kind)), 8)
    np.testing.assert_array_equal(images, pixels)
    assert len(report.notes) == 1 and report.notes[0].endswith("pictures.npy: floating-point numbers, taken as -1 … 1")


def test_half_precision_floats(tmp_path):
    pixels = noise(5, 8, 8, 3)
    images, _ = load_images(save_array(tmp_path, (pixels / 255).astype(np.float16)), 8)
    assert np.abs(images.astype(int) - pixels).max() <= 1
    images, _ = load_images(save_array(tmp_path, (pixels / 127.5 - 1).astype(np.float16)), 8)
    assert np.abs(images.astype(int) - pixels).max() <= 1


def test_the_limits_of_floats_become_0_and_255(tmp_path):
    for low in 0, -1:
        values = np.full((1, 8, 8), low, np.float32)
        values[0, :, 4:] = 1
        images, _ = load_images(save_array(tmp_path, values), 8, channels=1)
        assert images[0, :, :4].max() == 0 and images[0, :, 4:].min() == 255


# Values beyond black or white by up to half a gray level are rounding; the range is that of the clear values.
float_arrays = {
    "a little below 0": ("f4", [-1e-9, 0.5, 1], [0, 128, 255], "0 … 1"),
    "a little above 1": ("f8", [0, 0.5, 1.000001], [0, 128, 255], "0 … 1"),
    "half a level below 0 and above 1": ("f4", [-0.0019, 0.2, 1.0019], [0, 51, 255], "0 … 1"),
    "one step of float16 above 1": ("f2", [0, 0.2, 1 + 2**-10], [0, 51, 255], "0 … 1"),
    "big-endian": (">f4", [-1e-7, 0.2, 1 + 1e-6], [0, 51, 255], "0 … 1"),
    "clearly negative": ("f4", [-0.26, 0, 1], [94, 128, 255], "-1 … 1"),
    "a little beyond -1 … 1": ("f8", [-1.003, 0, 1.003], [0, 128, 255], "-1 … 1"),
    "a float copy of uint8": ("f4", [0, 7, 255], [0, 7, 255], "0 … 255"),
    "float16 copy of uint8": ("f2", [3, 7, 200], [3, 7, 200], "0 … 255"),
    "resampled 0 … 255": (">f8", [-0.4, 7.3, 255.4], [0, 7, 255], "0 … 255"),
    "a float copy of dark uint8": ("f4", [0, 7, 20], [0, 7, 20], "0 … 255"),
}


@pytest.mark.parametrize("case", float_arrays)
def test_the_range_of_floats_is_recognised_with_a_tolerance(tmp_path, case):
    kind, values, expected, said = float_arrays[case]
    images, report = load_images(save_array(tmp_path, np.array(values, kind).repeat(64).reshape(3, 8, 8)), 8, 1)
    assert images[:, 4, 4, 0].tolist() == expected
    assert report.notes[0].endswith(f"floating-point numbers, taken as {said}")


def test_booleans_are_black_and_white(tmp_path):
    images, report = load_images(save_array(tmp_path, noise(3, 8, 8) > 127), 8, 1)
    np.testing.assert_array_equal(images[..., 0], 255 * (noise(3, 8, 8) > 127))
    assert [note.split(": ")[1] for note in report.notes] == ["False and True, taken as black and white"]


dark_arrays = {
    "masks": (np.uint8, 1, "largest value is 1, where 255 is white; multiply the values by 255 "),
    "masks of 64 bits": (np.int64, 1, "largest value is 1, where 255 is white; multiply the values by 255 "),
    "classes": (np.int16, 20, "largest value is 20, where 255 is white; multiply the values by 12.75 "),
    "an eighth, just not": (np.uint8, 31, "largest value is 31"),
    "floats": (np.float32, 1 / 255, "largest value is 0.00392157, where 1 is white; multiply the values by 255 "),
    "black": (np.uint8, 0, "largest value is 0, where 255 is white"),
    "dark photographs": (np.uint8, 32, None),
    "dark floats": (np.float64, 0.126, None),
}


@pytest.mark.parametrize("case", dark_arrays)
def test_nearly_black_arrays_are_named(tmp_path, case):
    kind, high, said = dark_arrays[case]
    array = np.zeros((3, 8, 8), kind)
    array[1, 2, 3] = high
    notes = [note for note in load_images(save_array(tmp_path, array), 8)[1].notes if "nearly black" in note]
    assert len(notes) == bool(said) and all(said in note for note in notes)


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 8, 8, 1)])
def test_gray_arrays_become_gray_or_colour(tmp_path, shape):
    pixels = noise(*shape)
    path = save_array(tmp_path, pixels)
    images, _ = load_images(path, 8, channels=1)
    np.testing.assert_array_equal(images, pixels.reshape(5, 8, 8, 1))
    images, _ = load_images(path, 8, channels=3)
    np.testing.assert_array_equal(images, np.repeat(pixels.reshape(5, 8, 8, 1), 3, axis=3))


def test_colour_arrays_become_gray(tmp_path):
    pixels = noise(5, 8, 8, 3)
    images, _ = load_images(save_array(tmp_path, pixels), 8, channels=1)
    assert images.shape == (5, 8, 8, 1)
    assert np.abs(images[..., 0] - pixels @ np.array([0.299, 0.587, 0.114])).max() <= 1


def test_arrays_of_another_size_are_cropped_and_reduced(tmp_path):
    stripes = np.zeros((2, 30, 90, 3), np.uint8)
    stripes[:, :, :30], stripes[:, :, 30:60], stripes[:, :, 60:] = RED, GREEN, BLUE
    images, _ = load_images(save_array(tmp_path, stripes), 8)
    assert images.shape == (2, 8, 8, 3)
    assert_plain(images[:, :, 1:-1], GREEN, 2)
    board = np.indices((250, 250)).sum(axis=0) % 2
    for array in (255 * board).astype(np.uint8)[None], board[None].astype(np.float32), 2.0 * board[None] - 1:
        images, _ = load_images(save_array(tmp_path, array), 16)
        assert_plain(images, (127.5,) * 3, 6)
    images, _ = load_images(save_array(tmp_path, noise(1, 5, 5)), 8)
    assert images.shape == (1, 8, 8, 3)


def test_the_only_array_of_an_npz_file_or_the_one_called_images(tmp_path):
    pixels = noise(5, 8, 8, 3)
    np.savez(tmp_path / "one.npz", anything=pixels)
    np.savez_compressed(tmp_path / "many.npz", a=np.zeros(3), images=pixels, z=noise(7, 8, 8, 3, seed=1))
    for name in "one.npz", "many.npz":
        images, report = load_images(tmp_path / name, 8)
        np.testing.assert_array_equal(images, pixels)
        assert not report.photographs
    np.savez(tmp_path / "none.npz", x_train=pixels, x_test=pixels)
    with pytest.raises(ValueError, match=r"2 arrays \(x_train, x_test\).*'images'"):
        load_images(tmp_path / "none.npz", 8)
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(ValueError, match="0 arrays"):
        load_images(tmp_path / "empty.npz", 8)


def test_the_mark_of_photographs_is_read(tmp_path):
    for photographs in True, False:
        path = save_array(tmp_path, noise(2, 8, 8, 3), "marked.npz", photographs=photographs)
        assert load_images(path, 8)[1].photographs is photographs


def test_an_array_under_the_wrong_ending_is_read_all_the_same(tmp_path):
    pixels = noise(5, 8, 8, 3)
    os.rename(save_array(tmp_path, pixels, "a.npz"), tmp_path / "wrong.npy")
    np.testing.assert_array_equal(load_images(tmp_path / "wrong.npy", 8)[0], pixels)
    os.rename(save_array(tmp_path, pixels, "a.npy"), tmp_path / "wrong.npz")
    np.testing.assert_array_equal(load_images(tmp_path / "wrong.npz", 8)[0], pixels)


with_value = {
    "whole numbers above 255": (np.int64, 256, "from 0 to 256"),
    "negative whole numbers": (np.int16, -1, "from -1 to 0"),
    "floats above 255": (np.float32, 256.0, "from 0 to 256"),
    "floats slightly above 1": (np.float64, 1.01, "from 0 to 1.01"),
    "float16 slightly above 1": (np.float16, 1.0312, r"from 0 to 1\.03"),
    "floats between 1 and dark": (np.float32, 31.5, r"from 0 to 31\.5"),
    "floats slightly below 0": (np.float64, -0.1, r"from -0\.1 to 0, not .*-1 … 1 \(with some below -0\.25\)"),
    "floats below -1": (np.float64, -1.01, "from -1.01 to 0"),
    "not a number": (np.float32, np.nan, r"NaN \(np.nan\)"),
    "not a number, big-endian": (">f8", np.nan, r"NaN \(np.nan\)"),
    "infinity": (np.float32, np.inf, r"infinity \(np.inf\)"),
    "minus infinity": (np.float16, -np.inf, r"infinity \(np.inf\)"),
}


@pytest.mark.parametrize("case", with_value)
@pytest.mark.parametrize("name", ["pictures.npy", "pictures.npz"])
def test_values_that_are_no_pixels_are_refused_in_a_sentence(tmp_path, case, name):
    kind, value, said = with_value[case]
    array = np.zeros((3, 8, 8, 3), kind)
    array[1, 2, 3, 1] = value
    with pytest.raises(ValueError, match=f"(numbers|integers) .*{said}") as error:
        load_images(save_array(tmp_path, array, name), 8)
    assert name in str(error.value) and "0 … 255" in str(error.value)


@pytest.mark.parametrize(
    "shape", [(), (8,), (8, 8), (8, 8, 3), (8, 8, 1), (5, 8, 8, 4), (5, 8, 8, 2), (5, 3, 8, 8), (2, 5, 8, 8, 3)]
)
def test_other_shapes_are_refused_in_a_sentence(tmp_path, shape):
    with pytest.raises(ValueError, match=r"\(N, height, width\)") as error:
        load_images(save_array(tmp_path, np.zeros(shape, np.uint8)), 8)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(0, 8, 8), (0, 8, 8, 3), (5, 0, 8, 3), (5, 8, 8, 0), (0,)])
@pytest.mark.parametrize("name", ["pictures.npy", "pictures.npz"])
def test_empty_arrays_are_refused(tmp_path, shape, name):
    with pytest.raises(ValueError, match=name):
        load_images(save_array(tmp_path, np.zeros(shape, np.uint8), name), 8)


@pytest.mark.parametrize("kind", ["U3", "S3", complex, "datetime64[s]", [("red", "u1"), ("blue", "u1")]])
@pytest.mark.parametrize("name", ["pictures.npy", "pictures.npz"])
def test_other_types_of_values_are_refused(tmp_path, kind, name):
    with pytest.raises(ValueError, match="not numbers"):
        load_images(save_array(tmp_path, np.zeros((5, 8, 8, 3), kind), name), 8)


def test_object_arrays_are_refused(tmp_path):
    array = np.full((5, 8, 8), None)
    for name in "pictures.npy", "pictures.npz":
        with pytest.raises(ValueError, match=name):
            load_images(save_array(tmp_path, array, name), 8)


def test_pickles_are_not_executed(tmp_path):
    mark = tmp_path / "executed"
    evil = b"cos\nmkdir\n(V" + os.fsencode(mark) + b"\ntR."
    pickle.loads(evil)
    assert mark.exists(), "the pickle of this test does nothing"
    mark.rmdir()
    file = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (5, 8, 8)}
    np.lib.format.write_array_header_1_0(file, header)
    (tmp_path / "header.npy").write_bytes(file.getvalue() + evil)
    (tmp_path / "bare.npy").write_bytes(evil)
    (tmp_path / "bare.npz").write_bytes(evil)
    for name, members in ("images.npz", ["images"]), ("mark.npz", ["photographs"]), ("only.npz", ["arr_0"]):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in members:
                archive.writestr(f"{member}.npy", file.getvalue() + evil)
            if name == "mark.npz":
                pixels = io.BytesIO()
                np.save(pixels, noise(2, 8, 8))
                archive.writestr("images.npy", pixels.getvalue())
    for name in "header.npy", "bare.npy", "bare.npz", "images.npz", "mark.npz", "only.npz":
        with pytest.raises(ValueError, match=name):
            load_images(tmp_path / name, 8)
        assert not mark.exists()


def saved(kind):
    file = io.BytesIO()
    pixels = np.repeat(noise(6, 8, 8, 3), 2, axis=0)
    {"npy": np.save, "stored": np.savez, "compressed": np.savez_compressed}[kind](file, pixels)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["npy", "stored", "compressed"])
def test_truncated_array_files_are_refused_in_a_sentence(tmp_path, kind):
    whole = saved(kind)
    path = tmp_path / ("pictures.npy" if kind == "npy" else "pictures.npz")
    path.write_bytes(whole)
    assert load_images(path, 8)[0].shape == (12, 8, 8, 3)
    for length in 0, 1, 6, 60, 127, 128, 500, len(whole) // 2, len(whole) - 30, len(whole) - 1:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            load_images(path, 8)


@pytest.mark.parametrize("kind", ["npy", "stored", "compressed"])
def test_damaged_array_files_are_read_or_refused_but_crash_nothing(tmp_path, kind):
    whole, chance, refused = saved(kind), random.Random(0), 0
    path = tmp_path / ("pictures.npy" if kind == "npy" else "pictures.npz")
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3])):
            place = chance.choice([chance.randrange(len(whole)), chance.randrange(150), -1 - chance.randrange(150)])
            damaged[place] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            load_images(path, 8)
        except ValueError as error:
            assert path.name in str(error)
            refused += 1
    assert refused > 50


def test_files_that_are_something_else_or_promise_too_much_are_refused(tmp_path):
    huge = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)}
    np.lib.format.write_array_header_1_0(huge, header)
    (tmp_path / "text.npy").write_text("once upon a time")
    (tmp_path / "text.npz").write_text("once upon a time")
    (tmp_path / "huge.npy").write_bytes(huge.getvalue() + b"few")
    for name, member, content in (
        ("huge.npz", "images.npy", huge.getvalue() + b"few"),
        ("foreign.npz", "cat.jpg", jpeg(RED)),
        ("broken.npz", "images.npy", b"once upon a time"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, content)
    for name in "text.npy", "text.npz", "huge.npy", "huge.npz", "foreign.npz", "broken.npz":
        with pytest.raises(ValueError, match=name):
            load_images(tmp_path / name, 8)


def test_arrays_of_any_file_name_are_named_printably(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff\n.npy")
    try:
        with open(path, "wb") as file:
            np.save(file, noise(2, 8, 8) / 255)
    except OSError:
        pytest.skip("this file system has no such names")
    _, report = load_images(os.fsdecode(path), 8)
    assert_printable_on_one_line(str(report))
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError) as error:
        load_images(os.fsdecode(path), 8)
    assert_printable_on_one_line(str(error.value))


@not_root
def test_an_unreadable_array_file_is_refused(tmp_path):
    path = save_array(tmp_path, noise(2, 8, 8))
    os.chmod(path, 0)
    with pytest.raises(ValueError, match="pictures.npy"):
        load_images(path, 8)


# The digest.


def test_the_digest_is_that_of_the_pixels():
    pixels = noise(6, 8, 8, 3)
    same = digest(pixels)
    assert isinstance(same, str) and len(same) >= 32
    assert digest(pixels.copy()) == same
    assert digest(np.asfortranarray(pixels)) == same
    assert digest(np.repeat(pixels, 2, axis=0)[::2]) == same


def test_the_digest_is_another_for_other_pixels_order_or_shape():
    pixels = noise(6, 8, 8, 3)
    one_off = pixels.copy()
    one_off[-1, -1, -1, -1] ^= 1
    others = [one_off, pixels[::-1], pixels[:5], pixels.reshape(6, 4, 16, 3), pixels.reshape(12, 4, 8, 3)]
    assert len({digest(images) for images in [pixels, *others]}) == 6


def test_the_digest_is_the_same_in_another_process_and_place(tmp_path):
    pixels = noise(6, 8, 8, 3)
    path = save_array(tmp_path, pixels)
    script = "import sys; from data import digest, load_images; print(digest(load_images(sys.argv[1], 8)[0]))"
    assert python("-c", script, path, env={"PYTHONHASHSEED": "7"}).stdout.strip() == digest(pixels)


# The batches of training.


def numbered(count):
    """Pictures (count, 4, 6, 3) that tell their number, and in which row and column a pixel was."""
    images = np.zeros((count, 4, 6, 3), np.uint8)
    images[..., 0] = np.arange(count)[:, None, None]
    images[..., 1] = 10 * np.arange(4)[:, None]
    images[..., 2] = 10 * np.arange(6)
    return images


def pixels_of(epoch):
    """The batches of an epoch as one array of pixels 0 … 255."""
    return np.rint((np.concatenate(list(epoch)).astype(np.float64) + 1) * 127.5).astype(int)


def order_of(epoch):
    return pixels_of(epoch)[:, 0, 0, 0].tolist()


def test_every_epoch_uses_every_picture_once_and_the_last_batch_is_smaller():
    images = numbered(103)
    for epoch in range(3):
        sizes = [len(batch) for batch in batches(images, 20, seed=0, epoch=epoch)]
        assert sizes == [20] * 5 + [3]
        assert sorted(order_of(batches(images, 20, seed=0, epoch=epoch))) == list(range(103))
    assert [len(batch) for batch in batches(images, 103, 0, 0)] == [103]
    assert [len(batch) for batch in batches(images, 500, 0, 0)] == [103]
    assert [len(batch) for batch in batches(images, 1, 0, 0)] == [1] * 103


def test_the_order_is_another_in_every_epoch_and_for_every_seed():
    images = numbered(100)
    orders = [order_of(batches(images, 8, seed, epoch)) for seed in range(3) for epoch in range(4)]
    assert len(set(map(tuple, orders))) == 12
    for order in orders:
        assert sum(a == b for a, b in zip(order, range(100), strict=True)) < 10, "hardly shuffled"
    for seed in range(3):
        for epoch in range(4):
            assert order_of(batches(images, 8, seed, epoch)) == orders[4 * seed + epoch]


def test_the_order_does_not_depend_on_the_batch_size_or_flipping():
    images = numbered(100)
    expected = order_of(batches(images, 8, 1, 2))
    assert order_of(batches(images, 33, 1, 2)) == expected
    assert order_of(batches(images, 8, 1, 2, flip=True)) == expected


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("start", [0, 8, 40, 13, 99, 100])
def test_entering_an_epoch_at_a_start_gives_exactly_its_tail(start, flip):
    images = numbered(100)
    whole = np.concatenate(list(batches(images, 8, 5, 1, flip=flip)))
    tail = list(batches(images, 8, 5, 1, start=start, flip=flip))
    tail = np.concatenate([np.zeros((0, 4, 6, 3), np.float32), *tail])
    np.testing.assert_array_equal(tail, whole[start:])


def test_values_are_exact_float32_from_minus_1_to_1():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    (batch,) = batches(images, 4, seed=0, epoch=0)
    assert batch.dtype == np.float32 and batch.shape == (1, 16, 16, 1)
    values = batch.ravel()
    assert values[0] == -1 and values[255] == 1
    np.testing.assert_allclose(values, [(2 * v - 255) / 255 for v in range(256)], rtol=0, atol=1.2e-7)
    np.testing.assert_array_equal(np.rint((values + 1) * 127.5), np.arange(256))
    assert np.abs(values).max() == 1 and (np.diff(values) > 0).all()


def test_without_flipping_nothing_is_mirrored():
    images = numbered(200)
    pixels = pixels_of(batches(images, 16, 0, 0))
    np.testing.assert_array_equal(pixels, images[pixels[:, 0, 0, 0]])


def test_flipping_mirrors_about_half_of_the_pictures_from_left_to_right():
    images = numbered(250)
    turned = []
    for epoch in range(4):
        pixels = pixels_of(batches(images, 16, 0, epoch, flip=True))
        expected = images[pixels[:, 0, 0, 0]]
        flipped = pixels[:, 0, 0, 2] != 0
        np.testing.assert_array_equal(pixels[~flipped], expected[~flipped])
        np.testing.assert_array_equal(pixels[flipped], expected[flipped][:, :, ::-1])
        assert 90 < flipped.sum() < 160
        turned.append(set(pixels[flipped][:, 0, 0, 0].tolist()))
        np.testing.assert_array_equal(pixels, pixels_of(batches(images, 16, 0, epoch, flip=True)))
    assert len(set(map(frozenset, turned))) == 4, "the same pictures are mirrored in every epoch"


def test_batches_leave_the_images_alone():
    images = numbered(50)
    before = images.copy()
    for batch in batches(images, 16, 0, 0, flip=True):
        batch[:] = 0
    np.testing.assert_array_equal(images, before)


# python -m data cats.


def shade(animal, k):
    """The colour of the k-th photograph in the archives of these tests."""
    return (15 * k, 60, 40) if animal == "cat" else (40, 15 * k, 220)


def archive_of_microsoft(size=(40, 30)):
    """PetImages/Cat/0.jpg …, cats 3 and 666 and dog 1 broken as in the original, and other files between."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("PetImages/", b"")
        for folder in "Dog", "Cat":
            archive.writestr(f"PetImages/{folder}/", b"")
            for k in 10, 2, 0, 1, 3, 12:
                content = jpeg(shade(folder.lower(), k), size)
                if (folder, k) in [("Cat", 3), ("Dog", 1)]:
                    content = content[: len(content) // 2]
                archive.writestr(f"PetImages/{folder}/{k}.jpg", content)
            archive.writestr(f"PetImages/{folder}/Thumbs.db", b"\xd0\xcf\x11\xe0" + bytes(500))
        archive.writestr("PetImages/Cat/666.jpg", b"")
        archive.writestr("__MACOSX/PetImages/Cat/._0.jpg", b"of a file system")
        archive.writestr("__MACOSX/PetImages/Cat/5.jpg", jpeg(WHITE))
        archive.writestr("CDLA-Permissive-2.0.pdf", b"%PDF-1.5")
        archive.writestr("readme[1].txt", b"Once upon a time")
    return file.getvalue()


def archive_of_kaggle():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train/", b"")
        for animal in "cat", "dog":
            for k in 0, 1, 10, 2:
                archive.writestr(f"train/{animal}.{k}.jpg", jpeg(shade(animal, k)))
    return file.getvalue()


def cats(*options, env=None, **others):
    return python("-m", "data", "cats", *options, env=env, **others)


def assert_failed_in_a_sentence(done, status=1):
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("python -m data cats: ") and len(done.stderr.splitlines()) == 1, done.stderr


def assert_prepared(path, expected, size=16):
    """That a prepared file holds these (animal, number) in any order, labelled."""
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive.files) == ["images", "labels", "photographs"]
        images, labels = archive["images"], archive["labels"]
        assert archive["photographs"].shape == () and archive["photographs"].dtype == bool and archive["photographs"]
    assert images.dtype == np.uint8 and images.shape == (len(expected), size, size, 3)
    assert labels.dtype == np.uint8 and labels.shape == (len(expected),)
    found = set()
    for image, label in zip(images, labels, strict=True):
        animal = ["cat", "dog"][label]
        number = min(range(13), key=lambda k: np.abs(image - np.array(shade(animal, k), float)).sum())
        assert_plain(image, shade(animal, number), 4)
        found.add((animal, number))
    assert found == set(expected)


CATS = [("cat", k) for k in (0, 1, 2, 10, 12)]
DOGS = [("dog", k) for k in (0, 2, 3, 10, 12)]


@pytest.mark.parametrize("animals", [None, "cats", "dogs", "both"])
def test_cats_are_prepared_from_microsoft_s_archive(tmp_path, animals):
    (tmp_path / "pets.zip").write_bytes(archive_of_microsoft())
    (tmp_path / "result").mkdir()
    out = tmp_path / "result" / "pets.npz"
    done = cats(
        *("--archive", tmp_path / "pets.zip", "--image-size", "16", "--out", out),
        *(["--animals", animals] if animals else []),
    )
    assert done.returncode == 0 and done.stderr == ""
    expected = {None: CATS, "cats": CATS, "dogs": DOGS, "both": CATS + DOGS}[animals]
    assert_prepared(out, expected)
    assert os.listdir(out.parent) == ["pets.npz"]
    broken = {None: 2, "cats": 2, "dogs": 1, "both": 3}[animals]
    assert f"{broken} file{'s' * (broken > 1)} skipped: " in done.stdout
    assert ("Cat/3.jpg" in done.stdout) == (animals != "dogs")
    assert ("Dog/1.jpg" in done.stdout) == (animals in ("dogs", "both"))
    assert f"{len(expected)} images" in done.stdout

    images, report = load_images(out, 16)
    assert images.shape == (len(expected), 16, 16, 3)
    assert report.photographs is True and report.notes == []


def test_cats_are_prepared_from_kaggle_s_archive_in_the_default_size(tmp_path):
    (tmp_path / "train.zip").write_bytes(archive_of_kaggle())
    out = tmp_path / "both.npz"
    done = cats("--archive", tmp_path / "train.zip", "--animals", "both", "--out", out)
    assert done.returncode == 0 and done.stderr == "" and "skipped" not in done.stdout
    assert_prepared(out, [(animal, k) for animal in ("cat", "dog") for k in (0, 1, 2, 10)], size=64)


def archive_of_noise():
    """Four photographs of more than 100,000 bytes each."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for k in range(4):
            picture = io.BytesIO()
            Image.fromarray(noise(400, 400, 3, seed=k)).save(picture, "JPEG", quality=95)
            assert len(picture.getvalue()) > 100_000
            archive.writestr(f"PetImages/Cat/{k}.jpg", picture.getvalue())
    return file.getvalue()


def no_large_files():
    """Lets a process write no file of more than 50,000 bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


@posix
def test_the_archive_is_read_without_unpacking_it_to_disk(tmp_path):
    (tmp_path / "pets.zip").write_bytes(archive_of_noise())
    out = tmp_path / "cats.npz"
    options = ("--archive", tmp_path / "pets.zip", "--image-size", "8", "--out", out)
    done = cats(*options, preexec_fn=no_large_files)
    assert done.returncode == 0, done.stderr
    assert len(load_images(out, 8)[0]) == 4


@posix
def test_a_disk_that_fills_up_ends_in_a_sentence_and_leaves_the_old_file(tmp_path):
    (tmp_path / "pets.zip").write_bytes(archive_of_noise())
    out = tmp_path / "cats.npz"
    out.write_bytes(b"the old one")
    options = ("--archive", tmp_path / "pets.zip", "--image-size", "100", "--out", out)
    assert_failed_in_a_sentence(cats(*options, preexec_fn=no_large_files))
    assert out.read_bytes() == b"the old one" and sorted(os.listdir(tmp_path)) == ["cats.npz", "pets.zip"]


def test_archives_that_are_none_end_in_a_sentence_and_leave_the_old_file(tmp_path):
    whole = archive_of_microsoft()
    lost = bytearray(whole)
    lost[whole.index(b"PK\x01\x02")] = 0  # where the list of contents begins
    without = io.BytesIO()
    with zipfile.ZipFile(without, "w") as archive:
        archive.writestr("PetImages/Cat/0.jpg", b"no picture")
        archive.writestr("PetImages/Dog/0.jpg", jpeg(RED))
    out = tmp_path / "cats.npz"
    out.write_bytes(b"the old one")
    path = tmp_path / "pets.zip"
    for content in whole[: len(whole) // 2], b"<html>", b"", bytes(lost), without.getvalue():
        path.write_bytes(content)
        assert_failed_in_a_sentence(cats("--archive", path, "--out", out), status=2)
        assert out.read_bytes() == b"the old one" and sorted(os.listdir(tmp_path)) == ["cats.npz", "pets.zip"]


def test_wrong_options_of_python_m_data_are_refused(tmp_path):
    (tmp_path / "train.zip").write_bytes(archive_of_kaggle())
    for options in (
        ["cats", "--archive", tmp_path / "missing.zip", "--out", tmp_path / "a.npz"],
        ["cats", "--archive", tmp_path / "train.zip", "--out", tmp_path / "a.png"],
        ["cats", "--archive", tmp_path / "train.zip", "--out", tmp_path / "a.npz", "--image-size", "0"],
        ["cats", "--archive", tmp_path / "train.zip", "--out", tmp_path / "a.npz", "--animals", "cows"],
        ["dogs"],
    ):
        done = python("-m", "data", *options)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr
        assert os.listdir(tmp_path) == ["train.zip"]


def test_a_folder_of_out_that_does_not_exist_ends_in_a_sentence(tmp_path):
    (tmp_path / "train.zip").write_bytes(archive_of_kaggle())
    done = cats("--archive", tmp_path / "train.zip", "--out", tmp_path / "missing" / "a.npz")
    assert_failed_in_a_sentence(done, status=2)


@contextlib.contextmanager
def server(content, length=None, status="200 OK"):
    """Answers every request with this content, of which it promises `length` bytes; gives the URL, and the requests."""
    requests = []

    def answer(connection, address, this_server):
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(65536)
        requests.append(request.split()[1].decode())
        promised = len(content) if length is None else length
        head = f"HTTP/1.0 {status}\r\nContent-Length: {promised}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + content)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), answer) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}/some/pets.zip", requests
        finally:
            listening.shutdown()
            thread.join()


def download(url, tmp_path, *options):
    """Runs `python -m data cats` with a cache of its own; returns the process, what is cached, and the file."""
    (tmp_path / "result").mkdir(exist_ok=True)
    env = {"KERAS_HOME": str(tmp_path / "keras"), "no_proxy": "*", "NO_PROXY": "*"}
    out = tmp_path / "result" / "cats.npz"
    done = cats("--url", url, "--image-size", "16", "--out", out, *options, env=env)
    cache = tmp_path / "keras" / "datasets"
    cached = {name: (cache / name).read_bytes() for name in os.listdir(cache)} if cache.exists() else {}
    return done, cached, out


def test_a_broken_download_leaves_nothing_and_the_next_one_works_and_is_kept(tmp_path):
    content = archive_of_microsoft()
    with server(content[: len(content) // 2], length=len(content)) as (url, requests):
        done, cached, out = download(url, tmp_path)
        assert_failed_in_a_sentence(done)
        assert url in done.stderr
        assert requests == ["/some/pets.zip"] and cached == {} and os.listdir(out.parent) == []
    with server(content) as (url, requests):
        done, cached, out = download(url, tmp_path)
        assert done.returncode == 0 and done.stderr == ""
        assert requests == ["/some/pets.zip"] and cached == {"pets.zip": content}
        assert_prepared(out, CATS)
        assert os.listdir(out.parent) == ["cats.npz"]
        assert load_images(out, 16)[1].photographs
    done, cached, out = download(url, tmp_path, "--animals", "dogs")  # the server is no more
    assert done.returncode == 0 and cached == {"pets.zip": content}
    assert_prepared(out, DOGS)


def test_a_download_that_is_not_found_ends_in_a_sentence(tmp_path):
    with server(b"<html>gone</html>", status="404 Not Found") as (url, requests):
        done, cached, out = download(url, tmp_path)
    assert_failed_in_a_sentence(done)
    assert requests and url in done.stderr and "404" in done.stderr
    assert cached == {} and os.listdir(out.parent) == []


def test_a_download_that_is_no_zip_archive_ends_in_a_sentence(tmp_path):
    with server(b"<html>Please log in.</html>" * 100) as (url, requests):
        done, cached, out = download(url, tmp_path)
    assert_failed_in_a_sentence(done)
    assert requests and url in done.stderr and cached == {} and os.listdir(out.parent) == []


def test_what_a_killed_download_has_left_is_replaced(tmp_path):
    content = archive_of_microsoft()
    cache = tmp_path / "keras" / "datasets"
    cache.mkdir(parents=True)
    (cache / "pets.zip").write_bytes(content[: len(content) // 2])
    with server(content) as (url, requests):
        done, cached, out = download(url, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert requests == ["/some/pets.zip"] and cached == {"pets.zip": content}
    assert_prepared(out, CATS)


def test_the_default_place_of_the_cats_is_in_the_package():
    assert os.path.join(REPO, "data", "cats64.npz") == data.CATS


# --- what has been read is kept ---------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of three pictures and a broken file, always worth keeping, and a counter of pictures read."""
    from data import cache

    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(cache, "MIN_SECONDS", -1)
    reads, read_picture = [], image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda *a: reads.append(a) or read_picture(*a))
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (40, 40), (80 * k, 0, 0)).save(folder / f"{k}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder, reads


def test_a_second_time_the_pictures_are_not_read_again(kept):
    folder, reads = kept
    images, report = load_images(folder, 32)
    count = len(reads)
    again, report_again = load_images(folder, 32)
    assert len(reads) == count
    np.testing.assert_array_equal(again, images)
    assert report_again == report and report.skipped == [("broken.png", "not an image")]
    load_images(folder, 64)
    assert len(reads) > count  # another size is another thing


homes = {
    "as usual": {"HOME": "{tmp}"},
    "without a home": {},
    "a home that cannot be written": {"HOME": "{tmp}/closed"},
    "KERAS_HOME": {"HOME": "{tmp}", "KERAS_HOME": "{tmp}/k"},
    "KERAS_HOME, relative": {"KERAS_HOME": "k"},
}


@posix
@pytest.mark.parametrize("case", homes)
def test_the_home_of_the_cache_is_that_of_keras(tmp_path, monkeypatch, case):
    import pwd

    from data import cache

    def unknown(number):
        raise KeyError(number)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("closed") and access(path, mode))
    for name in "HOME", "KERAS_HOME":
        monkeypatch.delenv(name, raising=False)
        if name in homes[case]:
            monkeypatch.setenv(name, homes[case][name].format(tmp=tmp_path))
    (source,) = importlib.util.find_spec("keras").submodule_search_locations
    source = pathlib.Path(source, "src", "backend", "config.py").read_text()
    rule = source[source.index('if "KERAS_HOME" in') : source.index("def keras_home")]
    exec(rule, {"os": os}, found := {})
    assert cache.cache_folder() == os.path.join(found["_KERAS_DIR"], "datasets")
    assert not cache.cache_folder().startswith("~")


@pytest.mark.parametrize("keras_home", ["", "~nobody-here/keras", "{tmp}/closed/keras"])
def test_a_home_that_cannot_be_is_replaced(tmp_path, monkeypatch, keras_home):
    from data import cache

    access = os.access
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("closed") and access(path, mode))
    monkeypatch.setenv("KERAS_HOME", keras_home.format(tmp=tmp_path))
    assert cache.cache_folder() == os.path.join(
        "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), ".keras", "datasets"
    )


@pytest.mark.parametrize("change", ["new", "gone", "other", "touched in place", "damaged cache"])
def test_what_has_changed_is_noticed(kept, change):
    from data import cache

    folder, reads = kept
    load_images(folder, 32)
    count = len(reads)
    status = os.stat(folder / "1.png")
    if change == "new":
        Image.new("RGB", (40, 40)).save(folder / "3.png")
    elif change == "gone":
        os.remove(folder / "1.png")
    elif change == "other":
        Image.new("RGB", (41, 40), "blue").save(folder / "1.png")
    elif change == "touched in place":  # as many bytes, and the old time of change put back
        data = bytearray((folder / "1.png").read_bytes())
        time.sleep(0.05)
        (folder / "1.png").write_bytes(data)
        os.utime(folder / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        path = cache.cache_path(folder, 32, 3)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
    images, _ = load_images(folder, 32)
    assert len(reads) > count
    assert len(images) == {"new": 4, "gone": 2}.get(change, 3)
    if change == "other":
        assert images[1].mean(axis=(0, 1)).argmax() == 2


def test_a_cache_that_cannot_be_written_is_no_loss(kept, monkeypatch):
    folder, _ = kept
    monkeypatch.setenv("KERAS_HOME", os.fspath(folder / "0.png"))  # no folder
    assert len(load_images(folder, 32)[0]) == 3
