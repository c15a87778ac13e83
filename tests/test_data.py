"""The data package: arguments of `load_images`, the drawings, the digest, and the batches of training."""

import collections
import errno
import os
import pathlib
import random

import numpy as np
import pytest
from data_helpers import (
    RED,
    assert_plain,
    assert_printable_on_one_line,
    encode,
    noise,
    plain,
    posix,
    python,
    write,
)
from PIL import Image

from data import batches, digest, drawings, load_images


@pytest.mark.parametrize(
    "name, value", [*(("channels", c) for c in (0, 2, 4, "3")), *(("image_size", s) for s in (0, -8, 8.5, "8", None))]
)
def test_impossible_sizes_and_channels_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        load_images("drawings", **{"image_size": 8, name: value})


def test_sources_that_are_missing_or_of_another_kind_are_refused(tmp_path):
    for missing in tmp_path / "missing", tmp_path / "missing.npy", "Drawings":
        with pytest.raises(FileNotFoundError, match=f"no folder or file .*{os.path.basename(missing)}"):
            load_images(missing, 8)
    write(tmp_path, {"single.png": RED, "photos.zip": b"PK"})
    for name in "single.png", "photos.zip":
        with pytest.raises(ValueError, match=f"{name} is neither a folder"):
            load_images(tmp_path / name, 8)


@posix
def test_dangling_links_and_pipes_are_refused_without_hanging(tmp_path):
    os.symlink(tmp_path / "nowhere.npy", tmp_path / "link.npy")
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        load_images(tmp_path / "link.npy", 8)
    os.mkfifo(tmp_path / "pipe.npy")
    done = python("-c", "import sys; from data import load_images; load_images(sys.argv[1], 8)", tmp_path / "pipe.npy")
    assert done.returncode == 1 and "ValueError: " in done.stderr


def test_files_without_permission_are_skipped_or_refused(tmp_path, monkeypatch):
    """Simulated, as root may read everything."""
    write(tmp_path, {"good.png": RED, "closed.png": RED, "closed/a.png": RED})
    np.save(tmp_path / "closed.npy", noise(2, 8, 8))

    def deny(module, name):
        allowed = getattr(module, name)

        def function(path, *arguments, **options):
            if os.path.basename(path).startswith("closed"):
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
            return allowed(path, *arguments, **options)

        monkeypatch.setattr(module, name, function)

    for module, name in (os, "scandir"), (Image, "open"), (np, "load"):
        deny(module, name)
    images, report = load_images(tmp_path, 8)
    assert len(images) == 1
    assert dict(report.skipped) == dict.fromkeys(["closed", "closed.npy", "closed.png"], "permission denied")
    with pytest.raises(ValueError, match="closed.npy"):
        load_images(tmp_path / "closed.npy", 8)


