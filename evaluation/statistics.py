"""Mean and covariance of features: all that a Fréchet distance needs of a set of images.

They are gathered while images are processed, so that the features of 50,000 images are never held at once. Files are
those of TTUR, pytorch-fid, EDM and others: a `.npz` file with the arrays `mu`, (dimensions,), and `sigma`, (dimensions,
dimensions).
"""

import zipfile
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from support import files


class Statistics(NamedTuple):
    """Of a set of images: mean (dimensions,) and unbiased covariance (dimensions, dimensions) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


def gather_statistics(blocks: Iterable[np.ndarray]) -> Statistics:
    """Statistics of features that come in blocks (images, dimensions), of which one at a time is held.

    Chan, Golub and LeVeque 1983: the squared deviations of both parts from their own means, and those of the means.
    Sums of squares would cancel where means are large beside deviations.

    Raises:
        ValueError: if there are fewer than 2 images.
    """
    count, mu, scatter = 0, 0.0, 0.0
    for block in blocks:
        block = np.asarray(block, np.float64)
        mean = block.mean(axis=0)
        deviations, step, total = block - mean, mean - mu, count + len(block)
        scatter = scatter + deviations.T @ deviations + np.outer(step, step) * (count * len(block) / total)
        mu = mu + step * (len(block) / total)
        count = total
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {count}")
    return Statistics(mu, scatter / (count - 1))


def load_statistics(path: str, dimensions: int) -> Statistics:
    """Reads statistics of features with so many dimensions.

    Raises:
        ValueError, FileNotFoundError: if they cannot be statistics of such features; the sentence says why.
    """
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            found = getattr(loaded, "files", [])  # those of other programs may hold images as well, which are not read
            mu, sigma = (loaded[name] if name in found else None for name in ("mu", "sigma"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--statistics {path}: there is no such file") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"--statistics {path} is not a complete .npz file ({error})") from error
    if mu is None or sigma is None:
        raise ValueError(
            f"--statistics {path} must hold the arrays mu and sigma, and has {', '.join(found) or 'neither'}; write "
            "such a file with --save-statistics"
        )
    if mu.shape != (dimensions,) or sigma.shape != (dimensions, dimensions):
        raise ValueError(
            f"--statistics {path} has mu of shape {mu.shape} and sigma of shape {sigma.shape}; these features have "
            f"{dimensions} dimensions, so they must be ({dimensions},) and ({dimensions}, {dimensions})"
        )
    problem = _find_problem(mu, sigma)
    if problem:
        raise ValueError(f"--statistics {path} {problem}; use another copy, or write it anew with --save-statistics")
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64))


def _find_problem(mu, sigma):
    """What makes arrays of the right shapes no statistics, or None."""
    if not all(np.issubdtype(array.dtype, np.floating) and np.all(np.isfinite(array)) for array in (mu, sigma)):
        return "holds values that are not finite floating-point numbers"
    variances = np.diagonal(sigma)
    if np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(variances).max() or variances.min() < 0:  # float32 rounds more
        return "has a sigma that is no covariance: it is not symmetric, or has negative variances"
    return None


def save_statistics(statistics: Statistics, path: str) -> None:
    """Writes them as a `.npz` file, which `load_statistics` and the programs named above read."""
    with files.replacing(path) as draft, open(draft, "wb") as file:
        np.savez(file, mu=statistics.mu, sigma=statistics.sigma)
