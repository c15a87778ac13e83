"""Trains the network of the slides to predict the noise in noisy pictures.

    python diffusion_model.py                        a first run: cartoon cats, minutes on any computer
    python diffusion_model.py --preset slides        the slides' setting: days, on a GPU
    python diffusion_model.py --data FOLDER          your own pictures

Run it again and it goes on where `model.keras` stopped. `python reverse_diffusion.py` then makes
pictures. Slides: "Diffusion network example, code, continued even more".
"""

import argparse
import atexit
import math
import os

import console
import data
import device
import files
from console import real, say, whole
from interruption import Interruption

PRESETS = {
    "first": {
        "image_size": 32, "n_feat": 16, "batch_size": 16, "n_epochs": None, "learning_rate": 4e-3,
        "lr_decay": "cosine", "warmup": 50, "ema": 0.99, "sample_every": None,
    },
    "slides": {
        "image_size": 64, "n_feat": 512, "batch_size": 64, "n_epochs": 300, "learning_rate": 1e-3,
        "lr_decay": "none", "warmup": 0, "ema": 0.999, "sample_every": 10,
    },
}  # fmt: skip
BOTH_PRESETS = {
    "channels": 3, "flip": None, "precision": "float32", "validation": None, "validate_every": 1,
    "beta1": 1e-4, "beta2": 0.02, "T": 1000, "seed": 0,
}  # fmt: skip
FIXED_BY_FILE = ("image_size", "channels", "n_feat", "beta1", "beta2", "T", "seed", "validation")
STEPS_OF_FIRST = 4800
# What the logbook knows of the progress: epochs and steps done, and of the epoch that is under way the pictures used,
# their sum of losses, the seconds they took, and the size of its batches.
NOTHING_DONE = {"epoch": 0, "step": 0, "images": 0, "loss": 0.0, "seconds": 0.0}


# fmt: off
def parse_options(arguments=None):
    """The options that were typed, as a dict; what was not typed is not in it."""
    parser = console.Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="first: no GPU needed, minutes; slides: the lecture's values, days on a GPU. "
        "If not given: slides where there are a large GPU and data/cats64.npz, else first")
    add("--data", metavar="SOURCE", help="drawings (cartoon cats made by code), a folder of pictures, a .npy or .npz "
        "file (preset slides: data/cats64.npz if it is there, see python -m data cats; else drawings)")
    add("--new-data", action="store_true", help="go on with other pictures than those the model was trained on")
    add("--image-size", type=whole(1), metavar="PIXELS", help="square pictures, multiple of 32 (first 32, slides 64)")
    add("--channels", type=int, choices=(1, 3), help="1 gray, 3 colour (3)")
    add("--n-feat", type=whole(1), metavar="N", help="width of the network, a multiple of 8 (first 16, slides 512)")
    add("--batch-size", type=whole(1), metavar="N", help="pictures in a step (first 16, slides 64)")
    add("--n-epochs", type=whole(1), metavar="N", help="epochs in total, earlier runs included (first: as many "
        f"as make about {STEPS_OF_FIRST} steps, slides 300)")
    add("--learning-rate", type=real(1e-12), metavar="RATE", help="of Adam, at its highest (first 4e-3, slides 1e-3)")
    add("--lr-decay", choices=("none", "cosine"), help="cosine: falls to 0 over all epochs (first: cosine)")
    add("--warmup", type=whole(0), metavar="STEPS", help="steps in which the rate rises from 0 (first 50, slides 0)")
    add("--ema", type=real(0, 0.999999), metavar="MOMENTUM", help="of the averaged weights that make the pictures, "
        "0 for none (first 0.99, slides 0.999)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror at random (photographs yes, drawings, arrays no)")
    add("--precision", choices=("float32", "bfloat16", "float16"), help="of the layers; weights stay float32 (float32)")
    add("--xla", action=argparse.BooleanOptionalAction, help="compile the step with XLA (on a GPU yes, on a CPU no)")
    add("--parts", type=whole(1), metavar="N", help="divide every batch into N parts that are computed side by side "
        f"(on a CPU one for each core, at most {device.MOST_PARTS}; on a GPU 1)")
    add("--beta1", type=float, metavar="VARIANCE", help="of the noise of the first step (1e-4)")
    add("--beta2", type=float, metavar="VARIANCE", help="of the noise of the last step (0.02)")
    add("--T", type=whole(1), metavar="STEPS", help="steps from picture to noise (1000)")
    add("--seed", type=whole(0), metavar="N", help="of everything random (0)")
    add("--model", default="model.keras", metavar="FILE.keras", help="written, or gone on from (model.keras)")
    add("--save-every", type=real(0), default=10, metavar="MINUTES", help="at most so much is lost to a power cut (10)")
    add("--keep", type=whole(0), default=0, metavar="K", help="keep the first save after each of the last K epochs (0)")
    add("--deterministic", action="store_true", help="on a GPU: the same bits in every run, but slower (a CPU is)")
    add("--validation", metavar="SOURCE", help="pictures whose loss is shown, not trained on: a share as 0.1, "
        "or a source of their own like --data (none)")
    add("--validate-every", type=whole(1), metavar="EPOCHS", help="their loss after every so many epochs (1)")
    add("--tensorboard", metavar="DIR", help="scalars, pictures and graph for tensorboard --logdir DIR (off)")
    add("--sample-every", type=whole(0), metavar="EPOCHS", help="a grid of pictures beside the model every so many "
        "epochs, 0 never (first: half-way, slides 10)")
    options = vars(parser.parse_args(arguments))
    if not options["model"].endswith(".keras"):
        parser.error(f"--model must end in .keras, got {options['model']}")
    return options
