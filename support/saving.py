"""When and how a run is saved: the model, and beside it the table of epochs and copies of older models."""

import contextlib
import glob
import os
import re
import shutil
import time

from support import checkpoint, files


class Checkpoints:
    """Saves a model in training. Model, table and copies are separate attempts; only the model decides what is saved.

    Args:
        model: what `checkpoint.compile_for_run` has made ready.
        path: of its file.
        table: its `History`.
        save_every: minutes between saves.
        keep: how many copies to keep, each of the first save after the end of an epoch.
        warn: a function that shows a sentence.
    """

    def __init__(self, model, path, table, save_every, keep, warn):
        self.model, self.path, self.table, self.keep, self.warn = model, path, table, keep, warn
        self.progress = checkpoint.metadata(model)["progress"]
        self.saved, self.kept_epoch = self.place(), self.progress["epoch"]
        self.save_every, self.saved_at, self.seconds = 60 * save_every, time.monotonic(), 0.0
        self.failing = set()  # files that could not be written the last time

    def place(self):
        """Where the run is: steps and epochs done."""
        return self.progress["step"], self.progress["epoch"]

    def due(self):
        return time.monotonic() - self.saved_at > self.save_every

    def nothing_to_lose(self):
        """Whether the file holds every step."""
        return self.place()[0] == self.saved[0]

    def save(self):
        """Saves what has been learnt since the last time. Returns whether the file now holds all of it."""
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

    def attempt(self, path, write):
        """Runs what writes the file `path`. Returns whether it could; the first failure in a row is said."""
        try:
            write()
        except OSError as error:
            if path not in self.failing:
                why = f"diffusion_model.py: {path} cannot be saved ({error.strerror or error})"
                self.warn(f"{why}; the old file stays, training goes on and tries again")
            self.failing.add(path)
            return False
        self.failing.discard(path)
        return True

    def keep_this_epoch(self):
        """Copies the first save after the end of an epoch, and removes the oldest copies."""
        epoch = self.progress["epoch"]
        if not self.keep or epoch == self.kept_epoch:
            return
        stem = os.path.splitext(os.path.realpath(self.path))[0]
        copy = f"{stem}-epoch{epoch:04d}.keras"
        if self.attempt(copy, lambda: _copy(os.path.realpath(self.path), copy)):
            self.kept_epoch = epoch
            # Copies of later epochs are from before somebody went back to an earlier one: they are not ours to remove.
            for old in sorted(number for number in _copies(stem) if number <= epoch)[: -self.keep]:
                with contextlib.suppress(OSError):
                    os.remove(_copies(stem)[old])


def _copy(source, target):
    """A second name of a file, or where the file system has no links, a copy."""
    with files.replacing(target) as draft:
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)


def _copies(stem):
    """The copies of a model by the number of their epoch, and no other files: {10: 'model-epoch0010.keras', …}."""
    names = glob.glob(f"{glob.escape(stem)}-epoch*.keras")
    found = {name: re.fullmatch(r"-epoch(\d{4,})\.keras", name.removeprefix(stem)) for name in names}
    return {int(match[1]): name for name, match in found.items() if match}
