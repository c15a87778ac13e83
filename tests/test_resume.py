"""Nothing that was learnt is lost: interruptions of every kind, damaged files, full disks, two runs at once."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import keras
import numpy as np
import pytest
from conftest import SMALL, TINY, environment, finish, iterations, start, tiny_network, write_images
from test_training import assert_equal_to_the_bit, losses

from diffusion import model_file
from training import checkpoint

LONG = (*SMALL, "--n-epochs", "200", "--sample-every", "0", "--lr-decay", "cosine", "--save-every", "0.005")


def read_until(process, word):
    """What a process prints, up to and with the line with this word in it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            break
    return "".join(lines)


def train(folder, *options, **more):
    return start(folder, "diffusion_model.py", *options, **more)


def table(path):
    with open(path, newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)
        ]


def progress(path):
    return model_file.metadata(keras.models.load_model(path))["progress"]


def assert_the_same_end(done, lines, at_once, folder):
    """Of an interrupted run in `often` and one in `once`: lines, table, and all bits of the model."""
    assert done.returncode == at_once.returncode == 0, done.stderr + at_once.stderr
    assert lines == losses(at_once)
    assert table(folder / "often" / "model.csv") == table(folder / "once" / "model.csv")
    assert_equal_to_the_bit(folder / "once" / "model.keras", folder / "often" / "model.keras")


def two_folders(tmp_path):
    for name in "once", "often":
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, count=40)  # the last batch of an epoch is a smaller one


@pytest.mark.slow
def test_randomly_interrupted_run_is_bit_exact(tmp_path):
    two_folders(tmp_path)
    at_once = finish(train(tmp_path / "once", *LONG))
    lines, steps, chance = {}, [], random.Random(0)
    for number in (signal.SIGTERM, signal.SIGKILL, None):
        process = train(tmp_path / "often", *LONG)
        printed = read_until(process, "ms a step")
        if number is not None:
            time.sleep(chance.uniform(0.4, 0.9))
            process.send_signal(number)
        done = finish(process, printed)
        assert done.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9, None: 0}[number], done.stderr
        lines.update(losses(done))
        steps.append(progress(tmp_path / "often" / "model.keras")["step"])
    assert 0 < steps[0] < steps[1] < steps[2] == 600  # each of them did interrupt something
    assert_the_same_end(done, lines, at_once, tmp_path)


