"""This process among several that run one command together, one for each device.

`support/launcher.py` starts them. The first prints, and writes all files; the job ends when it does. What the launcher
says comes through standard input: a signal for the first worker, or its end, upon which a worker ends too.
"""

import contextlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from support import files

VARIABLE = "DIFFUSION_WORKER"  # index, count, process of the launcher, folder


class Worker:
    """One of `count` workers, numbered from 0; a process that was not started by a launcher is the only one.

    Args:
        launcher: the process that started them.
        folder: an empty one that all of them share.
    """

    def __init__(self, index: int = 0, count: int = 1, launcher: int = 0, folder: str = ""):
        self.index, self.count, self.launcher, self.folder, self._exchanges = index, count, launcher, folder, 0

    @property
    def first(self) -> bool:
        return self.index == 0

    def share(self, n: int) -> range:
        """Which of n things are this worker's; shares differ by one at most."""
        return range(n * self.index // self.count, n * (self.index + 1) // self.count)

    def meet(self, minutes: float) -> None:
        """Waits until all workers have come here.

        Raises:
            OSError: if one of them takes longer.
        """
        names = [os.path.join(self.folder, f"here-{k}") for k in range(self.count)]
        open(names[self.index], "w").close()
        until = time.monotonic() + 60 * minutes
        while not all(map(os.path.exists, names)):
            if time.monotonic() > until:
                raise OSError(f"not all {self.count} workers have started within {minutes:g} minutes")
            time.sleep(0.02)

    def gather(self, value: Any) -> list | None:
        """The values of all workers in their order, for the first one, which waits for them; None for the others."""
        if self.count == 1:
            return [value]
        self._exchanges += 1
        if not self.first:
            return self._write(value, self.index)
        return [value, *(self._read(k, keep=False) for k in range(1, self.count))]

    def from_first(self, value: Any) -> Any:
        """The first worker's value, for all."""
        if self.count == 1:
            return value
        self._exchanges += 1
        if not self.first:
            return self._read(0, keep=True)
        self._write(value, 0)
        return value

    def _path(self, sender):
        return os.path.join(self.folder, f"{self._exchanges}-{sender}.pickle")

    def _write(self, value, sender):
        with files.replacing(self._path(sender)) as draft, open(draft, "wb") as file:
            pickle.dump(value, file)

    def _read(self, sender, keep):
        while not os.path.exists(self._path(sender)):  # the launcher ends this process if the other one fails
            time.sleep(0.01)
        with open(self._path(sender), "rb") as file:
            value = pickle.load(file)
        if not keep:
            os.remove(self._path(sender))
        return value

    def obey(
        self, hear: Callable[[int], None] | None = None, before_the_end: Callable[[], None] = lambda: None
    ) -> None:
        """Listens to the launcher, in a thread.

        Args:
            hear: is called with the number of each signal; None to raise it in this process.
            before_the_end: is called before this process ends because the launcher has ended, or wants it to.
        """
        hear = hear or (lambda number: os.kill(os.getpid(), number))

        def listen():
            with open(os.dup(0), "rb") as said:  # `sys.stdin` would be locked while Python exits
                for line in said:
                    hear(int(line))
            before_the_end()
            os._exit(1)

        if self.count > 1:
            threading.Thread(target=listen, daemon=True).start()

    def pass_on(self, number: int) -> None:
        """Sends a signal that came to this process to the launcher, which counts it once, whoever else got it."""
        if os.getppid() == self.launcher:
            os.kill(self.launcher, number)

    @contextlib.contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Ends the process right after the block, if it is one of several: TensorFlow would wait for the others."""
        try:
            yield
            status = 0
        except SystemExit as end:
            if self.count == 1:
                raise
            status = end.code
        if self.count > 1:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no standard output
                sys.stdout.flush()
            os._exit(status)


def this_worker() -> Worker:
    """What the launcher made of this process."""
    if VARIABLE not in os.environ:
        return Worker()
    *numbers, folder = os.environ[VARIABLE].split(" ", 3)
    return Worker(*map(int, numbers), folder)
