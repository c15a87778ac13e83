"""What a network knows of images: bits per dimension of the bound, loss by t, and signs of overfitting."""

import os

import numpy as np
import tensorflow as tf

import data
from ddpm import bound_decoder, bound_prior, bound_term, clip_estimate, ddpm_schedule, n_steps, q_sample
from diffusion.denoiser import denoiser
from evaluation.metrics import random_subset
from support import console, device, execution, files

MEMORISED_BELOW = 0.8  # training loss / held-out loss below this is reported as memorisation
WAYS = [(variance, clip) for variance in ("beta", "posterior") for clip in (True, False)]  # to take a reverse step


def likelihood_rows(model, book, held_out, training, options, kept):
    """Bits a dimension of the bound, for all four ways to take a reverse step, the loss in tenths of t, overfitting."""
    sched, batch_size = ddpm_schedule(**book["diffusion"]), execution.even_batches(model, len(held_out))[1]
    denoise = denoiser(execution.predictor(model, device.parts_for(batch_size)), sched)

    def seen(images, name):
        return measure_denoising(denoise, sched, images, options.draws, batch_size, kept and f"{kept}-{name}")

    of_held_out = seen(held_out, "bits.npz")
    rows = bound_rows(of_held_out) if "bits" in options.only else {}
    rows |= loss_rows(of_held_out, sched, held_out) if "loss" in options.only else {}
    if "overfitting" in options.only:
        of_training = seen(random_subset(training, len(held_out)), "training-bits.npz")
        rows |= overfitting_rows(of_training, of_held_out, sched)
    return rows


def bound_rows(seen):
    """Rows: bits a dimension for each of `WAYS`, and L_T."""
    rows = {}
    for (variance, clip), of_pictures in zip(WAYS, seen["bits"].T + seen["prior"], strict=True):
        name = f"bits/dim, {'β' if variance == 'beta' else 'β̃'}, {'clipped' if clip else 'not clipped'}"
        remark = "as pictures are made by default" if (variance, clip) == ("beta", True) else ""
        rows[name] = measured(of_pictures, remark)
    rows["… of it L_T"] = measured(seen["prior"], "x_T beside pure noise")
    return rows


def loss_rows(seen, sched, images):
    """Rows: squared error of ε̂ in tenths of t, beside that of the best predictor that knows the pixels' variance.

    Both are means over the t that were measured, as the error falls steeply within the first tenth.
    """
    rows, v = {}, np.var(data.scaled(images), axis=0).ravel()
    for (low, high), here in tenths(seen, sched).items():
        t, counts = np.unique(seen["t"][here], return_counts=True)
        a = sched["alphabar_t"][t, None]
        best = np.average(np.mean(a * v / (a * v + 1 - a), axis=1), weights=counts)
        remark = f"{best:.4f} if only pixels were known"
        rows[f"loss, t = {low} … {high}"] = measured(seen["error"], remark, here)
    return rows


def overfitting_rows(of_training, of_held_out, sched):
    """Row: the loss on training images divided by that on held-out ones, both as means over the tenths of t.

    Args:
        of_training, of_held_out: what `observed` returned.
    """
    here = [tenths(seen, sched) for seen in (of_training, of_held_out)]
    both = here[0].keys() & here[1].keys()
    means, errors = [], []
    for seen, of_tenths in zip((of_training, of_held_out), here, strict=True):
        parts = [mean_and_influences(seen["error"], of_tenths[tenth]) for tenth in both]
        mean, influences = (np.mean(part, axis=0) for part in zip(*parts, strict=True))
        means.append(mean)
        errors.append((standard_error(influences) or 0) / mean)
    share = float(means[0] / means[1])
    remark = "the training images are memorised" if share < MEMORISED_BELOW else "1 means no memorisation"
    return {"loss, training / held-out": {"value": share, "error": share * float(np.hypot(*errors)), "remark": remark}}


def tenths(seen, sched):
    """Which entries of `seen["t"]` lie in each tenth of 1 … T, by its first and last t, if there are any."""
    T, found = n_steps(sched), {}
    for tenth in range(10):
        low, high = 1 + tenth * T // 10, (tenth + 1) * T // 10
        here = (seen["t"] >= low) & (seen["t"] <= high)
        if here.any():
            found[low, high] = here
    return found