# fmt: on


if __name__ == "__main__":  # before TensorFlow, so that --help and slips of typing are answered at once
    OPTIONS = parse_options()
    INTERRUPTION = Interruption()
    say("diffusion_model.py: starting TensorFlow …")
    PARTS = OPTIONS.get("parts", 1 if OPTIONS.get("xla") else device.MOST_PARTS)
with console.errors_in_a_sentence("diffusion_model.py"):
    tf = device.start_tensorflow(PARTS if __name__ == "__main__" else 1)
import keras  # noqa: E402

import model_file  # noqa: E402
from ddpm import ddpm_schedule, q_sample  # noqa: E402
from keeper import Keeper, grid_name  # noqa: E402
from unet import NaiveUnet  # noqa: E402
from validation import Validation, held_back  # noqa: E402


def main():
    path, save_every, keep = (OPTIONS.pop(name) for name in ("model", "save_every", "keep"))
    folder = OPTIONS.pop("tensorboard", None)
    if OPTIONS.get("deterministic"):  # XLA has no such promise
        tf.config.experimental.enable_op_determinism()
    with console.errors_in_a_sentence("diffusion_model.py"):
        lock = model_file.Lock(path)
        atexit.register(lock.release)
        INTERRUPTION.at_the_end.append(lock.release)
        if lock.missing:
            say(lock.missing)
        files.check_writable(path)  # better known now than after an hour
        model, images, held_out = prepare(OPTIONS, path)
        sched, board = ddpm_schedule(**model_file.logbook(model)["diffusion"]), None
        if folder:
            from board import Board

            board = Board(folder, model, sched)
    validation = Validation(model, held_out, sched) if held_out is not None else None
    keeper = Keeper(model, path, save_every, keep, INTERRUPTION, validation, board)
    if finished(keeper):
        return
    describe(model, path)
    try:
        train(model, images, keeper)
    except FloatingPointError as error:
        advice = f"{path} is as it was saved before. Try a smaller --learning-rate, or another --precision"
        give_up(model, f"{error}; {advice}")
    except tf.errors.ResourceExhaustedError:
        smaller = max(1, model_file.logbook(model)["settings"]["batch_size"] // 2)
        give_up(model, f"the pictures of a batch do not fit in memory; add --batch-size {smaller}")


def give_up(model, why):
    """Ends a run that cannot go on, with the facts that explain it."""
    book = model_file.logbook(model)
    rate, precision = float(model.optimizer.learning_rate), book["settings"]["precision"]
    facts = f"in step {book['progress']['step']:,}, at learning rate {rate:g} and in {precision}"
    console.leave(f"diffusion_model.py: {facts}: {why}", 1)


def prepare(options, path):
    """A model ready to train, with its settings and progress in its logbook, its pictures, and held-out ones or None.

    Args:
        options: what `parse_options` returned, without the model's path.

    Raises:
        ValueError, OSError: for what cannot be used, or contradicts the file.
    """
    going_on = os.path.exists(path)
    model = model_file.open_for_training(path) if going_on else None
    book = model_file.logbook(model) if going_on else {}
    settings = choose_settings(options, book, path)
    ddpm_schedule(settings["beta1"], settings["beta2"], settings["T"])  # says what is wrong with them
    images, held_out = choose_data(options, settings, book, path)

    if going_on:
        optimizer = model.optimizer
        optimizer.ema_momentum = settings["ema"]
    else:
        keras.utils.set_random_seed(settings["seed"])
        model = NaiveUnet((settings["image_size"], settings["image_size"], settings["channels"]), settings["n_feat"])
        optimizer = keras.optimizers.Adam(settings["learning_rate"], use_ema=True, ema_momentum=settings["ema"])
        optimizer.build(model.trainable_variables)
    book["progress"] = {**NOTHING_DONE, "batch_size": settings["batch_size"], **book.get("progress", {})}
    book["diffusion"] = {name: settings[name] for name in ("beta1", "beta2", "T")}
    book["settings"] = settings
    model_file.logbook(model).update(book)

    xla = options.get("xla", device.has_gpu()) and not options.get("deterministic")
    parts = options.get("parts", 1 if xla else device.parts_for(settings["batch_size"]))
    model_file.compile_for_run(model, optimizer, settings["precision"], xla, min(parts, settings["batch_size"]))
    return model, images, held_out


def choose_settings(options, book, path):
    """All settings: what was typed, else what the file was trained with, else the preset's."""
    preset = options.get("preset") or ("slides" if device.large_gpu() and os.path.exists(data.CATS) else "first")
    defaults = {"preset": preset, **BOTH_PRESETS, **PRESETS[preset]}
    typed = {name: value for name, value in options.items() if name in defaults}
    if not book:
        return {**defaults, **typed}

    before = {**BOTH_PRESETS, **book["settings"]}  # a file may be older than one of our settings
    asked = {**defaults, **typed} if "preset" in options else typed
    for name in FIXED_BY_FILE:
        if asked.get(name, before[name]) != before[name]:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{path} was trained with {option} {before[name]}, not {asked[name]}; leave {option} away to go on "
                "with it, or name another --model for a new one"
            )
    settings = {**before, **typed}
    if settings["lr_decay"] == "cosine" and settings["n_epochs"] != before["n_epochs"]:
        say(f"the learning rate's fall to 0 is planned anew, over {settings['n_epochs']} epochs")
    return settings


