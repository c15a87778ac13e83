"""Dropout (Srivastava et al. 2014) whose masks belong to (seed, step, place in the batch), not to a stateful generator.

So they are the same however a batch is divided among cores or devices, and when a run resumes. Only Keras operations.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

KEYS = contextvars.ContextVar("keys of dropout masks", default=None)


@contextlib.contextmanager
def keyed_dropout(seed: Any, step: Any, rows: Any) -> Iterator[None]:
    """Within it, masks depend on the seed, the step, the place of an image in the batch and the layer alone.

    Args:
        seed, step: integers, or scalar tensors of integers.
        rows: (batch,) int, the places of these images in the whole batch.
    """
    token = KEYS.set([(seed, step, rows), 0])
    try:
        yield
    finally:
        KEYS.reset(token)


def drop_features(x: Any, rate: float) -> Any:
    """x, (batch, …) float, with a fraction of its values set to 0 and the others divided by 1 - rate."""
    keys = KEYS.get()
    if keys is None:  # a model that is trained by other code than ours
        return keras.random.dropout(x, rate)
    seed, step, rows, layer = (ops.cast(number, "uint32") for number in (*keys[0], keys[1]))
    keys[1] += 1
    one = (1, *x.shape[1:])
    places = ops.reshape(_mix(ops.cast(ops.arange(math.prod(one), dtype="int32"), "uint32")), one)
    images = _mix(layer + _mix(rows + _mix(step + _mix(seed))))
    kept = _mix(places + ops.reshape(images, (ops.shape(images)[0], *[1] * (len(one) - 1))))
    kept = kept >= ops.cast(int(rate * 2**32), "uint32")
    return ops.where(kept, x / (1 - rate), ops.zeros_like(x))


def _mix(x):
    """A hash of uint32 in which every bit depends on every bit: the last step of MurmurHash3."""
    x = x + ops.cast(0x9E3779B9, "uint32")  # else 0 would stay 0
    for factor, shift in (0x85EBCA6B, 16), (0xC2B2AE35, 13):
        x = ops.bitwise_xor(x, ops.right_shift(x, ops.cast(shift, "uint32"))) * ops.cast(factor, "uint32")
    return ops.bitwise_xor(x, ops.right_shift(x, ops.cast(16, "uint32")))
