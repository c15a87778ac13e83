"""Images of one seed that several processes sample, one for each device."""

import argparse
from collections.abc import Callable

import numpy as np

from diffusion.generate import choose_seed
from support.checks import one_for_each
from support.worker import Worker


def share_images(
    worker: Worker, sample: Callable[..., np.ndarray], options: argparse.Namespace, arguments: dict
) -> np.ndarray:
    """All images, for the first process, which gathers them; the others sample their part and end here.

    Args:
        worker: this process.
        sample: `reverse_diffusion.my_sample`.
        options: of `reverse_diffusion.py`.
        arguments: options of sampling, by name.
    """
    seed, mine = worker.from_first(choose_seed(options.seed)), worker.share(options.n_sample)
    if arguments["label"] is not None:
        arguments["label"] = one_for_each(arguments["label"], options.n_sample)[mine.start : mine.stop]
    how = {"model": options.model, "seed": seed, "raw": options.raw, "first": mine.start, **arguments}
    parts = worker.gather(sample(n_sample=len(mine), **how))
    if parts is None:
        raise SystemExit(0)
    return np.concatenate(parts)
