"""Whole numbers in range: seeds, counts, and the numbers of images."""

import math
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

LARGEST = 2**32 - 1  # a random key takes 32 bits of a seed and 32 of an image's number


def whole(value: Any, name: str, low: int = 0, high: int = LARGEST) -> int:
    """`value` as an int; raises ValueError unless it is a whole number from `low` to `high`."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise ValueError(f"{name} is {value!r}: give a whole number from {low} to {high}")
    return number


def real(value: Any, name: str, low: float) -> float:
    """`value` as a float; raises ValueError unless it is finite and at least `low`."""
    try:
        number = math.nan if isinstance(value, (bool, np.bool_, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number < math.inf:  # neither for a NaN
        raise ValueError(f"{name} is {value!r}: give a finite number of at least {low}")
    return number


def image_ids(ids: Any) -> np.ndarray:
    """uint32 [n] from numbers of images; raises ValueError unless all are whole and in range."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids are {ids.dtype} of shape {ids.shape}: give whole numbers, shape [n]")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= LARGEST:
        raise ValueError(
            f"ids reach from {ids.min()} to {ids.max()}: give some from 0 to {LARGEST}"
        )
    return ids.astype(np.uint32)


def consecutive(start: Any, num: Any, shape: Sequence[int]) -> np.ndarray:
    """uint32 [num]: the ids start, start + 1, ... of `num` images of `shape`.

    Raises ValueError for numbers out of range, and for more images than the memory can hold.
    """
    num = whole(num, "num", 1)
    start = whole(start, f"start, for {num} images,", 0, LARGEST + 1 - num)
    # The noise and the images are float32 arrays of this size.
    each, memory = 8 * math.prod(shape), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num * each > memory:
        raise ValueError(
            f"{num} images take {num * each / 1e9:.0f} GB, but the memory has {memory / 1e9:.0f}: "
            f"give num={max(memory // (2 * each), 1)}, and continue with start"
        )
    return np.arange(start, start + num).astype(np.uint32)
