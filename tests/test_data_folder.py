"""Folders of images: what is read in which order, what is ignored or skipped and how that is said, and the cache."""

import importlib.util
import json
import os
import pathlib
import random
import re
import sys
import tempfile
import threading
import time
import types

import numpy as np
import pytest
from conftest import ROOT
from data_helpers import (
    BLUE,
    GREEN,
    RED,
    assert_printable_on_one_line,
    jpeg,
    noise,
    plain,
    png,
    posix,
    python,
    write,
)
from PIL import Image, features

import data
from data import cache, image_files, listing, load_images
from support import device, grids

PHOTOS = os.path.join(ROOT, "..", "shared", "data", "photos")


def grey(level, side=10):
    return plain((side, side), (level,) * 3)


@pytest.mark.parametrize("cores", [1, 2, 9])
def test_images_come_in_the_order_of_their_names(tmp_path, monkeypatch, cores):
    names = sorted(["b.png", "a/z.png", "a/b/c.png", "a.png", "B.jpg", "c/a.png", "é.png", "10.png", "9.png"])
    levels = {name: 20 * k for k, name in enumerate(names)}
    write(tmp_path, {name: grey(levels[name]) for name in random.Random(0).sample(names, len(names))})
    read_image, delays = image_files.read_image, random.Random(1)

    def read_slowly(file, *arguments, **options):
        time.sleep(delays.choice([0, 0.02, 0.05]))
        return read_image(file, *arguments, **options)

    monkeypatch.setattr(image_files, "read_image", read_slowly)
    monkeypatch.setattr(device, "cores", lambda: cores)
    monkeypatch.chdir(tmp_path)
    images, report = load_images(".", 8)
    assert np.abs(images[:, 4, 4, 0].astype(int) - list(levels.values())).max() <= 2
    assert report == data.Report(str(tmp_path), photographs=True)


def test_large_and_skipped_images_do_not_change_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "LARGE", 500)
    sides = {"0": 10, "1": 40, "3": 10, "5": 40, "6": 40, "8": 10}
    write(tmp_path, {f"{k}.png": grey(20 * int(k), side) for k, side in sides.items()})
    write(tmp_path, {"2.png": b"no image", "4.png": png(40, 40)[:40], "7.png": b"no image"})
    images, report = load_images(tmp_path, 8)
    assert images[:, 4, 4, 0].tolist() == [20 * int(k) for k in sides]
    assert [name for name, _ in report.skipped] == ["2.png", "4.png", "7.png"]


@pytest.mark.skipif(not os.path.isdir(PHOTOS), reason="the photographs are not here")
def test_real_photographs_are_all_read():
    images, report = load_images(PHOTOS, 32)
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    assert report.photographs and report.skipped == [] and str(report) == ""
    assert len({image.tobytes() for image in images}) == 200
    assert 60 < images.mean() < 200 and images.std(axis=(1, 2, 3)).min() > 5


@pytest.mark.parametrize("stdin", [False, True])
def test_folders_are_read_without_a_main_guard(tmp_path, stdin):
    script = (
        "import sys; print('started'); from data import load_images; images, report = load_images(sys.argv[1], 8)\n"
        "print(images.shape, images[:, 4, 4, 0].tolist())"
    )
    write(tmp_path, {f"photos/{k:02}.png": grey(20 * k, 50) for k in range(12)} | {"script.py": script.encode()})
    done = python("-" if stdin else tmp_path / "script.py", tmp_path / "photos", stdin=script if stdin else None)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == ["started", f"(12, 8, 8, 3) {[20 * k for k in range(12)]}"]


# What cannot be read is skipped, counted and named.