def choose_data(options, settings, book, path):
    """Reads the pictures, notes them in the logbook, and settles what depends on them. Held-out ones or None too."""
    before = book.get("data")
    source = options.get("data") or (before and before["source"])
    if source is None:
        source = data.CATS if settings["preset"] == "slides" and os.path.exists(data.CATS) else "drawings"
    images, report = data.load_images(source, settings["image_size"], settings["channels"])
    images, held_out = hold_out(images, settings)
    now = {"source": report.source, "count": len(images), "digest": data.digest(images)}
    if before and now["digest"] != before["digest"]:
        if not options.get("new_data"):
            raise ValueError(
                f"{path} was trained on {before['source']} ({before['count']:,} pictures), not on what is now in "
                f"{now['source']} ({now['count']:,}); name another --model for a new one, or add --new-data to go on "
                "with other pictures"
            )
        book["progress"].update(images=0, loss=0.0, seconds=0.0)  # the epoch begins anew
        settings["flip"] = options.get("flip")
    if str(report):
        say(report)

    book["data"] = now
    if settings["flip"] is None:
        settings["flip"] = report.photographs
    if settings["n_epochs"] is None:
        settings["n_epochs"] = max(1, STEPS_OF_FIRST // math.ceil(len(images) / settings["batch_size"]))
    if settings["sample_every"] is None:
        settings["sample_every"] = math.ceil(settings["n_epochs"] / 2)
    return images, held_out


def hold_out(images, settings):
    """Pictures to train on, and held-out ones: a share of them, those of another source, or None."""
    source = settings["validation"]
    if source is None:
        return images, None
    try:
        share = float(source)
    except ValueError:
        return images, data.load_images(source, settings["image_size"], settings["channels"])[0]
    if not 0 < round(share * len(images)) < len(images):
        raise ValueError(f"--validation must leave pictures on both sides, got {source} of {len(images):,}")
    return held_back(images, share, settings["seed"])


def finished(keeper):
    """Whether all epochs are done; if so, says it, and how to go on."""
    epochs = keeper.progress["epoch"]
    if epochs < keeper.settings["n_epochs"]:
        return False
    grid = grid_name(keeper.path)
    if not os.path.exists(grid) or os.path.getmtime(grid) < os.path.getmtime(keeper.path):
        keeper.make_grid(grid)  # the run was killed between its last save and the picture
    say(f"{keeper.path} has all its {epochs} epochs; go on with --n-epochs {2 * epochs}, or begin --model NEW.keras")
    return True


def describe(model, path):
    """The first lines of a run: what it is about to do."""
    book = model_file.logbook(model)
    s, d, done = book["settings"], book["data"], book["progress"]
    steps = math.ceil(d["count"] / s["batch_size"])
    xla = ", XLA" if model.jit_compile else ""
    parts = f", batches in {model.parts} parts" if model.parts > 1 else ""
    rate = f"learning rate {s['learning_rate']:g}" + (" falling to 0" if s["lr_decay"] == "cosine" else "")
    say(f"preset    {s['preset']} (--preset first|slides, --help for all options)")
    say(f"device    {device.name()}, {s['precision']}{xla}{parts}")
    say(f"data      {d['source']}: {d['count']:,} pictures, {s['image_size']}×{s['image_size']}×{s['channels']}")
    say(f"network   n_feat {s['n_feat']}, {model.count_params():,} parameters")
    say(f"training  {s['n_epochs']} epochs of {steps:,} steps of {s['batch_size']} pictures, {rate}")
    say(f"files     {path}, {grid_name(path)}")
    if done["step"]:
        say(f"going on after {done['epoch']} epochs, {done['step']:,} steps")
    if device.has_gpu() and d["source"] == "drawings" and not os.path.exists(data.CATS):
        say("`python -m data cats` brings the slides' cats for this GPU")


def train(model, images, keeper):
    """The loop of the slides: pictures, noise on them, and the network learns to see the noise."""
    book = model_file.logbook(model)
    settings, progress = book["settings"], book["progress"]
    noisy = noising(ddpm_schedule(**book["diffusion"]), settings["seed"])
    for i in range(progress["epoch"], settings["n_epochs"]):
        keeper.before_epoch()
        if progress["images"] == 0:
            progress["batch_size"] = settings["batch_size"]
        train_data = data.batches(
            images, progress["batch_size"], settings["seed"], i, progress["images"], settings["flip"]
        )
        for image_batch in train_data:
            x_t, t_input, eps = noisy(image_batch, tf.constant(progress["step"], tf.int64))
            model.optimizer.learning_rate = learning_rate(settings, progress, len(images))
            loss = model.train_on_batch([x_t, t_input], eps)
            progress["loss"] += loss
            progress["images"] += len(image_batch)
            progress["step"] += 1
            keeper.after_step(loss)
        keeper.after_epoch()
    keeper.at_the_end()


def noising(sched, seed):
    """The noise of a training step as one function of the pictures x_0 and the number of the step.

    Draws depend on the seed and the step alone, so that a run which goes on draws what it would have drawn.
    """
    T = len(sched["beta_t"]) - 1

    @tf.function(autograph=False)  # one call instead of twenty small ones
    def noisy(image_batch, step):
        this_size = tf.shape(image_batch)
        key = tf.stack([tf.constant(seed, tf.int64), -1 - 2 * step])  # negative: the keys of sampling are positive
        eps = tf.random.stateless_normal(this_size, key)
        t_ind = tf.random.stateless_uniform(this_size[:1], key - [0, 1], minval=1, maxval=T + 1, dtype=tf.int32)
        x_t = q_sample(image_batch, t_ind, eps, sched)
        return x_t, tf.cast(t_ind, tf.float32)[:, None] / T, eps

    return noisy


def learning_rate(settings, progress, count):
    """Adam's rate for the next step: a linear rise, then constant or half a cosine down to 0 over all epochs."""
    rate = settings["learning_rate"] * min(1, (progress["step"] + 1) / (settings["warmup"] + 1))
    if settings["lr_decay"] == "cosine":
        rate *= 0.5 + 0.5 * math.cos(math.pi * (progress["epoch"] + progress["images"] / count) / settings["n_epochs"])
    return rate


if __name__ == "__main__":
    main()
