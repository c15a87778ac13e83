"""The checks of `on_gpu.py`: a module for each part, and the registry that they add their checks to."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

PARTS = (
    "runs",
    "speed",
    "time",
    "right",
    "devices",
    "limits",
    "good",
)  # in order of value; each is a module of this package


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the checks are."""

    n_feat: int
    image_size: int
    batch: int
    T: int
    steps: int
    matrix: int
    absurd_batch: int  # cuDNN takes no array of 2^31 values
    full: bool = True


FULL = Size(n_feat=512, image_size=64, batch=64, T=1000, steps=300, matrix=8192, absurd_batch=480)
TINY = Size(n_feat=8, image_size=32, batch=4, T=20, steps=6, matrix=256, absurd_batch=8, full=False)


class Check(NamedTuple):
    part: str
    seconds: int  # expected on a GPU
    needs: tuple  # packages, "gpu", and "gpus" for several
    function: Callable  # from a `Size` to a dict of results


CHECKS = {}  # by name, in the order in which they run


def check(part, seconds, needs=("tensorflow",), name=None, **settings):
    """Registers a function as a check, under its own name or another; `settings` are further arguments of it."""

    def register(function):
        bound = functools.partial(function, **settings) if settings else function
        CHECKS[name or function.__name__] = Check(part, seconds, needs, bound)
        return function

    return register
