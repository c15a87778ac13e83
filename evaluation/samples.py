"""What a model generates: samples, and their statistics compared with held-out and training images."""

import argparse
import os
from collections.abc import Callable

import keras
import numpy as np

import data
from ddpm import to_pixels
from diffusion import model_file
from diffusion.reverse import ReverseSteps, even_batches
from diffusion.sampling import make_plan, sample
from evaluation import metrics
from evaluation.features import KNOWN
from support import console, files
from support.console import say


def generate_samples(
    model: keras.Model, weaker: keras.Model | None, options: argparse.Namespace, cache: str | None
) -> np.ndarray:
    """Samples images, uint8, in batches that are cached in a file as they come, unless `cache` is None.

    Args:
        model: with metadata.
        weaker: a model that guides it, see `diffusion.denoiser.autoguided`.
        options: of `evaluate.py`, with the arguments of `make_plan` as `how`.
        cache: how the path of the file begins.
    """
    shape = model.inputs[0].shape[1:]
    how = options.how
    path = cache and samples_path(cache, how, weaker)
    samples = np.load(path) if path and os.path.exists(path) else np.empty((0, *shape), np.uint8)
    start, (sched, target) = len(samples), model_file.diffusion_of(model)
    plan = make_plan(sched, **how)
    batches, batch_size = even_batches(model, max(1, options.n_sample - start))
    of_weaker = weaker and (weaker, model_file.diffusion_of(weaker)[1])
    steps = ReverseSteps(model, sched, batch_size, target, weaker=of_weaker)
    S, place = len(plan.times) - 1, {int(t): k for k, t in enumerate(plan.times)}
    bar = console.Bar(batches * batch_size * S, "step")
    for first in range(start, options.n_sample, batch_size):
        for t, x_t in sample(steps, plan, 0, range(first, first + batch_size)):
            bar.update((first - start) * S + batch_size * place[t])
        samples = np.concatenate([samples, to_pixels(x_t).astype(np.uint8)])
        if path:
            files.save_array(samples, path)  # a later run resumes from here
    return samples[: options.n_sample]


def samples_path(cache: str, how: dict, weaker: keras.Model | None) -> str:
    """Where samples are cached, see `generate_samples`."""
    guide = f"{model_file.fingerprint(weaker)}-" if weaker else ""
    return f"{cache}-{sampler_name(**how)}{guide}samples.npy"


def sampler_name(
    sampler: str,
    steps: int | None,
    spacing: str | None,
    eta: float,
    variance: str,
    corrector: int,
    snr: float,
    guidance: float,
    guidance_interval: tuple[int, int] | None,
) -> str:
    """What files of samples are called after: nothing for the default, `ddim-50-` for 50 steps of DDIM and so on."""
    parts = [sampler if sampler != "ddpm" else "", variance if variance != "beta" else "", str(steps or ""),
             spacing or "", f"eta{eta}" if eta else "",
             f"corrector{corrector}-{snr}" if corrector else "",
             f"guidance{guidance}" if guidance != 1 else "",
             "-".join(map(str, guidance_interval)) if guidance_interval and guidance != 1 else ""]  # fmt: skip
    return "".join(f"{part}-" for part in parts if part)


def sample_rows(
    samples: np.ndarray,
    training: np.ndarray | None,
    held_out: np.ndarray,
    extract: Callable[..., np.ndarray],
    options: argparse.Namespace,
    cache: str | None = None,
) -> dict[str, dict]:
    """Rows: distances between samples and held-out images, and how near both are to training images.

    Args:
        samples, training, held_out: uint8 (n, height, width, channels).
        extract: see `features.extractor`.
        options: of `evaluate.py`.
        cache: a path, in whose folder features of training images are kept for other models of them; None for nowhere.
    """

    def features_of(images, what, path=None):
        if path and os.path.exists(path):
            return np.load(path).astype(np.float64)
        say(f"{options.features}: features of {len(images):,} {what}")
        found = extract(images, console.Bar(len(images), "image").update)
        if path:
            files.save_array(found.astype(np.float32), path)
        return found

    of_samples, of_held_out = features_of(samples, "samples"), features_of(held_out, "held-out images")
    few = min(len(samples), len(held_out))
    remarks = {
        "kid": "around 0 for the same distribution" + ("; below 500 images mostly noise" if few < 500 else ""),
        "frechet": f"of {few} images" + ("; fewer than dimensions" if few < of_samples.shape[1] else ""),
        "precision": "fraction of samples among the real images",
        "recall": "fraction of the real images among samples",
    }
    rows = {}
    for name, remark in remarks.items():
        if name in options.only:
            value, error = metrics.with_error(getattr(metrics, name), of_held_out, of_samples)
            rows[f"{name}, {options.features}"] = {"value": float(value), "error": float(error), "remark": remark}
    if "copies" in options.only or options.figure:
        mirrored = samples[:, :, ::-1]
        of_mirrored = features_of(mirrored, "mirrored samples")
        of_training = features_of(training, "training images", features_path(cache, training, options.features))
        flat = [images.reshape(len(images), -1) / 255.0 for images in (samples, training, held_out, mirrored)]
        spaces = {"exact pixels": flat, options.features: (of_samples, of_training, of_held_out, of_mirrored)}
        if "copies" in options.only:
            for space, all_features in spaces.items():
                rows |= copy_rows(space, *all_features)
        if options.figure:
            save_nearest_figure(samples[:8], training, held_out, spaces[options.features], options.figure)
    return rows


def features_path(cache: str | None, images: np.ndarray, name: str) -> str | None:
    """Where features of images are kept: beside `cache`, if they are of a network that cannot change; else None."""
    if not cache or name not in KNOWN:
        return None
    return os.path.join(os.path.dirname(cache), f"{data.digest(images)[:8]}-{name}-features.npy")


def copy_rows(space: str, *all_features: np.ndarray) -> dict[str, dict]:
    """Rows: nearness to training images and near-copies, in the features of that name; see `metrics.copy_ratios`."""
    ratios, fraction = metrics.copy_ratios(*all_features)
    quantiles = {f"{q} %": float(np.percentile(ratios, q)) for q in (5, 25, 75, 95)}
    remark = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in quantiles.items())
    error = float((fraction * (1 - fraction) / len(ratios)) ** 0.5) or None  # none or all: it is not 0
    return {
        f"nearness to training, {space}": {
            "value": float(np.median(ratios)), "quantiles": quantiles,
            "remark": f"median ratio, 1 without copying; {remark}",
        },
        f"near-copies, {space}": {"value": float(fraction), "error": error, "remark": "fraction of samples"},
    }  # fmt: skip


def save_nearest_figure(
    samples: np.ndarray, training: np.ndarray, held_out: np.ndarray, all_features: tuple, path: str
) -> None:
    """Writes an image of samples, below each its nearest training image, and below that its nearest held-out one.

    Images are mirrored where that is nearer.
    """
    of_samples, of_training, of_held_out, of_mirrored = all_features
    rows = [samples]
    for images, features in (training, of_training), (held_out, of_held_out):
        some = slice(len(samples))
        index, _, flipped = metrics.nearest_either_way(of_samples[some], of_mirrored[some], features)
        rows.append(np.where(flipped[:, None, None, None], images[index, :, ::-1], images[index]))
    files.save_grid(np.concatenate(rows), path, columns=len(samples))
    say(f"{path}: samples, below them the nearest training images, then the nearest held-out ones")
