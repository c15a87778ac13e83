"""Starts a command once for each device, and watches over the processes; what they are then is `support/worker.py`.

It imports no TensorFlow and uses no GPU itself.
"""

import argparse
import collections
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from typing import BinaryIO

from support import console
from support.places import LAUNCHED
from support.signals import SIGNALS
from support.worker import GRACE, Worker

LAST_SAVE = 45  # seconds for a save under way, after which a worker is killed
LAST_WORDS = 5  # seconds for the end of a worker that saves nothing


def device_count(text: str) -> int | str:
    """An argparse type: a number of devices, or `all`."""
    try:
        return text if text == "all" else console.integer(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, which is neither that nor all") from None


def help_on_devices(what: str) -> str:
    """What `--devices` means."""
    return (
        f"number of devices that share {what}, in a process for each: GPUs, or on a machine without any, CPU cores; "
        "all: every GPU"
    )


def add_devices_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds `--devices` to a parser."""
    help = f"{help_on_devices(what)} (1)"
    parser.add_argument("--devices", type=device_count, default=1, metavar="N|all", help=help)


def find_gpus() -> list[str]:
    """Names of all GPUs that this process may use, as in CUDA_VISIBLE_DEVICES; no GPU is touched."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return names[: next((k for k, name in enumerate(names) if name in ("", "-1")), len(names))]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(k) for k, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def choose_devices(count: int | str) -> list[str | None]:
    """The GPUs for `--devices`; None for each process that computes on CPU cores, on a machine without GPUs.

    Raises:
        ValueError: if there are fewer GPUs.
    """
    gpus = find_gpus()
    if count == "all":
        return gpus or [None]
    if gpus and count > len(gpus):
        raise ValueError(
            f"--devices {count}, and this machine has {len(gpus)} GPU{'s' * (len(gpus) > 1)}; choose --devices all"
        )
    return gpus[:count] or [None] * count


def launch_if_several(
    worker: Worker, program: str, count: int | str, comfort: str = "", most: int | None = None
) -> None:
    """Runs this command on several devices, and ends with its exit status; returns in each of its workers.

    Args:
        worker: what this process is.
        program: its name, for messages.
        count: the value of `--devices`.
        comfort: what to say after the sentence on a worker that has died.
        most: how many devices have something to do.

    Raises:
        ValueError: as `choose_devices`, or if workers that were started otherwise have too few GPUs or images.
    """
    if worker.count > 1 and not worker.place.launched:
        check_tasks(worker.count, count, most)
        take_device(worker.place.local)
    if worker.count > 1 or count == 1:
        return
    devices = choose_devices(count)[:most]
    if len(devices) > 1 and os.name == "nt":
        raise ValueError("several processes need Linux or macOS; omit --devices")
    if len(devices) > 1:
        sys.exit(Launch(program, devices, [sys.executable, *sys.argv], comfort).run())


def check_tasks(tasks: int, count: int | str, most: int | None) -> None:
    """Raises ValueError if several tasks of a cluster were started with `--devices`, or for fewer images."""
    if count != 1:
        raise ValueError(
            f"--devices {count} starts processes on one machine, but {tasks} tasks have been started already, one for "
            "each device; omit --devices"
        )
    if most is not None and most < tasks:
        raise ValueError(f"{tasks} tasks have been started for {most} images; start fewer tasks")


def take_device(local: int) -> None:
    """Makes one GPU visible to the worker with this number on its machine, where the scheduler has not done so.

    Raises:
        ValueError: if there are several GPUs, but none for this worker.
    """
    gpus = find_gpus()
    if len(gpus) > 1:
        if local >= len(gpus):
            raise ValueError(f"there are more tasks than GPUs on this node, which has {len(gpus)}; start one for each")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local]


class Launch:
    """A command that runs in several processes.

    Args:
        program, comfort: see `launch_if_several`.
        devices: see `choose_devices`.
        command: the words of the command.
    """

    def __init__(self, program: str, devices: Sequence[str | None], command: Sequence[str], comfort: str = ""):
        self.program, self.devices, self.command, self.comfort = program, devices, command, comfort
        self.workers, self.last_words, self.heard = [], [], set()

    def run(self) -> int:
        """Starts the workers and waits for the first one. Returns the exit status."""
        try:
            how = f"{len(self.devices)} {free_port()} {secrets.token_hex(16)}"
            for k in range(len(self.devices)):
                self.start(k, how)
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup, for the workers too
                    signal.signal(number, self.pass_on)
            return self.watch()
        finally:
            self.end_all()

    def start(self, k: int, how: str) -> None:
        """Starts worker k, out of reach of Ctrl-C in the terminal, which this process passes on."""
        env = {**os.environ, LAUNCHED: f"{k} {how}"}
        env.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # how TensorFlow comments on the end of another worker
        if self.devices[k] is not None:
            env["CUDA_VISIBLE_DEVICES"] = self.devices[k]
        others = {} if k == 0 else {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        worker = subprocess.Popen(self.command, env=env, stdin=subprocess.PIPE, start_new_session=True, **others)
        self.workers.append(worker)
        self.last_words.append(collections.deque(maxlen=1))
        if k:
            threading.Thread(target=self.read, args=(worker.stderr, self.last_words[k]), daemon=True).start()
        if self.devices[k] is None and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(worker.pid, share_of_cores(k, len(self.devices)))

    def read(self, stderr: BinaryIO, last_words: collections.deque) -> None:
        """Keeps the last line that a worker prints on stderr."""
        for line in stderr:
            if line.strip():
                last_words.append(line.decode(errors="replace").strip())

    def pass_on(self, number: int, frame: types.FrameType | None) -> None:
        """Handles a signal: the first worker hears of it."""
        self.heard.add(number)
        with contextlib.suppress(OSError, ValueError):  # it has ended
            os.write(self.workers[0].stdin.fileno(), b"%d\n" % number)

    def watch(self) -> int:
        """Waits for the end of the first worker, or for one that fails; returns the exit status."""
        first, failed, until = self.workers[0], None, None
        while first.poll() is None and (failed is None or time.monotonic() < until):
            time.sleep(0.05)
            if failed is None:
                failed = next((k for k, worker in enumerate(self.workers) if worker.poll()), None)
                until = time.monotonic() + (GRACE if failed and self.workers[failed].returncode > 0 else 0)
        status = first.returncode
        if status is not None and status >= 0:
            return status
        if status is not None and -status in self.heard:  # it has no handler for this signal
            return 128 - status
        failed = failed or 0
        status = self.workers[failed].returncode
        console.warn(f"{self.program}: {self.describe_end(failed)}{self.comfort}")
        return status if status > 0 else 128 - status

    def describe_end(self, k: int) -> str:
        """How a worker has ended, in words."""
        worker = self.workers[k]
        if k:
            time.sleep(0.2)  # for its last words
        how = f"ended with exit status {worker.returncode}"
        if worker.returncode < 0:
            how = f"was killed by {signal.Signals(-worker.returncode).name}"
        words = "".join(f" ({line})" for line in self.last_words[k])
        return f"worker {k + 1} of {len(self.workers)} (process {worker.pid}) {how}{words}"

    def end_all(self) -> None:
        """Ends all workers; a save under way is finished."""
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.stdin.close()
        begun = time.monotonic()
        for k, worker in enumerate(self.workers):
            try:
                worker.wait(max(0.0, begun + (LAST_WORDS if k else LAST_SAVE) - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def share_of_cores(k: int, count: int) -> list[int]:
    """The cores of worker k of `count`, a share of those of this process; a single one if there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[k::count] or [cores[k % len(cores)]]
