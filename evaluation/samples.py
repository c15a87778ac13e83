"""What a model generates: samples, and their statistics beside held-out and training images."""

import os

import numpy as np

from ddpm import ddpm_schedule, n_steps, to_pixels
from diffusion.sampling import sample
from evaluation import metrics
from support import console, files
from support.console import say
from support.execution import ReverseSteps, even_batches


def generate_samples(model, book, options, kept):
    """Images of the model, uint8, made in batches that are cached in a file as they come, unless `kept` is None."""
    shape = model.inputs[0].shape[1:]
    path = kept and f"{kept}-samples.npy"
    samples = np.load(path) if path and os.path.exists(path) else np.empty((0, *shape), np.uint8)
    start, sched = len(samples), ddpm_schedule(**book["diffusion"])
    T = n_steps(sched)
    batches, batch_size = even_batches(model, max(1, options.n_sample - start))
    steps = ReverseSteps(model, sched, batch_size)
    bar = console.Bar(batches * batch_size * T, "step")
    for first in range(start, options.n_sample, batch_size):
        for t, x_t in sample(steps, sched, 0, range(first, first + batch_size)):
            bar.update((first - start) * T + batch_size * (T - t))
        samples = np.concatenate([samples, to_pixels(x_t).astype(np.uint8)])
        if path:
            files.save_array(samples, path)  # a later run goes on from here
    return samples[: options.n_sample]


def sample_rows(samples, training, held_out, extract, options):
    """Distances between samples and held-out pictures, and from both to the training pictures."""

    def features_of(images, what):
        say(f"{options.features}: features of {len(images):,} {what}")
        return extract(images, console.Bar(len(images), "picture").update)

    of_made, of_held_out = features_of(samples, "samples"), features_of(held_out, "held-out pictures")
    few = min(len(samples), len(held_out))
    remarks = {
        "kid": "around 0 for the same kind" + ("; below 500 pictures mostly noise" if few < 500 else ""),
        "frechet": f"of {few} pictures" + ("; fewer than dimensions" if few < of_made.shape[1] else ""),
        "precision": "share of samples among the real",
        "recall": "share of the real among samples",
    }
    rows = {}
    for name, remark in remarks.items():
        if name in options.only:
            value, error = metrics.with_error(getattr(metrics, name), of_held_out, of_made)
            rows[f"{name}, {options.features}"] = {"value": float(value), "error": float(error), "remark": remark}
    if "copies" in options.only or options.figure:
        mirrored = samples[:, :, ::-1]
        of_mirrored, of_training = features_of(mirrored, "mirrored samples"), features_of(training, "training pictures")
        flat = [images.reshape(len(images), -1) / 255.0 for images in (samples, training, held_out, mirrored)]
        spaces = {"pixels": flat, options.features: (of_made, of_training, of_held_out, of_mirrored)}
        for space, of_all in spaces.items():
            if "copies" in options.only:
                ratios, share = metrics.copy_ratios(*of_all)
                quantiles = {f"{q} %": float(np.percentile(ratios, q)) for q in (5, 25, 75, 95)}
                rows[f"nearness to training, {space}"] = {
                    "value": float(np.median(ratios)),
                    "quantiles": quantiles,
                    "remark": "median ratio, 1 without copying; "
                    + ", ".join(f"{name}: {ratio:.2f}" for name, ratio in quantiles.items()),
                }
                error = float((share * (1 - share) / len(samples)) ** 0.5)
                rows[f"near-copies, {space}"] = {"value": float(share), "error": error, "remark": "share of samples"}
        if options.figure:
            save_nearest_figure(samples[:8], training, held_out, spaces[options.features], options.figure)
    return rows


def save_nearest_figure(samples, training, held_out, spaces, path):
    """An image of samples, under each its nearest training image, and under that its nearest held-out one.

    Mirrored ones are shown as they are nearest.
    """
    of_made, of_training, of_held_out, of_mirrored = spaces
    rows = [samples]
    for images, features in (training, of_training), (held_out, of_held_out):
        some = slice(len(samples))
        index, _, flipped = metrics.nearest_either_way(of_made[some], of_mirrored[some], features)
        rows.append(np.where(flipped[:, None, None, None], images[index, :, ::-1], images[index]))
    files.save_grid(np.concatenate(rows), path, columns=len(samples))
    say(f"{path}: samples, below them the nearest training pictures, then the nearest held-out ones")
