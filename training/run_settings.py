"""The settings of a run: what was typed, else what its file holds, else the preset's; and what older files lack."""

from collections.abc import Callable

from support import files
from support.console import say
from training.settings import PRESETS, SETTINGS

# Progress in the metadata: epochs and steps done, and of the running epoch the images used, the steps taken, the sum of
# their losses, and the seconds they took.
DIFFUSION = ("beta1", "beta2", "T", "schedule", "zero_snr", "target")  # settings that samplers need
DEFAULTS_OF_OLD_FILES = {"ema_warmup": False, "sampler": None, "bit_depth": 8}  # where new files have others
NOTHING_DONE = {"epoch": 0, "step": 0, "images": 0, "epoch_steps": 0, "loss": 0.0, "seconds": 0.0}


def choose_settings(options: dict, metadata: dict, path: str, automatic: Callable[[], str]) -> dict:
    """All settings of a run: what was typed, else what the file was trained with, else the preset's.

    Args:
        options: what `parse_options` returned.
        metadata: the metadata of the model in the file, `complete`; empty for a new one.
        path: of the file.
        automatic: a function that names the preset of a new model where none is typed.

    Raises:
        ValueError: if an option contradicts the file.
    """
    typed = {option.name: options[option.name] for option in SETTINGS if option.name in options}
    if not metadata:
        preset = typed.get("preset") or automatic()
        chosen = {**PRESETS[preset], "preset": preset, **typed}
        if {"beta1", "beta2"} & typed.keys() and "schedule" not in typed and chosen["schedule"] != "linear":
            say("schedule  linear, as --beta1 and --beta2 belong to it")
            chosen["schedule"] = "linear"
        if chosen["schedule"] == "learned" and "weaker_after" not in typed:
            chosen["weaker_after"] = 0  # an early copy has an earlier schedule, and so cannot guide
        preset_target = PRESETS[preset]["target"]
        if chosen["target"] != preset_target and "weighting" not in typed and chosen["weighting"] != "none":
            say(f"weighting none, as {chosen['weighting']} of the preset belongs to its --target {preset_target}")
            chosen["weighting"] = "none"
        if typed.get("variance") == "learned":  # which was the only way to ask for it in earlier versions
            chosen["learn_variance"] = typed.get("learn_variance", True)
        elif chosen["learn_variance"] and "variance" not in typed:
            chosen["variance"] = "learned"
        return chosen

    before = metadata["settings"]
    for option in SETTINGS:
        name = option.name
        if option.fixed and typed.get(name, before[name]) != before[name]:
            how, flag = _describe_difference(option.flag, before[name], typed[name])
            raise ValueError(
                f"{path} was trained {how}; omit {flag} to resume, or choose another --model to start a new run"
            )
    done = metadata["progress"]["epoch"]
    if typed.get("n_epochs", done) < done:
        if before["n_epochs"] > done:
            raise ValueError(
                f"{path} has been trained for {done} epochs, more than --n-epochs {typed['n_epochs']}; omit --n-epochs "
                f"to train on to {before['n_epochs']}, or choose another --model to start a new run"
            )
        say(f"--n-epochs {typed.pop('n_epochs')} is ignored, as {path} has been trained for {done} epochs")
    settings = {**before, **typed}
    if settings["lr_decay"] == "cosine" and settings["n_epochs"] != before["n_epochs"]:
        say(f"the learning rate now falls to 0 over all {settings['n_epochs']} epochs")
    return settings


def complete(metadata: dict, learns_variance: bool) -> None:
    """Adds to the metadata what files of earlier versions lack, so that no other code has to check for it.

    Args:
        learns_variance: whether the network in the file learns the variance of a step.
    """
    settings = metadata["settings"] = {**PRESETS["slides"], **DEFAULTS_OF_OLD_FILES, **metadata["settings"]}
    if settings["sampler"] is None:
        settings["sampler"] = "ddim" if (settings["sample_steps"] or settings["T"]) < settings["T"] else "ddpm"
    settings["learn_variance"] = learns_variance
    progress = metadata["progress"] = {**NOTHING_DONE, **metadata["progress"]}
    if batch_size := progress.pop("batch_size", None):  # until steps were counted, all of an epoch had one size
        progress["epoch_steps"] = -(-progress["images"] // batch_size)
    metadata["classes"] = list(map(files.normalise_name, metadata.get("classes", [])))
    metadata.setdefault("no_class", settings["drop_label"] > 0)
    if "validation" not in metadata:
        source = settings["validation"]
        fraction = as_fraction(source)
        metadata["validation"] = source and {"source": None if fraction else source, "fraction": fraction}


def as_fraction(text: str | None) -> float | None:
    """The number in `--validation 0.1`; None for a source of images."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _describe_difference(flag: str, before: object, typed: object) -> tuple[str, str]:
    """How a model was trained, in words, and the option that was typed."""
    if not isinstance(before, bool):
        return f"with {flag} {before}, not {typed}", flag
    return f"with{'' if before else 'out'} {flag}", flag if typed else flag.replace("--", "--no-", 1)
