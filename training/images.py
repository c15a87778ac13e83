"""The images of a run: its training and held-out images, found again and recognised when it resumes."""

import dataclasses
import math
import os

import numpy as np

import data
from data.classes import match_classes
from data.splits import split_held_out
from support.console import say
from support.scale import Scale
from training import advice
from training.run_settings import as_fraction
from training.settings import DATA, FOR_GPU, STEPS


@dataclasses.dataclass
class Images:
    """Images, uint8 or uint16 (N, height, width, channels), and their labels, (N,) int, or None."""

    images: np.ndarray
    labels: np.ndarray | None = None

    def facts(self, source: str | None) -> dict:
        """What a model file stores about them, to recognise them later."""
        facts = {"source": source, "count": len(self.images), "digest": data.digest(self.images)}
        return facts if self.labels is None else {**facts, "labels": data.digest(self.labels)}


def choose_data(options: dict, settings: dict, metadata: dict, path: str) -> tuple[Images, Images | None]:
    """Reads training and held-out images (or None), records them in the metadata, settles what depends on them."""
    before = metadata.get("data")
    default = DATA.get(settings["preset"], "drawings")
    if settings["preset"] in FOR_GPU and os.path.exists(data.CATS):
        default = "cats"
    fraction = (before and metadata.get("validation") or {}).get("fraction")
    scale = Scale(**before["scale"]) if before and "scale" in before else None
    images, report = read_images("data", options, before, default, settings, path, scale, fraction)
    if report.origin and not before:
        say(report.origin)
    if before and sorted(metadata["classes"]) != sorted(report.classes):
        raise ValueError(
            f"{path} was trained with the classes {', '.join(metadata['classes'])}, and {report.source} has "
            f"{', '.join(report.classes)}; choose another --model to start a new run"
        )
    metadata["classes"] = metadata["classes"] if before else report.classes
    images.labels = match_classes(images.labels, report.classes, metadata["classes"])
    images, held_out = choose_validation(images, options, settings, metadata, path, report.scale)
    settings["bit_depth"] = 8 if report.scale.levels == 255 else 16
    now = images.facts(report.source)
    if held_out and metadata["validation"]["digest"] == now["digest"]:
        say("the held-out images are the training images, so their loss cannot show overfitting; choose others")
    if not before or "scale" in before:
        now["scale"] = dataclasses.asdict(report.scale)
    if before and not same_images("data", now, before, path, options):
        metadata["progress"].update(images=0, epoch_steps=0, loss=0.0, seconds=0.0)  # the epoch begins anew
        settings["flip"] = options.get("flip")

    metadata["data"] = now
    if settings["flip"] is None:
        settings["flip"] = report.photographs
        if sentence := advice.on_flip(settings):
            say(sentence)
    if settings["n_epochs"] is None:
        settings["n_epochs"] = max(1, STEPS[settings["preset"]] // math.ceil(now["count"] / settings["batch_size"]))
    if settings["sample_every"] is None:
        settings["sample_every"] = math.ceil(settings["n_epochs"] / 2)
    return images, held_out


def choose_validation(
    images: Images, options: dict, settings: dict, metadata: dict, path: str, scale: Scale
) -> tuple[Images, Images | None]:
    """Training images, and held-out ones: a fraction of the images, images of another source, or None."""
    before, typed, count = metadata.get("validation"), options.get("validation"), len(images.images)
    fraction = as_fraction(typed) if typed is not None else before and before["fraction"]
    if "data" in metadata and fraction != (before and before["fraction"]):
        how = f"with --validation {describe_validation(before)}" if before else "without --validation"
        raise ValueError(
            f"{path} was trained {how}, not with {typed}, and the held-out images cannot change; omit --validation to "
            "resume, or choose another --model to start a new run"
        )
    source = None
    if fraction is not None:
        if not 0 < fraction < 1 or not 0 < round(fraction * count) < count:
            raise ValueError(
                f"--validation must be a fraction that leaves images both to train on and to hold out, got {typed} of "
                f"{count:,} images"
            )
        parts = filter(lambda part: part is not None, (images.images, images.labels))
        both = (split_held_out(part, fraction, settings["seed"]) for part in parts)
        images, held_out = (Images(*side) for side in zip(*both, strict=True))
    elif typed is not None or before:
        held_out, report = read_images("validation", options, before, None, settings, path, scale)
        source = report.source
        if unknown := [name for name in report.classes if name not in set(metadata["classes"])]:
            raise ValueError(
                f"--validation {source} has the classes {', '.join(unknown)}, and the training images have only "
                f"{', '.join(metadata['classes'])}; choose images of those classes"
            )
        held_out.labels = match_classes(held_out.labels, report.classes, metadata["classes"])
    else:
        return images, None
    now = {"fraction": fraction, **held_out.facts(source)}
    if before and before["fraction"] is None:
        same_images("validation", now, before, path, options)
    metadata["validation"] = now
    settings["validation"] = describe_validation(now)
    return images, held_out


def describe_validation(validation: dict) -> str:
    """The value of `--validation` that stands for this: a fraction or a source."""
    return str(validation["fraction"] or validation["source"])


def read_images(
    name: str,
    options: dict,
    before: dict | None,
    default: str | None,
    settings: dict,
    path: str,
    scale: Scale | None,
    fraction: float | None = None,
) -> tuple[Images, data.Report]:
    """Images from the source typed as `--data` or `--validation`, else the one in the file, else a default.

    Args:
        before: what the model file stores about them.
        scale: how the training images are stored, None where it is to be found.
        fraction: of the images that was held out, or None; `before` is about the others.
    """

    def recognise(images):
        part = images if fraction is None else split_held_out(images, fraction, settings["seed"])[0]
        return data.digest(part) == before.get("digest")

    source = options.get(name, before["source"] if before else default)
    how = {"image_size": settings["image_size"], "channels": settings["channels"], "classes": settings["classes"]}
    how |= {"bit_depth": settings["bit_depth"] if name == "data" else 8, "scale": scale}
    try:
        images, report = data.load_images(source, recognise=recognise if before else None, **how)
    except FileNotFoundError as error:
        if options.get(name):
            raise
        raise FileNotFoundError(
            f"{path} was trained with --{name} {source}, which no longer exists; if it has moved, give its new place "
            f"with --{name} NEW"
        ) from error
    if str(report):
        say(report)
    return Images(images, report.labels), report


def same_images(name: str, now: dict, before: dict, path: str, options: dict) -> bool:
    """Whether a source holds the images that the model was trained with.

    Raises:
        ValueError: if it does not and `--new-data` was not given.
    """
    if all(now.get(name) == before.get(name, now.get(name)) for name in ("digest", "labels")):
        return True
    if not options.get("new_data"):
        count = f"{before['count']:,}"
        labels = ", other labels" if now["digest"] == before["digest"] else ""
        raise ValueError(
            f"{path} was trained with --{name} {before['source']} ({count} images), not with what is now in "
            f"{now['source']} ({now['count']:,}{labels}); if they have moved, give their new place with --{name} NEW, "
            "add --new-data to resume with other images, or choose another --model to start a new run"
        )
    return False