def test_unreadable_files_are_skipped_counted_and_named(tmp_path):
    good = jpeg(RED, (200, 200))
    bad = {
        "broken.png": png(200, 200)[:40] + b"\xff" * 30 + png(200, 200)[70:],
        "empty.png": b"",
        "text.png": b"Once upon a time\n" * 100,
        "truncated.gif": b"GIF89a\x10\0\x10\0",
        "truncated.jpg": good[: len(good) // 2],
        "truncated.png": png(200, 200, rows=map(bytes, noise(200, 200)))[:20_000],
        "zero.jpg": bytes(10_000),
    }
    write(tmp_path, {"good.jpg": good, **bad})
    images, report = load_images(tmp_path, 8)
    skipped, said = dict(report.skipped), str(report)
    assert len(images) == 1 and list(skipped) == sorted(bad) and all(skipped.values())
    assert skipped["empty.png"] == "empty"
    assert said.startswith("7 files skipped: ") and said.endswith(", and 4 more") and "text.png" not in said
    assert all(name in said for name in ("broken.png", "empty.png", "truncated.jpg"))  # one of each reason


def load_elsewhere(folder):
    """Loads a folder in a process of its own, which may hang: colours, skipped files, and peak memory if it is known.

    The process must print nothing else, such as warnings of Pillow.
    """
    code = """if True:
        import json, os, re, sys
        from data import load_images, image_files
        from support import device; device.cores = lambda: 4
        image_files._show_progress = lambda results, total: results  # its bar would bring TensorFlow, and its memory
        images, report = load_images(sys.argv[1], 8)
        status = open("/proc/self/status").read() if os.path.exists("/proc/self/status") else "VmHWM: 0"
        megabytes = int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) // 1024
        print(json.dumps([images[:, 4, 4].tolist(), dict(report.skipped), megabytes]))
    """
    done = python("-c", code, folder, timeout=30)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


def test_large_images_and_bombs_take_little_memory_silently(tmp_path):
    good = {f"{k:02}.png": RED for k in range(64)}
    good |= dict.fromkeys(["00.png", "16.png", "32.png", "48.png"], png(6000, 6000, color_type=2))  # 144 MB in Pillow
    bombs = {
        "bomb.png": png(30_000, 30_000, depth=1),
        "header.png": png(2**31 - 1, 2**31 - 1, rows=[b"\0" * 100]),
        "medium.png": png(12_000, 12_000, depth=1),
    }
    assert len(bombs["bomb.png"]) < 2_000_000
    write(tmp_path, {**good, **bombs})
    colors, skipped, megabytes = load_elsewhere(tmp_path)
    assert len(colors) == 64 and list(skipped) == list(bombs) and megabytes < 400


@posix
def test_links_are_followed_but_pipes_and_cycles_are_skipped(tmp_path):
    write(tmp_path, {"folder/good.png": GREEN, "folder/sub/good.png": RED, "elsewhere/a.png": BLUE})
    os.mkfifo(tmp_path / "folder" / "pipe.png")
    links = {
        **{"broken.png": "nowhere.png", "circle.png": "circle.png", "to_pipe.png": "pipe.png"},
        **{"sub/back": "..", "sub/self": tmp_path / "folder", "z": tmp_path / "elsewhere", "zz.png": "sub/good.png"},
    }
    for link, target in links.items():
        os.symlink(target, tmp_path / "folder" / link)
    colors, skipped, _ = load_elsewhere(tmp_path / "folder")
    assert colors == [list(color) for color in (GREEN, RED, BLUE, RED)]
    assert skipped.pop("circle.png")  # as the system says it
    assert skipped.pop("broken.png") == "a broken link"
    assert skipped == dict.fromkeys(["pipe.png", "to_pipe.png"], "not a regular file")


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        ("x", "1 file skipped: 0 (x)"),
        ("xyz", "3 files skipped: 0 (x), 1 (y), 2 (z)"),
        ("wxyz", "4 files skipped: 0 (w), 1 (x), 2 (y), and 1 more"),
        ("xxxy", "4 files skipped: 0 (x), 3 (y), 1 (x), and 1 more"),
    ],
)
def test_the_summary_names_a_file_of_each_reason(reasons, said):
    assert image_files.summarise_skipped([(str(k), reason) for k, reason in enumerate(reasons)]) == said


