"""The process in two dimensions, where one sees all of it: points in place of images.

    points = toy.swiss_roll(32); trained = toy.train(points); toy.draw(trained, points)
    best = toy.exact(modes=6, classes=2); toy.draw_scores({"exact": best}, t=60)

After Sohl-Dickstein et al. 2015, arXiv 1503.03585, figure 1. An image of 8×8 pixels with two channels is 64 points for
a network that sees single pixels, so that schedule, targets, denoiser, samplers and the loop over t are those of
images. For `mixture` the best possible network is known in closed form, with and without classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras
import keras.layers as kl
import numpy as np
import tensorflow as tf
from keras import ops

from ddpm import n_steps, network_time, q_sample, signal_and_noise
from diffusion.denoiser import score
from diffusion.layers import ClassLayer, Logbook
from diffusion.model_file import TrainedModel, describe, metadata
from diffusion.options import Sampling
from diffusion.reverse import ReverseSteps, denoiser_of
from diffusion.sampling import make_plan, sample
from diffusion.schedules import make_schedule
from diffusion.targets import find_target
from support.plots import BLUE, GREEN, VERMILION
from unet import TimeLayer

if TYPE_CHECKING:  # imported late, as drawing needs it alone
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHAPE = (8, 8, 2)
DEVIATION = 0.04  # of the points around a mode


def swiss_roll(count: int, seed: int = 0) -> np.ndarray:
    """Points on a spiral, float32 (count, 8, 8, 2) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    angle = 1.5 * np.pi * (1 + 2 * np.sqrt(rng.random((count, *SHAPE[:2]))))  # nearly as many on each length of it
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=-1) / (4.5 * np.pi)
    return (points + 0.015 * rng.standard_normal(points.shape)).astype(np.float32)


def centres(modes: int) -> np.ndarray:
    """The middles of the modes of `mixture`, evenly spaced on a circle, float64 (modes, 2)."""
    angle = 2 * np.pi * np.arange(modes) / modes
    return 0.8 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def mixture(count: int, seed: int = 0, modes: int = 8, classes: int = 0) -> np.ndarray:
    """Points around as many modes on a circle, float32 (count, 8, 8, 2) in [-1, 1].

    With classes, the points of image k belong to class k % classes, which has every classes-th mode.
    """
    rng = np.random.default_rng(seed)
    mode = rng.integers(modes, size=(count, *SHAPE[:2]))
    if classes:
        mode = mode // classes * classes + (np.arange(count) % classes)[:, None, None]
    points = centres(modes)[mode]
    return (points + DEVIATION * rng.standard_normal(points.shape)).astype(np.float32)


def PointNet(n_feat: int = 128, classes: int = 0) -> keras.Model:
    """Dense layers for each pixel: [x_t, t/T], with classes also a label, → like x_t, (batch, 8, 8, 2)."""
    points, t, labels = kl.Input(shape=SHAPE), kl.Input(shape=(1,)), []
    known = TimeLayer(n_feat)(Logbook(name="logbook")(t))
    if classes:
        labels = [kl.Input(shape=(1,), dtype="int32")]
        known = kl.Add()([known, ClassLayer(classes, n_feat)(*labels)])
    known = kl.Reshape((1, 1, n_feat))(known)
    x = kl.Dense(n_feat)(points)
    for _ in range(3):
        x = kl.Dense(n_feat)(kl.Activation("silu")(kl.Add()([x, known])))
    return keras.Model([points, t, *labels], kl.Dense(2)(kl.Activation("silu")(x)))


def note(network: keras.Model, classes: int, **diffusion: object) -> TrainedModel:
    """A network with its schedule, its target and its classes in its metadata."""
    diffusion = {"beta1": 1e-4, "beta2": 0.02, "schedule": "cosine", "zero_snr": False, "target": "eps"} | diffusion
    metadata(network).update(diffusion=diffusion, classes=[f"class {k}" for k in range(classes)])
    return describe(network)


