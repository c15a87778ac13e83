"""What surrounds the training loop: progress, checkpoints, sample grids, held-out loss, signals."""

import math
import os
import shlex
import statistics
import threading
import time

import numpy as np

from ddpm import to_pixels
from diffusion.model_file import TrainedModel, open_model
from diffusion.reverse import ReverseSteps
from diffusion.sampling import make_plan, sample
from support import console, files, grids
from support.signals import Interruption
from training import advice, checkpoint
from training.history import History
from training.learned_schedule import follow_schedule, with_live_schedule
from training.run_settings import complete
from training.saving import Checkpoints
from training.settings import SETTINGS
from training.tensorboard import Board
from training.validation import Validation, overfitting_warning

N_SAMPLES = 16  # images in a grid


class TrainingRun:
    """Progress output, checkpoints, sample grids and signal handling around the training loop, which calls it.

    Args:
        trained: the model, compiled by `checkpoint.compile_for_run`, with complete metadata.
        path: of its file.
        save_every: minutes between saves.
        keep: how many copies to keep, each of the first save after the end of an epoch.
        interruption: an `Interruption`.
        validation: a `Validation`, or None.
        board: a `Board`, or None.
    """

    def __init__(
        self,
        trained: TrainedModel,
        path: str,
        save_every: float,
        keep: int,
        interruption: Interruption,
        validation: Validation | None = None,
        board: Board | None = None,
    ):
        self.trained, self.model = trained, trained.network
        self.path, self.validation, self.board = path, validation, board
        metadata = trained.metadata
        self.settings, self.progress, self.count = metadata["settings"], metadata["progress"], metadata["data"]["count"]
        self.table = History(files.table_name(path), self.progress["epoch"])
        self.bar = StepBar(steps_to_go(self.settings, self.progress, self.count))
        self.checkpoints = Checkpoints(self.model, path, self.table, save_every, keep, self.bar.warn)
        self.shown = trained.shown()
        self.grids = None if trained.is_classifier else Grids(trained, interruption)  # a classifier samples nothing
        self.started, self.warned = time.monotonic(), False
        self.interruption = interruption
        interruption.nothing_to_lose = self.checkpoints.nothing_to_lose
        interruption.farewell = self.say_where_it_stopped

    def before_epoch(self) -> None:
        """Samples the grid of the last epoch if one is due and no interrupted run has already written it."""
        epoch, every = self.progress["epoch"], self.settings["sample_every"]
        name = files.grid_name(self.path, f"epoch{epoch:04d}")
        due = self.grids and every and epoch and epoch % every == 0 and self.progress["images"] == 0
        if due and (self.bar.done or not os.path.exists(name)):
            self.make_grid(name)

    def after_step(self, loss: float) -> None:
        """Counts a step, and acts on signals and on the clock.

        Raises:
            FloatingPointError: if its loss is not finite, or a weight is not when the model is saved.
        """
        progress = self.progress
        seconds = self.bar.lap()
        progress["seconds"] += seconds
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        self.bar.show(seconds, progress["loss"] / progress["epoch_steps"])
        if self.grids and progress["step"] == self.settings["weaker_after"]:
            self.save_weaker()
        if self.interruption.stop:
            self.save_and_end()
        if self.interruption.save_asked or self.checkpoints.due():
            self.save()

    def after_epoch(self) -> None:
        """Prints the line of the slides, measures held-out loss if due, and adds a row to the table."""
        progress = self.progress
        self.bar.say(f"Epoch :{progress['epoch']} loss :{progress['loss']}")
        seconds, mean = progress["seconds"], progress["loss"] / progress["epoch_steps"]
        speed, rate = self.count / max(seconds, 1e-9), float(self.model.optimizer.learning_rate)
        row = progress["epoch"], progress["step"], progress["loss"], mean, f"{seconds:.3f}", f"{speed:.1f}", rate
        source = self.trained.metadata["data"]["source"]
        if sentence := advice.on_loss(self.settings, source, progress["epoch"], mean):
            self.bar.say(sentence)
        held_out = self.validate()
        self.table.rows.append((*row, *(held_out or [""] * 5)))
        self.warn_of_overfitting()
        if self.board:
            values = {"loss": mean, "images a second": speed, "learning rate": rate}
            if held_out:
                names = "held-out/all", *(f"held-out/q{q}" for q in range(1, 5))
                values |= {name: loss for name, loss in zip(names, held_out, strict=True) if loss is not None}
            epoch = progress["epoch"]
            self.checkpoints.attempt(self.board.folder, lambda: self.board.epoch(epoch, values))
        begin_next_epoch(progress)
        if time.monotonic() - self.table.written_at > 2:  # the rows of short epochs are gathered
            self.checkpoints.attempt(self.table.path, self.table.write)

    def validate(self) -> tuple[float | None, ...] | None:
        """Measures and prints the held-out loss, over all t and in each quarter of t; None if it is not due."""
        if not is_measured(self.validation, self.trained):
            return None
        measured = self.validation.measure()
        self.bar.lap()  # the time it took belongs to no step
        for name, (mean, quarters) in measured.items():
            by_quarters = " ".join("-" if loss is None else f"{loss:.4f}" for loss in quarters)
            self.bar.say(f"held-out {name} {mean:.4f}; by quarters of t: {by_quarters}")
        mean, quarters = measured["loss"]
        return mean, *quarters

    def warn_of_overfitting(self) -> None:
        """Says once that the network begins to overfit."""
        sentence = None if self.warned or not self.validation else overfitting_warning(self.table.held_out())
        if sentence:
            self.bar.say(sentence)
            self.warned = True

    def at_the_end(self) -> None:
        """Saves, samples the last grid, and says where everything is."""
        self.save(last=True)
        if self.grids:
            self.make_grid(files.grid_name(self.path))
        seconds = self.checkpoints.seconds
        console.say(
            f"saving took {seconds:.1f} s, {100 * seconds / (time.monotonic() - self.started):.1f} % of the run"
        )
        sample_more = f"python {files.script_name('reverse_diffusion.py')}"
        if self.grids:
            console.say(f"{self.all_done()}; samples: {files.grid_name(self.path)}")
            console.say(f"more samples: {sample_more} --model {self.path} --n-sample 64 --out more.png")
            weaker = files.weaker_name(self.path)
            if is_early_copy(weaker, self.trained):
                console.say(f"with guidance: {sample_more} --model {self.path} --weaker {weaker} --guidance 1.5")
        else:
            first = shlex.quote(self.trained.classes[0])
            console.say(f"{self.all_done()}; to guide with it: {sample_more} --classifier {self.path} --label={first}")

    def all_done(self) -> str:
        """How a sentence on a finished run begins."""
        epochs = self.progress["epoch"]
        return f"{self.path} has been trained for {'its one epoch' if epochs == 1 else f'all {epochs} epochs'}"

    def save(self, last: bool = False) -> None:
        """Saves the model if it was trained since the last save. A failed save is tried again later, unless `last`."""
        with self.interruption.busy:
            saved = self.checkpoints.save()
        self.interruption.save_asked = False
        self.bar.lap()
        if last and not saved:
            lost = f"all steps after {self.checkpoints.saved[0]:,} are lost"
            console.leave(f"diffusion_model.py: {self.path} could not be saved; {lost}", 1)

    def save_weaker(self) -> None:
        """Saves the early copy of the model; a run that resumes from an earlier step saves it again."""
        path = files.weaker_name(self.path)
        with self.interruption.busy:
            self.checkpoints.attempt(path, lambda: checkpoint.save(self.model, path), again=False)
        self.bar.lap()

    def make_grid(self, name: str) -> None:
        """Samples a grid of images from the EMA weights into a file."""
        if not self.grids.reverse.compiled:
            self.save()  # a signal during compilation can only end the process, which must lose nothing
        try:
            images = self.grids.sample()
        except FloatingPointError as error:
            self.bar.warn(f"diffusion_model.py: {name} is not written, as {error}")
            return
        if self.interruption.stop:
            self.save_and_end()
        if self.checkpoints.attempt(name, lambda: grids.save_grid(images, name, shown=self.shown)) and self.board:
            epoch = self.progress["epoch"]
            self.checkpoints.attempt(self.board.folder, lambda: self.board.grid(epoch, name))
        self.bar.lap()

    def save_and_end(self) -> None:
        """Saves and ends the program, after a signal."""
        self.save(last=True)
        self.interruption.end()

    def say_where_it_stopped(self) -> None:
        """The last line of an interrupted run."""
        steps = self.checkpoints.saved[0]
        resumes = f"stopped after {steps:,} steps; the same command resumes {self.path}"
        self.bar.say(resumes if steps else f"stopped before the first step; there is no {self.path} yet")


