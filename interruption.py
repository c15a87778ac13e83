"""Signals that ask a run to stop, noted until the end of the training step."""

import signal


class Interruption:
    """Notes SIGINT, SIGTERM and SIGHUP from now on; a second Ctrl-C ends the program at once.

    `stop` is the number of the signal that asked the run to stop, or None.
    """

    def __init__(self):
        self.stop = None
        for name in "SIGINT", "SIGTERM", "SIGHUP":
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._note)

    def _note(self, number, frame):
        self.stop = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