KINDS = {
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


@pytest.mark.parametrize("name", KINDS)
def test_files_of_other_kinds_say_what_to_do(tmp_path, without_codecs, name):
    write(tmp_path, {name: b"\0\0\0\x18ftyp or any other contents"})
    with pytest.raises(ValueError) as error:
        load_images(tmp_path, 8)
    assert str(error.value).endswith(f": 1 file skipped: {name} ({KINDS[name]})")
    assert "EPS" not in image_files.readable_formats()  # Pillow reads it by starting another program
    write(tmp_path, {"good.png": RED, f"empty{name}": b""})
    assert load_images(tmp_path, 8)[1].skipped == sorted([(name, KINDS[name]), (f"empty{name}", "empty")])


def test_heif_is_read_where_pillow_heif_is_installed(cached, without_codecs):
    folder, _ = cached
    write(folder, {"a.heic": b"HEIF!"})
    assert ("a.heic", KINDS["a.heif"]) in load_images(folder, 8)[1].skipped
    heif = types.ModuleType("pillow_heif")
    heif.register_heif_opener = lambda: Image.register_open(
        "HEIF", lambda file, name: plain((9, 9), GREEN), lambda prefix: prefix.startswith(b"HEIF!")
    )
    without_codecs.setitem(sys.modules, "pillow_heif", heif)
    without_codecs.setattr(Image, "OPEN", dict(Image.OPEN))
    without_codecs.setattr(Image, "ID", list(Image.ID))
    image_files.readable_formats.cache_clear()
    images, report = load_images(folder, 8)  # although the images are cached
    assert len(images) == 4 and report.skipped == [("broken.png", "not an image")]
    assert [tuple(image[4, 4].tolist()) for image in images if image[4, 4, 1]] == [GREEN]


# What is ignored, and links.


@pytest.mark.parametrize(
    ("names", "count", "said"),
    [
        ("a.png .b.png c/._d.png c/.e/f.png c/.e/g.png", 1, "3 hidden or system files or folders ignored"),
        ("a.png .ipynb_checkpoints/a-checkpoint.png", 1, "1 hidden or system file or folder ignored"),
        ("a.png .Trash-1000/files/a.png __MACOSX/a.png @eaDir/a.png/SYNO.jpg", 1, "3 hidden .*"),
        ("a.png Thumbs.db b/DESKTOP.INI $RECYCLE.BIN/a.png lost+found/a.png #recycle/b.png", 1, "5 .*"),
        ("a.png macosx/thumbs.db.png eaDir/b.png a..png desktop.png", 5, ""),
        ("a.png samples.png samples-epoch0010.png b/samples-epoch12345.png", 1, "3 sample grids ignored"),
        ("samples-of-cats.png samples.jpg samples-epoch1.png Samples.png samples1.png", 5, ""),
        ("my-samples.png mysamples.png samples-epoch0001.png.png other.keras sub/my.keras", 3, "2 files .*"),
        ("a.png my-samples.png my-samples-epoch0010.png my.keras", 1, "2 sample grids ignored\n1 file .*"),
        ("a.png .b.png samples.png", 1, "1 hidden or system file or folder ignored; 1 sample grid ignored"),
        (".a.png", 0, "there is no image in the folder .*: 1 hidden or system file or folder ignored"),
    ],
)
def test_hidden_and_system_files_and_our_own_grids_are_ignored(tmp_path, names, count, said):
    folder = tmp_path / ".hidden"  # what is named by the user is read
    write(folder, {name: b"a model" if name.endswith(".keras") else RED for name in names.split()})
    try:
        images, report = load_images(folder, 8)
    except ValueError as error:
        images, report = [], error
    assert len(images) == count and re.fullmatch(said, str(report), re.DOTALL)


def test_sample_grids_are_recognised_by_their_contents(tmp_path):
    write(tmp_path, {"a.png": RED})
    grids.save_grid(noise(4, 8, 8, 3), tmp_path / "more.png")
    grids.save_grid(noise(4, 8, 8, 1), tmp_path / "of-a-deleted-model-samples.png")
    grids.save_grid(noise(1, 8, 8, 3), tmp_path / "single.png")  # as `evaluate.py --samples` may read it
    images, report = load_images(tmp_path, 8)
    assert len(images) == 2
    assert report.skipped == [(name, "a sample grid") for name in ("more.png", "of-a-deleted-model-samples.png")]


@posix
def test_folders_without_inodes_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": RED, "b/c.png": RED, "b/d/e.png": RED, "f/g.png": RED})
    os.symlink("..", tmp_path / "b" / "back")
    os.symlink(tmp_path / "f", tmp_path / "b" / "second")
    stat = os.stat

    def without_inode(*arguments, **options):
        status = stat(*arguments, **options)
        return os.stat_result([status.st_mode, 0, *status[2:]], {"st_mtime_ns": 0, "st_ctime_ns": 0})

    assert len(load_images(tmp_path, 8)[0]) == 4
    monkeypatch.setattr(os, "stat", without_inode)
    assert len(load_images(tmp_path, 8)[0]) == 4


# Messages.


def test_errors_of_pillow_are_printed_on_one_line(tmp_path, monkeypatch):
    write(tmp_path, {"good.png": RED, "bad.ppm": b"P6\n\x1b[31m\x07999999999999\n"})
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


def test_a_folder_without_images_says_what_was_found(tmp_path):
    for make in lambda: None, (tmp_path / "sub").mkdir:
        make()
        with pytest.raises(ValueError, match="no image in the folder .*: it is empty"):
            load_images(tmp_path, 8)
    write(tmp_path, {f"sub/note{k}.txt": b"no image" for k in range(5)})
    with pytest.raises(ValueError, match="5 files skipped: .*note0.txt .*and 2 more"):
        load_images(tmp_path, 8)


# The cache.


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A folder of three images and a broken file, always worth caching, and a list that grows with each file read."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(cache, "MIN_SECONDS", -1)
    reads, read_image = [], image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda *a: reads.append(a) or read_image(*a))
    images = {f"{k}.png": plain((40, 40), (80 * k, 0, 0)) for k in range(3)}
    write(tmp_path / "folder", images | {"broken.png": b"no image"})
    return tmp_path / "folder", reads


