"""Distances between two sets of pictures, given as features: arrays (pictures, dimensions).

Numbers depend on the features, and compare only with numbers from the same ones. Everything is computed in float64.
"""

import numpy as np

BLOCKS = 10


def kid(one, other):
    """Kernel distance: the unbiased estimate of the squared maximum mean discrepancy, kernel (x·y/d + 1)³.

    Bińkowski et al. 2018, arXiv 1801.01401. Around 0 for two sets of the same kind, also below. Means something from
    some 500 pictures on.
    """
    d = one.shape[1]
    (m, n), kernel = (len(one), len(other)), lambda x, y: (x @ y.T / d + 1) ** 3
    within_one, within_other = kernel(one, one), kernel(other, other)
    within_one = (within_one.sum() - np.trace(within_one)) / (m * (m - 1))
    within_other = (within_other.sum() - np.trace(within_other)) / (n * (n - 1))
    return within_one + within_other - 2 * kernel(one, other).mean()


def frechet(one, other):
    """Fréchet distance of the Gaussians with the means and covariances of both sets, |m₁-m₂|² + tr(C₁+C₂-2√(C₁C₂)).

    Heusel et al. 2017, arXiv 1706.08500. With fewer pictures than dimensions the covariances are not of full rank, and
    with few pictures it is too large: compare only numbers from equally many.
    """
    mean_one, mean_other = one.mean(0), other.mean(0)
    a = (one - mean_one) / np.sqrt(len(one) - 1)
    b = (other - mean_other) / np.sqrt(len(other) - 1)
    # C₁ = aᵀa and C₂ = bᵀb: the eigenvalues of C₁C₂ are the squared singular values of abᵀ.
    root = np.linalg.svd(a @ b.T if len(a) + len(b) < 2 * a.shape[1] else _root(a.T @ a) @ b.T, compute_uv=False).sum()
    return np.sum((mean_one - mean_other) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * root


def _root(matrix):
    """The symmetric square root of a covariance matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def precision(real, made, k=3):
    """The share of made pictures that lie among the real ones: within the distance of a real one to its k-th neighbour.

    Kynkäänniemi et al. 2019, arXiv 1904.06991. Falls when pictures are bad, not when there are always the same ones.
    Means something from some hundred pictures of each on, and compares only with numbers from equally many: the more
    there are, the smaller are the distances to neighbours.
    """
    radius = np.sort(distances(real, real), axis=1)[:, k]  # at 0 stands the picture itself
    return np.mean(np.any(distances(made, real) <= radius, axis=1))


def recall(real, made, k=3):
    """The share of real pictures that lie among the made ones: `precision` with the roles exchanged.

    Falls when kinds of pictures are missing.
    """
    return precision(made, real, k)


def distances(one, other):
    """Euclidean distances (len(one), len(other)) of all pairs."""
    squared = np.sum(one**2, axis=1)[:, None] + np.sum(other**2, axis=1) - 2 * one @ other.T
    return np.sqrt(np.maximum(squared, 0))


def random_subset(rows, count, seed=0):
    """At most `count` rows of an array, at random and in random order: the order of files often means something."""
    return rows[np.random.default_rng(seed).permutation(len(rows))[:count]]


def with_error(metric, one, other):
    """A metric and its standard error, by leaving out a tenth of both sets at a time (jackknife).

    The tenths are random: those of sets sorted by class would be too much alike, and the error too small.
    """
    one, other = random_subset(one, len(one)), random_subset(other, len(other), seed=1)
    without = []
    for block in range(BLOCKS):
        left = (features[np.arange(len(features)) % BLOCKS != block] for features in (one, other))
        without.append(metric(*left))
    return metric(one, other), np.sqrt((BLOCKS - 1) * np.var(without))


def nearest(made, pictures, chunk=256):
    """For each made picture the number of the nearest one and its distance, two arrays (len(made),)."""
    found = [distances(made[k : k + chunk], pictures) for k in range(0, len(made), chunk)]
    index = np.concatenate([d.argmin(1) for d in found])
    return index, np.concatenate([d.min(1) for d in found])


def nearest_either_way(made, mirrored, images):
    """The image nearest to each sample or to its mirror image.

    The samples are mirrored instead of the images, as they are fewer. In pixels that is the same.

    Args:
        made, mirrored: features of the samples and of their mirror images, in the same order.
        images: features of the images to search.

    Returns:
        Three arrays (len(made),): the index of the nearest image, its distance, and whether the mirror image is nearer.
    """
    (index, distance), (index_mirrored, distance_mirrored) = nearest(made, images), nearest(mirrored, images)
    flipped = distance_mirrored < distance
    return np.where(flipped, index_mirrored, index), np.minimum(distance, distance_mirrored), flipped


def copy_ratios(made, training, held_out, mirrored=None, seed=0):
    """How much nearer the samples are to training than to held-out images: memorisation.

    For each, the distance to the nearest training image divided by that to the nearest held-out one. As many training
    images are drawn as there are held-out ones, so that without copying the ratio is 1 on average; a sample counts as
    a near-copy if it is less than half as far from some training image as from all held-out ones.

    Args:
        made, training, held_out: features, one row for each image.
        mirrored: features of the mirrored samples. Training mirrors photographs, so a copy may be mirrored too: the
            distance to any image, training or held-out, is then the smaller of the two orientations'.
        seed: of the random subsets.

    Returns:
        The ratios (len(made),) with equally many, and the share of near-copies.
    """
    mirrored = made if mirrored is None else mirrored

    def ratios(training, held_out):
        to_training, to_held_out = (nearest_either_way(made, mirrored, images)[1] for images in (training, held_out))
        return to_training / np.maximum(to_held_out, 1e-12)

    count = min(len(training), len(held_out))
    equally_many = ratios(random_subset(training, count, seed), random_subset(held_out, count, seed))
    return equally_many, np.mean(ratios(training, held_out) < 0.5)
