"""Figures with their bootstrap deviations, and paired differences between cells of a study.

Every cell of as many images draws the same resamples, and its images start from the same noise, so
differences between cells are known better than the cells themselves.
"""

from collections.abc import Callable, Sequence

import numpy as np

KEPT = ("single", "fd", "kd", "patch_fd", "base_fd")  # whose resamples are kept


def with_deviation(
    figures: Callable[[np.ndarray], dict], n: int, resamples: int, kept: Sequence[str] = KEPT
) -> dict:
    """{name: [figures of all rows, bootstrap standard deviation]} and "draws", {name: what the
    resamples gave, as text} of those in `kept`."""
    rng = np.random.default_rng(0)
    drawn = [figures(rng.integers(0, n, n)) for _ in range(resamples)]
    found: dict = {
        name: [float(value), float(np.std([row[name] for row in drawn]))]
        for name, value in figures(np.arange(n)).items()
    }
    found["draws"] = {
        name: " ".join(f"{row[name]:.4g}" for row in drawn) for name in kept if name in found
    }
    return found


def difference(cell: dict, other: dict) -> dict:
    """{metric: [cell - other, low, high]} of the metrics whose resamples both cells have; the
    interval is 1.96 deviations of the paired resamples."""
    rows = {}
    for name in cell.get("draws", {}):
        if name in other.get("draws", {}):
            ours, theirs = (np.array(c["draws"][name].split(), float) for c in (cell, other))
            value, spread = cell[name][0] - other[name][0], 1.96 * float(np.std(ours - theirs))
            rows[name] = [value, value - spread, value + spread]
    return rows