class Follower:
    """Stands for `TrainingRun` in all workers but the first, which writes and prints everything."""

    def __init__(self, trained: TrainedModel, validation: Validation | None):
        self.trained, self.validation = trained, validation

    def before_epoch(self) -> None:
        """The first worker may sample a grid now; this one waits for it in the next step."""

    def after_step(self, loss: float) -> None:
        """The first worker counts it, and may save."""

    def after_epoch(self) -> None:
        """Measures its part of the held-out loss."""
        if is_measured(self.validation, self.trained):
            self.validation.measure()
        begin_next_epoch(self.trained.metadata["progress"])

    def at_the_end(self) -> None:
        """Waits until the first worker has written everything, which ends this process."""
        threading.Event().wait()


def is_measured(validation: Validation | None, trained: TrainedModel) -> bool:
    """Whether the held-out loss is measured after the epoch that is just over."""
    epoch, every = trained.metadata["progress"]["epoch"], trained.metadata["settings"]["validate_every"]
    return validation is not None and (epoch + 1) % every == 0


def begin_next_epoch(progress: dict) -> None:
    """Counts an epoch."""
    progress.update(epoch=progress["epoch"] + 1, images=0, epoch_steps=0, loss=0.0, seconds=0.0)


class StepBar:
    """Progress of this run on the screen: a bar, the time that is left, and how long a step takes."""

    def __init__(self, count: int):
        self.count, self.done, self.first = count, 0, []
        self.bar = console.Bar(count, "step")
        self.say, self.warn = self.bar.say, self.bar.warn
        self.lap_at = time.monotonic()

    def lap(self) -> float:
        """Seconds since the last call. A call after anything that is not a step excludes it from the next one."""
        now = time.monotonic()
        seconds, self.lap_at = now - self.lap_at, now
        return seconds

    def show(self, seconds: float, loss: float) -> None:
        """Counts a step that took `seconds`, and shows the mean loss of the epoch."""
        self.done += 1
        self.bar.update(self.done, loss=loss)
        if self.done <= 20:
            self.first.append(seconds)
        if self.done == 20:
            seconds = statistics.median(self.first)  # not the mean: some were compiled first
            left = console.duration(seconds * (self.count - self.done))
            self.say(f"about {left} to go, {1000 * seconds:.0f} ms a step")


