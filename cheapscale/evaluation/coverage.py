"""Precision, recall and nearest neighbours in a feature space (Kynkaanniemi et al. 2019).

The manifold of a set is the union of balls around its members, each reaching to the member's k-th
nearest neighbour within the set. Precision: the share of samples inside the reals' manifold.
Recall: the share of reals inside the samples' manifold.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(
    real: np.ndarray, fake: np.ndarray, *, k: int = 3, tile: int = 1024
) -> PrecisionRecall:
    """Precision and recall of `fake` [m, d] against `real` [n, d] features.

    Only [tile, n] distances exist at a time.
    """
    _check(real, fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"k={k} neighbours need more than {k} vectors, got {len(real)} real, {len(fake)} fake"
        )
    return PrecisionRecall(
        precision=_share_inside(fake, real, _radii(real, k, tile), tile),
        recall=_share_inside(real, fake, _radii(fake, k, tile), tile),
    )


def nearest(
    queries: np.ndarray, references: np.ndarray, *, tile: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """For each query [m, d] the distance to, and the index of, its nearest reference [n, d].

    References may be uint8 (and many): they are widened a tile at a time.
    """
    _check(queries, references)
    best = np.full(len(queries), np.inf)
    index = np.zeros(len(queries), np.int64)
    for squared, rows in _tiles(references, queries, tile):
        here = squared.min(axis=0)
        index = np.where(here < best, rows.start + squared.argmin(axis=0), index)
        best = np.minimum(here, best)
    return np.sqrt(best), index


def _check(a, b):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [n, d] and [m, d], got {a.shape} and {b.shape}")


def _tiles(a: np.ndarray, b: np.ndarray, tile: int) -> Iterator[tuple[np.ndarray, slice]]:
    """Squared distances [tile, len(b)] of a tile of a's rows to all of b, and which rows they are.

    Computed about b's mean: far from the origin the expanded square would lose its digits.
    """
    centre = b.mean(axis=0, keepdims=True, dtype=np.float64)
    b = b - centre
    b_norm = np.einsum("nd,nd->n", b, b)[None]
    for start in range(0, len(a), tile):
        rows = a[start : start + tile] - centre
        squared = np.einsum("nd,nd->n", rows, rows)[:, None] + b_norm - 2 * rows @ b.T
        yield np.maximum(squared, 0), slice(start, start + len(rows))


def _radii(points, k, tile):
    """Squared distance of each point to its k-th neighbour; position 0 is the point itself."""
    return np.concatenate(
        [np.partition(squared, k, axis=1)[:, k] for squared, _ in _tiles(points, points, tile)]
    )


def _share_inside(points, centres, radii, tile):
    inside = [
        np.any(squared <= radii[None], axis=1) for squared, _ in _tiles(points, centres, tile)
    ]
    return float(np.concatenate(inside).mean())
