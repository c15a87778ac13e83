"""Signals that ask a run to stop or to save, heard at once and heeded when nothing can be lost by it.

Python runs a signal's handler only between two of its own instructions, and one TensorFlow call
(a compilation) can take many seconds. So a thread listens too: while there is nothing that a stop
would lose, it ends the program right there; otherwise the training loop does, after its step.
"""

import contextlib
import os
import signal
import socket
import sys
import threading

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Interruption:
    """Listens from now on to SIGINT, SIGTERM, SIGHUP (unless ignored, as under nohup) and SIGUSR1.

    Attributes:
        stop: the number of the signal that asked for an end, or None. The exit status is 128 more.
        save_asked: whether SIGUSR1 asked for a save.
        busy: a lock, to be held while something is done that must not be cut short.
        nothing_to_lose: a function that says whether ending right now would lose anything.
        at_the_end: functions that are called last.
    """

    def __init__(self):
        self.stop = None
        self.save_asked = False
        self.busy = threading.Lock()
        self.nothing_to_lose = lambda: True
        self.at_the_end = [lambda: print("interrupted; there was nothing to save")]
        self._ended = threading.Lock()

        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        self._sockets = ear, mouth
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)  # the thread hears of it through the socket
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        while True:
            for number in self._sockets[0].recv(16):
                if number == getattr(signal, "SIGUSR1", None):
                    self.save_asked = True
                elif number in SIGNALS:
                    again, self.stop = self.stop is not None, number
                    if again and number == signal.SIGINT:
                        os._exit(128 + number)
                    threading.Thread(target=self._end_if_possible, daemon=True).start()

    def _end_if_possible(self):
        with self.busy:
            if self.nothing_to_lose():
                self.end()

    def end(self):
        """Ends the program with the status of the signal, once `at_the_end` is done."""
        self._ended.acquire()  # whoever comes second waits for the end
        for function in self.at_the_end:
            with contextlib.suppress(OSError):  # after a hang-up there is no terminal to print on
                function()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(128 + self.stop)
