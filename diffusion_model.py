"""Trains a network to predict the noise in noisy images, or the image without it.

    python diffusion_model.py                        a first run: cartoon cats, minutes on any computer
    python diffusion_model.py --preset slides        the slides' setting: days, on a GPU
    python diffusion_model.py --data FOLDER          your own images

Run it again and it resumes where `model.keras` stopped. `python reverse_diffusion.py` then generates images.
Slides: "Diffusion network example, code, continued even more".
"""

import math
import os
import sys

if __name__ == "__main__":  # which `python -P` leaves out
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    from support.packages import check_packages

    check_packages()
import numpy as np

import data
from support import console, device, launcher
from support.console import say
from support.lock import Lock
from support.signals import Interruption
from support.worker import at_work
from training.settings import parse_options


def main():
    with at_work("diffusion_model.py") as worker:
        # Options are read before TensorFlow is imported, so that --help and slips of typing are answered at once.
        options = parse_options(__doc__)
        path = options["model"]
        comfort = f"; the last save is in {path}"
        check_parts(options, worker)
        launcher.launch_if_several(worker, "diffusion_model.py", options.get("devices", 1), comfort)
        with Interruption() as interruption:
            interruption.follow(worker, comfort)
            say("diffusion_model.py: starting TensorFlow …")  # the imports below take seconds
            device.start_tensorflow(options.get("parts", 1 if options.get("xla") else device.MOST_PARTS))
            from training.workers import join

            workers = join(worker)
            interruption.take_signals()
            if not worker.first:
                train_model(options, path, interruption, workers)  # until the first one ends
                return
            with Lock(path) as lock:
                interruption.clean_up = lock.release
                if lock.missing:
                    say(lock.missing)
                train_model(options, path, interruption, workers)


def check_parts(options, worker):
    """Raises ValueError if a batch is to be divided both among devices and in parts."""
    divided = {"parts", "sequential"} & options.keys()
    if divided and (worker.count > 1 or len(launcher.choose_devices(options.get("devices", 1))) > 1):
        flag = "--sequential" if "sequential" in options else "--parts"
        raise ValueError(f"{flag} divides a batch on one device, but several share it already; omit {flag}")


def train_model(options, path, interruption, workers=None):
    """Trains the model at `path`, a new one or the one in the file, to the last epoch."""
    import tensorflow as tf

    from training.preparation import check_files, describe, finished, prepare
    from training.training_run import Follower, TrainingRun
    from training.validation import Validation

    if options.get("deterministic"):  # XLA has no such promise
        tf.config.experimental.enable_op_determinism()
    first = workers is None or workers.first  # which writes all files
    if first:
        check_files(options, path)  # better known now than after an hour
    try:
        trained, images, held_out = prepare(options, path, workers)
    except tf.errors.ResourceExhaustedError:
        console.leave(
            "diffusion_model.py: the network does not fit in the GPU's memory; end other processes that use it (see "
            "nvidia-smi), or try a smaller --n-feat",
            1,
        )
    metadata, board = trained.metadata, None  # a dict in the file, of which settings and progress are parts
    if "tensorboard" in options and first:
        from training.tensorboard import Board

        board = Board(options["tensorboard"], trained)
    validation = Validation(trained, held_out.images, held_out.labels, workers) if held_out else None
    if workers:
        workers.check_start(options, trained)
    if first:
        run = TrainingRun(trained, path, options["save_every"], options["keep"], interruption, validation, board)
        if finished(run):
            return
        describe(trained, path, images.labels)
    try:
        train(trained, images, run if first else Follower(trained, validation))
    except FloatingPointError as error:
        give_up(
            metadata,
            f"{error}; {path} keeps the last save; try a smaller --learning-rate, or another --precision",
        )
    except tf.errors.OpError as error:
        if not device.out_of_memory(error):
            raise
        batch_size, more = metadata["settings"]["batch_size"], 2 * trained.network.parts_in_turn
        smaller = f"--batch-size {max(1, batch_size // 2)}"
        way_out = f"--parts {more} --sequential, which needs less, or {smaller}" if more <= batch_size else smaller
        way_out = smaller if workers else way_out
        give_up(
            metadata,
            f"the images of a batch do not fit in memory; add {way_out}, or end other processes that use the memory",
        )


def give_up(metadata, why):
    """Ends a run that cannot continue, with the facts that explain it."""
    settings, progress = metadata["settings"], metadata["progress"]
    console.leave(
        f"diffusion_model.py: in step {progress['step']:,}, with --learning-rate {settings['learning_rate']:g} and "
        f"--precision {settings['precision']}: {why}",
        1,
    )


