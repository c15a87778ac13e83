"""This process among several that run one command together, one for each device, on one machine or on several.

The first prints, and writes all files; the job ends when it does. The others hold a line to it (`support/line.py`),
through which all values, signals and ends go. Which one this process is says `support/places.py`. Where our launcher
has started them, it speaks through standard input, a signal for the first worker or the end of all, and says how a
process ended. Elsewhere the first worker does: it hears an end, finds a line closed, or one without signs of life.
"""

import contextlib
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from support import console
from support.line import SILENCE, STARTING, Line
from support.places import SECRET, Place, choose_hosts, find_place
from support.silence import Silence

GRACE = 3  # seconds in which the first worker can say itself what is wrong, when another one has ended
ONE_SIGNAL = 1  # seconds within which a signal that arrives in several ways is one
LATE = 15  # seconds after which is said for whom a worker waits
LOST = 137  # exit status when a worker was lost, as if it was killed


class Worker:
    """One of `count` workers, numbered from 0, or a process alone. It has to be opened before it exchanges anything."""

    def __init__(self, place: Place | None = None):
        self.place = place or Place()
        self.index, self.count, self.first = self.place.index, self.place.count, self.place.index == 0
        self._hear, self._before_the_end, self._comfort = self._raise_here, lambda: None, ""
        self._others = range(1, self.count) if self.first else range(1)  # that this one has a line to
        self._lines, self._names, self._complete, self._trouble = {}, {}, threading.Event(), ""
        self._values = {k: queue.SimpleQueue() for k in self._others}
        self._heard, self._hearing = {}, threading.Lock()
        self._losing, self._leaving = threading.Lock(), threading.Lock()
        self._program, self._stderr, self._silence = "", 2, None

    def share(self, n: int) -> range:
        """Which of n things are this worker's; shares differ by one at most."""
        return range(n * self.index // self.count, n * (self.index + 1) // self.count)

    def gather(self, value: Any) -> list | None:
        """The values of all workers in their order, for the first one, which waits for them; None for the others."""
        self.meet()
        if not self.first:
            return self._lines[0].send(("value", value))
        return [value, *(self._values[k].get() for k in self._others)]

    def from_first(self, value: Any) -> Any:
        """The first worker's value, for all."""
        self.meet()
        if not self.first:
            return self._values[0].get()
        for line in self._lines.values():
            line.send(("value", value))
        return value

    def name(self, index: int | None) -> str:
        """What a worker is called in sentences."""
        if index is None:
            return "a worker that had just come"
        return f"worker {index + 1} of {self.count}" + (f" ({self._names[index]})" if index in self._names else "")

    def open(self, program: str) -> None:
        """Opens the lines between the workers, in threads, and listens to the launcher.

        Args:
            program: its name, for messages.

        Raises:
            OSError: if the first worker's port is in use.
        """
        if self.count == 1:
            return
        with contextlib.suppress(OSError):  # there may be none
            self._stderr = os.dup(2)
        self._program = program
        self._names[self.index] = f"process {os.getpid()} on {self.place.node}"
        if self.place.launched:
            _in_thread(self._listen_to_launcher)
        elif not self.first:
            self._silence = Silence()
        if self.first:
            _in_thread(self._accept, self._listen())
        else:
            _in_thread(self._call)

    def obey(
        self,
        hear: Callable[[int], None],
        before_the_end: Callable[[], None] = lambda: None,
        comfort: str = "",
    ) -> None:
        """Says what this process does with what it is told.

        Args:
            hear: is called in the first worker with the number of each signal; before, signals are raised in it.
            before_the_end: is called before this process ends because another one has ended.
            comfort: what to say after the sentence on a worker that was lost.
        """
        self._hear, self._before_the_end, self._comfort = hear, before_the_end, comfort

    def meet(self, seconds: float = STARTING) -> None:
        """Waits until this worker's lines are open: those of the first one to all others.

        Raises:
            OSError: if it takes longer.
        """
        if self.count > 1 and not self._complete.wait(min(seconds, LATE)):
            self._say(f"waiting for {self._describe_missing()}{self._trouble}")
            if not self._complete.wait(max(0, seconds - LATE)):
                missing = self._describe_missing()
                raise OSError(f"{missing} did not come within {seconds / 60:g} minutes{self._trouble}")

    def hurry(self) -> None:
        """From now on no worker may be silent for longer than `SILENCE` seconds; before, it may be starting."""
        for line in self._lines.values():
            line.patience = SILENCE

    @contextlib.contextmanager
    def time_limit(self, seconds: float, sentence: str) -> Iterator[None]:
        """Ends the job with a sentence if the block takes longer, also where Python cannot interrupt it."""
        timer = threading.Timer(seconds, self._give_up, (sentence,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def addresses(self, port: int) -> list[str]:
        """`host:port` for a port of each worker, as all of them reach it."""
        self.meet()
        if not self.first:
            self.gather((*self._lines[0].addresses(), port))
            return self.from_first(None)
        *ends, ports = zip(*self.gather(("", "", port)), strict=True)
        hosts = choose_hosts(ends[0][1:], ends[1][1:])
        return self.from_first([f"{host}:{port}" for host, port in zip(hosts, ports, strict=True)])

    def pass_on(self, number: int) -> None:
        """Tells the first worker of a signal that came to this process: it counts once, whoever else got it."""
        if self.first:
            self._hear_once(number)
        elif self._lines:
            self._lines[0].send(("signal", number))
        else:  # there is nothing to lose yet
            self.leave(128 + number)

    def leave(self, status: int) -> NoReturn:
        """Ends the process at once, as TensorFlow would wait for the others, and lets them know."""
        self._leaving.acquire()  # whoever comes second waits for the end
        words = self._silence.last_words() if self._silence else ""
        for line in list(self._lines.values()):
            line.send(("end", (status, words)))
        if status and not self._lines and words:  # nobody else can say it
            self._say(words, program="")
        end_process(status)

    def _listen(self):
        host = "127.0.0.1" if self.place.launched else ""
        try:
            return socket.create_server((host, self.place.port), backlog=128)
        except OSError as error:
            raise OSError(
                f"port {self.place.port} of {self.place.node} cannot be used ({error.strerror}); end the program that "
                "uses it, or start the same command again as a new job"
            ) from None

    def _accept(self, server):
        server.settimeout(1)
        with server:
            while not self._complete.is_set():
                with contextlib.suppress(OSError):  # nobody has come for a second, say
                    _in_thread(self._open_line, server.accept()[0], False)

    def _call(self):
        while not self._lines:
            try:
                connection = socket.create_connection((self.place.host, self.place.port), timeout=5)
            except OSError as error:
                self._trouble = f": {error.strerror or error}"
            else:
                self._open_line(connection, True)
            time.sleep(0.2)

    def _open_line(self, connection, caller):
        """Makes a line of a connection whose other end knows the secret."""
        try:
            line = Line(connection, self.place.secret, caller)
        except (OSError, EOFError) as error:
            how = "did not answer in time" if isinstance(error, TimeoutError) else f"did not know {SECRET}"
            self._trouble = f"; the other end of a connection {how}"
            connection.close()
        else:
            line.send((self.index, self._names[self.index]))
            self._serve(line)

    def _serve(self, line):
        """Hears what another worker says, from its name to its end."""
        index = None
        try:
            index, name = line.receive()
            if index in self._lines or index not in self._others:
                self._trouble = f"; another process says that it is worker {index + 1}"
                return line.close()
            self._names[index], self._lines[index] = name, line
            if len(self._lines) == len(self._others):
                self._complete.set()
            kind, value = line.receive()
            while kind != "end":
                if kind == "value":
                    self._values[index].put(value)
                else:
                    self._hear_once(value)
                kind, value = line.receive()
        except TimeoutError:
            self._lose(index, f"has not answered for {line.patience:g} s; it is hung, or its node is lost", hung=True)
        except (OSError, EOFError):
            self._lose(index, "was lost: it ended without a word, or its node did")
        status, words = value
        if not self.first:
            self._end(status)
        if status:
            time.sleep(GRACE)
            self._lose(index, f"ended with exit status {status}" + (f" ({words})" if words else ""), status)

    def _lose(self, index, how, status=LOST, hung=False):
        """Ends this process because of another one, and says so, unless the launcher does, who knows more."""
        if self.place.launched and not hung:
            time.sleep(60)
        self._give_up(f"{self.name(index)} {how}", status)

    def _give_up(self, sentence, status=LOST):
        self._losing.acquire()  # the first reason is said, others follow from it
        self._say(sentence + self._comfort)
        self._end(status)

    def _end(self, status):
        self._before_the_end()
        self.leave(status)

    def _raise_here(self, number):
        os.kill(os.getpid(), number)

    def _hear_once(self, number):
        with self._hearing:
            before, self._heard[number] = self._heard.get(number, -ONE_SIGNAL), time.monotonic()
            if self._heard[number] - before < ONE_SIGNAL:
                self._heard[number] = before
                return
        self._hear(number)

    def _listen_to_launcher(self):
        with open(os.dup(0), "rb") as said:  # `sys.stdin` would be locked while Python exits
            for line in said:
                self._hear_once(int(line))
        self._end(1)

    def _describe_missing(self):
        missing = [str(k + 1) for k in self._others if k not in self._lines]
        said = f"worker{'s' * (len(missing) > 1)} {', '.join(missing)} of {self.count}"
        if not self.first:
            return f"{said} (at {self.place.host}:{self.place.port})"
        seen = [name.rpartition(" on ")[2] for name in list(self._names.values())]
        silent = [node for node in self.place.nodes if node not in seen]
        return said + (f" (none has come from {', '.join(silent)})" if silent else "")

    def _say(self, sentence, program=None):
        """Prints on the stderr that this process has started with, in one process of each node."""
        prefix = self._program + ": " if program is None else program
        if self.index <= 1 or self.place.local == 0:
            with contextlib.suppress(OSError):
                os.write(self._stderr, f"{prefix}{sentence}\n".encode())


def end_process(status: int) -> NoReturn:
    """Ends this process at once."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no standard output
        sys.stdout.flush()
    os._exit(status)


def _in_thread(function, *arguments):
    threading.Thread(target=function, args=arguments, daemon=True).start()


@contextlib.contextmanager
def at_work(program: str) -> Iterator[Worker]:
    """This process as a worker, open inside the block, whose errors become one sentence.

    If it is one of several it ends after the block: the first one at once, and others with it, unless they have failed.
    """
    with console.one_line_errors(program):
        worker = Worker(find_place())
    try:
        with console.one_line_errors(program):
            worker.open(program)
            yield worker
        status = 0
    except SystemExit as end:
        if worker.count == 1:
            raise
        status = end.code or 0
        if isinstance(status, str):  # as Python itself does
            console.warn(status)
            status = 1
    except Exception:
        if worker.count == 1:
            raise
        traceback.print_exc()
        status = 1
    if worker.count > 1:
        if status == 0 and not worker.first:  # else a scheduler would end the first one, which still works
            threading.Event().wait()
        worker.leave(status)
