"""Advice on settings that are valid but hardly intended, one sentence each."""

from collections.abc import Sequence

import numpy as np

from training.settings import PRESETS, STEPS

FAR = 0.1  # above this, x_T shows the image: sampling starts from noise that training never sees
NEAR = 0.01  # what is recommended stays below this; the slides' schedule has 0.0064
SLIDES = {"T": 1000, "beta2": 0.02}


def image_left(beta1: float, beta2: float, T: int) -> float:
    """√ᾱ_T of the linear schedule, the factor of the image in x_T."""
    return float(np.exp(0.5 * np.sum(np.log1p(-np.linspace(beta1, beta2, T)))))


def on_schedule(beta1: float, beta2: float, T: int) -> str | None:
    """The sentence to say when x_T is far from the noise that sampling starts with, else None.

    Args:
        beta1, beta2, T: see `ddpm.ddpm_schedule`, which accepts them.
    """
    left = image_left(beta1, beta2, T)
    if left <= FAR:
        return None
    scaled = float(f"{SLIDES['beta2'] * SLIDES['T'] / T:.2g}")  # more noise in a step, as there are fewer
    larger = [steps for steps in (25, 50, 100, 250, 500, 1000) if steps > T and image_left(beta1, beta2, steps) <= NEAR]
    if beta1 <= scaled < 1 and image_left(beta1, scaled, T) <= NEAR:
        way_out = f"--beta2 {scaled:g}"
    elif larger:
        way_out = f"--T {larger[0]}"
    else:
        way_out = f"--T {SLIDES['T']} --beta2 {SLIDES['beta2']:g}"
    return (
        f"with --beta1 {beta1:g} --beta2 {beta2:g} --T {T}, x_T still contains {left:.2g} times the image (√ᾱ_T), but "
        f"sampling starts from pure noise; try {way_out}"
    )


MEASURED = {  # mean loss of a step by the epoch, of `diffusion_model.py --data drawings --preset …`
    "first": {0: 0.155, 1: 0.0457, 2: 0.0325, 4: 0.0230, 8: 0.0172, 16: 0.0127, 31: 0.0101},
    "cpu-hour": {0: 0.447, 1: 0.205, 2: 0.147, 4: 0.112, 8: 0.0935, 16: 0.0804, 32: 0.0707},
}
EPOCH = 128  # steps, of the 2,048 drawings
LOSS_SETTINGS = (
    *("image_size", "channels", "network", "n_feat", "widths", "blocks", "attention", "patch", "classes", "dropout"),
    *("batch_size", "optimizer", "learning_rate", "lr_decay", "warmup"),
    *("T", "schedule", "zero_snr", "target", "weighting", "t_sampling", "learn_variance"),
)
HIGH = 1.2  # times the measured loss; seeds differ by a few percent


def on_loss(settings: dict, source: str, epoch: int, loss: float) -> str | None:
    """A sentence that compares the mean loss of an epoch with the measured loss of a preset, else None.

    Args:
        settings: of the run; None is returned unless all that affect the loss match a measured preset.
        source: of the images; None is returned unless they are the drawings.
        epoch: its number, from 0.
        loss: the mean over its steps.
    """
    if source != "drawings" or settings["flip"]:
        return None
    for preset, losses in MEASURED.items():
        as_measured = settings["n_epochs"] == STEPS[preset] // EPOCH and epoch in losses
        if as_measured and all(settings[name] == PRESETS[preset][name] for name in LOSS_SETTINGS):
            higher = ": it should be lower" if loss > HIGH * losses[epoch] else ""
            return f"mean loss of a step {loss:.3g}; expected {losses[epoch]:.3g}{higher}"
    return None


FEW = 50  # images of a class; with fewer a network learns the images instead of the class


def on_classes(labels: np.ndarray, classes: Sequence[str]) -> str | None:
    """The sentence to say when a class has few images, else None.

    Args:
        labels: (N,) int, the class of each image.
        classes: their names.
    """
    counts = {name: int(np.sum(labels == k)) for k, name in enumerate(classes)}
    few = [f"{name} ({count})" for name, count in counts.items() if count < FEW]
    if not few:
        return None
    more = f" and {len(few) - 5} more" if len(few) > 5 else ""
    return f"few images of {', '.join(few[:5])}{more}; add images, as a class is hardly learnt from fewer than {FEW}"


def on_flip(settings: dict) -> str | None:
    """The sentence to say when images with classes are mirrored without having been asked for, else None."""
    if not settings["flip"] or not settings["classes"]:
        return None
    return (
        "images are mirrored at random; add --no-flip if they show letters, digits or other shapes that must not be "
        "mirrored"
    )


def on_precision(precision: str, has_bfloat16: bool) -> str | None:
    """The sentence to say when the GPU is no faster in the precision, else None."""
    if precision != "bfloat16" or has_bfloat16:
        return None
    return "this GPU is no faster in bfloat16 than in float32; try --precision float16"


def on_weighting(pure_noise: str | None, weighting: str) -> str | None:
    """The sentence to say when nothing is learnt at t = T, where sampling starts, else None.

    Args:
        pure_noise: the option that makes x_T pure noise, if one does.
    """
    if not pure_noise or weighting == "none":
        return None
    return f"--weighting {weighting} gives t = T no weight, where {pure_noise} leaves no signal; try --weighting none"


def on_batch_size(settings: dict) -> str | None:
    """The sentence to say when the learning rate is a preset's, which was chosen for another batch size, else None."""
    preset = PRESETS[settings["preset"]]
    rate, batch_size = settings["learning_rate"], settings["batch_size"]
    if rate != preset["learning_rate"] or batch_size == preset["batch_size"]:
        return None
    return (
        f"the learning rate {rate:g} was chosen for batches of {preset['batch_size']} images, not {batch_size}; for "
        "larger ones try a higher --learning-rate, and --warmup"
    )
