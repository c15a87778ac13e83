"""Held-out images during training: whether the network generalises or overfits."""

import numpy as np
import tensorflow as tf

from ddpm import from_pixels, n_steps, network_time, q_sample
from diffusion.model_file import TrainedModel
from diffusion.reverse import denoiser_of, predictor
from diffusion.sampling import standard_normal
from diffusion.targets import comparable_weights
from training import checkpoint
from training.learned_schedule import follow_schedule, with_live_schedule
from training.train_step import cross_entropies
from training.workers import Workers

BATCH = 64
PATIENCE = 3  # measurements in a row that must be worse than the best
QUARTERS = 4


class Validation:
    """The loss on held-out images, always at the same t and with the same ε; see `targets.comparable_weights`.

    Args:
        trained: the model in training, compiled by `training.checkpoint.compile_for_run`.
        images: integers (N, height, width, channels), not trained on. Each gets one t; together they cover 1 … T
            evenly.
        labels: (N,) int, the class of each image, or None.
        workers: those that train, and measure, together; None for this process alone.
    """

    def __init__(
        self,
        trained: TrainedModel,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        workers: Workers | None = None,
    ):
        labels = np.full(len(images), -1) if labels is None else labels
        if trained.is_classifier:  # as in training
            images, labels = images[labels >= 0], labels[labels >= 0]
            if not len(images):
                raise ValueError("none of the held-out images has a class; name images with classes with --validation")
        self.names = ("loss", "accuracy") if trained.is_classifier else ("loss",)
        trained, self.workers = with_live_schedule(trained), workers
        self.trained = trained
        model, sched = trained.network, trained.sched
        self.images, self.labels, T = images, labels, n_steps(sched)
        self.t = (1 + np.random.default_rng(0).permutation(len(images)) * T // len(images)).astype(np.int32)
        self.quarter = (self.t - 1) * QUARTERS // T
        parts = min(model.parts, BATCH)  # as in training, whatever the number of cores
        classify, denoise = predictor(model, parts), denoiser_of(trained, parts)

        self.weights = tf.Variable(comparable_weights(sched.alphabar), dtype=tf.float32)

        def measure_denoising(x_t, t, eps, label):
            error = tf.reduce_mean(tf.square(denoise(x_t, t, label + 1).eps - eps), axis=(1, 2, 3))
            return {"loss": tf.gather(self.weights, t) * error}

        def measure_classifying(x_t, t, eps, label):
            logits = classify([x_t, network_time(t, sched)])
            right = tf.argmax(logits, axis=-1, output_type=label.dtype) == label
            return {"loss": cross_entropies(logits, label)[:, 0, 0, 0], "accuracy": tf.cast(right, tf.float32)}

        @tf.function(autograph=False)
        def measures(x_0, t, label, index):
            eps = standard_normal(0, 0, index, x_0.shape[1:])
            measure = measure_classifying if trained.is_classifier else measure_denoising
            return measure(q_sample(x_0, t, eps, sched), t, eps, label)

        self.measures = measures

    def measure(self) -> dict[str, tuple[float, list[float | None]]]:
        """The mean `loss` of the EMA weights, over all t and in each quarter of t (None for a quarter without images).

        For a classifier also the `accuracy`, the fraction of images whose class it predicts correctly.
        """
        n, network = len(self.images), self.trained.network
        checkpoint.swap_ema_weights(network)
        if self.trained.schedule_layer:
            follow_schedule(self.trained)
            self.weights.assign(comparable_weights(self.trained.sched.alphabar))
        index, count = (self.workers.index, self.workers.count) if self.workers else (0, 1)
        values = np.zeros((len(self.names), n), np.float32)
        for first in range(index * BATCH, n, count * BATCH):
            values[:, first : first + BATCH] = self._measure_batch(first)
        checkpoint.swap_ema_weights(network)
        if self.workers:  # each has measured some batches
            values = self.workers.add(tf.constant(values.ravel())).numpy().reshape(values.shape)
        return {name: self._by_quarters(row) for name, row in zip(self.names, values, strict=True)}

    def _measure_batch(self, first):
        """The values, (names, images), of the images from `first` on, at most a batch."""
        n = len(self.images)
        index = np.arange(first, first + BATCH) % n  # the last batch is filled up
        x_0 = from_pixels(self.images[index], self.trained.levels)
        label = self.labels[index].astype(np.int32)
        measured = self.measures(tf.constant(x_0), self.t[index], label, index.astype(np.int64))
        return np.stack([measured[name][: n - first] for name in self.names])

    def _by_quarters(self, values):
        """The mean over all t, and the mean in each quarter of t."""
        quarters = [values[self.quarter == q] for q in range(QUARTERS)]
        return float(values.mean()), [float(part.mean()) if len(part) else None for part in quarters]


def overfitting_warning(rows: list[tuple[float, float]]) -> str | None:
    """The sentence to print when the held-out loss rises while the training loss falls, else None.

    Args:
        rows: pairs (mean training loss, held-out loss) of the epochs in which the second was measured.
    """
    if len(rows) <= PATIENCE:
        return None
    best = min(range(len(rows)), key=lambda k: rows[k][1])
    since = rows[best + 1 :]
    worse = [held_out > 1.02 * rows[best][1] and training < rows[best][0] for training, held_out in since]
    if len(worse) < PATIENCE or not all(worse[-PATIENCE:]):
        return None
    return (
        f"the network is overfitting: the held-out loss has risen from {rows[best][1]:.4f} to {rows[-1][1]:.4f} while "
        "the training loss still falls; try more images, --flip or a smaller --n-feat"
    )
