"""Output of the programs, their options, and errors in one sentence.

No failure to print ends work: a closed terminal, a pipe without a reader, a full disk or a missing stream loses
the text and nothing else. Characters that a stream's encoding lacks are replaced.
"""

import argparse
import codecs
import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from support import device
from support.checks import MOST, check_number

STAND_INS = {"…": "...", "×": "x", "━": "=", "┄": "-", "±": "+-", "β": "beta", "ε": "eps", "\u0303": "~", "\u0302": "^"}


def say(*words: object) -> None:
    """Prints a line and flushes it, so that files and pipes have it at once too."""
    _write("stdout", " ".join(map(str, words)) + "\n")


def warn(message: str) -> None:
    """Prints a line on stderr and flushes it."""
    _write("stderr", f"{message}\n")


def _write(name, text):
    stream = SafeStream(getattr(sys, name))
    stream.write(text)
    stream.flush()


def open_streams() -> None:
    """Makes every print of this program safe, including prints by libraries and by Python as it exits.

    Missing descriptors are opened: otherwise the next file would get one of them, and TensorFlow would write its
    messages into that file.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    for name in "stdout", "stderr":
        if not isinstance(getattr(sys, name), SafeStream):
            setattr(sys, name, SafeStream(getattr(sys, name)))


class SafeStream:
    """Wraps a standard stream, which may be None, closed or full, so that writing to it never fails."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        with contextlib.suppress(Exception):
            return self._stream.isatty()
        return False

    def write(self, text: str) -> int:
        with self._harmless():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "console.stand_ins").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._harmless():
            self._stream.flush()

    @contextlib.contextmanager
    def _harmless(self):
        """Drops what could not be written: it must not block later text, as the disk may have room again."""
        try:
            yield
        except Exception:  # of any kind, as notebooks bring streams of their own
            with contextlib.suppress(Exception):
                target, nowhere = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
                before = os.dup(target)
                try:
                    os.dup2(nowhere, target)
                    self._stream.flush()
                finally:
                    os.dup2(before, target)
                    os.close(before)
                    os.close(nowhere)


def can_redraw() -> bool:
    """Whether a line on stdout can be written over, as progress bars do: on a terminal, and in a notebook."""
    return SafeStream(sys.stdout).isatty() or "ipykernel" in sys.modules


def _stand_ins(error):
    """An error handler of encoders: replaces characters that an encoding lacks by ASCII."""
    missing = error.object[error.start : error.end]
    text = "".join(STAND_INS.get(character, character) for character in missing)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("console.stand_ins", _stand_ins)


EXPECTED = ValueError, OSError, MemoryError, FloatingPointError  # wrong usage, failed work; others are our bugs


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with one sentence on stderr instead of a traceback.

    ValueError and FileNotFoundError stand for wrong usage (exit status 2), other OSErrors, MemoryError and
    FloatingPointError (a result that is not finite) for failed work (1), KeyboardInterrupt for Ctrl-C (130). Everything
    else is a bug of ours, and keeps its traceback.
    """
    try:
        yield
    except EXPECTED as error:
        sys.exit(report(program, error))
    except KeyboardInterrupt:
        leave(f"{program}: interrupted", 130)


def report(program: str, error: Exception) -> int:
    """Prints an error in one sentence on stderr. Returns the exit status that goes with it."""
    warn(f"{program}: {_sentence(error)}")
    return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1


def leave(message: str, status: int) -> NoReturn:
    """Prints a line on stderr and ends the program with an exit status."""
    warn(message)
    sys.exit(status)


def _sentence(error):
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    text, kind = " ".join(str(error).splitlines()), type(error).__name__
    return text or kind if isinstance(error, EXPECTED) else f"{kind}: {text}"


class Bar:
    """Keras' progress bar for `count` units, with the remaining time, on a terminal; elsewhere only lines."""

    def __init__(self, count: int, unit_name: str):
        device.start_tensorflow()
        from keras.utils import Progbar

        self.terminal = SafeStream(sys.stdout).isatty()
        self.bar = Progbar(count, interval=0.2, unit_name=unit_name, verbose=int(self.terminal))

    def update(self, done: int, **values: float) -> None:
        """Shows how many units are done, and the running means of values."""
        values = [(name, float(value)) for name, value in values.items()]
        with contextlib.suppress(Exception):  # Keras prints by itself
            self.bar.update(done, values)

    def say(self, *words: object) -> None:
        """Prints a line in place of the bar."""
        self._clear()
        say(*words)

    def warn(self, message: str) -> None:
        """Prints a line on stderr in place of the bar."""
        self._clear()
        warn(message)

    def _clear(self):
        if self.terminal:
            _write("stdout", "\r\033[K")


