"""Distances against naive computations, closed forms, and what they are for."""

import numpy as np
import pytest

from evaluation import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_kid_is_the_sum_over_all_pairs(rng):
    one, other = rng.normal(size=(7, 5)), rng.normal(0.5, 1, size=(6, 5))

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / 5 + 1) ** 3

    def within(s):
        pairs = [kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(x, y) for x in one for y in other]
    assert metrics.kid(one, other) == pytest.approx(within(one) + within(other) - 2 * sum(across) / len(across))


def test_kid_is_unbiased(rng):
    values = [metrics.kid(rng.normal(size=(20, 3)), rng.normal(size=(20, 3))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


@pytest.mark.parametrize("count, dimensions", [(4000, 3), (40, 200)])
def test_frechet_agrees_with_eigenvalues_of_covariances(rng, count, dimensions):
    """Against the formula with eigenvalues of C₁C₂, also with fewer images than dimensions."""
    one = rng.normal(size=(count, dimensions)) * rng.uniform(0.5, 2, dimensions)
    other = rng.normal(0.7, 1, size=(count, dimensions)) @ rng.normal(size=(dimensions, dimensions))
    c1, c2 = np.cov(one.T), np.cov(other.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(c1 @ c2).real, 0))
    expected = np.sum((one.mean(0) - other.mean(0)) ** 2) + np.trace(c1) + np.trace(c2) - 2 * roots.sum()
    assert metrics.frechet(one, other) == pytest.approx(expected, rel=1e-5)


def test_frechet_of_two_gaussians_is_the_closed_form(rng):
    one, other = rng.normal(0, 1, (200_000, 2)), rng.normal((1, 0), (2, 1), (200_000, 2))
    assert metrics.frechet(one, other) == pytest.approx(1 + (2 - 1) ** 2, rel=0.02)
    assert metrics.frechet(one, one) == pytest.approx(0, abs=1e-8)


def test_precision_and_recall_by_counting(rng):
    real, samples = rng.normal(size=(30, 2)), rng.normal(1, 1, size=(25, 2))

    def among(points, centres):
        inside = 0
        for p in points:
            for c in centres:
                radius = sorted(np.linalg.norm(c - o) for o in centres)[3]
                if np.linalg.norm(p - c) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    assert metrics.precision(real, samples) == among(samples, real)
    assert metrics.recall(real, samples) == among(real, samples)


def test_samples_at_the_very_distance_of_a_neighbour_count():
    """Of four equal images the third neighbour is at distance 0, as is a copy of them."""
    real = np.repeat([[0.0, 0.0], [3.0, 4.0]], 4, axis=0)
    assert metrics.precision(real, real[:1]) == 1 and metrics.precision(real, real[:1] + 1) == 0


def test_precision_sees_bad_images_and_recall_missing_ones(rng):
    real = np.concatenate([rng.normal(0, 1, (200, 4)), rng.normal(20, 1, (200, 4))])
    half = rng.normal(0, 1, (200, 4))
    assert metrics.precision(real, half) > 0.9 and metrics.recall(real, half) < 0.6
    with_bad = np.concatenate([half, rng.normal(-50, 1, (200, 4))])
    assert metrics.precision(real, with_bad) < 0.6


def test_the_standard_error_agrees_with_repetitions(rng):
    def mean_of_both(one, other):
        return one.mean() + other.mean()

    errors = [metrics.with_error(mean_of_both, *rng.normal(size=(2, 400, 1)))[1] for _ in range(50)]
    assert np.mean(errors) == pytest.approx((2 / 400) ** 0.5, rel=0.15)


def test_copies_are_caught_and_new_images_are_not(rng):
    training, held_out = rng.normal(size=(2, 300, 20))
    ratios, fraction = metrics.copy_ratios(rng.normal(size=(100, 20)), training, held_out)
    assert np.median(ratios) == pytest.approx(1, abs=0.05) and fraction == 0
    copies = training[:100] + rng.normal(0, 0.1, (100, 20))
    ratios, fraction = metrics.copy_ratios(copies, training, held_out)
    assert np.median(ratios) < 0.3 and fraction == 1
    index, distance = metrics.nearest(copies, training, chunk=7)
    np.testing.assert_array_equal(index, range(100))
    assert distance[3] == pytest.approx(np.linalg.norm(copies[3] - training[3]))


def test_near_copies_are_less_than_half_as_far_away():
    training, held_out = np.zeros((1, 1)), np.full((1, 1), 10.0)
    samples = np.array([[3.3], [3.4]])  # ratios 3.3 / 6.7 and 3.4 / 6.6
    ratios, fraction = metrics.copy_ratios(samples, training, held_out)
    np.testing.assert_allclose(ratios, [3.3 / 6.7, 3.4 / 6.6])
    assert fraction == 0.5


def test_random_subsets_follow_their_seed_and_cover_the_order():
    rows = np.arange(1000)
    some = metrics.random_subset(rows, 100)
    assert len(set(some)) == 100 and 400 < np.mean(some) < 600
    np.testing.assert_array_equal(some, metrics.random_subset(rows, 100))
    assert list(some) != sorted(some) and list(some) != list(metrics.random_subset(rows, 100, seed=1))
    assert sorted(metrics.random_subset(rows, 5000)) == list(rows)


def classes(rng, count):
    """Features of ten classes, sorted by class as a folder of folders is."""
    return np.repeat(20 * np.eye(10), count // 10, axis=0) + rng.normal(size=(count, 10))


def test_the_ratio_is_1_also_for_images_sorted_by_class(rng):
    training, held_out, samples = classes(rng, 100), classes(rng, 400), classes(rng, 100)
    for one, other in (training, held_out), (held_out, training):
        ratios, _ = metrics.copy_ratios(samples, one, other)
        assert 0.8 < np.median(ratios) < 1.25 and np.percentile(ratios, 90) < 4


def test_the_standard_error_does_not_depend_on_the_order(rng):
    def mean_of_both(one, other):
        return one.mean() + other.mean()

    sets = np.sort(rng.normal(size=(30, 2, 400, 1)), axis=2)
    errors = [metrics.with_error(mean_of_both, *both)[1] for both in sets]
    assert np.mean(errors) == pytest.approx((2 / 400) ** 0.5, rel=0.15)


def test_mirrored_copies_are_caught_and_new_images_are_not(rng):
    def flat(images):
        return images.reshape(len(images), -1)

    training, held_out, new = rng.normal(size=(3, 200, 4, 6))
    copies = training[:50, :, ::-1] + rng.normal(0, 0.05, (50, 4, 6))
    assert metrics.copy_ratios(flat(copies), flat(training), flat(held_out))[1] == 0  # in one orientation alone
    for images, expected, ratio in (copies, 1, 0.05), (copies[..., ::-1], 1, 0.05), (new, 0, 1):
        ratios, fraction = metrics.copy_ratios(flat(images), flat(training), flat(held_out), flat(images[..., ::-1]))
        assert fraction == expected and np.median(ratios) == pytest.approx(ratio, abs=0.05)
    index, distance, flipped = metrics.nearest_either_way(flat(copies), flat(copies[..., ::-1]), flat(training))
    np.testing.assert_array_equal(index, range(50))
    assert flipped.all() and distance.max() < 1
    assert not metrics.nearest_either_way(flat(new), flat(new), flat(training))[2].any()


def test_the_squared_standard_error_is_unbiased_for_a_mean(rng):
    """The mean of 20 values in 10 blocks: also a factor of 10 instead of 9 would be seen."""
    errors = [metrics.with_error(lambda one, other: one.mean(), *rng.normal(size=(2, 20, 1)))[1] for _ in range(2000)]
    assert np.mean(np.square(errors)) == pytest.approx(1 / 20, rel=0.05)


def test_ratios_use_equally_many_images_and_near_copies_all(rng):
    """In two dimensions, where the nearest of ten times as many is three times as near."""
    training, held_out, samples = (rng.normal(size=(count, 2)) for count in (3000, 300, 300))
    for one, other in (training, held_out), (held_out, training):
        assert 0.75 < np.median(metrics.copy_ratios(samples, one, other)[0]) < 1.33
    training, held_out = rng.normal(size=(400, 20)), rng.normal(size=(40, 20))
    assert metrics.copy_ratios(training + 0.01, training, held_out)[1] == 1  # a copy of each
