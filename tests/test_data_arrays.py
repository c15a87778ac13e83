"""Array files: values, shapes and types that are read, and those that are refused in a sentence."""

import io
import os
import pickle
import random
import re

import numpy as np
import pytest
from data_helpers import (
    GREEN,
    RED,
    jpeg,
    noise,
    pack,
    stripes,
    write,
)

from data import load_images

PIXELS, BOARD = noise(5, 8, 8, 3), np.indices((1, 250, 250)).sum(axis=0) % 2
NAMES = pytest.mark.parametrize("name", ["images.npy", "images.npz"])


def encode(array, kind="npy", **more):
    """The bytes of an array file: npy, stored or compressed npz, which has the array under the name `images`."""
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, array)
    else:
        (np.savez if kind == "stored" else np.savez_compressed)(file, images=array, **more)
    return file.getvalue()


def save(folder, array, name="images.npy"):
    write(folder, {name: encode(array, "npy" if name.endswith("npy") else "stored")})
    return folder / name


def levels(*values, dtype="u1"):
    """A flat grey image for each value, without an axis of channels."""
    return np.array(values, dtype).repeat(64).reshape(-1, 8, 8)


def floats(dtype, values, expected, meaning):
    return levels(*values, dtype=dtype), levels(*expected)[..., None], f"floating-point numbers, taken as {meaning}"


def scaled(dtype, black, tolerance=0):
    values = (PIXELS / 255 * (1 - black) + black).astype(dtype)
    return values, PIXELS, f"floating-point numbers, taken as {black} … 1", tolerance