def steps_to_go(settings: dict, progress: dict, count: int) -> int:
    """How many steps are left of all epochs."""
    this_epoch = math.ceil((count - progress["images"]) / settings["batch_size"])
    later_epochs = settings["n_epochs"] - progress["epoch"] - 1
    return this_epoch + later_epochs * math.ceil(count / settings["batch_size"])


def copies_early(trained: TrainedModel) -> bool:
    """Whether the steps to come include the one after which the early copy is saved."""
    settings, progress = trained.metadata["settings"], trained.metadata["progress"]
    last = progress["step"] + steps_to_go(settings, progress, trained.metadata["data"]["count"])
    guides = not trained.is_classifier and trained.schedule_layer is None  # a later schedule is another one
    return guides and progress["step"] < settings["weaker_after"] <= last


def is_early_copy(path: str, trained: TrainedModel) -> bool:
    """Whether a file is the early copy of this training, or of an earlier one with the same images and fixed settings.

    Pixels, labels and classes must be the same; where the images are stored does not matter.
    """
    try:
        other = open_model(path)
    except (OSError, ValueError):
        return False
    if {"data", "settings", "progress"} - other.metadata.keys():
        return False
    complete(other.metadata, other.learns_variance)
    right_step = other.metadata["progress"]["step"] == trained.metadata["settings"]["weaker_after"]
    return right_step and what_is_fixed(other.metadata) == what_is_fixed(trained.metadata)


def what_is_fixed(metadata: dict) -> list:
    """What distinguishes one training from another: images, but not their place, classes and fixed settings."""
    images = [metadata["data"].get(name) for name in ("count", "digest", "labels")]
    return [*images, metadata["classes"], *(metadata["settings"][option.name] for option in SETTINGS if option.fixed)]


class Grids:
    """Samples from a model in training, always from the same noise, so that grids can be compared."""

    def __init__(self, trained: TrainedModel, interruption: Interruption):
        self.trained, self.model, self.interruption = with_live_schedule(trained), trained.network, interruption
        self.seed = trained.metadata["settings"]["seed"]
        classes = len(trained.classes)
        self.label = [1 + (k * classes // N_SAMPLES if classes <= N_SAMPLES else k) for k in range(N_SAMPLES)]
        self.label = self.label if classes else None
        self.plan = make_plan(trained.sched, trained.recommended)
        self.reverse = ReverseSteps(self.trained, N_SAMPLES)

    def sample(self) -> np.ndarray:
        """Images sampled with the EMA weights, int16 (16, height, width, channels); unfinished if a signal came.

        With classes, they are ordered by class.
        """
        checkpoint.swap_ema_weights(self.model)
        follow_schedule(self.trained)
        self.plan = make_plan(self.trained.sched, self.trained.recommended)
        for _, x_t in sample(self.reverse, self.plan, self.seed, range(N_SAMPLES), label=self.label):
            if self.interruption.stop:
                break
        checkpoint.swap_ema_weights(self.model)
        return to_pixels(x_t)
