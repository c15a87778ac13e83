"""The images that an evaluation needs: held-out ones, those trained on, and samples."""

import argparse
import hashlib
from collections.abc import Callable

import keras
import numpy as np

import data
from data.splits import split_held_out
from evaluation.features import extractor
from evaluation.metrics import random_subset
from support.console import say

OF_SAMPLES = ("kid", "frechet", "precision", "recall", "copies")  # parts of an evaluation that need samples
FEWEST = 20  # images in a set: statistics of fewer mean nothing


def load_inputs(
    model: keras.Model, book: dict, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, Callable | None]:
    """Reads all images that the requested parts need, so that what is missing is reported before the long work.

    Returns:
        Held-out images, training images, given samples, and the feature extractor; the last three may be None.
    """
    shape, only = model.inputs[0].shape[1:], set(options.only)

    def load(source, recognise=None):
        return data.load_images(source, shape[0], shape[2], recognise=recognise)[0]

    held_out, training = load_images(load, book, options)
    held_out = random_subset(held_out, options.count)
    say(f"{options.model}: {book['progress']['step']:,} steps on {book['data']['source']}; {options.data}: "
        f"{len(held_out):,} images")  # fmt: skip
    if training is not None and (known := count_known(held_out, training)):
        say(f"{known:,} of the {len(held_out):,} held-out images are among the training images; "
            "results are better than for new ones")  # fmt: skip

    with_samples = set(OF_SAMPLES) & only or options.figure
    samples = random_subset(load(options.samples), options.n_sample) if with_samples and options.samples else None
    of_sets = ", ".join(name for name in ("kid", "frechet", "precision", "recall") if name in only)
    for option, images in ("--data", held_out), ("--samples", samples):
        if of_sets and images is not None and len(images) < FEWEST:
            raise ValueError(
                f"{option} has {len(images)} images, and {of_sets} need at least {FEWEST}; see --only for the rest"
            )
    return held_out, training, samples, extractor(options.features) if with_samples else None


def load_images(
    load: Callable[..., np.ndarray], book: dict, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray | None]:
    """Held-out images, and training images, or None if those are neither needed nor available."""
    needed = {"overfitting", "copies"} & set(options.only) or options.figure or options.train
    held_out, training = load_held_out(load, book, options)
    if training is None:
        try:
            training, _ = load_training(load, book, options)
        except (ValueError, OSError):
            if needed:
                raise
            # Even without them it is known whether `--data` is their whole source.
            part, _, same = split_as_in_training(held_out, book)
            training = part if same else None
    return held_out, training


def held_out_by_training(book: dict) -> tuple[float | None, str | None, str | None]:
    """What training held out: a fraction of its images, or another source, and a digest; None for what is unknown.

    Files of earlier versions hold only the text of the option `--validation`.
    """
    noted = book.get("validation")
    if noted:
        return noted.get("fraction"), noted.get("source"), noted.get("digest")
    text = book["settings"].get("validation")
    try:
        return float(text), None, None
    except (TypeError, ValueError):
        return None, text, None


def split_as_in_training(images: np.ndarray, book: dict) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Splits all images of a source as training did.

    Returns:
        Training images, held-out ones or None, and whether the former are those that the model was trained on.
    """
    (fraction, _, _), trained_on = held_out_by_training(book), book["data"]["digest"]
    if fraction is None or data.digest(images) == trained_on:  # the latter: the source is the training part alone
        training, held_out = images, None
    else:
        training, held_out = split_held_out(images, fraction, book["settings"]["seed"])
    return training, held_out, data.digest(training) == trained_on


def load_training(
    load: Callable[..., np.ndarray], book: dict, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray | None]:
    """The images that the model was trained on, and those of the same source that were held out, or None.

    Raises:
        ValueError, FileNotFoundError: if they are not where they were, or have changed, and `--train` names no others.
    """
    source, advice = book["data"]["source"], "name the training images with --train SOURCE"
    try:
        images = load(options.train or source, lambda images: split_as_in_training(images, book)[2])
        training, held_out, same = split_as_in_training(images, book)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {advice}") from error
    if not same and not options.train:
        raise ValueError(f"the training images in {source} have changed or moved since training; {advice}")
    if not same and options.data == "held-out" and held_out is not None:
        raise ValueError(
            f"the images in {options.train} are not those that the model was trained on, so which of them were held "
            "out is not known; name held-out images with --data SOURCE"
        )
    if not same:
        say(f"{options.train}: not the images that the model was trained on")
    return training, held_out


def load_held_out(
    load: Callable[..., np.ndarray], book: dict, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray | None]:
    """Held-out images, and, if they come from the same source, the training images, else None.

    Raises:
        ValueError, FileNotFoundError: if training held out none, or they are not where they were, or have changed.
    """
    if options.data != "held-out":
        return load(options.data), None
    fraction, source, expected = held_out_by_training(book)
    if fraction is None and source is None:
        raise ValueError(
            f"{options.model} was trained without --validation, so no images were held out; name others with --data "
            "SOURCE (./held-out for a folder of that name)"
        )
    advice = "name the held-out images with --data SOURCE"
    if source is None:
        training, held_out = load_training(load, book, options)
    else:
        try:
            training, held_out = None, load(source, lambda images: data.digest(images) == expected)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {advice}") from error
    if held_out is None or expected not in (None, data.digest(held_out)):
        where = source or options.train or book["data"]["source"]
        raise ValueError(f"the images that training held out are not those in {where} now; {advice}")
    return held_out, training


def count_known(images: np.ndarray, training: np.ndarray) -> int:
    """The number of images that are, pixel for pixel, among the training images."""
    known = {hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in training}
    return sum(hashlib.blake2b(image.tobytes(), digest_size=16).digest() in known for image in images)