NAMES = [
    *(b"two\nlines", b"\r\t\x1b[31mred\x07\x7f", b"\xff\xfe", b" %s {0} \\ ' \" "),
    *("next\u0085 line\u2028 separator\u2029".encode(), "Käse 猫".encode()),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_bytes_are_read_and_printed_on_one_line(tmp_path, name):
    def put(folder, ending, content):
        """Writes a file, or makes a folder."""
        path = os.path.join(os.fsencode(folder), name + ending)
        try:
            os.mkdir(path) if content is None else pathlib.Path(os.fsdecode(path)).write_bytes(content)
        except OSError:
            pytest.skip("this file system has no such names")
        return os.fsdecode(path)

    def refuse(source, said):
        with pytest.raises(ValueError, match=said) as error:
            load_images(source, 8)
        assert_printable_on_one_line(str(error.value))

    folder = put(tmp_path, b".npy", None)
    refuse(folder, "it is empty")
    bad = put(folder, b".png", b"no image")
    refuse(folder, "no image")
    put(folder, b".z.png", encode(plain((9, 9), RED), "PNG"))
    images, report = load_images(folder, 8)
    assert_plain(images[0], RED)
    assert report.skipped == [(os.path.basename(bad), "not an image")]
    assert_printable_on_one_line(str(report))
    readable = name.decode(errors="backslashreplace")
    if readable.isprintable():
        assert readable in str(report), "what can be printed should be shown as it is"

    array = put(tmp_path, b"2.npy", b"no array")
    refuse(array, "array of numbers")
    np.save(array, noise(2, 8, 8) / 255)
    assert_printable_on_one_line(str(load_images(array, 8)[1]))
    np.save(array, np.zeros(3))
    refuse(array, "shape")


@pytest.mark.parametrize("name", ["drawings", "new-drawings"])
def test_a_folder_named_like_the_drawings_is_told_apart(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawings.draw_cats, "__defaults__", (2, 0))
    assert load_images(name, 8)[1].notes == []
    write(tmp_path, {f"{name}/a.png": RED})
    images, report = load_images(name, 8)
    np.testing.assert_array_equal(images, drawings.draw_cats(8, count=2, seed=int(name == "new-drawings")))
    assert report.source == name
    assert report.notes == [f"{name} means the set of that name; for the folder of that name write .{os.sep}{name}"]
    for folder in f"./{name}", f"{name}/", tmp_path / name, pathlib.Path(name):
        images, report = load_images(folder, 8)
        assert len(images) == 1 and report.source == str(tmp_path / name) and report.notes == []


# The drawings.


def test_drawings_are_2048_different_images_the_same_in_grey(monkeypatch):
    images, report = load_images("drawings", 16)
    assert images.shape == (2048, 16, 16, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 2048
    assert report.source == "drawings" and not report.photographs
    assert report.notes == [] and report.skipped == [] and str(report) == ""
    np.testing.assert_array_equal(images[:3], drawings.draw_cats(16, count=3, seed=0))

    monkeypatch.setattr(drawings, "draw_cats", lambda image_size, seed: images)  # which takes seconds
    grey, _ = load_images("drawings", 16, channels=1)
    assert grey.shape == (2048, 16, 16, 1) and grey.dtype == np.uint8
    assert np.abs(grey[..., 0] - images @ np.array([0.299, 0.587, 0.114])).max() <= 1  # ITU-R BT.601


def test_every_drawing_shows_a_cat_as_large_as_a_cat():
    """At least a fifth of the pixels have the colour of the fur; without the head it would be a sixth."""
    furs = np.array([fur for fur, _ in drawings.FURS.values()])
    for image in drawings.draw_cats(64, count=40):
        assert np.mean(np.all(image[:, :, None] == furs, axis=-1), axis=(0, 1)).max() > 0.2


def test_a_drawing_depends_only_on_the_seed_and_its_number():
    drawn = []
    for global_seed, count, seed in (1, 5, 3), (2, 12, 3), (1, 5, 4):
        random.seed(global_seed)
        np.random.seed(global_seed)
        drawn.append(drawings.draw_cats(32, count=count, seed=seed))
    few, many, other = drawn
    np.testing.assert_array_equal(few[4], drawings.draw_cat(np.random.default_rng([3, 4]), 32))
    np.testing.assert_array_equal(few, many[:5])
    assert all((a != b).any() for a, b in zip(few, other, strict=True))


def test_drawings_show_something_and_are_antialiased():
    flat = {tuple(c) for fur in drawings.FURS for c in fur} | {tuple(c) for c in drawings.BACKGROUNDS + drawings.EYES}
    for image in drawings.draw_cats(32, count=20):
        colors = collections.Counter(map(tuple, image.reshape(-1, 3).tolist()))
        assert len(set(colors) - flat) > 60, "without antialiasing, a drawing has some 12 colours"
        assert set(drawings.BACKGROUNDS) & set(colors) and max(colors.values()) < 0.8 * 32 * 32


# The digest.


def test_the_digest_belongs_to_pixels_and_shape(tmp_path):
    pixels = noise(6, 8, 8, 3)
    one_off = pixels.copy()
    one_off[-1, -1, -1, -1] ^= 1
    expected = digest(pixels)
    assert isinstance(expected, str) and len(expected) >= 32
    for same in pixels.copy(), np.asfortranarray(pixels), np.repeat(pixels, 2, axis=0)[::2]:
        assert digest(same) == expected
    others = [one_off, pixels[::-1], pixels[:5], pixels.reshape(6, 4, 16, 3), pixels.reshape(12, 4, 8, 3)]
    assert len({digest(images) for images in [pixels, *others]}) == 6
    np.save(tmp_path / "images.npy", pixels)
    script = "import sys; from data import digest, load_images; print(digest(load_images(sys.argv[1], 8)[0]))"
    in_another_process = python("-c", script, tmp_path / "images.npy", env={"PYTHONHASHSEED": "7"})
    assert in_another_process.stdout.strip() == expected


# The batches of training.


def numbered(count):
    """Images (count, 4, 6, 3) that tell their number, and in which row and column a pixel was."""
    images = np.zeros((count, 4, 6, 3), np.uint8)
    images[..., 0] = np.arange(count)[:, None, None]
    images[..., 1] = 10 * np.arange(4)[:, None]
    images[..., 2] = 10 * np.arange(6)
    return images


def read_pixels(epoch):
    """The batches of an epoch as one array of pixels 0 … 255."""
    images = np.concatenate([batch for batch, _ in epoch])
    assert images.dtype == np.uint8
    return images.astype(int)


def read_order(epoch):
    return read_pixels(epoch)[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("batch_size, sizes", [(20, [20] * 5 + [3]), (103, [103]), (500, [103]), (1, [1] * 103)])
def test_every_epoch_uses_every_image_exactly_once(batch_size, sizes):
    for epoch in range(3):
        given = list(batches(numbered(103), batch_size, seed=0, epoch=epoch))
        assert [len(batch) for batch, _ in given] == sizes
        assert sorted(read_order(given)) == list(range(103))


def test_the_order_depends_only_on_seed_and_epoch():
    images, orders = numbered(100), set()
    for seed in range(3):
        for epoch in range(4):
            order = read_order(batches(images, 8, seed, epoch))
            assert sum(a == b for a, b in zip(order, range(100), strict=True)) < 10, "hardly shuffled"
            for batch_size, flip in (8, False), (33, False), (8, True):
                assert read_order(batches(images, batch_size, seed, epoch, flip=flip)) == order
            orders.add(tuple(order))
    assert len(orders) == 12


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("start", [0, 8, 40, 13, 99, 100])
def test_resuming_within_an_epoch_gives_exactly_the_rest(start, flip):
    images = numbered(100)
    whole = np.concatenate([batch for batch, _ in batches(images, 8, 5, 1, flip=flip)])
    rest = [batch for batch, _ in batches(images, 8, 5, 1, start=start, flip=flip)]
    np.testing.assert_array_equal(np.concatenate([whole[:0], *rest]), whole[start:])


def test_without_flipping_nothing_is_mirrored():
    images = numbered(200)
    pixels = read_pixels(batches(images, 16, 0, 0))
    np.testing.assert_array_equal(pixels, images[pixels[:, 0, 0, 0]])


def test_flipping_mirrors_another_half_in_each_epoch():
    images, mirrored = numbered(250), set()
    before = images.copy()
    for epoch in range(4):
        pixels = read_pixels(batches(images, 16, 0, epoch, flip=True))
        expected, flipped = images[pixels[:, 0, 0, 0]], pixels[:, 0, 0, 2] != 0
        np.testing.assert_array_equal(pixels[~flipped], expected[~flipped])
        np.testing.assert_array_equal(pixels[flipped], expected[flipped][:, :, ::-1])
        np.testing.assert_array_equal(pixels, read_pixels(batches(images, 16, 0, epoch, flip=True)))
        assert 90 < flipped.sum() < 160
        mirrored.add(frozenset(pixels[flipped][:, 0, 0, 0].tolist()))
    assert len(mirrored) == 4
    for batch, _ in batches(images, 16, 0, 0, flip=True):
        batch[:] = 0
    np.testing.assert_array_equal(images, before)
