"""Cutting the noise levels into contiguous groups (step-adaptive training, spec section 2).

Levels are counted from clean to noisy: position 0 is the least noise. A partition of n positions
into N groups is its edges, N + 1 integers from 0 to n; group j holds edges[j] ... edges[j+1] - 1.
The paper's index i runs the other way, from 1 at the lowest SNR (the noisiest) to N: i = N - j.
"""

from collections.abc import Sequence

import numpy as np


def equal_length(n: int, groups: int) -> np.ndarray:
    """Groups of equally many positions, round(n j / N) (section 2.2)."""
    _check(n, groups)
    return np.round(n * np.arange(groups + 1) / groups).astype(int)


def at(inner: Sequence[int], n: int, groups: int) -> np.ndarray:
    """Groups that begin at these positions, the cleanest at 0; ValueError where they do not."""
    edges = np.array([0, *inner, n])
    if len(edges) != groups + 1 or np.any(np.diff(edges) < 1):
        raise ValueError(
            f"prune.edges {tuple(inner)} do not cut {n} positions into {groups} groups: give "
            f"{groups - 1} increasing positions between 1 and {n - 1}"
        )
    return edges


def equal_decibels(
    decibels: np.ndarray, groups: int, clip: tuple[float, float] = (-20.0, 20.0)
) -> np.ndarray:
    """Groups of equal width in SNR (section 2.3), the decibels [n] clipped first.

    Unclipped, the ends of a cosine schedule make groups of three and of one position out of 4000.
    Raises ValueError where a group would be empty.
    """
    decibels = np.asarray(decibels, np.float64)
    _check(len(decibels), groups)
    if np.any(np.diff(decibels) > 0):
        raise ValueError("decibels must fall from clean to noisy: sort the levels by sigma")
    clipped = np.clip(decibels, *clip)
    inner = np.linspace(clipped[0], clipped[-1], groups + 1)[1:-1]
    # a level on a border belongs to the cleaner group
    edges = [0, *(int(np.sum(clipped >= border)) for border in inner), len(decibels)]
    return _whole(edges, "equal decibels: clip them less, or use fewer groups")


def cluster(cost: np.ndarray, groups: int) -> np.ndarray:
    """The contiguous groups of least total cost, exactly, by dynamic programming (ANT, 2.4).

    cost: [n, n], cost[a, b] of a group of positions a ... b (a <= b), see `spread` and `conflict`.
    O(groups n^2).
    """
    n = len(cost)
    _check(n, groups)
    best = np.full((groups + 1, n + 1), np.inf)
    start = np.zeros((groups + 1, n + 1), int)
    best[0, 0] = 0.0
    for g in range(1, groups + 1):
        for end in range(g, n + 1):
            totals = best[g - 1, :end] + cost[:end, end - 1]
            start[g, end] = np.argmin(totals)
            best[g, end] = totals[start[g, end]]
    edges = [n]
    for g in range(groups, 0, -1):
        edges.append(int(start[g, edges[-1]]))
    return np.array(edges[::-1])


def spread(values: Sequence[float]) -> np.ndarray:
    """Cost of a group: sum of squares around its mean, of a loss or of decibels, [n] -> [n, n]."""
    values = np.asarray(values, np.float64)
    n = len(values)
    total, square = (np.concatenate([[0], np.cumsum(v)]) for v in (values, values**2))
    a, b = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    size = np.maximum(b - a + 1, 1)
    ends = np.minimum(b + 1, n)
    within = square[ends] - square[a] - (total[ends] - total[a]) ** 2 / size
    return np.where(a <= b, np.maximum(within, 0.0), np.inf)


def conflict(gradients: np.ndarray) -> np.ndarray:
    """Cost of a group: size times 1 - mean cosine of its members' gradients (or centred ranks),
    [n, d] -> [n, n]."""
    norms = np.linalg.norm(gradients, axis=1)
    # of a large network [n, d] is most of the memory: no copy of it
    cosines = (gradients @ gradients.T) / np.maximum(np.outer(norms, norms), 1e-30)
    n = len(cosines)
    total = np.zeros((n + 1, n + 1))
    total[1:, 1:] = cosines.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    cost = np.full((n, n), np.inf)
    for a in range(n):
        ends, size = np.arange(a + 1, n + 1), np.arange(1, n - a + 1)
        within = total[ends, ends] - total[a, ends] - total[ends, a] + total[a, a]
        cost[a, a:] = size * (1 - within / size**2)
    return cost


def from_anchors(anchors: np.ndarray, edges: np.ndarray, n: int) -> np.ndarray:
    """Edges over n positions from those over a few `anchors` (positions, increasing): half way
    between the anchors on both sides of a border."""
    inner = [(int(anchors[e - 1]) + int(anchors[e]) + 1) // 2 for e in edges[1:-1]]
    return _whole([0, *inner, n], "clustering its anchors: use more of them")


def owners(sigmas: np.ndarray, borders: Sequence[float]) -> np.ndarray:
    """The group that owns each level, counted from the cleanest; borders: sigmas between the
    groups, ascending. A level on a border, to the precision of float32, is the cleaner group's."""
    return np.searchsorted(np.asarray(borders, np.float64), np.asarray(sigmas) * (1 - 1e-6))


def step_owners(grid: np.ndarray, borders: Sequence[float]) -> np.ndarray:
    """The group that owns each step of a grid, in either direction: its noisier end's."""
    return owners(np.maximum(grid[:-1], grid[1:]), borders)


def _check(n, groups):
    if not 1 <= groups <= n:
        raise ValueError(f"{n} positions cannot be cut into {groups} groups: use 1 to {n}")


def _whole(edges, how):
    edges = np.asarray(edges, int)
    if np.any(np.diff(edges) < 1):
        sizes = ", ".join(map(str, np.diff(edges)))
        raise ValueError(f"groups of {sizes} positions come from {how}")
    return edges
