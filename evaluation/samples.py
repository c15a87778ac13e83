"""What a model generates: samples, and their statistics compared with held-out and training images."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Collection, Sequence

import numpy as np

import data
from ddpm import to_pixels
from diffusion.model_file import TrainedModel, fingerprint
from diffusion.options import Sampling
from diffusion.reverse import ReverseSteps, even_batches
from diffusion.sampling import make_plan, sample
from evaluation import metrics
from evaluation.features import KNOWN
from evaluation.inputs import SAMPLE_PARTS
from evaluation.statistics import Statistics, gather_statistics, save_statistics
from support import console, files, grids
from support.console import say
from support.worker import Worker

SAVE_EVERY = 60  # seconds between two writes of the cached samples, which grow to hundreds of megabytes
BLOCK = 1024  # images whose features are held at once where their statistics suffice
PUBLISHED = 50_000  # samples of which FIDs are published


def generate_samples(
    trained: TrainedModel,
    weaker: TrainedModel | None,
    *,
    n_sample: int,
    sampling: Sampling,
    cache: str | None,
    worker: Worker | None = None,
) -> np.ndarray | None:
    """Samples images, uint8, in batches that are cached in a file as they come, unless `cache` is None.

    Args:
        weaker: a model that guides it, see `diffusion.denoiser.autoguided`.
        sampling: how, see `TrainedModel.choose`.
        cache: how the path of the file begins.
        worker: one of several processes that share the images; all but the first get None.
    """
    worker, path = worker or Worker(), cache and samples_path(cache, sampling, weaker)
    samples = np.load(path) if path and os.path.exists(path) else np.empty((0, *trained.image_shape), np.uint8)
    start, plan = worker.from_first(len(samples)), make_plan(trained.sched, sampling)
    turns, batch_size = even_batches(trained.network, max(1, math.ceil((n_sample - start) / worker.count)))
    reverse = ReverseSteps(trained, batch_size, sampling.clip, weaker=weaker)
    n_calls, place = len(plan.times) - 1, {int(t): k for k, t in enumerate(plan.times)}
    bar = console.Bar(turns * batch_size * n_calls, "step")
    saved, saved_at = start, time.monotonic()
    try:
        for turn, begin in enumerate(range(start, n_sample, batch_size * worker.count)):  # a batch for each worker
            first = begin + batch_size * worker.index
            for t, x_t in sample(reverse, plan, 0, range(first, first + batch_size)):
                bar.update(batch_size * (turn * n_calls + place[t]))
            samples = np.concatenate([samples, *(worker.gather(to_pixels(x_t).astype(np.uint8)) or [])])
            if worker.first and path and time.monotonic() > saved_at + SAVE_EVERY:
                files.save_array(samples, path)
                saved, saved_at = len(samples), time.monotonic()
    finally:
        if worker.first and path and len(samples) > saved:
            files.save_array(samples, path)  # a later run resumes from here
    return samples[:n_sample] if worker.first else None


def samples_path(cache: str, sampling: Sampling, weaker: TrainedModel | None) -> str:
    """Where samples are cached, see `generate_samples`."""
    guide = f"{fingerprint(weaker)}-" if weaker else ""
    return f"{cache}-{sampling.file_name()}{guide}samples.npy"


def sample_rows(
    samples: np.ndarray,
    training: np.ndarray | None,
    held_out: np.ndarray | None,
    extract: Callable[..., np.ndarray],
    *,
    features: str,
    parts: Collection[str],
    figure: str | None = None,
    cache: str | None = None,
    shown: Sequence[int] | None = None,
    statistics: Statistics | None = None,
    save_to: str | None = None,
) -> dict[str, dict]:
    """Rows: distances between samples and held-out images, and how near both are to training images.

    Args:
        samples, training, held_out: uint8 (n, height, width, channels).
        training: needed for copies and the figure only.
        held_out: None if only the FID is measured, and `statistics` are given.
        extract: see `features.extractor`.
        features: its name.
        parts: what is measured: fid, kid, frechet, precision, recall, copies.
        figure: where to draw the nearest images, if anywhere.
        shown: the channels that networks and the figure see, of images with other than 1 or 3, see `grids.visible`.
        cache: a path beside which features of training images are cached, also for other models of these images.
        statistics: of real images, for the FID instead of those of the held-out images.
        save_to: where to write the statistics of the held-out images, if anywhere.
    """

    def extract_visible(images, show):
        return extract(images if features == "pixels" else grids.visible(images, shown), show)

    @contextlib.contextmanager
    def progress(images, what):
        say(f"{features}: features of {len(images):,} {what}")
        start = time.monotonic()
        yield console.Bar(len(images), "image").update
        say(f"{len(images) / (time.monotonic() - start):,.1f} images per second")

    def compute(images, what, path=None):
        if path and os.path.exists(path):
            return np.load(path).astype(np.float64)
        with progress(images, what) as show:
            computed = extract_visible(images, show)
        if path:
            files.save_array(computed.astype(np.float32), path)
        return computed

    def summarise(images, what, computed):
        if computed is not None:
            return gather_statistics([computed])
        with progress(images, what) as show:
            starts = range(0, len(images), BLOCK)
            return gather_statistics(
                extract_visible(images[first : first + BLOCK], lambda done, first=first: show(first + done))
                for first in starts
            )

    sample_features = held_out_features = None
    if figure or not set(SAMPLE_PARTS).difference({"fid"}).isdisjoint(parts):
        sample_features, held_out_features = compute(samples, "samples"), compute(held_out, "held-out images")
    rows = {}
    if "fid" in parts:
        real = statistics or summarise(held_out, "held-out images", held_out_features)
        if save_to:
            save_statistics(real, save_to)
            say(f"{save_to}: statistics of {len(held_out):,} images")
        distance = metrics.frechet_distance(real, summarise(samples, "samples", sample_features))
        remark = f"of {len(samples):,} samples" + ("" if statistics else f" and {len(held_out):,} images")
        if len(samples) < PUBLISHED or not statistics and len(held_out) < PUBLISHED:
            remark += f"; published FIDs are of {PUBLISHED:,} of each"
        rows["FID"] = {"value": float(distance), "remark": remark}
    if sample_features is not None:
        rows |= distance_rows(held_out_features, sample_features, features, parts)
    if "copies" in parts or figure:
        mirrored = samples[:, :, ::-1]
        mirrored_features = compute(mirrored, "mirrored samples")
        training_features = compute(training, "training images", features_path(cache, training, features))
        pixels = [images.reshape(len(images), -1) / 255.0 for images in (samples, training, held_out, mirrored)]
        extracted = [sample_features, training_features, held_out_features, mirrored_features]
        if "copies" in parts:
            rows |= copy_rows("exact pixels", *pixels) | copy_rows(features, *extracted)
        if figure:
            save_nearest_figure(samples[:8], training, held_out, extracted, figure, shown)
    return rows


def distance_rows(
    real_features: np.ndarray, sample_features: np.ndarray, features: str, parts: Collection[str]
) -> dict[str, dict]:
    """Rows: the distances among `parts` with their standard errors, from arrays of the named features."""
    few = min(len(sample_features), len(real_features))
    remarks = {
        "kid": "around 0 for the same distribution" + ("; below 500 images mostly noise" if few < 500 else ""),
        "frechet": f"of {few} images" + ("; fewer than dimensions" if few < sample_features.shape[1] else ""),
        "precision": "fraction of samples among the real images",
        "recall": "fraction of the real images among samples",
    }
    rows = {}
    for name, remark in remarks.items():
        if name in parts:
            value, error = metrics.with_error(getattr(metrics, name), real_features, sample_features)
            rows[f"{name}, {features}"] = {"value": float(value), "error": float(error), "remark": remark}
    return rows


def features_path(cache: str | None, images: np.ndarray, name: str) -> str | None:
    """Where features of images are cached: beside `cache` if the extractor is a fixed one, else nowhere, None."""
    if not cache or name not in KNOWN:
        return None
    return os.path.join(os.path.dirname(cache), f"{data.digest(images)[:8]}-{name}-features.npy")


def copy_rows(space: str, *features: np.ndarray) -> dict[str, dict]:
    """Rows: nearness to training images and near-copies in a feature space; arguments as for `metrics.copy_ratios`."""
    ratios, fraction = metrics.copy_ratios(*features)
    quantiles = {f"{q} %": float(np.percentile(ratios, q)) for q in (5, 25, 75, 95)}
    remark = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in quantiles.items())
    error = float((fraction * (1 - fraction) / len(ratios)) ** 0.5) or None  # unknown, not 0, if none or all are copies
    return {
        f"nearness to training, {space}": {
            "value": float(np.median(ratios)),
            "quantiles": quantiles,
            "remark": f"median ratio, 1 without copying; {remark}",
        },
        f"near-copies, {space}": {"value": float(fraction), "error": error, "remark": "fraction of samples"},
    }


def save_nearest_figure(
    samples: np.ndarray,
    training: np.ndarray,
    held_out: np.ndarray,
    features: Sequence[np.ndarray],
    path: str,
    shown: Sequence[int] | None = None,
) -> None:
    """Writes an image of samples, below each its nearest training image, and below that its nearest held-out one.

    Images are mirrored where that is nearer.

    Args:
        samples, training, held_out: images; there may be fewer samples than features of samples.
        features: of samples, training images, held-out images and mirrored samples.
    """
    sample_features, training_features, held_out_features, mirrored_features = features
    drawn = slice(len(samples))
    rows = [samples]
    for images, candidates in (training, training_features), (held_out, held_out_features):
        index, _, flipped = metrics.nearest_either_way(sample_features[drawn], mirrored_features[drawn], candidates)
        rows.append(np.where(flipped[:, None, None, None], images[index, :, ::-1], images[index]))
    grids.save_grid(np.concatenate(rows), path, columns=len(samples), shown=shown)
    say(f"{path}: samples, below them the nearest training images, then the nearest held-out ones")