def test_the_table_has_a_row_for_every_epoch(trained):
    rows = table(trained[0] / "model.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "3"), ("1", "6")]
    for row in rows:
        assert float(row["loss_sum"]) == losses(trained[1])[int(row["epoch"])]
        assert float(row["loss_mean"]) == pytest.approx(float(row["loss_sum"]) / 3)
        assert 0 < float(row["learning_rate"]) < 4e-3


@pytest.mark.parametrize("moment", ["starting TensorFlow", "files "])
def test_signal_before_training_ends_the_program_at_once(tmp_path, moment):
    """While TensorFlow is imported, and while the first step is compiled."""
    write_images(tmp_path)
    process = train(tmp_path, *LONG, fresh=moment == "starting TensorFlow")
    printed = read_until(process, moment)
    time.sleep(0.7)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    done = finish(process, printed)
    assert done.returncode == 143 and done.stderr == "" and "resumes" not in done.stdout
    assert time.monotonic() - begun < 2
    assert os.listdir(tmp_path) == ["images.npy"]


def test_signal_during_a_grid_loses_neither_steps_nor_grid(tmp_path):
    write_images(tmp_path)
    options = (*SMALL, "--T", "500", "--beta2", "0.02", "--n-epochs", "4", "--sample-every", "2")
    process = train(tmp_path, *options)
    printed = read_until(process, "Epoch :1")
    time.sleep(1)
    assert not (tmp_path / "samples-epoch0002.png").exists()
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    done = finish(process, printed)
    assert done.returncode == 130 and time.monotonic() - begun < 10, done.stderr
    assert "stopped after 6 steps" in done.stdout
    again = train(tmp_path, *options)
    while again.poll() is None and not (tmp_path / "samples-epoch0002.png").exists():
        time.sleep(0.1)
    assert again.poll() is None
    again.kill()
    printed = finish(again).stdout
    assert "resuming after 2 epochs" in printed and "Epoch :2" not in printed


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_signals_save_or_end_a_run_and_nohup_is_respected(tmp_path):
    write_images(tmp_path)
    options = (*SMALL, "--n-epochs", "100000", "--sample-every", "0")
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the program inherits, as from nohup
    process = train(tmp_path, *options, fresh=True)
    signal.signal(signal.SIGHUP, handler)
    printed = read_until(process, "ms a step")
    assert not (tmp_path / "model.keras").exists()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    for _ in range(100):
        time.sleep(0.1)
        if (tmp_path / "model.keras").exists():
            break
    saved = iterations(tmp_path / "model.keras")
    assert saved >= 20
    printed += read_until(process, f"Epoch :{saved // 3} ")  # with steps after the save
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    done = finish(process, printed)
    assert done.returncode == 130 and done.stderr == "" and time.monotonic() - begun < 10
    after = iterations(tmp_path / "model.keras")
    assert after > saved and f"stopped after {after:,} steps" in done.stdout


def in_a_process(code):
    """Runs lines in the block of an `Interruption`, `i`, in a process of their own, which a signal may end."""
    begin = "import os, signal, sys, time\nfrom support.signals import Interruption\ni = Interruption().__enter__()\n"
    command = [sys.executable, "-c", begin + code + "time.sleep(60)"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=20)


def test_signal_waits_until_a_save_under_way_is_finished():
    """The thread that hears the signal waits for the lock of the save."""
    done = in_a_process(
        "with i.busy:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(1)\n    print('saved', flush=True)\n"
    )
    assert done.returncode == 143 and done.stdout.startswith("saved\n")


def test_a_second_ctrl_c_ends_at_once():
    done = in_a_process(
        "i.nothing_to_lose = lambda: False\nfor _ in range(2):\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.5)\n    print(i.stop, flush=True)\n"
    )
    assert done.returncode == 130 and done.stdout == f"{int(signal.SIGINT)}\n"


def test_second_run_on_a_file_is_refused_while_the_first_lives(run, tmp_path):
    write_images(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked.keras").symlink_to(tmp_path / "model.keras")
    first = train(tmp_path, *SMALL, "--n-epochs", "100000")
    read_until(first, "files ")
    second = run("diffusion_model.py", *SMALL, "--model", "linked.keras")
    assert second.returncode == 1 and len(second.stderr.splitlines()) == 1
    assert f"process {first.pid}" in second.stderr and "--model" in second.stderr
    first.kill()
    finish(first)
    third = train(tmp_path, *SMALL)
    printed = read_until(third, "files ")
    third.send_signal(signal.SIGTERM)
    done = finish(third, printed)
    assert done.returncode == 143, done.stderr
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".lock") or ".saving" in name]


def test_non_finite_loss_stops_the_run_and_keeps_the_file(train_tiny, tmp_path, capsys):
    train_tiny(*TINY, "--n-epochs", "1")
    before = (tmp_path / "model.keras").read_bytes()
    with pytest.raises(SystemExit) as end:
        train_tiny("--n-epochs", "9", "--learning-rate", "1e30", "--lr-decay", "none", "--warmup", "0")
    said = capsys.readouterr().err
    assert end.value.code == 1 and len(said.splitlines()) == 1
    for word in "step", "1e+30", "float32", "--learning-rate", "--precision":
        assert word in said
    assert (tmp_path / "model.keras").read_bytes() == before


@pytest.mark.parametrize("where", ["weight", "slot"])
def test_a_weight_that_is_not_finite_is_never_saved(tiny_folder, where):
    path = tiny_folder / "model.keras"
    before = path.read_bytes()
    model = checkpoint.open_for_training(path).network
    variable = model.trainable_variables[1] if where == "weight" else model.optimizer.variables[-1]
    variable.assign(np.full(variable.shape, np.inf))
    with pytest.raises(FloatingPointError, match="not finite"):
        checkpoint.save(model, path)
    assert path.read_bytes() == before


