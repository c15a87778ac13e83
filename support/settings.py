"""The options of `diffusion_model.py`, its presets, and the settings that follow from both and from the file."""

import argparse

from support import console, device
from support.console import integer, number, say

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
FIXED_BY_FILE = ("preset", "image_size", "channels", "n_feat", "beta1", "beta2", "T", "seed")
STEPS_OF_FIRST = 4800
# What the logbook knows of the progress: epochs and steps done, and of the epoch that is under way the images used, the
# steps taken, their sum of losses, and the seconds they took.
NOTHING_DONE = {"epoch": 0, "step": 0, "images": 0, "epoch_steps": 0, "loss": 0.0, "seconds": 0.0}


# fmt: off
def parse_options(description, arguments=None):
    """The options that were typed, as a dict; what was not typed is not in it."""
    parser = console.Parser(description=description, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="first: no GPU needed, minutes; slides: the lecture's values, days on a GPU. "
        "If not given: slides where there are a large GPU and data/cats64.npz, else first")
    add("--data", metavar="SOURCE", help="drawings (cartoon cats made by code), a folder of pictures, a .npy or .npz "
        "file (preset slides: data/cats64.npz if it is there, see python -m data cats; else drawings)")
    add("--new-data", action="store_true", help="resume with other images than those the model was trained on")
    add("--image-size", type=integer(1), metavar="PIXELS", help="square pictures, multiple of 32 (first 32, slides 64)")
    add("--channels", type=int, choices=(1, 3), help="1 gray, 3 colour (3)")
    add("--n-feat", type=integer(1), metavar="N", help="width of the network, a multiple of 8 (first 16, slides 512)")
    add("--batch-size", type=integer(1), metavar="N", help="pictures in a step (first 16, slides 64)")
    add("--n-epochs", type=integer(1), metavar="N", help="epochs in total, earlier runs included (first: as many "
        f"as make about {STEPS_OF_FIRST} steps, slides 300)")
    add("--learning-rate", type=number(1e-12), metavar="RATE", help="of Adam, at its highest (first 4e-3, slides 1e-3)")
    add("--lr-decay", choices=("none", "cosine"), help="cosine: falls to 0 over all epochs (first: cosine)")
    add("--warmup", type=integer(0), metavar="STEPS", help="steps in which the rate rises from 0 (first 50, slides 0)")
    add("--ema", type=number(0, 0.999999), metavar="MOMENTUM", help="of the averaged weights that make the pictures, "
        "0 for none (first 0.99, slides 0.999)")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror at random (photographs yes, drawings, arrays no)")
    add("--precision", choices=("float32", "bfloat16", "float16"), help="of the layers; weights stay float32 (float32)")
    add("--xla", action=argparse.BooleanOptionalAction, help="compile the step with XLA (on a GPU yes, on a CPU no)")
    add("--parts", type=integer(1), metavar="N", help="divide every batch into N parts that are computed side by side "
        f"(on a CPU one for each core, at most {device.MOST_PARTS}; on a GPU 1)")
    add("--beta1", type=float, metavar="VARIANCE", help="of the noise of the first step (1e-4)")
    add("--beta2", type=float, metavar="VARIANCE", help="of the noise of the last step (0.02)")
    add("--T", type=integer(1), metavar="STEPS", help="steps from picture to noise (1000)")
    add("--seed", type=integer(0, 2**32 - 1), metavar="N", help="of everything random (0)")
    add("--model", default="model.keras", metavar="FILE.keras", help="written, or gone on from (model.keras)")
    add("--save-every", type=number(0), default=10, metavar="MINUTES", help="between saves (10)")
    add("--keep", type=integer(0), default=0, metavar="K", help="keep a copy after each of the last K epochs (0)")
    add("--deterministic", action="store_true", help="on a GPU: the same bits in every run, but slower (a CPU is)")
    add("--validation", metavar="SOURCE", help="pictures whose loss is shown, not trained on: a share as 0.1, "
        "or a source of their own like --data (none)")
    add("--validate-every", type=integer(1), metavar="EPOCHS", help="their loss after every so many epochs (1)")
    add("--tensorboard", metavar="DIR", help="scalars, pictures and graph for tensorboard --logdir DIR (off)")
    add("--sample-every", type=integer(0), metavar="EPOCHS", help="a grid of pictures beside the model every so many "
        "epochs, 0 never (first: half-way, slides 10)")
    options = vars(parser.parse_args(arguments))
    if not options["model"].endswith(".keras"):
        parser.error(f"--model must end in .keras, got {options['model']}")
    return options
# fmt: on


def choose_settings(options, book, path, automatic):
    """All settings: what was typed, else what the file was trained with, else the preset's.

    Args:
        options: what `parse_options` returned.
        book: the logbook of the model in the file, `complete`; empty for a new one.
        path: of the file.
        automatic: a function that names the preset of a new model where none is typed.

    Raises:
        ValueError: if an option contradicts the file.
    """
    names = {"preset", *BOTH_PRESETS, *PRESETS["first"]}
    typed = {name: value for name, value in options.items() if name in names}
    if not book:
        preset = typed.get("preset") or automatic()
        return {"preset": preset, **BOTH_PRESETS, **PRESETS[preset], **typed}

    before = book["settings"]
    for name in FIXED_BY_FILE:
        if typed.get(name, before[name]) != before[name]:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{path} was trained with {option} {before[name]}, not {typed[name]}; omit {option} to resume, or "
                "choose another --model to start a new run"
            )
    settings = {**before, **typed}
    if settings["lr_decay"] == "cosine" and settings["n_epochs"] != before["n_epochs"]:
        say(f"the learning rate's fall to 0 is planned anew, over {settings['n_epochs']} epochs")
    return settings


def complete(book):
    """Adds what files of earlier versions lack, so that nothing else has to ask whether it is there."""
    settings = book["settings"] = {**BOTH_PRESETS, **book["settings"]}
    progress = book["progress"] = {**NOTHING_DONE, **book["progress"]}
    if batch_size := progress.pop("batch_size", None):  # until steps were counted, all of an epoch had one size
        progress["epoch_steps"] = -(-progress["images"] // batch_size)
    if "validation" not in book:
        source, fraction = settings["validation"], None
        if source is not None:
            fraction = as_fraction(source)
        book["validation"] = source and {"source": None if fraction else source, "fraction": fraction}


def as_fraction(text):
    """The number in `--validation 0.1`, or None for a source of images."""
    try:
        return float(text)
    except ValueError:
        return None