GREY, AVERAGED = PIXELS[..., :1], np.full((1, 16, 16, 3), 127.5)
# An array, the images that come of it, what is noted, and a tolerance.
READ = {
    **{kind: (PIXELS.astype(kind), PIXELS) for kind in ("uint8", "int64", "uint16", ">i4")},
    "int8": ((PIXELS // 2).astype("i1"), PIXELS // 2),
    "booleans": (GREY[..., 0] > 127, np.uint8(255) * (GREY > 127), "False and True, taken as black and white"),
    **{f"{kind} 0 … 1": scaled(kind, 0, int(kind == "f2")) for kind in ("f4", "f8", ">f4", "f2")},
    **{f"{kind} -1 … 1": scaled(kind, -1, int(kind == "f2")) for kind in ("f4", "f8", "f2")},
    # Values beyond black or white by up to half a grey level are rounding; the range follows from the clear values.
    "limits of 0 … 1": floats("f4", [0, 1], [0, 255], "0 … 1"),
    "limits of -1 … 1": floats("f4", [-1, 1], [0, 255], "-1 … 1"),
    "a little below 0": floats("f4", [-1e-9, 0.5, 1], [0, 128, 255], "0 … 1"),
    "a little above 1": floats("f8", [0, 0.5, 1.000001], [0, 128, 255], "0 … 1"),
    "half a level below 0 and above 1": floats("f4", [-0.0019, 0.2, 1.0019], [0, 51, 255], "0 … 1"),
    "one step of float16 above 1": floats("f2", [0, 0.2, 1 + 2**-10], [0, 51, 255], "0 … 1"),
    "big-endian": floats(">f4", [-1e-7, 0.2, 1 + 1e-6], [0, 51, 255], "0 … 1"),
    "clearly negative": floats("f4", [-0.26, 0, 1], [94, 128, 255], "-1 … 1"),
    "a little beyond -1 … 1": floats("f8", [-1.003, 0, 1.003], [0, 128, 255], "-1 … 1"),
    "a float copy of uint8": floats("f4", [0, 7, 255], [0, 7, 255], "0 … 255"),
    "float16 copy of uint8": floats("f2", [3, 7, 200], [3, 7, 200], "0 … 255"),
    "resampled 0 … 255": floats(">f8", [-0.4, 7.3, 255.4], [0, 7, 255], "0 … 255"),
    "a float copy of dark uint8": floats("f4", [0, 7, 20], [0, 7, 20], "0 … 255"),
    "grey without axis": (GREY[..., 0], GREY),
    "grey": (GREY, GREY),
    "grey without axis to colour": (GREY[..., 0], GREY.repeat(3, axis=3)),
    "grey to colour": (GREY, GREY.repeat(3, axis=3)),
    "colour to grey": (PIXELS, PIXELS @ np.array([[0.299], [0.587], [0.114]]), None, 1),
    "checkerboard": (np.uint8(255 * BOARD), AVERAGED, None, 6),
    "checkerboard 0 … 1": (np.float32(BOARD), AVERAGED, "floating-point numbers, taken as 0 … 1", 6),
    "checkerboard -1 … 1": (2.0 * BOARD - 1, AVERAGED, "floating-point numbers, taken as -1 … 1", 6),
    "stripes": (np.stack([stripes(30)] * 2), np.full((2, 8, 8, 3), GREEN), None, 25),
    "enlarged": (levels(50)[:, :5, :5], np.full((1, 8, 8, 3), 50)),
}


@NAMES
@pytest.mark.parametrize("case", READ)
def test_arrays_are_read(tmp_path, name, case):
    array, expected, *more = READ[case]
    note, tolerance = (*more, *(None, 0)[len(more) :])
    path = save(tmp_path, array, name)
    images, report = load_images(path, *expected.shape[2:])
    assert images.dtype == np.uint8 and images.shape == expected.shape and images.flags.writeable
    assert np.abs(images.astype(float) - expected).max() <= tolerance
    assert report.source == str(path) and not report.photographs and report.skipped == []
    assert [said for said in report.notes if "nearly black" not in said] == ([f"{path}: {note}"] if note else [])
    assert str(report) == "\n".join(report.notes)


DARK = [
    ("u1", 1, "largest value is 1, where 255 is white; multiply the values by 255 "),
    ("i8", 1, "largest value is 1, where 255 is white; multiply the values by 255 "),
    ("i2", 20, "largest value is 20, where 255 is white; multiply the values by 12.75 "),
    ("u1", 31, "largest value is 31"),
    ("f4", 1 / 255, "largest value is 0.00392157, where 1 is white; multiply the values by 255 "),
    ("u1", 0, "largest value is 0, where 255 is white"),
    *[("u1", 32, None), ("f8", 0.126, None)],
]


@pytest.mark.parametrize("dtype, high, said", DARK)
def test_nearly_black_arrays_are_reported(tmp_path, dtype, high, said):
    array = np.zeros((3, 8, 8), dtype)
    array[1, 2, 3] = high
    notes = [note for note in load_images(save(tmp_path, array), 8)[1].notes if "nearly black" in note]
    assert len(notes) == bool(said) and all(said in note for note in notes)
    assert high or "multiply" not in notes[0]


def one_value(dtype, value):
    array = np.zeros((3, 8, 8, 3), dtype)
    array[1, 2, 3, 1] = value
    return array


REFUSED = {
    **{
        f"{dtype} {value}": (one_value(dtype, value), f"(numbers|integers) .*{said}.*0 … 255")
        for dtype, value, said in (
            ("i8", 256, "from 0 to 256"),
            ("i2", -1, "from -1 to 0"),
            ("f4", 256, "from 0 to 256"),
            ("f8", 1.01, "from 0 to 1.01"),
            ("f2", 1.0312, r"from 0 to 1\.03"),
            ("f4", 31.5, r"from 0 to 31\.5"),
            ("f8", -0.1, r"from -0\.1 to 0, not .*-1 … 1 \(with some below -0\.25\)"),
            ("f8", -1.01, "from -1.01 to 0"),
            ("f4", np.nan, r"NaN \(np.nan\)"),
            (">f8", np.nan, r"NaN \(np.nan\)"),
            ("f4", np.inf, r"infinity \(np.inf\)"),
            ("f2", -np.inf, r"infinity \(np.inf\)"),
        )
    },
    **{
        str(shape): (np.zeros(shape, "u1"), re.escape(f"shape {shape}; images must have the shape (N, height, width)"))
        for shape in (
            *(
                (),
                (8,),
                (8, 8),
                (8, 8, 1),
                (8, 8, 3),
                (8, 8, 4),
                (5, 8, 8, 4),
                (5, 8, 8, 2),
                (5, 3, 8, 8),
                (2, 5, 8, 8, 3),
            ),
            *((0, 8, 8), (0, 8, 8, 3), (5, 0, 8, 3), (5, 8, 8, 0), (0,)),
        )
    },
    **{
        str(kind): (np.zeros((5, 8, 8, 3), kind), "arrays of numbers")
        for kind in ("U3", "S3", complex, "M8[s]", [("red", "u1"), ("blue", "u1")])
    },
    "objects": (np.full((5, 8, 8), None), ""),
}


@NAMES
@pytest.mark.parametrize("case", REFUSED)
def test_other_arrays_are_refused(tmp_path, name, case):
    array, said = REFUSED[case]
    with pytest.raises(ValueError, match=f"{name} .*{said}"):
        load_images(save(tmp_path, array, name), 8)


# Files.


def test_the_only_array_or_the_one_called_images_is_read(tmp_path):
    np.savez(tmp_path / "one.npz", anything=PIXELS)
    np.savez_compressed(tmp_path / "many.npz", a=np.zeros(3), images=PIXELS, z=noise(7, 8, 8, 3, seed=1))
    write(tmp_path, {"wrong.npy": encode(PIXELS, "stored"), "wrong.npz": encode(PIXELS)})
    for name in "one.npz", "many.npz", "wrong.npy", "wrong.npz":
        images, report = load_images(tmp_path / name, 8)
        np.testing.assert_array_equal(images, PIXELS)
        assert not report.photographs


@pytest.mark.parametrize("photographs", [True, False])
def test_the_mark_of_photographs_is_read(tmp_path, photographs):
    write(tmp_path, {"marked.npz": encode(PIXELS, "stored", photographs=photographs)})
    assert load_images(tmp_path / "marked.npz", 8)[1].photographs is photographs


def test_other_files_are_refused_and_pickles_are_not_executed(tmp_path):
    mark = tmp_path / "executed"
    evil = b"cos\nmkdir\n(V" + os.fsencode(mark) + b"\ntR."
    pickle.loads(evil)
    assert mark.exists(), "the pickle of this test does nothing"
    mark.rmdir()

    def start(descr, shape):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        return file.getvalue()

    objects, huge, text = start("|O", (5, 8, 8)) + evil, start("|u1", (10**9, 64, 64, 3)) + b"few", b"once upon a time"
    refused = {
        **{"objects.npy": objects, "bare.npy": evil, "bare.npz": evil, "only.npz": pack({"arr_0.npy": objects})},
        "images.npz": pack({"images.npy": objects}),
        "mark.npz": pack({"photographs.npy": objects, "images.npy": encode(PIXELS)}),
        **{"text.npy": text, "text.npz": text, "huge.npy": huge},
        "huge.npz": pack({"images.npy": huge}),
        "foreign.npz": pack({"cat.jpg": jpeg(RED)}),
        "broken.npz": pack({"images.npy": text}),
        "two.npz": pack({"x_train.npy": encode(PIXELS), "x_test.npy": encode(PIXELS)}),
        "empty.npz": pack({}),
    }
    said = {"two.npz": r".* 2 arrays \(x_train, x_test\).*'images'", "empty.npz": ".* 0 arrays"}
    write(tmp_path, refused)
    for name in refused:
        with pytest.raises(ValueError, match=name + said.get(name, "")):
            load_images(tmp_path / name, 8)
        assert not mark.exists()


@pytest.mark.parametrize("kind", ["npy", "stored", "compressed"])
def test_truncated_and_corrupt_files_are_refused(tmp_path, kind):
    whole, chance, refused = encode(noise(6, 8, 8, 3).repeat(2, axis=0), kind), random.Random(0), 0
    path = tmp_path / ("images.npy" if kind == "npy" else "images.npz")
    path.write_bytes(whole)
    assert load_images(path, 8)[0].shape == (12, 8, 8, 3)
    for length in 0, 1, 6, 60, 127, 128, 500, len(whole) // 2, len(whole) - 30, len(whole) - 1:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            load_images(path, 8)
    for _ in range(300):
        corrupt = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3])):
            place = chance.choice([chance.randrange(len(whole)), chance.randrange(150), -1 - chance.randrange(150)])
            corrupt[place] = chance.randrange(256)
        path.write_bytes(corrupt)
        try:
            load_images(path, 8)
        except ValueError as error:
            assert path.name in str(error)
            refused += 1
    assert refused > 50
