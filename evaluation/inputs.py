"""The images that an evaluation needs: held-out ones, those trained on, and samples."""

import dataclasses
import hashlib
from collections.abc import Callable, Collection

import numpy as np

import data
from data.named import find_held_out
from data.splits import split_held_out
from diffusion.model_file import TrainedModel
from evaluation.features import extractor
from evaluation.metrics import random_subset
from support.console import say

DISTANCES = ("fid", "kid", "frechet", "precision", "recall")  # parts of an evaluation that compare samples with images
SAMPLE_PARTS = (*DISTANCES, "copies")  # parts that need samples
FEWEST = 20  # images in a set: statistics of fewer mean nothing


@dataclasses.dataclass(frozen=True)
class Sources:
    """The model that is evaluated, and where its images are read from.

    Attributes:
        model: path of its file.
        data: held-out images; `'held-out'` for what training held out, else the test part of a named set; None if no
            part needs them.
        train: training images; None for the source that the metadata names.
        samples: samples of the model; None if they are to be generated.
    """

    model: str
    data: str | None
    train: str | None = None
    samples: str | None = None


def load_inputs(
    trained: TrainedModel,
    sources: Sources,
    *,
    parts: Collection[str],
    figure: bool,
    features: str,
    count: int,
    n_sample: int,
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, Callable | None]:
    """Reads all images that the requested parts need, so that what is missing is reported before the long work.

    Args:
        trained: the model, with the metadata of its training.
        parts: what is measured, see `evaluate.PARTS`.
        figure: whether the nearest images are drawn.
        features: the name of a feature extractor.
        count, n_sample: the largest numbers of held-out images and of samples; others are left out at random.

    Returns:
        Held-out images, training images, given samples, and the feature extractor; each may be None.
    """
    metadata, own = trained.metadata, trained.scale

    def load(source, recognise=None, scale=own):
        *size, channels = trained.image_shape
        return data.load_images(source, size, channels, recognise=recognise, scale=scale)[0]

    compare_training = figure or not {"overfitting", "copies"}.isdisjoint(parts)
    held_out = training = None
    steps = f"{metadata['progress']['step']:,} steps on {metadata['data']['source']}"
    if sources.data is None:
        say(f"{sources.model}: {steps}")
    else:
        held_out, training = load_images(load, metadata, sources, training_needed=compare_training)
        held_out = random_subset(held_out, count)
        say(f"{sources.model}: {steps}; {sources.data}: {len(held_out):,} images")
    if training is not None and (known := count_known(held_out, training)):
        among = f"{known:,} of the {len(held_out):,} held-out images are among the training images"
        say(f"{among}, which makes results look better than for new images")

    with_samples = figure or not set(SAMPLE_PARTS).isdisjoint(parts)
    samples = random_subset(load(sources.samples, scale=None), n_sample) if with_samples and sources.samples else None
    distances = ", ".join(name for name in DISTANCES if name in parts)
    for option, images in ("--data", held_out), ("--samples", samples):
        if distances and images is not None and len(images) < FEWEST:
            raise ValueError(
                f"{option} has {len(images)} images, and {distances} need at least {FEWEST}; give more images, or "
                "choose other parts with --only"
            )
    return held_out, training, samples, extractor(features) if with_samples else None


def load_images(
    load: Callable[..., np.ndarray], metadata: dict, sources: Sources, training_needed: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Held-out images, and training images, or None if these are neither needed nor available."""
    held_out, training = load_held_out(load, metadata, sources)
    if training is None:
        try:
            training, _ = load_training(load, metadata, sources)
        except (ValueError, OSError):
            if training_needed or sources.train:
                raise
            # Even without them it is known whether `--data` is their whole source.
            part, _, same = split_as_in_training(held_out, metadata)
            training = part if same else None
    return held_out, training


def held_out_by_training(metadata: dict) -> tuple[float | None, str | None, str | None]:
    """What training held out: a fraction of its images, or another source, and a digest; None for what is unknown.

    Files of earlier versions hold only the text of the option `--validation`.
    """
    noted = metadata.get("validation")
    if noted:
        return noted.get("fraction"), noted.get("source"), noted.get("digest")
    text = metadata["settings"].get("validation")
    try:
        return float(text), None, None
    except (TypeError, ValueError):
        return None, text, None


def split_as_in_training(images: np.ndarray, metadata: dict) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Splits all images of a source as training did.

    Returns:
        Training images, held-out ones or None, and whether the model was trained on exactly these training images.
    """
    (fraction, _, _), trained_on = held_out_by_training(metadata), metadata["data"]["digest"]
    if fraction is None or data.digest(images) == trained_on:  # the source is the training part alone
        training, held_out = images, None
    else:
        training, held_out = split_held_out(images, fraction, metadata["settings"]["seed"])
    return training, held_out, data.digest(training) == trained_on


def load_training(
    load: Callable[..., np.ndarray], metadata: dict, sources: Sources
) -> tuple[np.ndarray, np.ndarray | None]:
    """The images that the model was trained on, and the held-out ones if they come from the same source, else None.

    Raises:
        ValueError, FileNotFoundError: if they have moved or changed, and `--train` names no others.
    """
    source, advice = metadata["data"]["source"], "name the training images with --train SOURCE"
    try:
        images = load(sources.train or source, lambda images: split_as_in_training(images, metadata)[2])
        training, held_out, same = split_as_in_training(images, metadata)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {advice}") from error
    if not same and not sources.train:
        raise ValueError(f"the training images in {source} have changed or moved since training; {advice}")
    if not same and sources.data == "held-out" and held_out is not None:
        raise ValueError(
            f"{sources.train} does not hold the images that the model was trained on, so its held-out part is unknown; "
            "name held-out images with --data SOURCE"
        )
    if not same:
        say(f"{sources.train}: these are not the images that the model was trained on")
    return training, held_out


def load_held_out(
    load: Callable[..., np.ndarray], metadata: dict, sources: Sources
) -> tuple[np.ndarray, np.ndarray | None]:
    """Held-out images, and, if they come from the same source, the training images, else None.

    Raises:
        ValueError, FileNotFoundError: if training held out none, or they have moved or changed.
    """
    if sources.data != "held-out":
        return load(sources.data), None
    fraction, source, expected = held_out_by_training(metadata)
    if fraction is None and source is None and (source := find_held_out(metadata["data"]["source"])):
        say(f"held-out images: {source}")
    if fraction is None and source is None:
        raise ValueError(
            f"{sources.model} was trained without --validation, so no images were held out; name others with --data "
            "SOURCE (./held-out for a folder of that name)"
        )
    advice = "name the held-out images with --data SOURCE"
    if source is None:
        training, held_out = load_training(load, metadata, sources)
    else:
        try:
            training, held_out = None, load(source, lambda images: data.digest(images) == expected)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {advice}") from error
    if held_out is None or expected not in (None, data.digest(held_out)):
        where = source or sources.train or metadata["data"]["source"]
        raise ValueError(f"{where} no longer holds the images that training held out; {advice}")
    return held_out, training


def count_known(images: np.ndarray, training: np.ndarray) -> int:
    """The number of images that are, pixel for pixel, among the training images."""
    known = {hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in training}
    return sum(hashlib.blake2b(image.tobytes(), digest_size=16).digest() in known for image in images)