def train(trained, images, run):
    """The loop of the slides: images, noise on them, and the network learns to predict the noise (or x_0, or v).

    A classifier learns their classes instead.
    """
    import tensorflow as tf

    from ddpm import from_pixels

    model, settings, progress = trained.network, trained.metadata["settings"], trained.metadata["progress"]
    noisy = noising(
        trained.sched,
        settings["seed"],
        trained.target,
        weighting=settings["weighting"],
        t_sampling=settings["t_sampling"],
        learned=trained.schedule_layer is not None,
    )
    for i in range(progress["epoch"], settings["n_epochs"]):
        run.before_epoch()
        train_data = data.batches(
            images.images,
            settings["batch_size"],
            settings["seed"],
            epoch=i,
            start=progress["images"],
            flip=settings["flip"],
            labels=images.labels,
        )
        for image_batch, labels in train_data:
            x_0, step = from_pixels(image_batch, trained.levels), tf.constant(progress["step"], tf.int64)
            x_t, t_input, target, weight = noisy(x_0, step)
            inputs = [x_t, t_input]
            if settings["network"] == "classifier":
                target, weight = labels, np.float32(labels >= 0)[:, None, None, None]
            elif labels is not None:
                inputs.append(drop_labels(labels, settings["drop_label"], settings["seed"], progress["step"]))
            model.optimizer.learning_rate = learning_rate(settings, progress, len(images.images))
            loss = model.train_on_batch(inputs, target, sample_weight=weight)
            progress["loss"] += loss
            progress["images"] += len(image_batch)
            progress["epoch_steps"] += 1
            progress["step"] += 1
            run.after_step(loss)
        run.after_epoch()
    run.at_the_end()


def noising(sched, seed, target="eps", weighting="none", t_sampling="uniform", learned=False):
    """The noise of a training step: a function of the images x_0 and the step → x_t, t/T, target, weight of each image.

    Draws depend on the seed and the step alone, so that a resumed run draws what it would have drawn.

    Args:
        target, weighting: see `diffusion/targets.py`.
        t_sampling: `'uniform'` as on the slides, `'logsnr'` for `targets.log_snr_probabilities`.
        learned: whether the schedule is learned, so that the noise is added within the step, see
            `training/learned_schedule.py`: the function then returns x_0, t/T of a continuous t, ε, and weight 1.
    """
    import tensorflow as tf

    from ddpm import n_steps, network_time, q_sample, signal_and_noise
    from diffusion.targets import find_target, log_snr_probabilities, loss_weights

    T, cumulative = n_steps(sched), np.cumsum(log_snr_probabilities(sched.alphabar))
    wanted, weights = find_target(target).wanted, loss_weights(sched.alphabar, target, weighting)

    def draw_t(shape, key):
        if t_sampling == "uniform":
            return tf.random.stateless_uniform(shape, key, minval=1, maxval=T + 1, dtype=tf.int32)
        place = tf.random.stateless_uniform(shape, key, dtype=tf.float64)
        return 1 + tf.minimum(tf.searchsorted(cumulative, place, side="right"), T - 1)

    @tf.function(autograph=False)  # one call instead of twenty small ones
    def noisy(image_batch, step):
        this_size = tf.shape(image_batch)
        # Two keys a step, one for ε and one for t; negative, as the keys of sampling are positive.
        key = tf.stack([tf.constant(seed, tf.int64), -1 - 2 * step])
        eps = tf.random.stateless_normal(this_size, key)
        if learned:
            t = 1 + (T - 1) * tf.random.stateless_uniform(this_size[:1], key - [0, 1])
            return image_batch, t[:, None] / T, eps, tf.ones_like(t)[:, None, None, None]
        t_ind = draw_t(this_size[:1], key - [0, 1])
        x_t = q_sample(image_batch, t_ind, eps, sched)
        wanted_output = wanted(image_batch, eps, *signal_and_noise(t_ind, image_batch, sched))
        weight = tf.gather(tf.constant(weights, tf.float32), t_ind)[:, None, None, None]
        return x_t, network_time(t_ind, sched), wanted_output, weight

    return noisy


def drop_labels(labels, fraction, seed, step):
    """Labels as networks take them in training: k + 1 for class k, 0 for "no class" and, at random, for a fraction.

    So the network also learns to predict without a class (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1).

    Args:
        labels: (batch,) int, -1 for no class.

    Returns:
        (batch, 1) int32.
    """
    dropped = np.random.default_rng([seed, 2, step]).random(len(labels)) < fraction
    return np.where(dropped, 0, labels + 1).astype(np.int32)[:, None]


def learning_rate(settings, progress, count):
    """Adam's rate for the next step: a linear rise, then constant or half a cosine down to 0 over all epochs."""
    rate = settings["learning_rate"] * min(1, (progress["step"] + 1) / (settings["warmup"] + 1))
    if settings["lr_decay"] == "cosine":
        rate *= 0.5 + 0.5 * math.cos(math.pi * (progress["epoch"] + progress["images"] / count) / settings["n_epochs"])
    return rate


if __name__ == "__main__":
    main()