def exact(modes: int = 8, classes: int = 0, T: int = 200, **diffusion: object) -> TrainedModel:
    """The best possible network for the points of `mixture`: its ε̂ is the mean of ε given x_t, in closed form.

    Given its mode μ, x_t is N(√ᾱ μ, v) with v = ᾱ s² + 1 - ᾱ, and the mean of ε is √(1 - ᾱ) (x_t - √ᾱ μ) / v. Over the
    modes these means are weighted with p(mode | x_t), which Bayes' theorem gives.

    Args:
        classes: how many classes the modes are divided among, see `mixture`; 0 for none.
        T, diffusion: the schedule, arguments of `schedules.make_schedule`.
    """
    points, t = kl.Input(shape=SHAPE), kl.Input(shape=(1,))
    labels = [kl.Input(shape=(1,), dtype="int32")] if classes else []
    alphabar = make_schedule(**{"schedule": "cosine", "T": T, **diffusion}).alphabar
    index = ops.cast(ops.round(Logbook(name="logbook")(t)[:, :, None, None, None] * T), "int32")
    a, b, v = (
        ops.take(ops.convert_to_tensor(table, "float32"), index)
        for table in (np.sqrt(alphabar), np.sqrt(1 - alphabar), alphabar * DEVIATION**2 + 1 - alphabar)
    )
    away = points[..., None, :] - a * centres(modes).astype(np.float32)  # (batch, 8, 8, modes, 2)
    log_p = -ops.sum(ops.square(away), axis=-1, keepdims=True) / (2 * v)
    for label in labels:
        label, owner = label[:, :, None, None, None], 1 + np.arange(modes)[:, None] % classes
        fits = ops.logical_or(ops.equal(label, 0), ops.equal(label, owner))
        log_p = ops.where(fits, log_p, -1e9)
    eps = ops.sum(ops.softmax(log_p, axis=-2) * b * away / v, axis=-2)
    return note(keras.Model([points, t, *labels], eps), classes, T=T, **diffusion)


