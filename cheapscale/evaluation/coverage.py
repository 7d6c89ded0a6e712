"""Neighbourhoods in a feature space: precision, recall, density, coverage, nearest neighbours.

The manifold of a set is estimated by the union of balls around its members. The radius of a ball
is the distance to the member's k-th nearest neighbour within the set. With the balls B_k(r) of the
real images r and the balls B_k(s) of the generated images s:

    precision   share of s inside any B_k(r)             Kynkaanniemi et al. 2019, arXiv 1904.06991
    recall      share of r inside any B_k(s)             "
    density     mean over s of |{r: s in B_k(r)}| / k    Naeem et al. 2020, arXiv 2002.09797
    coverage    share of r whose B_k(r) contains an s    "

A point on the surface of a ball counts as inside for precision and recall (so a set lies in its own
manifold) and as outside for density and coverage, as in the papers' implementations. Distances are
computed in tiles, in float64 and about a common centre: a 50,000 x 50,000 matrix is never stored.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cheapscale.evaluation.fid import check_features

KS = (3, 5)  # k of the k-th nearest neighbour


class Coverage(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float


def prdc(
    real: np.ndarray, fake: np.ndarray, *, ks: Sequence[int] = KS, tile: int = 2048
) -> dict[int, Coverage]:
    """{k: Coverage} of the features `fake` [m, d] against `real` [n, d].

    Every distance is computed once for all k; within a set, only the upper triangle is computed.
    """
    check_features(real, "real features")
    check_features(fake, "generated features")
    real_radii, fake_radii = radii(real, ks, tile), radii(fake, ks, tile)
    inside_real = np.zeros((len(ks), len(fake)), bool)
    inside_fake = np.zeros((len(ks), len(real)), bool)
    balls = np.zeros(len(ks), np.int64)
    closest = np.full(len(real), np.inf)
    for squared, rows, columns in _tiles(real, fake, tile):
        closest[rows] = np.minimum(closest[rows], squared.min(axis=1))
        for i in range(len(ks)):
            reach = real_radii[i, rows, None]
            inside_real[i, columns] |= (squared <= reach).any(axis=0)
            inside_fake[i, rows] |= (squared <= fake_radii[i, None, columns]).any(axis=1)
            balls[i] += np.count_nonzero(squared < reach)
    return {
        k: Coverage(
            precision=float(inside_real[i].mean()),
            recall=float(inside_fake[i].mean()),
            density=float(balls[i] / (k * len(fake))),
            coverage=float((closest < real_radii[i]).mean()),
        )
        for i, k in enumerate(ks)
    }


def radii(points: np.ndarray, ks: Sequence[int], tile: int = 2048) -> np.ndarray:
    """The squared distance [len(ks), n] of each point [n, d] to its k-th nearest other point."""
    most = max(ks)
    # The smallest most + 1 distances so far: the point itself at 0, and its nearest neighbours.
    best = np.full((len(points), most + 1), np.inf)
    for squared, rows, columns in _tiles(points, points, tile, half=True):
        best[rows] = _smallest(best[rows], squared)
        if rows != columns:
            best[columns] = _smallest(best[columns], squared.T)
    best.sort(axis=1)
    return best[:, list(ks)].T


def nearest(
    queries: np.ndarray, references: np.ndarray, *, tile: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """(distance, index) of the nearest reference [n, d] of each query [m, d].

    References may be a large uint8 array: each tile is converted to float64 separately.
    """
    best = np.full(len(queries), np.inf)
    index = np.zeros(len(queries), np.int64)
    for squared, rows, columns in _tiles(references, queries, tile):
        # "<" keeps the first of equally near references, so the result does not depend on tiles.
        here, previous = squared.min(axis=0), best[columns]
        index[columns] = np.where(here < previous, rows.start + squared.argmin(0), index[columns])
        best[columns] = np.minimum(here, previous)
    return np.sqrt(best), index


def _tiles(
    a: np.ndarray, b: np.ndarray, tile: int, half: bool = False
) -> Iterator[tuple[np.ndarray, slice, slice]]:
    """Yields (squared distances of a tile, its rows of a, its rows of b).

    |x - y|^2 = |x|^2 - 2 x.y + |y|^2 is expanded about the mean of b, since far from the origin the
    difference of large squares would cancel most digits.
    half: a and b are the same set, and only the tiles on and above the diagonal are computed.
    """
    centre = b.mean(axis=0, keepdims=True, dtype=np.float64)
    for rows in _slices(len(a), tile):
        left = a[rows] - centre
        left_norm = np.einsum("nd,nd->n", left, left)[:, None]
        for columns in _slices(len(b), tile):
            if half and columns.start < rows.start:
                continue
            right = b[columns] - centre
            squared = left @ right.T
            squared *= -2
            squared += left_norm
            squared += np.einsum("nd,nd->n", right, right)[None]
            yield np.maximum(squared, 0, out=squared), rows, columns  # rounding may go below 0


def _slices(length, tile):
    """Consecutive slices of at most `tile` rows."""
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]


def _smallest(known, more):
    """For each row, the smallest values of `known` and `more`: as many as in `known`, unsorted."""
    count = known.shape[1]
    if more.shape[1] > count:
        more = np.partition(more, count - 1, axis=1)[:, :count]
    return np.partition(np.concatenate([known, more], axis=1), count - 1, axis=1)[:, :count]
