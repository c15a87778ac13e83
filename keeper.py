"""What happens around the training loop: time shown, the model saved, pictures made, signals heeded."""

import glob
import math
import os
import shutil
import statistics
import sys
import time

import tensorflow as tf

import console
import files
import model_file
from ddpm import ddpm_schedule, reverse_process, to_pixels
from epoch_log import EpochLog
from parts import sampling_step
from validation import memorising

N_SAMPLES = 16  # pictures in a grid


class Keeper:
    """Keeps a run of training: nothing that it has learnt is lost, and its user knows where it is.

    Args:
        model: what `model_file.compile_for_run` has made ready, its logbook filled in.
        path: of its file.
        save_every: minutes between saves.
        keep: how many older saves to keep, each the first after the end of an epoch.
        interruption: an `Interruption`.
        validation: a `Validation`, or None.
        board: a `Board`, or None.
    """

    def __init__(self, model, path, save_every, keep, interruption, validation=None, board=None):
        self.model, self.path, self.keep = model, path, keep
        self.validation, self.board, self.warned = validation, board, False
        book = model_file.logbook(model)
        self.settings, self.progress, self.count = book["settings"], book["progress"], book["data"]["count"]
        self.log = EpochLog(os.path.splitext(path)[0] + ".csv", self.progress["epoch"])
        self.reverse_step = sampling_step(model, ddpm_schedule(**book["diffusion"]), N_SAMPLES)

        this_epoch = math.ceil((self.count - self.progress["images"]) / self.progress["batch_size"])
        later_epochs = self.settings["n_epochs"] - self.progress["epoch"] - 1
        self.steps = this_epoch + later_epochs * math.ceil(self.count / self.settings["batch_size"])
        self.done, self.first_steps = 0, []  # steps of this run, and how long the first ones took
        self.bar = console.Bar(self.steps, "step")

        self.save_every, self.seconds_saving, self.failing = 60 * save_every, 0.0, False
        self.saved, self.kept_epoch = self.place(), self.progress["epoch"]
        self.started = self.saved_at = self.stepped_at = time.monotonic()
        self.interruption = interruption
        interruption.nothing_to_lose = lambda: self.place()[0] == self.saved[0]
        interruption.at_the_end[0] = self.farewell

    def place(self):
        """Where the run is: steps and epochs done."""
        return self.progress["step"], self.progress["epoch"]

    def before_epoch(self):
        """The grid of the epochs so far, if one is due, and no interrupted run has made it before."""
        epoch, every = self.progress["epoch"], self.settings["sample_every"]
        name = grid_name(self.path, f"-epoch{epoch:04d}")
        due = every and epoch and epoch % every == 0 and self.progress["images"] == 0
        if due and (self.done or not os.path.exists(name)):
            self.make_grid(name)

    def after_step(self, loss):
        """Counts a step, and heeds what came while it ran.

        Raises:
            FloatingPointError: if its loss is not finite, or a weight when it comes to saving.
        """
        now, progress = time.monotonic(), self.progress
        seconds, self.stepped_at = now - self.stepped_at, now
        progress["seconds"] += seconds
        self.done += 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        self.bar.update(self.done, loss=progress["loss"] / math.ceil(progress["images"] / progress["batch_size"]))
        if self.done <= 20:
            self.first_steps.append(seconds)
        if self.done == 20:
            seconds = statistics.median(self.first_steps)  # not the mean: some were compiled first
            left = console.duration(seconds * (self.steps - self.done))
            self.bar.say(f"about {left} to go, {1000 * seconds:.0f} ms a step")
        if self.interruption.stop:
            self.save_and_end()
        if self.interruption.save_asked or now - self.saved_at > self.save_every:
            self.save()

    def after_epoch(self):
        """The line of the slides, and a row of the table."""
        progress, batches = self.progress, math.ceil(self.count / self.progress["batch_size"])
        self.bar.say(f"Epoch :{progress['epoch']} loss :{progress['loss']}")
        seconds, mean = progress["seconds"], progress["loss"] / batches
        speed = self.count / max(seconds, 1e-9)
        rate = float(self.model.optimizer.learning_rate)
        row = progress["epoch"], progress["step"], progress["loss"], mean, f"{seconds:.3f}", f"{speed:.1f}", rate
        held_out = self.validate()
        self.log.rows.append((*row, *(held_out or [""] * 5)))
        self.warn_of_memorising()
        if self.board:
            values = {"loss": mean, "images a second": speed, "learning rate": rate}
            if held_out:
                values |= dict(zip(("held-out/all", *(f"held-out/q{q}" for q in range(1, 5))), held_out, strict=True))
            self.board.epoch(progress["epoch"], values)
        progress.update(epoch=progress["epoch"] + 1, images=0, loss=0.0, seconds=0.0)
        if time.monotonic() - self.log.written_at > 2:  # the rows of short epochs are gathered
            self.attempt(self.log.write)

    def validate(self):
        """The loss on held-out pictures and that of the quarters of t, said and returned, if it is their turn."""
        if not self.validation or (self.progress["epoch"] + 1) % self.settings["validate_every"]:
            return None
        mean, quarters = self.validation.measure()
        self.stepped_at = time.monotonic()  # it is not part of the next step
        self.bar.say(f"held-out loss {mean:.4f}; by quarters of t: " + " ".join(f"{q:.4f}" for q in quarters))
        return mean, *quarters

    def warn_of_memorising(self):
        """Says once when the network begins to learn its pictures by heart."""
        sentence = None if self.warned or not self.validation else memorising(self.log.held_out())
        if sentence:
            self.bar.say(sentence)
            self.warned = True

    def at_the_end(self):
        self.save(last=True)
        self.make_grid(grid_name(self.path))
        share = self.seconds_saving / (time.monotonic() - self.started)
        console.say(f"saving took {self.seconds_saving:.1f} s, {100 * share:.1f} % of the run")
        console.say(f"{self.path} has all its {self.progress['epoch']} epochs; their pictures: {grid_name(self.path)}")
        console.say(f"more: python reverse_diffusion.py --model {self.path} --n-sample 64 --out more.png")

    def save(self, last=False):
        """Saves what has been learnt since the last time. If it fails there is a next time, unless this is the last."""
        start = time.monotonic()
        with self.interruption.busy:
            if self.place() != self.saved:
                if self.attempt(self.log.write, self.write_model, self.keep_this_epoch):
                    self.saved, self.failing = self.place(), False
                elif last:
                    console.leave(f"diffusion_model.py: what was learnt after step {self.saved[0]:,} is not saved", 1)
        self.interruption.save_asked = False
        self.saved_at = time.monotonic()
        self.seconds_saving += self.saved_at - start

    def write_model(self):
        model_file.save(self.model, self.path)

    def keep_this_epoch(self):
        """Of the first save after the end of an epoch, a second name; the oldest such files go."""
        epoch = self.progress["epoch"]
        if self.keep and epoch > self.kept_epoch:
            stem = os.path.splitext(os.path.realpath(self.path))[0]
            with files.replacing(f"{stem}-epoch{epoch:04d}.keras") as draft:
                try:
                    os.link(os.path.realpath(self.path), draft)
                except OSError:  # a file system without links
                    shutil.copyfile(self.path, draft)
            self.kept_epoch = epoch
            for old in sorted(glob.glob(f"{glob.escape(stem)}-epoch[0-9]*.keras"))[: -self.keep]:
                os.remove(old)

    def attempt(self, *actions):
        """Does what writes files. True if it could be done; else the reason is said, once, and training goes on."""
        try:
            for action in actions:
                action()
        except OSError as error:
            if not self.failing:
                self.bar.say("")
                why = f"diffusion_model.py: {self.path} cannot be saved ({error.strerror or error}); the old file stays"
                print(f"{why}, training goes on and tries again", file=sys.stderr, flush=True)
            self.failing = True
            return False
        return True

    def make_grid(self, name):
        """Pictures from the averaged weights, always from the same noise."""
        if not self.reverse_step.experimental_get_tracing_count():
            self.save()  # compiling cannot be interrupted, only ended, and that must lose nothing
        shape, index = self.model.input_shape[0][1:], tf.range(N_SAMPLES)
        model_file.exchange_averages(self.model)
        for _, x_t in reverse_process(self.reverse_step, self.settings["T"], shape, self.settings["seed"], index):
            if self.interruption.stop:
                break
        model_file.exchange_averages(self.model)
        if self.interruption.stop:
            self.save_and_end()
        if self.attempt(lambda: files.save_grid(to_pixels(x_t), name)) and self.board:
            self.board.grid(self.progress["epoch"], name)
        self.stepped_at = time.monotonic()

    def save_and_end(self):
        self.save(last=True)
        self.interruption.end()

    def farewell(self):
        self.bar.say(f"stopped after {self.saved[0]:,} steps; the same command goes on from {self.path}")


def grid_name(path, suffix=""):
    """`samples.png` beside the model."""
    return os.path.join(os.path.dirname(path), f"samples{suffix}.png")
