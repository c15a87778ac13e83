"""The process in two dimensions, where one sees all of it: points in place of images.

    points = toy.swiss_roll(32); trained = toy.train(points); toy.draw(trained, points)

After Sohl-Dickstein et al. 2015, arXiv 1503.03585, figure 1. An image of 8×8 pixels with two channels is 64 points for
a network that sees single pixels, so that schedule, targets, denoiser, samplers and the loop over t are those of
images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import keras.layers as kl
import numpy as np
import tensorflow as tf

from ddpm import n_steps, network_time, q_sample, signal_and_noise
from diffusion.denoiser import score
from diffusion.layers import Logbook
from diffusion.model_file import TrainedModel, describe, metadata
from diffusion.options import Sampling
from diffusion.reverse import ReverseSteps, denoiser_of
from diffusion.sampling import make_plan, sample
from diffusion.targets import find_target
from support.plots import BLUE, GREEN, VERMILION
from unet import TimeLayer

if TYPE_CHECKING:  # imported late, as drawing needs it alone
    from matplotlib.figure import Figure

SHAPE = (8, 8, 2)


def swiss_roll(count: int, seed: int = 0) -> np.ndarray:
    """Points on a spiral, float32 (count, 8, 8, 2) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    angle = 1.5 * np.pi * (1 + 2 * np.sqrt(rng.random((count, *SHAPE[:2]))))  # nearly as many on each length of it
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=-1) / (4.5 * np.pi)
    return (points + 0.015 * rng.standard_normal(points.shape)).astype(np.float32)


def mixture(count: int, seed: int = 0, modes: int = 8) -> np.ndarray:
    """Points around as many modes on a circle, float32 (count, 8, 8, 2) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    angle = 2 * np.pi * rng.integers(modes, size=(count, *SHAPE[:2])) / modes
    points = 0.8 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return (points + 0.04 * rng.standard_normal(points.shape)).astype(np.float32)


def PointNet(n_feat: int = 128) -> keras.Model:
    """Dense layers for each pixel: [x_t, t/T] → like x_t, (batch, 8, 8, 2)."""
    points, t = kl.Input(shape=SHAPE), kl.Input(shape=(1,))
    time = kl.Reshape((1, 1, n_feat))(TimeLayer(n_feat)(Logbook(name="logbook")(t)))
    x = kl.Dense(n_feat)(points)
    for _ in range(3):
        x = kl.Dense(n_feat)(kl.Activation("silu")(kl.Add()([x, time])))
    return keras.Model([points, t], kl.Dense(2)(kl.Activation("silu")(x)))


def train(
    points: np.ndarray, target: str = "eps", schedule: str = "cosine", T: int = 200, rounds: int = 24, seed: int = 0
) -> TrainedModel:
    """A network that has learned the points: 20 seconds on 2 cores.

    Args:
        points: (count, 8, 8, 2) float32.
        target, schedule: see `diffusion/targets.py` and `diffusion/schedules.py`.
        T: steps from points to noise.
        rounds: of training; in each every point is noised 32 times.
        seed: of all random numbers.
    """
    keras.utils.set_random_seed(seed)
    network = PointNet()
    diffusion = {"beta1": 1e-4, "beta2": 0.02, "T": T, "schedule": schedule, "zero_snr": False, "target": target}
    metadata(network).update(diffusion=diffusion)
    trained, batch = describe(network), 8
    x_0 = tf.repeat(points, 32, axis=0)
    rate = keras.optimizers.schedules.CosineDecay(4e-3, rounds * -(-len(x_0) // batch))
    network.compile(optimizer=keras.optimizers.Adam(rate), loss="mse", steps_per_execution=32)
    for k in range(rounds):
        eps = tf.random.stateless_normal(x_0.shape, [seed, 2 * k])
        t = tf.random.stateless_uniform([len(x_0)], [seed, 2 * k + 1], 1, T + 1, tf.int32)
        inputs = [q_sample(x_0, t, eps, trained.sched), network_time(t, trained.sched)]
        wanted = find_target(target).wanted(x_0, eps, *signal_and_noise(t, x_0, trained.sched))
        network.fit(inputs, wanted, batch_size=batch, verbose=0)
    return trained


def reverse(trained: TrainedModel, count: int, seed: int = 0, **options: object) -> dict[int, np.ndarray]:
    """The reverse process of 64 · count points: x_t, (count, 8, 8, 2) float32, by t.

    Args:
        options: of `diffusion.options.Sampling`.
    """
    plan = make_plan(trained.sched, Sampling(**options))
    steps = sample(ReverseSteps(trained, count, clip=False), plan, seed, range(count), every=True)
    return {t: x_t.numpy() for t, x_t in steps}


def draw(trained: TrainedModel, points: np.ndarray, seed: int = 0) -> Figure:
    """Noising (above), sampling (middle), and the score, in which direction a noisy point is more likely (below)."""
    import matplotlib.pyplot as plt

    sched, T = trained.sched, n_steps(trained.sched)
    shown = [round(fraction * T) for fraction in (0, 0.05, 0.15, 0.35, 1)]
    sampled, slope = reverse(trained, len(points), seed), score(denoiser_of(trained, 1), sched)
    grid = np.stack(np.meshgrid(*[np.linspace(-1.4, 1.4, 16)] * 2), axis=-1).reshape(-1, *SHAPE).astype(np.float32)
    figure, axes = plt.subplots(3, len(shown), figsize=(2 * len(shown), 6.2), layout="constrained")
    for (noisy, drawn, field), t in zip(axes.T, shown, strict=True):
        eps = tf.random.stateless_normal(points.shape, [seed, t])
        x_t = q_sample(points, tf.fill([len(points)], t), eps, sched).numpy()
        noisy.scatter(*x_t.reshape(-1, 2).T, s=1, color=BLUE, linewidths=0)
        noisy.set_title(f"t = {t}", fontsize=10)
        drawn.scatter(*sampled[t].reshape(-1, 2).T, s=1, color=VERMILION, linewidths=0)
        if t:
            arrows = slope(tf.constant(grid), tf.fill([len(grid)], t)).numpy()
            arrows /= np.sqrt(1e-9 + np.square(arrows).sum(axis=-1, keepdims=True)) ** 0.7  # long ones hide the rest
            field.quiver(*grid.reshape(-1, 2).T, *arrows.reshape(-1, 2).T, color=GREEN)
        for axis in noisy, drawn, field:
            axis.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[], aspect="equal")
    for axis, name in zip(axes[:, 0], ("$q(x_t)$", "$p_\\theta(x_t)$", "score"), strict=True):
        axis.set_ylabel(name)
    axes[2, 0].axis("off")  # the score at t = 0 is not defined
    return figure
