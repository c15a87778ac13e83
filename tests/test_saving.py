"""Saves that do not depend on anything but the model file; tables and copies beside it; several writers."""

import errno
import os
import socket
import subprocess
import sys
import types

import pytest

import unet
from support import files
from training import checkpoint, history
from training.history import COLUMNS, History
from training.saving import Checkpoints


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Checkpoints of a model that is nothing but its settings, which a save writes as text; and what they warn of."""
    progress = {"step": 0, "epoch": 0}
    model = types.SimpleNamespace(layers=[unet.Logbook({"progress": progress})])
    path = str(tmp_path / "model.keras")
    warnings = []

    def save(model, path):
        with files.replacing(path) as draft, open(draft, "w") as file:
            file.write(str(progress))

    monkeypatch.setattr(checkpoint, "save", save)
    made = Checkpoints(model, path, History(str(tmp_path / "model.csv"), 0), 10, keep=2, warn=warnings.append)
    return made, warnings


def train(checkpoints, epoch):
    """As if the first step after so many epochs had been taken."""
    checkpoints.progress.update(epoch=epoch, step=checkpoints.progress["step"] + 3)
    checkpoints.table.rows.append([str(epoch - 1), *["1"] * 6, *[""] * 5])


def kept(folder):
    return sorted(name for name in os.listdir(folder) if "-epoch" in name)


@pytest.mark.parametrize("name", ["model.csv", "model-epoch0001.keras"])
def test_model_is_saved_even_if_its_table_or_copies_are_not(checkpoints, tmp_path, name):
    made, warnings = checkpoints
    (tmp_path / name).mkdir()
    (tmp_path / name / "something").write_text("of a user")
    for epoch in 1, 1:
        train(made, epoch)
        assert made.save() and str(made.progress) == (tmp_path / "model.keras").read_text()
    assert len(warnings) == 1 and f"{name} cannot be saved" in warnings[0] and "model.keras cannot" not in warnings[0]
    assert (tmp_path / name / "something").read_text() == "of a user"

    (tmp_path / name / "something").unlink()
    (tmp_path / name).rmdir()
    train(made, 1)
    assert made.save() and (tmp_path / name).is_file() and len(warnings) == 1


def test_failed_save_is_reported_once_and_made_up_later(checkpoints, tmp_path):
    made, warnings = checkpoints
    (tmp_path / "model.keras").mkdir()
    for _ in range(2):
        train(made, 1)
        assert not made.save() and not made.nothing_to_lose()
    assert len(warnings) == 1 and "model.keras cannot be saved" in warnings[0]
    assert (tmp_path / "model.csv").is_file() and kept(tmp_path) == []
    (tmp_path / "model.keras").rmdir()
    assert made.save() and made.nothing_to_lose() and kept(tmp_path) == ["model-epoch0001.keras"]


def test_newest_copies_stay_and_files_of_users_are_not_removed(checkpoints, tmp_path):
    made, _ = checkpoints
    for name in "model-epoch0010-best.keras", "model-epoch9997.keras.bak", "model-epochs.keras", "model-epoch12.keras":
        (tmp_path / name).write_text("of a user")
    others = kept(tmp_path)
    for epoch in 9998, 9999, 10000, 10001:
        train(made, epoch)
        made.save()
    assert kept(tmp_path) == sorted([*others, "model-epoch10000.keras", "model-epoch10001.keras"])

    made.kept_epoch = 4  # somebody has gone back to an earlier epoch
    for epoch in 5, 6, 7:
        train(made, epoch)
        made.save()
    mine = ["model-epoch0006.keras", "model-epoch0007.keras", "model-epoch10000.keras", "model-epoch10001.keras"]
    assert kept(tmp_path) == sorted([*others, *mine])


# --- files ------------------------------------------------------------------------------------------------------------


def write(path, text):
    with files.replacing(path) as draft, open(draft, "w") as file:
        file.write(text)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_cannot_be_flushed_is_no_failure(tmp_path, monkeypatch, code, call):
    real = getattr(os, call)

    def fail_for_the_folder(target, *arguments, **more):
        if os.path.realpath(target if call == "open" else f"/proc/self/fd/{target}") == os.path.realpath(tmp_path):
            raise OSError(code, os.strerror(code))
        return real(target, *arguments, **more)

    monkeypatch.setattr(os, call, fail_for_the_folder)
    write(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("code, fails", [(errno.EINVAL, False), (errno.ENOSYS, False), (errno.EIO, True)])
def test_failed_flush_of_a_file_is_an_error_where_supported(tmp_path, monkeypatch, code, fails):
    (tmp_path / "a.txt").write_text("old")

    def fsync(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if fails:
        with pytest.raises(OSError):
            write(tmp_path / "a.txt", "new")
    else:
        write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == ("old" if fails else "new")


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with files.replacing(path) as one, open(one, "w") as file:
        file.write("on")
        with files.replacing(path) as other, open(other, "w") as other_file:
            other_file.write("other")
        assert path.read_text() == "other"
        file.write("e")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]


def test_drafts_are_removed_only_if_their_writers_are_dead(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()
    dead_here, stale = f"{here}-{dead.pid}-a1", "other-host-8-a1"
    living = [f"{here}-{os.getpid()}-a1", f"{here}-{os.getppid()}-a1", "other-host-7-a1"]
    for name in (dead_here, stale, *living):
        (tmp_path / f".a.txt.saving-{name}").mkdir()
    os.utime(tmp_path / f".a.txt.saving-{stale}", (0, 0))
    (tmp_path / f".b.txt.saving-{stale}").mkdir()
    files.check_writable(tmp_path / "a.txt")
    expected = [f".a.txt.saving-{name}" for name in living] + [f".b.txt.saving-{stale}"]
    assert sorted(os.listdir(tmp_path)) == sorted(expected)


# --- the table --------------------------------------------------------------------------------------------------------

ROWS = [
    ["0", "4", "3.97", "0.9928", "12.354", "1.6", "0.0003", *["0.5"] * 5],
    ["1", "8", "3.5", "0.875", "0.239", "83.5", "0.0004", *[""] * 5],
]


def as_text(delimiter=",", decimal=".", columns=12, end="\n", quote=""):
    lines = [[quote + cell + quote for cell in row[:columns]] for row in (COLUMNS, *ROWS)]
    return end.join(delimiter.join(line).replace(".", decimal) for line in lines) + end


@pytest.mark.parametrize(
    "content",
    [
        as_text().encode(),
        as_text(end="\r\n").encode("utf-8-sig"),
        as_text(quote='"').encode(),
        as_text(";", ",", end="\r\n").encode(),
        as_text("\t", ",", end="\r\n").encode("utf-16"),
        b"\xfe\xff" + as_text("\t").encode("utf-16-be"),
    ],
)
def test_a_table_that_a_spreadsheet_has_saved_is_read(tmp_path, content):
    (tmp_path / "model.csv").write_bytes(content)
    table = History(str(tmp_path / "model.csv"), 2)
    assert table.rows == ROWS
    assert table.held_out() == [(0.9928, 0.5)]
    table.write()
    assert (tmp_path / "model.csv").read_text() == as_text()


def test_old_table_gains_columns_and_loses_rows_of_lost_epochs(tmp_path):
    (tmp_path / "model.csv").write_text(as_text(columns=7))
    assert history.read_rows(tmp_path / "model.csv") == [row[:7] + [""] * 5 for row in ROWS]
    assert len(History(tmp_path / "model.csv", 1).rows) == 1
    (tmp_path / "model.csv").write_text("\n")
    assert History(tmp_path / "model.csv", 1).rows == []


@pytest.mark.parametrize(
    "content",
    [
        b"name,age\nTom,3\n",
        b"epoch,step\n0,4\n",
        as_text().replace("learning_rate", "lr").encode(),
        as_text().replace("\n", ",notes\n", 1).encode(),
        as_text().replace("3.97", "many").encode(),
        as_text().replace("\n1,8", "\n1;8").encode(),
        b"\x00\x01\x02\xff",
        "prêt".encode("latin-1"),
    ],
)
def test_a_table_of_somebody_else_is_refused_and_stays(tmp_path, content):
    (tmp_path / "model.csv").write_bytes(content)
    with pytest.raises(ValueError, match="model.csv is not a table of epochs.*rename it, or choose another --model"):
        History(str(tmp_path / "model.csv"), 5)
    assert (tmp_path / "model.csv").read_bytes() == content
