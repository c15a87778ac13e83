"""Several processes of one command: how they start, exchange values, hear of signals and end. No TensorFlow."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import environment

from support import launcher
from support.places import Place
from support.worker import Worker

BEGIN = """
import os, signal, sys, time
from support import launcher
from support.places import find_place
from support.worker import Worker
worker = Worker(find_place())
if worker.count == 1:
    launch = launcher.Launch("program.py", [None] * 3, [sys.executable, *sys.orig_argv[1:]], "; comfort")
    sys.exit(launch.run())
worker.open("program.py")
"""


def start(code):
    """Starts Python code in three workers and a launcher."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + code], env=environment(), stdout=pipe, stderr=pipe, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_values_are_gathered_and_handed_out_in_order():
    status, out, err = finish(
        start(
            "parts = worker.gather(list(worker.share(7)))\n"
            "word = worker.from_first(f'word {worker.index}')\n"
            "words = worker.gather(word)\nif worker.first:\n    print(parts, words)\n"
        )
    )
    assert (status, err) == (0, "")
    assert out == "[[0, 1], [2, 3], [4, 5, 6]] ['word 0', 'word 0', 'word 0']\n"


def test_a_single_process_exchanges_with_itself():
    worker = Worker()
    assert worker.first and list(worker.share(3)) == [0, 1, 2]
    assert worker.gather("a") == ["a"] and worker.from_first("b") == "b"


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 5, 16])
def test_shares_are_even_and_cover_everything(n, count):
    shares = [Worker(Place(k, count)).share(n) for k in range(count)]
    assert [k for share in shares for k in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


DIED = r"program.py: worker {} of 3 \(process \d+\) {}; comfort\n"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        slow("if worker.first: sys.exit(2)\ntime.sleep(60)", 2, ""),
        slow("if not worker.first: sys.exit('wrong')\nsys.exit('sentence')", 1, "sentence\n"),  # all alike
        slow(
            "if worker.index == 1: sys.exit('why')\ntime.sleep(60)",
            1,
            DIED.format(2, r"ended with exit status 1 \(why\)"),
        ),
        slow("if worker.first: os.kill(os.getpid(), 9)\ntime.sleep(60)", 137, DIED.format(1, "was killed by SIGKILL")),
        ("if worker.index == 2: os.kill(os.getpid(), 9)\ntime.sleep(60)", 137, DIED.format(3, "was killed by SIGKILL")),
    ],
)
def test_the_job_ends_with_the_first_worker_or_one_that_fails(code, status, said):
    began = time.monotonic()
    done = finish(start(code))
    assert done[0] == status and re.fullmatch(said, done[2]), done
    assert time.monotonic() - began < 30


def wait_for(path, count):
    """The lines of a file, once there are so many."""
    end = time.monotonic() + 30
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.02)
    return path.read_text().splitlines()


WAITING = """
def hear(number):
    write(f"{worker.index} heard {number}")
def write(line):
    with open(%r, "a") as file:
        file.write(line + "\\n")
worker.obey(hear, lambda: write(f"{worker.index} ends"))
signal.signal(signal.SIGTERM, lambda number, frame: worker.pass_on(number))
write(f"{worker.index} {os.getpid()}")
while True:
    time.sleep(0.1)
"""


def test_a_signal_counts_once_whoever_gets_it(tmp_path):
    notes = tmp_path / "notes"
    process = start(WAITING % str(notes))
    pids = [int(line.split()[1]) for line in sorted(wait_for(notes, 3))]
    time.sleep(0.3)  # the launcher sets its handlers when all are started
    for pid in (*pids, process.pid):
        os.kill(pid, signal.SIGTERM)
    assert wait_for(notes, 4)[3:] == [f"0 heard {int(signal.SIGTERM)}"]
    time.sleep(1.2)
    os.kill(pids[2], signal.SIGTERM)
    assert wait_for(notes, 5)[4:] == [f"0 heard {int(signal.SIGTERM)}"]
    process.kill()
    process.communicate()
    assert sorted(wait_for(notes, 8)[5:]) == ["0 ends", "1 ends", "2 ends"]  # no orphans


@pytest.mark.slow
def test_a_signal_without_a_handler_ends_all():
    process = start("print('ready', flush=True)\ntime.sleep(60)\n")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (143, "", "")


@pytest.mark.parametrize(
    ("visible", "listed", "count", "chosen"),
    [
        ("3,5,7", "", "all", ["3", "5", "7"]),
        ("3,5,7", "", 2, ["3", "5"]),
        ("GPU-8f2e", "", "all", ["GPU-8f2e"]),
        ("0,-1,2", "", "all", ["0"]),  # as CUDA reads it
        ("", "GPU 0: A\nGPU 1: B\n", 2, [None, None]),
        (None, "GPU 0: A (UUID: x)\n  MIG 1g: y\nGPU 1: B (UUID: z)\n", "all", ["0", "1"]),
        (None, None, "all", [None]),
        (None, None, 3, [None, None, None]),
    ],
)
def test_devices_are_the_visible_gpus_else_processes(monkeypatch, tmp_path, visible, listed, count, chosen):
    monkeypatch.setenv("PATH", str(tmp_path))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if listed is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listed}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert launcher.choose_devices(count) == chosen


def test_more_devices_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match="--devices 3, and this machine has 2 GPUs"):
        launcher.choose_devices(3)


@pytest.mark.parametrize(
    ("visible", "local", "taken"), [("0,1,2", 1, "1"), ("5", 3, "5"), ("", 2, ""), ("GPU-a,GPU-b", 0, "GPU-a")]
)
def test_task_takes_the_gpu_of_its_number_if_it_sees_several(monkeypatch, visible, local, taken):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launcher.launch_if_several(Worker(Place(7, 8, local=local)), "program.py", 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken


@pytest.mark.parametrize(
    ("count", "most", "local", "said"),
    [
        (2, None, 0, "omit --devices"),
        ("all", None, 0, "omit --devices"),
        (1, 7, 0, "8 tasks"),
        (1, 8, 2, "one for each"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(monkeypatch, count, most, local, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match=said):
        launcher.launch_if_several(Worker(Place(1, 8, local=local)), "program.py", count, most=most)


def test_cores_are_divided_among_workers():
    cores = sorted(os.sched_getaffinity(0))
    shares = [launcher.share_of_cores(k, 2) for k in range(2)]
    assert set(shares[0] + shares[1]) == set(cores)
    assert len(cores) == 1 or not set(shares[0]) & set(shares[1])
    assert all(launcher.share_of_cores(k, 1000) for k in range(1000))