def test_temporary_file_of_keras_stays_in_the_private_folder(tiny_folder, monkeypatch):
    """Where memory is short, Keras gathers the weights in a randomly named file beside the target first."""
    from keras.src.saving import saving_lib

    path, seen = tiny_folder / "model.keras", []
    replace = os.replace

    def note_and_replace(source, target):
        seen.append(sorted(re.sub(r"(\.saving)-.*", r"\1", name) for name in os.listdir(tiny_folder)))
        replace(source, target)

    def no_memory(model):
        seen.append("asked")
        return False

    model = checkpoint.open_for_training(path).network
    before = sorted(os.listdir(tiny_folder))
    with monkeypatch.context() as patch:
        patch.setattr(saving_lib, "is_memory_sufficient", no_memory)
        patch.setattr(os, "replace", note_and_replace)
        checkpoint.save(model, path)
    assert seen == ["asked", sorted([*before, ".model.keras.saving"])]
    assert sorted(os.listdir(tiny_folder)) == before
    for a, b in zip(model.get_weights(), checkpoint.open_for_training(path).network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def damage(path, kind):
    """Spoils a model file in one of the ways that files are spoilt."""
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "a bit":
        middle = len(content) * 3 // 4  # among the weights
        path.write_bytes(
            content[:middle] + bytes(b ^ 255 for b in content[middle : middle + 64]) + content[middle + 64 :]
        )
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "other network":
        image, t = keras.Input((8, 8, 1)), keras.Input((1,))
        model = keras.Model([image, t], keras.layers.Dense(4)(image))
        model.save(path)
    elif kind == "no settings":
        model = tiny_network((8, 8, 1))
        model.compile(loss="mse", optimizer="adam")
        model.save(path)
    elif kind == "no optimizer":
        keras.models.load_model(path, compile=False).save(path)
    elif kind == "new optimizer":
        model = keras.models.load_model(path)
        model.compile(loss="mse", optimizer=keras.optimizers.Adam(use_ema=True))
        model.optimizer.build(model.trainable_variables)
        model.save(path)
    elif kind == "optimizer of another shape":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members["config.json"] = members["config.json"].replace(b'"use_ema": true', b'"use_ema": false')
        with zipfile.ZipFile(path, "w") as archive:
            for name, member in members.items():
                archive.writestr(name, member)


FOR_TRAINING_ONLY = ("no settings", "no optimizer", "new optimizer", "optimizer of another shape")


@pytest.mark.parametrize("kind", ["truncated", "a bit", "empty", "other zip", "other network", *FOR_TRAINING_ONLY])
def test_corrupt_file_is_refused_in_one_sentence_and_unchanged(tiny_folder, kind):
    path = tiny_folder / "model.keras"
    damage(path, kind)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match="model.keras .*(use another file|choose another --model|not a diffusion model)"
    ):
        checkpoint.open_for_training(path)
    if kind not in FOR_TRAINING_ONLY:
        with pytest.raises(ValueError, match="model.keras"):
            model_file.open_model(path)
    assert path.read_bytes() == before


def test_corrupt_file_ends_both_scripts_with_one_sentence(run, tiny_folder):
    damage(tiny_folder / "model.keras", "a bit")
    before = (tiny_folder / "model.keras").read_bytes()
    for script in "diffusion_model.py", "reverse_diffusion.py":
        process = run(script)
        assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert (tiny_folder / "model.keras").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own with 6 MiB, where this may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", folder], stderr=subprocess.DEVNULL
    ):
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.call(["umount", folder])


@pytest.mark.parametrize("freed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_costs_neither_the_old_file_nor_the_training(small_disk, freed):
    write_images(small_disk)
    n_epochs = "100000" if freed else "200"
    process = train(small_disk, *SMALL, "--n-epochs", n_epochs, "--sample-every", "0", "--save-every", "0.01")
    printed = read_until(process, "ms a step")
    while not (small_disk / "model.keras").exists():
        time.sleep(0.05)
    try:
        with open(small_disk / "filler", "wb") as filler:
            while True:
                filler.write(bytes(65536))
                filler.flush()
    except OSError:
        pass  # full
    time.sleep(1.5)
    before = iterations(small_disk / "model.keras")
    assert process.poll() is None
    if freed:
        os.remove(small_disk / "filler")
        process.send_signal(signal.SIGTERM)
    done = finish(process, printed)
    warnings = done.stderr.splitlines()
    last = "" if freed else warnings.pop()
    files_named = {name for line in warnings for name in ("model.keras", "model.csv") if f" {name} cannot" in line}
    assert files_named and len(files_named) == len(warnings)  # one warning for each
    for warning in warnings:
        assert "No space left" in warning and "training goes on" in warning
    after = iterations(small_disk / "model.keras")
    if freed:
        assert done.returncode == 143 and f"after {after:,} steps" in done.stdout
        assert after > before
    else:
        assert done.returncode == 1 and "could not be saved" in last and after == before < 600
