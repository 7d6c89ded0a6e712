"""Contiguous groups of noise levels, one for each expert (step-adaptive training, arXiv
2312.13307).

The noise levels are `process.levels()` of the teacher, from clean to noisy: the times of a VP
schedule, or the 40 Karras nodes of EDM. A position is an index into them. Group j has the positions
edges[j] ... edges[j + 1] - 1. The paper counts in the other direction, i = 1 ... N from the lowest
SNR (the noisiest levels) to the highest: i = N - j.

The paper groups levels by difficulty. Since we do not know its exact rule, there are three: equally
many positions, equal ranges of SNR in decibels, and clusters of a measured curve, which dynamic
programming finds exactly (the interval clustering of Go et al. 2023, arXiv 2306.00354).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cheapscale.diffusion.denoiser import Process
from cheapscale.diffusion.noise import decibels

ANCHORS = 50  # number of positions at which a curve is measured by network calls
# Range of the SNR in decibels. The SNR of a cosine schedule diverges at its ends, where groups of
# equal width would otherwise have a single level.
CLIP = (-20.0, 20.0)


class Groups(NamedTuple):
    """levels: sigmas of all positions, ascending. edges: int [N + 1], from 0 to len(levels)."""

    levels: np.ndarray
    edges: np.ndarray

    @property
    def count(self) -> int:
        """N."""
        return len(self.edges) - 1

    @property
    def sizes(self) -> np.ndarray:
        """The number of positions in each group."""
        return np.diff(self.edges)

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The sigmas that separate the groups, ascending: the noisiest level of each group except
        the last."""
        return tuple(float(self.levels[edge - 1]) for edge in self.edges[1:-1])

    def decibels(self) -> np.ndarray:
        """The mean SNR of each group, in decibels."""
        snr = decibels(self.levels)
        return np.array([snr[a:b].mean() for a, b in zip(self.edges, self.edges[1:])])

    def interval(
        self, group: int, overlap: int = 0, grid: np.ndarray | None = None
    ) -> tuple[float, float]:
        """(low, high): a group's expert is trained on the levels low < sigma <= high.

        Levels between two positions belong to the noisier one, so groups leave no gap.

        Args:
            overlap: number of levels of the sampler's `grid` beyond the group, on either side, that
                the interval also covers. Heun's method needs one: its corrector calls the expert at
                the cleaner end of the group's last step, which is outside the group.
        """
        first, last = int(self.edges[group]), int(self.edges[group + 1]) - 1
        if overlap:
            nodes = np.sort(np.asarray(grid))
            nodes = nodes[nodes > 0]
            low = self.levels[first - 1] if first else 0.0
            # A node on the boundary is outside the group; 1e-9 absorbs rounding of the grid.
            below = nodes[nodes <= low * (1 + 1e-9)][-overlap:]
            above = nodes[nodes > self.levels[last] * (1 + 1e-9)][:overlap]
            if len(below):
                first = min(first, int(np.searchsorted(self.levels, below[0] * (1 - 1e-9))))
            if len(above):
                last = max(last, int(np.searchsorted(self.levels, above[-1] * (1 - 1e-9))))
        last = min(last, len(self.levels) - 1)
        return float(self.levels[first - 1]) if first else 0.0, float(self.levels[last])


def anchor_positions(n: int) -> np.ndarray:
    """At most 50 of n positions, evenly spaced, with both ends."""
    return np.unique(np.linspace(0, n - 1, min(ANCHORS, n)).round().astype(int))


def make_groups(
    process: Process, count: int, kind: str = "equal", measured: np.ndarray | None = None
) -> Groups:
    """The levels of the process in `count` groups.

    Args:
        kind: "equal", equally many positions; "decibels", equal ranges of SNR; or clusters of a
            curve: "snr" (in decibels) or "loss".
        measured: the curve of "loss" at the positions `anchor_positions`: the logarithm of the
            teacher's loss, [anchors].
    """
    levels = process.levels()
    if not 1 <= count <= len(levels):
        raise ValueError(
            f"{len(levels)} noise levels cannot make {count} groups: give "
            f"--config.prune.groups={len(levels)} at most"
        )
    if kind == "equal":
        edges = np.round(len(levels) * np.arange(count + 1) / count).astype(int)
    elif kind == "decibels":
        edges = equal_decibels(decibels(levels), count)
    else:
        anchors = anchor_positions(len(levels))
        cost = spread(decibels(levels[anchors]) if kind == "snr" else measured)
        found = cluster(cost, count)
        # An edge lies half way between the two anchors beside a boundary.
        inner = [(int(anchors[e - 1]) + int(anchors[e]) + 1) // 2 for e in found[1:-1]]
        edges = np.array([0, *inner, len(levels)])
    if np.any(np.diff(edges) < 1):
        raise ValueError(
            f"prune.partition={kind} makes groups of {np.diff(edges).tolist()} levels: use fewer "
            "groups, or --config.prune.partition=equal"
        )
    return Groups(levels, edges)


def equal_decibels(snr: np.ndarray, count: int, clip: tuple[float, float] = CLIP) -> np.ndarray:
    """The edges of groups of equal range in SNR. snr: [n] in decibels, descending; is clipped."""
    clipped = np.clip(snr, *clip)
    inner = np.linspace(clipped[0], clipped[-1], count + 1)[1:-1]
    # A level on a boundary belongs to the cleaner group.
    return np.array([0, *(int(np.sum(clipped >= boundary)) for boundary in inner), len(snr)])


def cluster(cost: np.ndarray, count: int) -> np.ndarray:
    """The edges of the `count` contiguous groups of least total cost, by dynamic programming.

    cost: [n, n]; cost[a, b] is the cost of a group of the positions a ... b (`spread`).
    """
    n = len(cost)
    if count > n:
        raise ValueError(
            f"{n} measured levels cannot make {count} groups: give --config.prune.groups={n} at "
            "most, or --config.prune.partition=equal"
        )
    # best[g, end]: least cost of the positions 0 ... end - 1 in g groups, the last of which begins
    # at start[g, end].
    best = np.full((count + 1, n + 1), np.inf)
    start = np.zeros((count + 1, n + 1), int)
    best[0, 0] = 0.0
    for g in range(1, count + 1):
        for end in range(g, n + 1):
            totals = best[g - 1, :end] + cost[:end, end - 1]
            start[g, end] = np.argmin(totals)
            best[g, end] = totals[start[g, end]]
    edges = [n]
    for g in range(count, 0, -1):
        edges.append(int(start[g, edges[-1]]))
    return np.array(edges[::-1])


def spread(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The cost [n, n] of each group of values [n]: the sum of squared deviations from its mean."""
    values = np.asarray(values, np.float64)
    n = len(values)
    total, square = (np.concatenate([[0], np.cumsum(v)]) for v in (values, values**2))
    a, b = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    size, end = np.maximum(b - a + 1, 1), b + 1
    # sum (v - mean)^2 = sum v^2 - (sum v)^2 / size, with sums from cumulative sums
    within = square[end] - square[a] - (total[end] - total[a]) ** 2 / size
    return np.where(a <= b, np.maximum(within, 0.0), np.inf)
