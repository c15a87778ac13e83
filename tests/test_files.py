"""Files are written whole or not at all; the start of the programs."""

import errno
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, environment
from PIL import Image

from diffusion import command_line
from support import console, device, files, grids


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


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """The current folder: a file in.npy, links to it, and a folder with an image."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.npy").write_text("precious")
    os.symlink("in.npy", "soft.json")
    os.link("in.npy", "hard.json")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("")


@pytest.mark.parametrize("name", ["in.npy", "images/../in.npy", "soft.json", "hard.json", "IN.npy"])
def test_outputs_that_are_an_input_are_refused(outputs, name):
    with pytest.raises(ValueError, match=f"^--out {name} would overwrite .*, in.npy; choose another name$"):
        files.check_outputs([("--npy", None), ("--out", name)], [None, "images", "in.npy"])


@pytest.mark.parametrize("one, other", [("a.png", "./a.png"), ("a.png", "A.PNG"), ("\xe9.png", "e\u0301.png")])
def test_outputs_that_are_one_file_are_refused(outputs, one, other):
    """On some file systems, of which Linux has none, the names of the last two pairs are one."""
    with pytest.raises(ValueError, match=f"--figure {other} would overwrite .*, {one};"):
        files.check_outputs([("--out", one), ("--figure", other)], ["in.npy"])


def test_outputs_may_lie_in_a_folder_of_images(outputs):
    files.check_outputs([("--out", "images/samples.png"), ("--npy", "out.npy")], ["images", "in.npy", "nowhere", "0.1"])
    with pytest.raises(ValueError, match="images is a folder"):
        files.check_outputs([("--out", "images")], ["images"])
    with pytest.raises(FileNotFoundError, match="no folder for --out nowhere/a.png"):
        files.check_outputs([("--out", "nowhere/a.png")], [])
    with pytest.raises(ValueError, match="--tensorboard must name a folder, but in.npy is a file"):
        files.make_folder("--tensorboard", "in.npy")


def test_names_are_compared_where_inodes_are_0(outputs, monkeypatch):
    """As on some network drives, where all files would be one."""
    stat = os.stat

    def without_inodes(path, **how):
        values = stat(path, **how)
        return os.stat_result([values[0], 0, *values[2:]])

    monkeypatch.setattr(os, "stat", without_inodes)
    assert files.same_file("in.npy", "soft.json") and not files.same_file("in.npy", "images/a.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_once(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels)).astype(np.int16)
    grids.save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png")).reshape(2 * 98, 3 * 98, channels)
    for k in range(5):  # 8 pixels shown as 96, and a white line around
        y, x = 98 * (k // 3) + 1, 98 * (k % 3) + 1
        np.testing.assert_array_equal(grid[y : y + 96 : 12, x : x + 96 : 12], images[k])
        np.testing.assert_array_equal(grid[y + 11 : y + 96 : 12, x + 11 : x + 96 : 12], images[k])
    assert np.all(grid[98:, 2 * 98 :] == 255) and np.all(grid[0] == 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_shows_each_batch_and_pauses_at_its_end(tmp_path, channels):
    grids.save_animation([np.full((4, 8, 8, channels), grey) for grey in (0, 100, 200)], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3 and image.size == (2 * 98, 2 * 98) and image.info["loop"] == 0  # for ever
        for k, grey in enumerate((0, 100, 200)):
            image.seek(k)
            assert abs(image.convert("L").getpixel((50, 50)) - grey) < 3
            assert (image.info["duration"] > 1000) == (k == 2)


@pytest.mark.parametrize(
    "seconds, text", [(5, "5 s"), (200, "3 min 20 s"), (1800, "30 min"), (18600, "5 h 10 min"), (2e5, "2 days 7 h")]
)
def test_durations_read_as_a_person_says_them(seconds, text):
    assert console.duration(seconds) == text


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_an_unsupported_python_gets_one_clear_sentence(run, version):
    start = os.path.join(ROOT, "start.py")
    code = f"import sys, runpy; sys.version_info = {(*version, 0)}; runpy.run_path({start!r}, run_name='__main__')"
    process = run("-c", code)
    assert process.returncode == 1
    assert process.stderr == f"start.py: needs Python 3.11, 3.12 or 3.13, but this is {version[0]}.{version[1]}\n"


def test_startup_messages_are_shown_only_after_a_failure(run):
    code = "import os\nfrom support.device import _stderr_held_back\n"
    code += "with _stderr_held_back():\n    os.write(2, b'chatter\\n')\n    {}"
    quiet, loud = run("-c", code.format("pass")), run("-c", code.format("import nowhere"))
    assert quiet.stderr == "" and loud.stderr.startswith("chatter\n") and "nowhere" in loud.stderr


@pytest.mark.parametrize(
    "end, shown",
    [
        ("os.abort()", True),
        ("os.kill(os.getpid(), signal.SIGILL)", True),
        ("ctypes.CDLL(None).exit(3)", True),
        ("import nowhere", True),
        ("", False),
        ("os._exit(143)", False),  # as after a signal, see `support/signals.py`
    ],
)
def test_the_last_words_of_tensorflow_are_shown(run, tmp_path, end, shown):
    (tmp_path / "tensorflow.py").write_text(
        f"import ctypes, os, signal\nos.write(2, b'no AVX here\\n' * 9999)\n{end}\n"
        "from types import SimpleNamespace\nconfig = SimpleNamespace(list_physical_devices=lambda kind: [])"
    )
    process = run("-c", "from support import device; device.start_tensorflow()", timeout=20)
    assert process.stderr.count("no AVX here") == 9999 * shown and (process.returncode != 0) == bool(end)


def test_tensorflow_starts_without_standard_streams(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        "import os, types\nconfig = types.SimpleNamespace(list_physical_devices=lambda kind: [])"
    )
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "from support import device; device.start_tensorflow()" <&- >&- 2>&-', sys.executable],
        cwd=tmp_path,
        env=environment(),
        timeout=20,
    )
    assert done.returncode == 0


@pytest.mark.parametrize("parts, on", [(None, True), (1, True), (1, False)])
def test_garbage_collector_pauses_during_the_import(run, tmp_path, parts, on):
    """It goes on as it was, and leaves out what is there by then in our programs, not in those of users."""
    (tmp_path / "tensorflow.py").write_text(
        "import gc, types\nwhile_imported = gc.isenabled()\n"
        "config = types.SimpleNamespace(list_physical_devices=lambda kind: [])"
    )
    (tmp_path / "keras.py").write_text(
        "import gc, types\nwhile_imported = gc.isenabled()\n"
        "config = types.SimpleNamespace(set_floatx=print, set_image_data_format=print)"
    )
    process = run(
        "-c",
        f"import gc, sys\nif not {on}: gc.disable()\n"
        f"from support import device\ntf = device.start_tensorflow({parts})\n"
        "seen = [module.while_imported for module in (tf, sys.modules.get('keras', tf))]\n"
        "print(seen, gc.isenabled(), gc.get_freeze_count() > 1000)",
    )
    assert process.stdout.splitlines()[-1] == f"[False, False] {on} {parts is not None}", process.stderr


def test_settings_too_late_for_tensorflow_are_not_inherited(monkeypatch):
    import tensorflow as tf

    for name in "TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS":
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    assert device.start_tensorflow() is tf and dict(os.environ) == before


@pytest.mark.parametrize(
    "words, said",
    [
        (["--label", "-sad"], "write --label=-sad if -sad is"),
        (["--label", "happy", "-sad", "--n-sample", "2"], "write --label=-sad if"),
        (["--label=-sad", "happy"], "write --label=happy if"),
        (["--out", "-a.png"], "write --out=-a.png if"),
        (["--n-sample", "2", "-seed", "3"], "unrecognized arguments: -seed 3; see"),
        (["--guidance", "-1", "--seed", "a"], "--seed: must be an integer of at least 0, got 'a'; see"),
    ],
)
def test_values_that_begin_with_a_dash_say_how(capsys, words, said):
    with pytest.raises(SystemExit, match="2"):
        command_line.parse_sampling_options(None, words)
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_labels_may_begin_with_a_dash():
    for words, labels in (
        (["--label=-sad"], ["-sad"]),
        (["--label=-sad", "--label=happy", "--label=-1"], ["-sad", "happy", "-1"]),
        (["--label", "sad", "happy"], ["sad", "happy"]),
        ([], None),
    ):
        assert command_line.parse_sampling_options(None, words).label == labels


class Broken(io.TextIOWrapper):
    """A standard stream whose other end is gone."""

    def __init__(self, error):
        super().__init__(io.BytesIO(), "utf-8")
        self.error = error

    def write(self, text):
        raise self.error

    flush = write


def stream(kind):
    """A standard stream to which text cannot be written, or not every text."""
    if kind in ("ascii", "cp1252", "latin-1", "utf-8"):
        return io.TextIOWrapper(io.BytesIO(), kind)
    if kind == "closed":
        closed = io.StringIO()
        closed.close()
        return closed
    return {"none": None, "nothing of a stream": object()}.get(kind) or kind and Broken(kind)


BROKEN = [
    *(OSError(number, os.strerror(number)) for number in (errno.EIO, errno.EPIPE, errno.ENOSPC, errno.EAGAIN)),
    *(
        RuntimeError("the kernel is gone"),
        "none",
        "closed",
        "nothing of a stream",
        "ascii",
        "cp1252",
        "latin-1",
        "utf-8",
    ),
]


def test_too_little_memory_is_failed_work_in_one_sentence(capsys):
    with pytest.raises(SystemExit, match="1"), console.one_line_errors("x.py"):
        np.zeros(2**50)
    said = capsys.readouterr().err
    assert said.startswith("x.py: Unable to allocate") and len(said.splitlines()) == 1
    with pytest.raises(SystemExit, match="1"), console.one_line_errors("x.py"):
        raise MemoryError  # as Python itself does, without a word
    assert capsys.readouterr().err == "x.py: MemoryError\n"


@pytest.mark.parametrize("kind", BROKEN, ids=str)
def test_printing_that_fails_never_ends_the_work(monkeypatch, kind):
    out, err = (None, None) if kind == "none" else (stream(kind), stream(kind))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    text = "β ± 1×2 … \udcff 漢"
    for _ in range(2):
        console.say(text)
        console.warn(text)
    countdown = console.Countdown(range(2, -1, -1))
    for t in 2, 1, 0:
        countdown.show(t)
    with pytest.raises(SystemExit, match="2"):
        console.leave(text, 2)
    with pytest.raises(SystemExit), console.one_line_errors("x"):
        raise FileNotFoundError(text)
    with pytest.raises(SystemExit, match="0"):
        console.Parser(description=text).parse_args(["--help"])
    if isinstance(out, io.TextIOWrapper) and not isinstance(out, Broken):
        said = out.buffer.getvalue().decode(kind)
        assert said.count("\n") > 4 and "1x2" in said.replace("×", "x") and "\\udcff" in said


@pytest.mark.parametrize("kind", [OSError(errno.EIO, "terminal closed"), "closed", "ascii"], ids=str)
def test_a_bar_survives_the_end_of_its_terminal(monkeypatch, kind):
    monkeypatch.setattr(sys, "stdout", stream(kind))
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # put back afterwards
    monkeypatch.setattr(console.SafeStream, "isatty", lambda stream: True)
    if kind == "closed":  # Keras would not even make a bar
        console.open_streams()
    shown = console.Bar(3, "step")
    for done in 1, 2, 3:
        shown.update(done, loss=0.5)
        shown.say("×")
    countdown = console.Countdown(range(3, -1, -1), "β ")
    for t in 3, 2, 1, 0:
        countdown.show(t)


def test_a_countdown_of_repeated_times_ends_with_a_full_bar(monkeypatch, capsys):
    monkeypatch.setattr(console.SafeStream, "isatty", lambda stream: True)
    times = [9, *[5] * 4, 2, 0]
    countdown = console.Countdown(times)
    for t in times:
        countdown.shown = 0.0  # without a pause between two lines
        countdown.show(t)
    lines = capsys.readouterr().out.split("\r")[1:]
    assert [sum(line.count(c) for c in "━┄") for line in lines] == [30] * len(times)
    assert lines[-1].count("━") == 30 and "\n" in lines[-1] and "\n" not in "".join(lines[:-1])


PRINTS = """
import sys
from support import console
console.Parser(prog="x").parse_args([])
for _ in range(3):
    console.say("β ± 1×2 … \\udcff 漢" * 1000)
    console.warn("β")
