"""Checks of arguments, in one sentence each."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np

MOST = 2**63 - 1  # an integer that TensorFlow can hold
LARGEST = 1e38  # a number that is finite in float32


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError, which names the choices, if `value` is not one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def describe_range(integer: bool, low: float, high: float, value: float = 0) -> str:
    """The numbers from `low` to `high` in words. The limit `MOST` is named only if `value` exceeds it."""
    what = "an integer" if integer else "a finite number" if low <= -LARGEST else "a number"
    if low <= -LARGEST:
        return what
    if high < MOST or integer and value > high:
        return f"{what} from {low} to {high}"
    return f"{what} of at least {low}"


def check_number(name: str, value: Any, low: float, high: float = math.inf, integer: bool = False) -> None:
    """Raises ValueError if `value` is not a finite number (or, with `integer`, not an integer) from `low` to `high`."""
    kind = numbers.Integral if integer else numbers.Real
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {describe_range(integer, low, high)}, got {value!r}")
    if not (low <= value <= high and abs(value) < float("inf")):
        raise ValueError(f"{name} must be {describe_range(integer, low, high, value)}, got {value}")


def check_finite(images: np.ndarray) -> None:
    """Raises FloatingPointError if values of images, an array or a tensor, are NaN or infinite."""
    if not np.all(np.isfinite(images)):
        raise FloatingPointError(
            "the result has NaN or infinite values; try a smaller guidance, or clip, or use another model"
        )


def one_for_each(label: Any, n_sample: int) -> list:
    """A label for each image, from one for all or one for each. Raises ValueError for another number of them."""
    one = isinstance(label, str) or np.ndim(label) == 0
    given = [label] * n_sample if one else list(label)
    if len(given) != n_sample:
        raise ValueError(f"label must be one class, or one for each of the {n_sample} images, got {len(given)}")
    return given