def test_cached_images_are_not_read_again(cached):
    folder, reads = cached
    images, report = load_images(folder, 32)
    count = len(reads)
    again, report_again = load_images(folder, 32)
    assert len(reads) == count
    np.testing.assert_array_equal(again, images)
    assert report_again == report and report.skipped == [("broken.png", "not an image")]
    load_images(folder, 64)
    assert len(reads) == 2 * count  # another size is cached separately
    assert load_images(folder, 32, channels=1)[0].shape == (3, 32, 32, 1)  # other channels as well


@pytest.mark.parametrize(("slow", "expected"), [(True, 1), (False, 3)])
def test_images_that_several_want_are_read_by_one_of_them(tmp_path, monkeypatch, slow, expected):
    """What is read too quickly to be cached the others read side by side, when the first has finished."""
    monkeypatch.setattr(cache, "MIN_SECONDS", 0 if slow else 60)
    reads, ends, inside = [], [], threading.Barrier(2)

    def read():
        reads.append(time.monotonic())
        if len(reads) > 1:
            inside.wait(5)
        time.sleep(0.3)
        ends.append(time.monotonic())
        return np.ones((2, 4, 4, 3), np.uint8), []

    def load():
        found.append(cache.load_or_read(str(tmp_path / "new" / "cached.npz"), "fingerprint", read))

    found, threads = [], [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == expected and len(found) == 3 and all(images.sum() == 96 for images, _, _ in found)
    assert all(begun >= ends[0] for begun in reads[1:])
    assert os.listdir(tmp_path / "new") == (["cached.npz"] if slow else [])


@pytest.mark.parametrize("change", ["new", "gone", "other", "touched in place", "corrupt cache"])
def test_cache_notices_a_change_of_the_folder(cached, change):
    folder, reads = cached
    load_images(folder, 32)
    count, status = len(reads), os.stat(folder / "1.png")
    if change == "new":
        write(folder, {"3.png": plain((40, 40), 0)})
    elif change == "gone":
        os.remove(folder / "1.png")
    elif change == "other":
        write(folder, {"1.png": plain((41, 40), "blue")})
    elif change == "touched in place":  # as many bytes, and the old time of change put back
        time.sleep(0.05)
        (folder / "1.png").write_bytes((folder / "1.png").read_bytes())
        os.utime(folder / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        path = cache.cache_path(folder, (32, 32), 3)
        os.truncate(path, os.path.getsize(path) // 2)
    images, _ = load_images(folder, 32)
    assert len(reads) > count
    assert len(images) == {"new": 4, "gone": 2}.get(change, 3)
    assert change != "other" or images[1].mean(axis=(0, 1)).argmax() == 2


def test_a_folder_that_changes_its_name_is_noticed(cached):
    """Which changes neither size nor time of any file, nor here their order, but the names of skipped ones."""
    folder, _ = cached
    write(folder, {"a/0.png": plain((40, 40), "blue"), "a/broken.png": b"no image"})
    assert "a/broken.png" in dict(load_images(folder, 32)[1].skipped)
    os.rename(folder / "a", folder / "b")
    assert "b/broken.png" in dict(load_images(folder, 32)[1].skipped)


def test_a_cache_follows_names_whose_accents_change(cached):
    """Such a change keeps the order of the images, and the sizes and times of the files in the folder."""
    folder, _ = cached
    write(folder, {"\xe9/0.png": plain((40, 40), "blue"), "\xe9/broken.png": b"no image"})
    images, report = load_images(folder, 32, classes=True)
    os.rename(folder / "\xe9", folder / "e\u0301")
    again, moved = load_images(folder, 32, classes=True)
    np.testing.assert_array_equal(again, images)
    assert report.labels.tolist() == moved.labels.tolist() == [-1, -1, -1, 0]
    assert "e\u0301/broken.png" in dict(moved.skipped)


def test_grids_are_known_by_names_of_either_form(tmp_path):
    grids = {"\xe9-samples.png", "e\u0301-samples-epoch0001.png"}
    assert listing.find_sample_grids([*grids, "\xe9.keras", "other-samples.png"]) == grids


def test_a_cache_that_cannot_be_written_is_no_loss(cached, monkeypatch):
    folder, _ = cached
    monkeypatch.setenv("KERAS_HOME", os.fspath(folder / "0.png"))  # not a folder
    assert len(load_images(folder, 32)[0]) == 3


@posix
@pytest.mark.parametrize(
    "environment, replaced",
    [
        ({"HOME": "{tmp}"}, False),
        ({}, False),
        ({"HOME": "{tmp}/closed"}, False),
        ({"HOME": "{tmp}", "KERAS_HOME": "{tmp}/k"}, False),
        ({"KERAS_HOME": "k"}, False),
        ({"KERAS_HOME": ""}, True),
        ({"KERAS_HOME": "~nobody-here/keras"}, True),
        ({"KERAS_HOME": "{tmp}/closed/keras"}, True),
    ],
)
def test_the_cache_is_in_the_folder_of_keras(tmp_path, monkeypatch, environment, replaced):
    import pwd

    monkeypatch.chdir(tmp_path)
    if replaced:
        (tmp_path / "closed").mkdir()
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # no user is known
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("closed") and access(path, mode))
    for name in "HOME", "KERAS_HOME":
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    if replaced:  # which Keras does only in `get_file`
        folder = os.path.join("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), ".keras")
    else:
        (source,) = importlib.util.find_spec("keras").submodule_search_locations
        source = pathlib.Path(source, "src", "backend", "config.py").read_text()
        rule = source[source.index('if "KERAS_HOME" in') : source.index("def keras_home")]
        exec(rule, {"os": os}, found := {})
        folder = found["_KERAS_DIR"]
    assert cache.cache_folder() == os.path.join(folder, "datasets") and not folder.startswith("~")
