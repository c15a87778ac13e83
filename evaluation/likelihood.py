"""Likelihood: bits per dimension of the variational bound, loss by t, and signs of overfitting."""

import itertools
import os
from collections.abc import Collection, Sequence

import numpy as np
import tensorflow as tf

import data
from ddpm import Schedule, bound_decoder, bound_prior, bound_term, from_pixels, n_steps, q_sample
from diffusion import reverse
from diffusion.denoiser import Denoiser, clip_estimate
from diffusion.learned_variance import log_ratio
from diffusion.model_file import TrainedModel
from diffusion.targets import comparable_weights
from evaluation.metrics import random_subset
from support import console, device, files
from support.worker import Worker

MEMORISED_BELOW = 0.8  # training loss / held-out loss below this is reported as memorisation
WAYS = [(variance, clip) for variance in ("beta", "posterior") for clip in (True, False)]  # to take a reverse step
LEARNED = [("learned", True), ("learned", False)]  # more ways, if the network has learned the variance


def likelihood_rows(
    trained: TrainedModel,
    held_out: np.ndarray,
    training: np.ndarray | None,
    *,
    parts: Collection[str],
    draws: int,
    cache: str | None,
    worker: Worker | None = None,
) -> dict[str, dict]:
    """Rows: bits per dimension of the bound for all reverse steps, loss in tenths of t, overfitting.

    Args:
        training: needed for overfitting only.
        parts: what is measured: bits, loss, overfitting.
        draws: steps t for each image, see `measure_denoising`.
        cache: how the names of cached results begin; None to cache nothing.
        worker: one of several processes that measure together; None for this process alone.
    """
    sched, batch_size = trained.sched, reverse.even_batches(trained.network, len(held_out))[1]
    denoise = reverse.denoiser_of(trained, device.parts_for(batch_size))
    ways = WAYS + LEARNED * trained.learns_variance

    held_out_path, training_path = measurement_paths(cache) if cache else (None, None)

    def measure(images, path):
        return measure_denoising(denoise, sched, images, draws, batch_size, path, ways, trained.levels, worker)

    on_held_out = measure(held_out, held_out_path)
    remark = f"for values in bins {trained.scale.step:.4g} wide" if trained.levels != 255 else ""
    rows = bound_rows(on_held_out, ways, remark) if "bits" in parts else {}
    rows |= loss_rows(on_held_out, sched, held_out, trained.levels) if "loss" in parts else {}
    if "overfitting" in parts:
        on_training = measure(random_subset(training, len(held_out)), training_path)
        rows |= overfitting_rows(on_training, on_held_out, sched)
    return rows


def measurement_paths(cache: str) -> list[str]:
    """Where measurements of held-out and of training images are cached."""
    return [f"{cache}-bits.npz", f"{cache}-training-bits.npz"]


def bound_rows(
    measurements: dict[str, np.ndarray], ways: Sequence[tuple[str, bool]] = tuple(WAYS), remark: str = ""
) -> dict[str, dict]:
    """Rows: bits per dimension for each of the `ways` that were measured, and L_T."""
    rows, names = {}, {"beta": "β", "posterior": "β̃", "learned": "learned"}
    for (variance, clip), bits in zip(ways, measurements["bits"].T + measurements["prior"], strict=True):
        name = f"bits/dim, {names[variance]}, {'clipped' if clip else 'not clipped'}"
        rows[name] = mean_row(bits, remark)
    rows["… of it L_T"] = mean_row(measurements["prior"], "part of the above: KL divergence of x_T from pure noise")
    return rows


def loss_rows(
    measurements: dict[str, np.ndarray], sched: Schedule, images: np.ndarray, levels: int = 255
) -> dict[str, dict]:
    """Rows: squared error of ε̂ in tenths of t, beside the best that the mean and variance of each pixel allow.

    Both are means over the t that were measured, since the error falls steeply within the first tenth.
    """
    rows, variance = {}, np.var(from_pixels(images, levels), axis=0).ravel()
    for (low, high), here in tenths(measurements, sched).items():
        t, counts = np.unique(measurements["t"][here], return_counts=True)
        alphabar = sched["alphabar_t"][t, None]
        signal = alphabar * variance
        best = np.average(np.mean(signal / (signal + 1 - alphabar), axis=1), weights=counts)
        remark = f"{best:.4f} at best from mean and variance of each pixel alone"
        rows[f"loss, t = {low} … {high}"] = mean_row(measurements["error"], remark, here)
    return rows


