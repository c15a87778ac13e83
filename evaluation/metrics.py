"""Distances between two sets of images, given as features: arrays (images, dimensions).

Values depend on the features and compare only with values on the same ones. Everything is computed in float64.
"""

from collections.abc import Callable, Iterator

import numpy as np

from evaluation.statistics import Statistics, gather_statistics

BLOCKS = 10


def kid(one: np.ndarray, other: np.ndarray) -> float:
    """Kernel distance: the unbiased estimate of the squared maximum mean discrepancy, kernel (x·y/d + 1)³.

    Bińkowski et al. 2018, arXiv 1801.01401. Around 0, also below, for two sets from the same
    distribution. Meaningful from about 500 images on.
    """
    d = one.shape[1]

    def kernel_mean(x, y):
        return sum(((rows @ y.T / d + 1) ** 3).sum() for rows in chunks(x)) / (len(x) * len(y))

    def within(x):  # without the pairs of an image with itself
        n, itself = len(x), np.mean((np.sum(x**2, axis=1) / d + 1) ** 3)
        return (n * kernel_mean(x, x) - itself) / (n - 1)

    return within(one) + within(other) - 2 * kernel_mean(one, other)


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of both sets, |m₁-m₂|² + tr(C₁+C₂-2√(C₁C₂)).

    Heusel et al. 2017, arXiv 1706.08500. With fewer images than dimensions the covariances are not of full rank. The
    distance is biased upwards for few images: compare only values for equally many.
    """
    if len(one) + len(other) >= 2 * one.shape[1]:
        return frechet_distance(gather_statistics([one]), gather_statistics([other]))
    mean_one, mean_other = one.mean(0), other.mean(0)
    a = (one - mean_one) / np.sqrt(len(one) - 1)
    b = (other - mean_other) / np.sqrt(len(other) - 1)
    # C₁ = aᵀa and C₂ = bᵀb: the eigenvalues of C₁C₂ are the squared singular values of abᵀ, a smaller matrix.
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return np.sum((mean_one - mean_other) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * root


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """The Fréchet distance of two Gaussians; the FID, if they are statistics of the features `fid`.

    The eigenvalues of C₁C₂ are those of √C₁ C₂ √C₁, which is symmetric: no complex numbers come up, as they do from a
    square root of C₁C₂ itself.
    """
    root = _root(one.sigma)
    values = np.linalg.eigvalsh(root @ other.sigma @ root)
    traces = np.trace(one.sigma) + np.trace(other.sigma) - 2 * np.sqrt(np.maximum(values, 0)).sum()
    return np.sum((one.mu - other.mu) ** 2) + traces


def _root(matrix):
    """The symmetric square root of a covariance matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def precision(real: np.ndarray, samples: np.ndarray, k: int = 3) -> float:
    """The fraction of samples that lie within the distance of some real image to its k-th neighbour.

    Kynkäänniemi et al. 2019, arXiv 1904.06991. Falls when samples are bad, not when they repeat each other. Meaningful
    from some hundred images of each on; compare only values for equally many: the more there are, the smaller are the
    distances to neighbours.
    """
    radius = [np.partition(distances(rows, real), k, axis=1)[:, k] for rows in chunks(real)]  # 0 is the image itself
    radius = np.concatenate(radius)
    return np.mean(np.concatenate([np.any(distances(rows, real) <= radius, axis=1) for rows in chunks(samples)]))


def recall(real: np.ndarray, samples: np.ndarray, k: int = 3) -> float:
    """The fraction of real images that lie among the samples: `precision` with the roles exchanged.

    Falls when kinds of images are missing.
    """
    return precision(samples, real, k)


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Euclidean distances (len(one), len(other)) of all pairs."""
    squared = np.sum(one**2, axis=1)[:, None] + np.sum(other**2, axis=1) - 2 * one @ other.T
    return np.sqrt(np.maximum(squared, 0))


def random_subset(rows: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """At most `count` random rows of an array, in random order, since files are often sorted by class."""
    return rows[np.random.default_rng(seed).permutation(len(rows))[:count]]


def with_error(metric: Callable[..., float], one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """A metric and its standard error, by leaving out a tenth of both sets at a time (jackknife).

    The tenths are random: in a set sorted by class, consecutive images would give an error that is too small.
    """
    one, other = random_subset(one, len(one)), random_subset(other, len(other), seed=1)
    without = []
    for block in range(BLOCKS):
        left = (features[np.arange(len(features)) % BLOCKS != block] for features in (one, other))
        without.append(metric(*left))
    return metric(one, other), np.sqrt((BLOCKS - 1) * np.var(without))


def chunks(rows: np.ndarray, size: int = 256) -> Iterator[np.ndarray]:
    """Some rows at a time: the distances between 50,000 images and as many others would take 20 GB."""
    return (rows[first : first + size] for first in range(0, len(rows), size))


def nearest(samples: np.ndarray, images: np.ndarray, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """For each sample the index of the nearest image and its distance, two arrays (len(samples),)."""
    blocks = [distances(rows, images) for rows in chunks(samples, chunk)]
    index = np.concatenate([block.argmin(1) for block in blocks])
    return index, np.concatenate([block.min(1) for block in blocks])


def nearest_either_way(
    samples: np.ndarray, mirrored: np.ndarray, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image nearest to each sample or to its mirror image.

    The samples are mirrored instead of the images, as they are fewer. In pixels that is the same.

    Args:
        samples, mirrored: features of the samples and of their mirror images, in the same order.
        images: features of the images to search.

    Returns:
        Three arrays (len(samples),): index of the nearest image, its distance, whether the mirror image is nearer.
    """
    (index, distance), (index_mirrored, distance_mirrored) = nearest(samples, images), nearest(mirrored, images)
    flipped = distance_mirrored < distance
    return np.where(flipped, index_mirrored, index), np.minimum(distance, distance_mirrored), flipped


def copy_ratios(
    samples: np.ndarray, training: np.ndarray, held_out: np.ndarray, mirrored: np.ndarray | None = None, seed: int = 0
) -> tuple[np.ndarray, float]:
    """How much nearer the samples are to training than to held-out images: memorisation.

    For each sample, the distance to the nearest training image divided by that to the nearest held-out one. As many
    training images are drawn as there are held-out ones, so that without copying the ratio is 1 on average. A sample
    is a near-copy if it is less than half as far from some training image as from all held-out ones.

    Args:
        samples, training, held_out: features, one row for each image.
        mirrored: features of the mirrored samples. Training mirrors photographs, so a copy may be mirrored too: the
            distance to any image, training or held-out, is then the smaller one of both orientations.
        seed: of the random subsets.

    Returns:
        The ratios (len(samples),) with equally many, and the fraction of near-copies.
    """
    mirrored = samples if mirrored is None else mirrored

    def ratios(training, held_out):
        to_training, to_held_out = (nearest_either_way(samples, mirrored, images)[1] for images in (training, held_out))
        return to_training / np.maximum(to_held_out, 1e-12)

    count = min(len(training), len(held_out))
    equally_many = ratios(random_subset(training, count, seed), random_subset(held_out, count, seed))
    return equally_many, np.mean(ratios(training, held_out) < 0.5)
