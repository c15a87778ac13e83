"""When and how a run is saved: the model, and beside it the table of epochs and copies of older models."""

import contextlib
import glob
import os
import re
import shutil
import time
from collections.abc import Callable

import keras

from diffusion import model_file
from support import files
from training import checkpoint
from training.history import History

COPY = re.compile(r"-epoch(\d{4,})\.keras$")  # how the name of a copy ends


class Checkpoints:
    """Saves a model in training. Model, table and copies are separate attempts; only the model decides what is saved.

    Args:
        model: compiled by `checkpoint.compile_for_run`.
        path: of its file.
        table: its `History`.
        save_every: minutes between saves.
        keep: how many copies to keep, each of the first save after the end of an epoch.
        warn: a function that shows a sentence.
    """

    def __init__(
        self,
        model: keras.Model,
        path: str,
        table: History,
        save_every: float,
        keep: int,
        warn: Callable[[str], None],
    ):
        self.model, self.path, self.table, self.keep, self.warn = model, path, table, keep, warn
        self.progress = model_file.metadata(model)["progress"]
        self.saved, self.kept_epoch = self.place(), self.progress["epoch"]
        self.save_every, self.saved_at, self.seconds = 60 * save_every, time.monotonic(), 0.0
        self.failing = set()  # files that could not be written the last time

    def place(self) -> tuple[int, int]:
        """Steps and epochs done."""
        return self.progress["step"], self.progress["epoch"]

    def due(self) -> bool:
        """Whether it is time for the next save."""
        return time.monotonic() - self.saved_at > self.save_every

    def nothing_to_lose(self) -> bool:
        """Whether the file holds every step of the run."""
        return self.place()[0] == self.saved[0]

    def save(self) -> bool:
        """Saves the model if it was trained since the last save. Returns whether the file is up to date now."""
        start = time.monotonic()
        if self.place() != self.saved:
            # First, so that a kill between the two leaves a row too many, which is dropped, and not one too few.
            self.attempt(self.table.path, self.table.write)
            if self.attempt(self.path, lambda: checkpoint.save(self.model, self.path)):
                self.saved = self.place()
                self.keep_this_epoch()
        self.saved_at = time.monotonic()
        self.seconds += self.saved_at - start
        return self.place() == self.saved

    def attempt(self, path: str, write: Callable[[], None], again: bool = True) -> bool:
        """Calls `write`, which writes the file. Returns whether it could; the first failure in a row is reported.

        Args:
            path: of the file.
            write: raises OSError if it cannot write it.
            again: whether later calls will try again.
        """
        try:
            write()
        except OSError as error:
            if path not in self.failing:
                why = f"diffusion_model.py: {path} cannot be saved ({error.strerror or error})"
                self.warn(f"{why}; the old file stays, training goes on {'and tries again' if again else 'without it'}")
            self.failing.add(path)
            return False
        self.failing.discard(path)
        return True

    def keep_this_epoch(self) -> None:
        """Copies the first save after the end of an epoch, and removes the oldest copies."""
        epoch = self.progress["epoch"]
        if not self.keep or epoch == self.kept_epoch:
            return
        stem, copy = _stem(self.path), copy_name(self.path, epoch)
        if self.attempt(copy, lambda: _copy(os.path.realpath(self.path), copy)):
            self.kept_epoch = epoch
            # Copies of later epochs are from before the user went back to an earlier one, and stay.
            for old in sorted(number for number in _copies(stem) if number <= epoch)[: -self.keep]:
                with contextlib.suppress(OSError):
                    os.remove(_copies(stem)[old])


def copy_name(path: str, epoch: int) -> str:
    """The copy of a model after so many epochs, `model-epoch0010.keras` beside the file itself."""
    return f"{_stem(path)}-epoch{epoch:04d}.keras"


def copied_epoch(path: str) -> int | None:
    """The epoch of which a file is the copy of some model, by its name, or None."""
    found = COPY.search(os.path.realpath(path))
    return found and int(found[1])


def _stem(path):
    return os.path.splitext(os.path.realpath(path))[0]


def _copy(source, target):
    """Links a file to a second name, or copies it where the file system has no links."""
    with files.replacing(target) as draft:
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)


def _copies(stem):
    """The copies of a model by epoch, {10: 'model-epoch0010.keras', …}; files with other names are the user's."""
    names = glob.glob(f"{glob.escape(stem)}-epoch*.keras")
    found = {name: COPY.fullmatch(name.removeprefix(stem)) for name in names}
    return {int(match[1]): name for name, match in found.items() if match}
