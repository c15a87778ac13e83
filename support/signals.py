"""Signals that ask a run to stop or save: received at once, acted on when nothing would be lost.

Python runs a signal's handler only between two of its own instructions, and one TensorFlow call (a compilation) can
take many seconds. So a thread listens too: while a stop would lose nothing, it ends the program right there; otherwise
the training loop does, after its step.
"""

import signal
import socket
import sys
import threading

from support.console import say
from support.worker import Worker, end_process

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Interruption:
    """Listens to SIGINT, SIGTERM, SIGHUP (unless ignored, as under nohup) and SIGUSR1 inside its `with` block.

    In an interactive session (IPython's `%run`) only the main thread ends the run, and the session continues.

    Attributes:
        hear: a function that a signal's number is given to; in one of several workers it is passed on.
        stop: the number of the signal that asked for an end, or None. The exit status is 128 more.
        save_asked: whether SIGUSR1 asked for a save.
        busy: a lock to hold during work that must not be interrupted.
        nothing_to_lose: a function that says whether ending right now would lose anything.
        leave: a function that ends the process at once with an exit status.
        farewell: a function that prints how the run ended.
        clean_up: a function that is called last if the program ends without leaving its `with` blocks.
    """

    def __init__(self):
        self.hear = self.react
        self.stop = None
        self.save_asked = False
        self.busy = threading.Lock()
        self.nothing_to_lose = lambda: True
        self.leave = end_process
        self.farewell = lambda: say("interrupted; there was nothing to save")
        self.clean_up = lambda: None
        self._ending = threading.Lock()

    def __enter__(self):
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._handlers_before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
        self.take_signals()
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *error):
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup_before)
        self._mouth.close()  # the thread reads to the end

    def take_signals(self) -> None:
        """Sets the handlers; again after TensorFlow has taken SIGTERM for itself, as it does in several workers."""
        for number in self._handlers_before:  # they do nothing: the thread hears of a signal through the socket
            signal.signal(number, lambda number, frame: None)

    def _listen(self):
        with self._ear:
            while numbers := self._ear.recv(16):
                for number in filter(SIGNALS.__contains__, numbers):
                    self.hear(number)

    def follow(self, worker: Worker, comfort: str = "") -> None:
        """In one of several workers: signals are passed on to the first one, see `Worker.obey`."""

        def before_the_end():
            with self.busy:
                self.clean_up()

        if worker.count > 1:
            self.hear, self.leave = worker.pass_on, worker.leave
            worker.obey(self.react, before_the_end, comfort)

    def react(self, number: int) -> None:
        """Notes a signal, and ends the program if nothing would be lost, or at the second Ctrl-C."""
        if number == getattr(signal, "SIGUSR1", None):
            self.save_asked = True
            return
        again, self.stop = self.stop is not None, number
        if not hasattr(sys, "ps1"):
            if again and number == signal.SIGINT:
                self.leave(128 + number)
            threading.Thread(target=self._end_if_possible, daemon=True).start()

    def _end_if_possible(self):
        with self.busy:
            if self.nothing_to_lose():
                self.end()

    def end(self) -> None:
        """Ends the program with the signal's exit status: SystemExit in the main thread, at once in others."""
        self._ending.acquire()  # whoever comes second waits for the end
        self.farewell()
        if threading.current_thread() is threading.main_thread():
            sys.exit(128 + self.stop)
        self.clean_up()
        self.leave(128 + self.stop)
