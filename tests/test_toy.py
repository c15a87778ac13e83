"""Points in the plane go the way of images: a network learns them in seconds, and samples lie where they lie."""

import numpy as np
import pytest

from training import toy


def distances(points, others):
    """Of each point to the nearest of the others."""
    points, others = (values.reshape(-1, 2) for values in (points, others))
    return np.sqrt(np.square(points[:, None] - others).sum(axis=-1)).min(axis=1)


@pytest.fixture(scope="module")
def modes():
    points = toy.mixture(8, modes=3)
    return points, toy.train(points, "flow", "flow", T=50, rounds=20)


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
    sampled, held_out = toy.reverse(trained, 8, **options), toy.mixture(32, seed=1, modes=3)
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