print("×")  # as a library would, and Python writes it at its end
"""


@pytest.mark.parametrize(
    "where, encoding",
    [
        *((place, "utf-8") for place in (">/dev/full 2>/dev/full", ">&- 2>&-", "2>&- | true", "<&- >&-")),
        *(("2>&1 | head -c1", "ascii"), ("", "ascii"), ("", "cp1252")),
    ],
)
def test_output_that_goes_away_leaves_the_exit_status_alone(where, encoding):
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$0" {where}; exit ${{PIPESTATUS[0]}}', PRINTS],
        env=environment(PYTHONIOENCODING=encoding),
        capture_output=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    assert b"Error" not in done.stderr and b"ignored" not in done.stderr
    if not where:
        assert done.stderr.split() == [rb"\u03b2"] * 3 and b"1x2" in done.stdout.replace(b"\xd7", b"x")


def test_no_file_gets_the_descriptor_of_a_stream_that_is_missing():
    code = "from support import console; console.Parser().parse_args([]); raise SystemExit(open('/dev/null').fileno())"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, code], env=environment(), timeout=20
    )
    assert done.returncode > 2


@pytest.mark.parametrize(
    "name, can_be_written",
    [("a.png", True), ("a.JPG", True), ("b/a.webp", True), ("a.gif", True), ("a.tif", True), ("a.pdf", True)]
    + [(f"a{ending}", False) for ending in ("", ".", ".psd", ".fits", ".h5", ".xbm", ".npy", ".pcd", ".wmf")]
    + [(".png", False)],
)
def test_only_image_formats_that_can_be_written_are_accepted(name, can_be_written):
    if can_be_written:
        grids.check_image_name("--out", name)
    else:
        with pytest.raises(ValueError, match=f"--out .*got {name}$"):
            grids.check_image_name("--out", name)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        files.check_writable(tmp_path)
