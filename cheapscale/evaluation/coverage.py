"""Neighbourhoods in a feature space: precision, recall, density, coverage, nearest neighbours.

The manifold of a set is the union of balls around its members, each reaching to the member's k-th
nearest neighbour within the set. With B_k(r) the ball of a real, n reals and m samples:

    precision   share of samples inside some B_k(r)                    Kynkaanniemi et al. 2019
    recall      share of reals inside the ball of some sample          "
    density     mean over samples of the number of B_k(r) around them, over k     Naeem et al. 2020
    coverage    share of reals with a sample inside B_k(r)                        "

A point on the rim of a ball counts as inside for the first two (so a set lies in its own
manifold) and as outside for the last two, as in the papers' implementations. Distances come in
tiles, computed in float64 about a common centre: 50,000 x 50,000 never exist at once.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cheapscale.evaluation.fid import check_features

KS = (3, 5)  # neighbours


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class Coverage(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float


def prdc(
    real: np.ndarray, fake: np.ndarray, *, ks: Sequence[int] = KS, tile: int = 2048
) -> dict[int, Coverage]:
    """{k: Coverage} of `fake` [m, d] against `real` [n, d] features.

    Every distance is computed once for all k: real-real and fake-fake half, real-fake whole.
    """
    _check(real, fake)
    check_features(real, "real features")
    check_features(fake, "generated features")
    ks = tuple(ks)
    if not ks or min(ks) < 1 or min(len(real), len(fake)) <= max(ks):
        raise ValueError(
            f"k={ks} neighbours need k > 0 and more than k vectors, got {len(real)} real, "
            f"{len(fake)} fake"
        )
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


def precision_recall(
    real: np.ndarray, fake: np.ndarray, *, k: int = 3, tile: int = 2048
) -> PrecisionRecall:
    """Precision and recall of `fake` [m, d] against `real` [n, d] features."""
    return PrecisionRecall(*prdc(real, fake, ks=(k,), tile=tile)[k][:2])


def radii(points: np.ndarray, ks: Sequence[int], tile: int = 2048) -> np.ndarray:
    """Squared distance [len(ks), n] of each point [n, d] to its k-th nearest other point."""
    most = max(ks)
    # of each point the distances to itself, which is 0, and to its `most` nearest others so far
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
    """For each query [m, d] the distance to, and the index of, its nearest reference [n, d].

    References may be uint8 (and many): they are widened a tile at a time.
    """
    _check(queries, references)
    best = np.full(len(queries), np.inf)
    index = np.zeros(len(queries), np.int64)
    for squared, rows, columns in _tiles(references, queries, tile):
        here, previous = squared.min(axis=0), best[columns]
        index[columns] = np.where(here < previous, rows.start + squared.argmin(0), index[columns])
        best[columns] = np.minimum(here, previous)
    return np.sqrt(best), index


def _check(a, b):
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [n, d] and [m, d], got {a.shape} and {b.shape}")


def _tiles(
    a: np.ndarray, b: np.ndarray, tile: int, half: bool = False
) -> Iterator[tuple[np.ndarray, slice, slice]]:
    """Squared distances of a tile of a's rows to a tile of b's, and which rows of each they are.

    Computed about b's mean: far from the origin the expanded square would lose its digits.
    `half`: of a set with itself only tiles on and above the diagonal.
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
            yield np.maximum(squared, 0, out=squared), rows, columns


def _slices(length, tile):
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]


def _smallest(known, more):
    """The smallest of each row of both, as many as are known, in any order."""
    count = known.shape[1]
    if more.shape[1] > count:
        more = np.partition(more, count - 1, axis=1)[:, :count]
    return np.partition(np.concatenate([known, more], axis=1), count - 1, axis=1)[:, :count]
