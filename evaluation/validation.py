"""Held-out pictures during training: whether the network learns what pictures are like, or these pictures by heart."""

import numpy as np
import tensorflow as tf

import data
from ddpm import n_steps, q_sample
from diffusion.denoiser import denoiser
from diffusion.sampling import standard_normal
from support import checkpoint, device
from support.execution import predictor

BATCH = 64
PATIENCE = 3  # measurements in a row that must be worse than the best
QUARTERS = 4


class Validation:
    """The loss on held-out pictures, always at the same t and with the same ε.

    Args:
        model: the network in training.
        images: uint8 (N, height, width, channels), pictures that are not trained on. Each gets one t, and together
            they cover 1 … T evenly.
        sched: what `ddpm_schedule` returned.
    """

    def __init__(self, model, images, sched):
        self.model, self.images, T = model, images, n_steps(sched)
        self.t = (1 + np.random.default_rng(0).permutation(len(images)) * T // len(images)).astype(np.int32)
        self.quarter = (self.t - 1) * QUARTERS // T
        denoise = denoiser(predictor(model, device.parts_for(BATCH)), sched)

        @tf.function(autograph=False)
        def errors(x_0, t, index):
            eps = standard_normal(0, 0, index, x_0.shape[1:])
            _, guess = denoise(q_sample(x_0, t, eps, sched), t)
            return tf.reduce_mean(tf.square(guess - eps), axis=(1, 2, 3))

        self.errors = errors

    def measure(self):
        """The mean loss of the averaged weights, and that of each quarter of t (NaN for one without pictures)."""
        n, errors = len(self.images), []
        checkpoint.swap_ema_weights(self.model)
        for first in range(0, n, BATCH):
            index = np.arange(first, first + BATCH) % n  # the last batch is filled up
            x_0 = data.scaled(self.images[index])
            errors.append(self.errors(tf.constant(x_0), self.t[index], index.astype(np.int64)).numpy())
        checkpoint.swap_ema_weights(self.model)
        errors = np.concatenate(errors)[:n]
        quarters = [errors[self.quarter == q].mean() if np.any(self.quarter == q) else np.nan for q in range(QUARTERS)]
        return float(errors.mean()), [float(q) for q in quarters]


def split_held_out(images, share, seed):
    """Divides pictures into those to train on, in their order, and a share that is held out; depends on the seed."""
    order = np.random.default_rng([seed, 1]).permutation(len(images))
    count = round(share * len(images))
    return images[np.sort(order[count:])], images[np.sort(order[:count])]


def overfitting_warning(rows):
    """The sentence to say when held-out loss rises while training loss falls, else None.

    Args:
        rows: of the epochs so far, pairs (mean training loss, held-out loss) as far as it was measured.
    """
    if len(rows) <= PATIENCE:
        return None
    best = min(range(len(rows)), key=lambda k: rows[k][1])
    since = rows[best + 1 :]
    worse = [held_out > 1.02 * rows[best][1] and training < rows[best][0] for training, held_out in since]
    if len(worse) < PATIENCE or not all(worse[-PATIENCE:]):
        return None
    return (
        f"held-out loss was {rows[best][1]:.4f} at its best and is {rows[-1][1]:.4f}, while the training loss still "
        "falls: the network is learning its pictures by heart; more pictures, --flip or a smaller --n-feat help"
    )
