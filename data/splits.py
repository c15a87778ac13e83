"""Which images are trained on, and which are held out."""

import numpy as np


def split_held_out(images: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits images into those to train on, in their order, and a fraction that is held out; depends on the seed."""
    order = np.random.default_rng([seed, 1]).permutation(len(images))
    count = round(fraction * len(images))
    return images[np.sort(order[count:])], images[np.sort(order[:count])]
