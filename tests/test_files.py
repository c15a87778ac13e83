"""Files are written whole or not at all; the start of the programs."""

import os

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import console
import device
import files


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as draft, open(draft, "w") as file:
        file.write("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with files.replacing(path) as draft, open(draft, "w") as file:
        file.write("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "a.txt").symlink_to(tmp_path / "far" / "b.txt")
    with files.replacing(tmp_path / "a.txt") as draft, open(draft, "w") as file:
        file.write("new")
    assert (tmp_path / "a.txt").is_symlink() and (tmp_path / "far" / "b.txt").read_text() == "new"


def test_what_a_killed_writer_left_is_cleaned(tmp_path):
    left = tmp_path / ".a.txt.saving"
    left.mkdir()
    (left / "tmpabc").write_text("half")
    files.check_writable(tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        files.check_writable(tmp_path / "file" / "a.txt")
    with pytest.raises(FileNotFoundError):
        files.check_writable(tmp_path / "nowhere" / "a.txt")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_picture_once(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels)).astype(np.int16)
    files.save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png")).reshape(20, 30, channels)
    for k in range(5):
        row, column = divmod(k, 3)
        np.testing.assert_array_equal(grid[10 * row + 1 : 10 * row + 9, 10 * column + 1 : 10 * column + 9], images[k])
    assert np.all(grid[10:, 20:] == 255)


@pytest.mark.parametrize(
    "seconds, text", [(5, "5 s"), (200, "3 min 20 s"), (1800, "30 min"), (18600, "5 h 10 min"), (2e5, "2 days 7 h")]
)
def test_times_as_a_person_says_them(seconds, text):
    assert console.duration(seconds) == text


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_another_python_gets_one_clear_sentence(run, version):
    start = os.path.join(ROOT, "start.py")
    code = f"import sys, runpy; sys.version_info = {(*version, 0)}; runpy.run_path({start!r}, run_name='__main__')"
    process = run("-c", code)
    assert process.returncode == 1
    assert process.stderr == f"start.py: needs Python 3.11, 3.12 or 3.13, and this is {version[0]}.{version[1]}\n"


def test_chatter_is_held_back_and_shown_when_something_fails(run):
    code = "import os, device\nwith device._stderr_held_back():\n    os.write(2, b'chatter\\n')\n    {}"
    quiet, loud = run("-c", code.format("pass")), run("-c", code.format("import nowhere"))
    assert quiet.stderr == "" and loud.stderr.startswith("chatter\n") and "nowhere" in loud.stderr


def test_settings_that_come_too_late_for_tensorflow_are_not_left_to_child_processes(monkeypatch):
    import tensorflow as tf

    for name in "TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS":
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    assert device.start_tensorflow() is tf and dict(os.environ) == before


@pytest.mark.parametrize(
    "name, can_be_written",
    [("a.png", True), ("a.JPG", True), ("b/a.webp", True), ("a.gif", True), ("a.tif", True), ("a.pdf", True)]
    + [(f"a{ending}", False) for ending in ("", ".", ".psd", ".fits", ".h5", ".xbm", ".npy", ".pcd", ".wmf")]
    + [(".png", False)],
)
def test_only_image_formats_that_can_be_written_are_accepted(name, can_be_written):
    if can_be_written:
        files.check_image_name("--out", name)
    else:
        with pytest.raises(ValueError, match=f"--out .*got {name}$"):
            files.check_image_name("--out", name)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        files.check_writable(tmp_path)