class Countdown:
    """The slides' countdown of t as one line: a bar on a terminal, elsewhere a line every tenth of the steps.

    Args:
        times: all t in their order.
        title: text before the countdown.
    """

    def __init__(self, times: Sequence[int], title: str = ""):
        self.place = {int(t): k for k, t in enumerate(times)}
        self.last, self.title = len(times) - 1, title
        self.start, self.shown, self.tenths = time.monotonic(), 0.0, -1

    def show(self, t: int) -> None:
        """Shows that x_t has been computed."""
        now, width, k = time.monotonic(), 30, self.place[t]
        if can_redraw():
            if k < self.last and now - self.shown < 0.1:
                return
            self.shown = now
            full = width * k // self.last
            left = duration((now - self.start) * (self.last - k) / k) if k else ""
            line = f"\r{self.title}t = {t:<5}{'━' * full}{'┄' * (width - full)} {left:<12}"
            _write("stdout", line if k < self.last else line + "\n")
        elif 10 * k // self.last > self.tenths:
            self.tenths = 10 * k // self.last
            say(f"{self.title}t = {t}")


def duration(seconds: float) -> str:
    """A time as text: 45 s, 3 min 20 s, 5 h 10 min, 3 days 4 h."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 10:
        return f"{minutes:.0f} min" if seconds % 60 < 1 else f"{int(minutes)} min {int(seconds % 60)} s"
    if minutes < 60:
        return f"{minutes:.0f} min"
    if hours < 24:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(days)} days {int(hours % 24)} h"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, and whose help names the defaults."""

    def __init__(self, description: str | None = None, **kwargs: Any):
        """The description shown is the first line; it may be a docstring, which is None under `python -OO`."""
        super().__init__(description=(description or "").split("\n")[0], allow_abbrev=False, **kwargs)
        self.words = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, *arguments: Any, **named: Any) -> argparse.Namespace:
        open_streams()  # every program begins with its options
        options = super().parse_args(*arguments, **named)
        for name, value in vars(options).items():
            if value == "":  # an unset variable of the shell
                self.error(f"--{name.replace('_', '-')} is empty")
        return options

    def error(self, message: str) -> NoReturn:
        for option, word in self._lost_values():
            message += f"; write {option}={word} if {word} is meant as its value"
        leave(f"{self.prog}: {message}; see {self.prog} --help", 2)

    def _lost_values(self):
        """Pairs of an option and a word that argparse does not take for its value: with a dash, or after one with =."""
        takes = {flag: action.nargs for action in self._actions for flag in action.option_strings}
        option = equals = ""
        for before, word in itertools.pairwise(["", *self.words]):
            dash = re.match(r"-[^-\d.\s]\S*$", word)  # no number, and no option, as ours have two
            several = takes.get(option) == "+"
            if word.startswith("--"):
                option, equals, _ = word.partition("=")
            elif dash and (several or before == option and takes.get(option, 0) != 0) or equals and several:
                yield option, word


def integer(low: int, high: int = MOST) -> Callable[[str], int]:
    """An argparse type: an integer from `low` to `high`."""
    return _number(int, low, high)


def number(low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a finite number from `low` to `high`."""
    return _number(float, low, high)


def integers(low: int) -> Callable[[str], str]:
    """An argparse type: comma-separated integers from `low`; the text is returned unchanged."""
    one = integer(low)

    def parse(text):
        for word in text.split(","):
            one(word)
        return text

    return parse


def image_size(text: str) -> int | str:
    """An argparse type: `32` for squares, as an integer, or height and width, `48x64`, as text."""
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must be pixels, or HEIGHTxWIDTH in pixels such as 48x64, got {text!r}")
    return int(sides[0]) if len(set(sides)) == 1 else "x".join(sides)


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated selection of names, as a list."""

    def parse(text):
        chosen = text.split(",")
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"must be one or more of {','.join(names)}, got {name!r}")
        return chosen

    return parse


def _number(kind, low, high):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = text
        try:
            check_number("", value, low, high, integer=kind is int)
        except ValueError as error:
            wanted = str(error).partition(", got ")[0]
            raise argparse.ArgumentTypeError(f"{wanted.strip()}, got {text!r}") from None
        return value

    return parse
