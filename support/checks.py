"""Checks of arguments, in one sentence each."""

from collections.abc import Iterable

import numpy as np


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError, naming the valid choices, if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_finite(images: np.ndarray) -> None:
    """Raises FloatingPointError if values of images, an array or a tensor, are NaN or infinite."""
    if not np.all(np.isfinite(images)):
        raise FloatingPointError(
            "the result has values that are NaN or infinite; the weights of the model, or guidance without clipping, "
            "are too large"
        )
