"""Small files for the tests of the data package, and how the tests look at what came of them."""

import io
import os
import struct
import subprocess
import sys
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes or limits of POSIX systems")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def stripes(side):
    """Three squares beside each other: red, green, blue."""
    return np.repeat(np.uint8([[RED, GREEN, BLUE]]), side, axis=0).repeat(side, axis=1)


def plain(size, color, mode="RGB"):
    return Image.new(mode, size, color)


def png(width, height, depth=8, color_type=0, rows=None, **chunks):
    """A PNG file made by hand: all zeros, or the given rows; color_type 0 is grey, 2 RGB, 3 palette, 6 RGBA."""
    samples = {0: 1, 2: 3, 3: 1, 6: 4}[color_type]
    compressor = zlib.compressobj(9)
    row = bytes(-(-width * samples * depth // 8))
    body = b"".join(compressor.compress(b"\0" + r) for r in (rows if rows is not None else [row] * height))

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    extra = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body + compressor.flush()) + chunk(b"IEND", b"")


def encode(image, file_format, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def jpeg(color, size=(40, 30)):
    return encode(plain(size, color), "JPEG", quality=95)


def pack(members, compression=zipfile.ZIP_STORED):
    """The bytes of a zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def write(folder, files):
    """Writes files, a dict: bytes as they are, an image in the format of its name, a colour as a small PNG image."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(encode(plain((10, 10), content), "PNG") if isinstance(content, tuple) else content)


def assert_plain(image, color, tolerance=0):
    assert np.abs(image.astype(int) - color).max() <= tolerance, f"{image[0, 0]} is not {color}"


def assert_printable_on_one_line(text):
    assert len(text.splitlines()) == 1
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp")], repr(text)
    text.encode("utf-8")  # no bytes in the guise of characters


def python(*arguments, stdin=None, timeout=120, env=None, **options):
    """Runs Python in the root of the project, and returns the finished process."""
    env = {**os.environ, "PYTHONPATH": ROOT, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    stdin = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    command = [sys.executable, *map(os.fspath, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, timeout=timeout, text=True, **stdin, **options
    )
