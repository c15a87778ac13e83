"""Points in the plane go the way of images: a network learns them in seconds, and samples lie where they lie."""

import numpy as np
import pytest
import tensorflow as tf

from diffusion.reverse import denoiser_of
from training import toy


def distances(points, others):
    """Of each point to the nearest of the others."""
    points, others = (values.reshape(-1, 2) for values in (points, others))
    return np.sqrt(np.square(points[:, None] - others).sum(axis=-1)).min(axis=1)


@pytest.fixture(scope="module")
def modes():
    points = toy.mixture(8, modes=4, classes=2)
    return points, toy.train(points, "flow", "flow", T=50, rounds=24, classes=2)


def test_points_have_the_shape_of_images_and_fit_in_the_range():
    roll, modes = toy.swiss_roll(40), toy.mixture(40, modes=4)
    for points in roll, modes:
        assert points.shape == (40, 8, 8, 2) and points.dtype == np.float32 and np.abs(points).max() < 1.1
    radius, angle = np.hypot(*roll.reshape(-1, 2).T), np.unwrap(np.arctan2(*roll.reshape(-1, 2).T[::-1]))
    assert radius.min() > 0.3 and radius.max() < 1.1 and len(angle) == 2560
    corners = np.abs(modes.reshape(-1, 2)).max(axis=1)
    assert abs(corners.mean() - 0.8) < 0.02 and not np.array_equal(toy.mixture(4, 1), toy.mixture(4, 2))


@pytest.mark.parametrize(
    "options", [{"steps": 20}, {"sampler": "ddim", "steps": 10}, {"sampler": "dpm++", "steps": 10}]
)
def test_sampled_points_lie_where_the_points_are(modes, options):
    _, trained = modes
    sampled, held_out = toy.reverse(trained, 8, **options), toy.mixture(32, seed=1, modes=4)
    assert max(sampled) == 50 and min(sampled) == 0
    spread = held_out.std() * np.random.default_rng(0).standard_normal((8, 8, 8, 2))
    assert distances(spread, held_out).mean() > 0.3
    assert distances(sampled[0], held_out).mean() < 0.1 and distances(held_out, sampled[0]).mean() < 0.1


def test_the_figure_shows_both_processes_and_the_score(modes):
    points, trained = modes
    figure = toy.draw(trained, points)
    assert [axis.get_title() for axis in figure.axes[:5]] == ["t = 0", "t = 2", "t = 8", "t = 18", "t = 50"]
    shown = [np.asarray(axis.collections[0].get_offsets()) for axis in figure.axes[:10]]
    for x_0, x_T in (shown[:5:4], shown[5::4]):
        assert len(x_0) == len(x_T) == 64 * len(points)
        assert distances(x_0, points).mean() < 0.1 and abs(np.std(x_T) - 1) < 0.1
    arrows = figure.axes[11].collections[0]
    inwards = -(arrows.XY * np.stack([arrows.U, arrows.V], axis=1)).sum(axis=1)
    assert np.mean(inwards[np.hypot(*arrows.XY.T) > 1.2] > 0) == 1  # to where points are


def test_points_of_a_class_lie_around_its_modes():
    points, centres = toy.mixture(4, modes=6, classes=2), toy.centres(6)
    for k, image in enumerate(points):
        nearest = np.square(image.reshape(-1, 1, 2) - centres).sum(axis=-1).argmin(axis=1)
        assert set(nearest) == {k % 2, k % 2 + 2, k % 2 + 4}
    np.testing.assert_array_equal(toy.mixture(4, modes=6).shape, points.shape)


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("t", [1, 20, 100])
def test_the_exact_network_knows_the_mean_of_the_noise(label, t):
    """E[ε | x_t, class] as a mean over draws of x_0, weighted with q(x_t | x_0)."""
    best = toy.exact(modes=4, classes=2, T=100)
    rng, alphabar = np.random.default_rng(0), best.sched.alphabar[t]
    centres = toy.centres(4) if label == 0 else toy.centres(4)[label - 1 :: 2]
    x_0 = centres[rng.integers(len(centres), size=60_000)] + toy.DEVIATION * rng.standard_normal((60_000, 2))
    x_t = np.sqrt(alphabar) * x_0[:64] + np.sqrt(1 - alphabar) * rng.standard_normal((64, 2))
    noise = (x_t[:, None] - np.sqrt(alphabar) * x_0) / np.sqrt(1 - alphabar)  # that would lead from each x_0 to x_t
    weight = np.exp(-np.square(noise).sum(axis=-1) / 2)
    expected = np.einsum("ij,ijk->ik", weight, noise) / weight.sum(axis=1, keepdims=True)
    image = tf.constant(x_t.reshape(1, 8, 8, 2), tf.float32)
    found = denoiser_of(best, 1)(image, tf.constant([t]), tf.constant([label])).eps.numpy().reshape(-1, 2)
    known = weight.sum(axis=1) > 100  # where enough draws lie near
    assert known.mean() > 0.5 and np.abs(found - expected)[known].max() < 0.2
    if label == 0:
        np.testing.assert_allclose(denoiser_of(best, 1)(image, tf.constant([t])).eps, found.reshape(1, 8, 8, 2))


def test_a_network_learns_classes_and_its_scores_are_drawn(modes):
    (points, trained), centres = modes, toy.centres(4)
    for label in 1, 2:
        sampled = toy.reverse(trained, 8, label=[label] * 8)[0]
        assert distances(sampled, centres[label - 1 :: 2]).mean() < 0.15
    best = toy.exact(4, 2, T=1000)  # of another schedule, so that its t is another one
    same_noise = int(np.argmin(np.abs(best.sched.alphabar - trained.sched.alphabar[25])))
    figures = toy.draw_scores({"exact": best}, same_noise), toy.draw_scores({"learned": trained}, 25, points)
    for figure in figures:
        assert [axis.get_title() for axis in figure.axes] == ["all points", "class 0", "class 1"]
    fields = [[axis.collections[-1] for axis in figure.axes] for figure in figures]
    exact, learned = ([np.stack([field.U, field.V]) for field in row] for row in fields)
    for one, other in zip(exact, learned, strict=True):
        cosine = (one * other).sum(axis=0) / np.sqrt((one**2).sum(axis=0) * (other**2).sum(axis=0))
        assert np.median(cosine) > 0.9
    assert len(figures[1].axes[1].collections[0].get_offsets()) == 256  # half of the points are of class 0