def train(
    points: np.ndarray,
    target: str = "eps",
    schedule: str = "cosine",
    T: int = 200,
    rounds: int = 24,
    seed: int = 0,
    classes: int = 0,
) -> TrainedModel:
    """A network that has learned the points: 20 seconds on 2 cores.

    Args:
        points: (count, 8, 8, 2) float32.
        target, schedule: see `diffusion/targets.py` and `diffusion/schedules.py`.
        T: steps from points to noise.
        rounds: of training; in each every point is noised 32 times.
        seed: of all random numbers.
        classes: of the points, as in `mixture`; a fifth of them are trained without.
    """
    keras.utils.set_random_seed(seed)
    network = PointNet(classes=classes)
    trained, batch = note(network, classes, T=T, schedule=schedule, target=target), 8
    x_0 = tf.repeat(points, 32, axis=0)
    label = np.repeat(1 + np.arange(len(points)) % max(1, classes), 32)
    rate = keras.optimizers.schedules.CosineDecay(4e-3, rounds * -(-len(x_0) // batch))
    network.compile(optimizer=keras.optimizers.Adam(rate), loss="mse", steps_per_execution=32)
    for k in range(rounds):
        eps = tf.random.stateless_normal(x_0.shape, [seed, 2 * k])
        t = tf.random.stateless_uniform([len(x_0)], [seed, 2 * k + 1], 1, T + 1, tf.int32)
        inputs = [q_sample(x_0, t, eps, trained.sched), network_time(t, trained.sched)]
        if classes:
            dropped = np.random.default_rng([seed, k]).random(len(label)) < 0.2
            inputs.append(np.where(dropped, 0, label)[:, None].astype(np.int32))
        wanted = find_target(target).wanted(x_0, eps, *signal_and_noise(t, x_0, trained.sched))
        network.fit(inputs, wanted, batch_size=batch, verbose=0)
    return trained


def reverse(
    trained: TrainedModel, count: int, seed: int = 0, label: Sequence[int] | None = None, **options: object
) -> dict[int, np.ndarray]:
    """The reverse process of 64 · count points: x_t, (count, 8, 8, 2) float32, by t.

    Args:
        label: (count,) int, k + 1 for class k; None for points of all classes.
        options: of `diffusion.options.Sampling`.
    """
    plan = make_plan(trained.sched, Sampling(label=label, **options))
    steps = sample(ReverseSteps(trained, count, clip=False), plan, seed, range(count), every=True, label=label)
    return {t: x_t.numpy() for t, x_t in steps}


def draw(trained: TrainedModel, points: np.ndarray, seed: int = 0) -> Figure:
    """Noising (above), sampling (middle), and the score, in which direction a noisy point is more likely (below)."""
    import matplotlib.pyplot as plt

    sched, T = trained.sched, n_steps(trained.sched)
    shown = [round(fraction * T) for fraction in (0, 0.05, 0.15, 0.35, 1)]
    sampled = reverse(trained, len(points), seed)
    figure, axes = plt.subplots(3, len(shown), figsize=(2 * len(shown), 6.2), layout="constrained")
    for (noisy, drawn, field), t in zip(axes.T, shown, strict=True):
        eps = tf.random.stateless_normal(points.shape, [seed, t])
        x_t = q_sample(points, tf.fill([len(points)], t), eps, sched).numpy()
        draw_points(noisy, x_t, BLUE)
        noisy.set_title(f"t = {t}", fontsize=10)
        draw_points(drawn, sampled[t], VERMILION)
        if t:
            draw_score(field, trained, t)
    for axis, name in zip(axes[:, 0], ("$q(x_t)$", "$p_\\theta(x_t)$", "score"), strict=True):
        axis.set_ylabel(name)
    for axis in axes.flat:
        frame(axis)
    axes[2, 0].axis("off")  # the score at t = 0 is not defined
    return figure


def draw_scores(models: dict[str, TrainedModel], t: int, points: np.ndarray | None = None) -> Figure:
    """The scores of models, one in a row, beside each other: without a class, then of each class.

    Args:
        models: by the names to show.
        t: of the noisy points at which the scores are shown.
        points: (count, 8, 8, 2), shown below the arrows if given, those of a class where that is shown; see `mixture`.
    """
    import matplotlib.pyplot as plt

    names = ["all points", *next(iter(models.values())).classes]
    size = 2.3 * len(names), 2.3 * len(models) + 0.3
    figure, axes = plt.subplots(len(models), len(names), figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=10)
    for row, (model, trained) in zip(axes, models.items(), strict=True):
        for label, axis in enumerate(row):
            if points is not None:
                draw_points(axis, points[label - 1 :: len(names) - 1] if label else points, VERMILION)
            draw_score(axis, trained, t, label)
            frame(axis)
        row[0].set_ylabel(model)
    return figure


def draw_points(axis: Axes, points: np.ndarray, colour: str) -> None:
    """Points (count, 8, 8, 2) as dots."""
    axis.scatter(*np.reshape(points, (-1, 2)).T, s=1, color=colour, linewidths=0)


def draw_score(axis: Axes, trained: TrainedModel, t: int, label: int = 0) -> None:
    """Arrows along the score at t, of a class (k + 1 for class k) or, for 0, of all points."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1.4, 1.4, 16)] * 2), axis=-1).reshape(-1, *SHAPE).astype(np.float32)
    labels = tf.fill([len(grid)], label) if trained.takes_labels else None
    slope = score(denoiser_of(trained, 1), trained.sched)
    arrows = slope(tf.constant(grid), tf.fill([len(grid)], t), labels).numpy()
    arrows /= np.sqrt(1e-9 + np.square(arrows).sum(axis=-1, keepdims=True)) ** 0.7  # long ones hide the rest
    axis.quiver(*grid.reshape(-1, 2).T, *arrows.reshape(-1, 2).T, color=GREEN)


def frame(axis: Axes) -> None:
    """The same part of the plane everywhere, without numbers."""
    axis.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[], aspect="equal")