def measure_denoising(denoise, sched, images, draws, batch_size, kept=None):
    """What the network makes of held-out pictures, at some steps t each.

    Every picture is seen at `draws` steps, one from each of as many equal stretches of 2 … T, and at t = 1: an
    unbiased estimate of the sum over all t, whose standard error follows from the spread between pictures.

    Args:
        denoise: see `diffusion/denoiser.py`, not clipped.
        images: uint8 (N, height, width, channels).
        draws: how many steps t, 0 for all.
        kept: a file into which everything is written after every batch, and with which a later call goes on.

    Returns:
        A dict of arrays: `bits` (N, 4), L_{T-1} + … + L_0 for each of `WAYS`; `prior` (N,), L_T; `t` and `error`
        (N, draws), the squared error of ε̂ for each image and step.
    """

    @tf.function(autograph=False)
    def terms(x_0, t, seed, last):
        """Squared error of ε̂, and the terms of the bound at t, each way, of every picture; `last`: all t are 1."""
        eps = tf.random.stateless_normal(tf.shape(x_0), seed)
        x_t = q_sample(x_0, t, eps, sched)
        estimate, guess = denoise(x_t, t)
        estimates = {False: estimate, True: clip_estimate(x_t, t, estimate, sched)[0]}
        if last:
            bits = [bound_decoder(x_0, x_t, estimates[clip], sched, variance) for variance, clip in WAYS]
        else:
            bits = [bound_term(x_0, x_t, t, estimates[clip], sched, variance) for variance, clip in WAYS]
        return tf.reduce_mean(tf.square(guess - eps), axis=(1, 2, 3)), tf.stack(bits, axis=1)

    T = n_steps(sched)
    draws = T - 1 if draws == 0 else min(draws, T - 1)
    edges = 2 + np.arange(draws + 1) * (T - 1) / draws  # of the stretches of 2 … T
    columns = draws + (draws == T - 1)  # all images at t = 1 would be too many in the mean over only some t
    seen = {"bits": np.empty((0, len(WAYS))), "prior": np.empty(0)}
    seen |= {"t": np.empty((0, columns), int), "error": np.empty((0, columns))}
    asked = f"{data.digest(images)} {draws}, a row for each image"  # in files of earlier versions there was none
    if kept and os.path.exists(kept):
        with np.load(kept) as file:
            if file["asked"] == asked:
                seen = {name: file[name] for name in seen}
    start = len(seen["prior"])
    bar = console.Bar((len(images) - start) * (draws + 1), "picture")
    for first in range(start, len(images), batch_size):
        real = min(batch_size, len(images) - first)
        index = np.arange(first, first + batch_size) % len(images)  # the last batch is filled up
        x_0 = tf.constant(data.scaled(images[index]))
        rng, bits = np.random.default_rng(first), 0
        new = {"prior": bound_prior(x_0, sched)[:real], "t": [], "error": []}
        for k in range(draws + 1):
            last = k == draws
            t = np.ones(batch_size) if last else np.floor(rng.uniform(edges[k], edges[k + 1], batch_size))
            error, of_t = terms(x_0, tf.constant(t, tf.int32), tf.constant([first, k]), last)
            bits = bits + of_t.numpy()[:real] * (1 if last else (T - 1) / draws)
            if k < columns:
                new["t"].append(t[:real].astype(int))
                new["error"].append(error[:real])
            bar.update((first - start) * (draws + 1) + (k + 1) * real)
        new |= {"bits": bits, "t": np.stack(new["t"], axis=1), "error": np.stack(new["error"], axis=1)}
        seen = {name: np.concatenate([seen[name], new[name]]) for name in seen}
        if kept:
            with files.replacing(kept) as draft:
                np.savez(draft, asked=asked, **seen)
    return seen


def measured(values, remark="", here=None):
    """A row of the table: a mean and its standard error, from values (images,) or, where `here`, (images, draws)."""
    if here is None:
        values, here = values[:, None], np.ones((len(values), 1), bool)
    mean, influences = mean_and_influences(values, here)
    return {"value": float(mean), "error": standard_error(influences[here.any(axis=1)]), "remark": remark}


def mean_and_influences(values, here):
    """The mean of `values[here]`, and what each image, a row of both, adds to it beyond its share."""
    mean = values[here].mean()
    return mean, ((values - mean) * here).sum(axis=1) / here.sum()


def standard_error(influences):
    """The standard error of a mean from the influences of its images; None for a single one.

    Images are independent, but the values of one image at several t are not: they count together.
    """
    n = len(influences)
    return float((n / (n - 1) * (influences**2).sum()) ** 0.5) if n > 1 else None