def rate_and_distortion(
    measurements: dict[str, np.ndarray], sched: Schedule, intervals: int = 40
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the reverse process knows of an image at each t: bits received until then, and the error of x̂_0 from x_t.

    DDPM, section 4.3 and figure 5. With σ_t² = β̃_t the step from t costs (SNR_{t-1} - SNR_t) ‖x_0 - x̂_0‖² / 2 nats
    (VDM, arXiv 2107.00630, equation 14). The last step, to the pixels, is left out.

    Returns:
        Falling t, (k,); the rate in bits per dimension when x_t is known, the cost of all steps from above t; and the
        distortion, the root mean squared error of x̂_0 in grey levels; all float64.
    """
    T, alphabar = n_steps(sched), sched.alphabar
    here = measurements["t"].ravel()
    error = measurements["error"].ravel().astype(np.float64)
    known = (here > 1) & (alphabar[here] > 0)
    here, error = here[known], error[known]
    squared = error * (1 - alphabar[here]) / alphabar[here]  # of x̂_0
    cost = (alphabar[here - 1] / (1 - alphabar[here - 1]) - alphabar[here] / (1 - alphabar[here])) * squared / 2
    edges = np.unique(np.linspace(1, T, intervals + 1).round().astype(int))
    rows, rate = [], 0.0
    for low, high in reversed(list(zip(edges[:-1], edges[1:], strict=True))):
        inside = (here > low) & (here <= high)
        if inside.any():
            rows.append((high, rate / np.log(2), 127.5 * np.sqrt(squared[inside].mean())))
            rate += cost[inside].mean() * (high - low)
    return tuple(np.array(rows).T)


def overfitting_rows(
    on_training: dict[str, np.ndarray], on_held_out: dict[str, np.ndarray], sched: Schedule
) -> dict[str, dict]:
    """Row: the loss on training images divided by that on held-out ones, both as means over the tenths of t.

    The loss is the error of ε̂ times `targets.comparable_weights`.

    Args:
        on_training, on_held_out: what `measure_denoising` returned.
    """
    measured = [tenths(measurements, sched) for measurements in (on_training, on_held_out)]
    both = measured[0].keys() & measured[1].keys()
    means, errors = [], []
    for measurements, masks in zip((on_training, on_held_out), measured, strict=True):
        weight = comparable_weights(sched.alphabar)[measurements["t"]]
        each = [mean_and_influences(weight * measurements["error"], masks[tenth]) for tenth in both]
        mean, influences = (np.mean(values, axis=0) for values in zip(*each, strict=True))
        means.append(mean)
        errors.append(standard_error(influences) or 0)
    if not any(means):  # as x_T is pure noise and there is no other step
        ratio, error = 1.0, None
    else:
        ratio = float(means[0] / means[1])
        error = ratio * float(np.hypot(errors[0] / means[0], errors[1] / means[1]))
    remark = "the training images are memorised" if ratio < MEMORISED_BELOW else "1 means no memorisation"
    return {"loss, training / held-out": {"value": ratio, "error": error, "remark": remark}}


def tenths(measurements: dict[str, np.ndarray], sched: Schedule) -> dict[tuple[int, int], np.ndarray]:
    """Masks of the measurements in each tenth of 1 … T that has any, by its first and last t."""
    T, masks = n_steps(sched), {}
    for tenth in range(10):
        low, high = 1 + tenth * T // 10, (tenth + 1) * T // 10
        here = (measurements["t"] >= low) & (measurements["t"] <= high)
        if here.any():
            masks[low, high] = here
    return masks


def measure_denoising(
    denoise: Denoiser,
    sched: Schedule,
    images: np.ndarray,
    draws: int,
    batch_size: int,
    cache: str | None = None,
    ways: Sequence[tuple[str, bool]] = tuple(WAYS),
    levels: int = 255,
    worker: Worker | None = None,
) -> dict[str, np.ndarray]:
    """Measures the error of ε̂ and the terms of the bound at some steps t of every image.

    Each image is measured at `draws` steps, one from each of as many equal intervals of 2 … T, and at t = 1: an
    unbiased estimate of the sum over all t, whose standard error follows from the spread between images.

    Args:
        denoise: see `diffusion/denoiser.py`, not clipped.
        images: integers (N, height, width, channels), 0 … levels.
        draws: how many steps t, 0 for all.
        cache: a file into which everything is written after every batch, and from which a later call resumes.
        ways: to take a reverse step, its variance and whether it is clipped.
        worker: one of several processes, each of which measures some batches.

    Returns:
        A dict of arrays: `bits` (N, ways), L_{T-1} + … + L_0 for each of them; `prior` (N,), L_T; `t` and `error`
        (N, draws), the step and the squared error of ε̂ for each image.
    """

    @tf.function(autograph=False)
    def terms(x_0, t, seed, last):
        """Squared error of ε̂ and the terms of the bound at t, each way, of every image; `last`: all t are 1."""
        eps = tf.random.stateless_normal(tf.shape(x_0), seed)
        x_t = q_sample(x_0, t, eps, sched)
        estimate = denoise(x_t, t)
        estimates = {False: estimate.x_0, True: clip_estimate(estimate, x_t, t, sched).x_0}
        learned = {} if estimate.u is None else {"learned": log_ratio(estimate.u, t, sched)}
        each = [(estimates[clip], sched, learned.get(variance, variance)) for variance, clip in ways]
        bits = [bound_decoder(x_0, x_t, *way, levels) if last else bound_term(x_0, x_t, t, *way) for way in each]
        return tf.reduce_mean(tf.square(estimate.eps - eps), axis=(1, 2, 3)), tf.stack(bits, axis=1)

    T = n_steps(sched)
    draws = T - 1 if draws == 0 else min(draws, T - 1)
    edges = 2 + np.arange(draws + 1) * (T - 1) / max(draws, 1)  # of the intervals of 2 … T, none for T = 1
    columns = draws + (draws == T - 1)  # all images at t = 1 would be too many in the mean over only some t
    measurements = {"bits": np.empty((0, len(ways))), "prior": np.empty(0)}
    measurements |= {"t": np.empty((0, columns), int), "error": np.empty((0, columns))}
    key = f"{data.digest(images)} {draws}, a row for each image"  # caches of earlier versions lack the last words
    if cache and os.path.exists(cache):
        with np.load(cache) as file:
            if file["asked"] == key:
                measurements = {name: file[name] for name in measurements}
    worker = worker or Worker()
    start = worker.from_first(len(measurements["prior"]))
    bar = console.Bar((len(images) - start) * (draws + 1), "image")

    def measure_batch(first):
        real = min(batch_size, len(images) - first)
        index = np.arange(first, first + batch_size) % len(images)  # the last batch is filled up
        x_0 = tf.constant(from_pixels(images[index], levels))
        rng, bits = np.random.default_rng(first), 0
        new = {"prior": bound_prior(x_0, sched)[:real], "t": [], "error": []}
        for k in range(draws + 1):
            last = k == draws
            t = np.ones(batch_size) if last else np.floor(rng.uniform(edges[k], edges[k + 1], batch_size))
            error, bits_at_t = terms(x_0, tf.constant(t, tf.int32), tf.constant([first, k]), last)
            bits = bits + bits_at_t.numpy()[:real] * (1 if last else (T - 1) / draws)
            if k < columns:
                new["t"].append(t[:real].astype(int))
                new["error"].append(error[:real])
            bar.update((first - start) * (draws + 1) + (k + 1) * real)
        return new | {"bits": bits, "t": np.stack(new["t"], axis=1), "error": np.stack(new["error"], axis=1)}

    firsts = range(start, len(images), batch_size)
    for turn in range(0, len(firsts), worker.count):  # a batch for each worker
        batches = worker.gather([measure_batch(first) for first in firsts[turn:][worker.index : worker.index + 1]])
        if batches:
            parts = [measurements, *itertools.chain(*batches)]
            measurements = {name: np.concatenate([part[name] for part in parts]) for name in measurements}
        if batches and cache:
            with files.replacing(cache) as draft:
                np.savez(draft, asked=key, **measurements)
    return worker.from_first(measurements)


def mean_row(values: np.ndarray, remark: str = "", here: np.ndarray | None = None) -> dict:
    """A row of the table, a mean and its standard error: of values (images,), or of `values[here]`, (images, draws)."""
    if here is None:
        values, here = values[:, None], np.ones((len(values), 1), bool)
    mean, influences = mean_and_influences(values, here)
    return {"value": float(mean), "error": standard_error(influences[here.any(axis=1)]), "remark": remark}


def mean_and_influences(values: np.ndarray, here: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean of `values[here]`, and the deviation from it that each image, a row of both, contributes."""
    mean = values[here].mean()
    return mean, ((values - mean) * here).sum(axis=1) / here.sum()


def standard_error(influences: np.ndarray) -> float | None:
    """The standard error of a mean from the influences of its images; None for a single one.

    Images are independent, the values of one image at several t are not: they are clustered by image.
    """
    n = len(influences)
    return float((n / (n - 1) * (influences**2).sum()) ** 0.5) if n > 1 else None
