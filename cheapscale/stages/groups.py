"""Groups of noise levels for a teacher of either process, and the loss inside one (spec 2, 5.2).

Positions are counted from clean to noisy. Of a VP teacher they are the times of its table; of an
EDM teacher the nodes of its 40-node sampling grid, between which its levels are continuous.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from cheapscale.diffusion import process
from cheapscale.diffusion.denoiser import edm_weight, squared_error
from cheapscale.pruning import partition

NODES = 40  # of the grid whose nodes are an EDM teacher's positions
ANCHORS = 50
KINDS = ("equal", "nodes", "edges", "decibels", "snr", "loss", "gradient", "scores")


class Groups(NamedTuple):
    """levels: sigmas of the positions, ascending. edges: see `partition`."""

    levels: np.ndarray
    edges: np.ndarray

    @property
    def count(self) -> int:
        return len(self.edges) - 1

    @property
    def borders(self) -> tuple[float, ...]:
        """Sigmas between the groups, ascending: the highest level of each group but the last."""
        return tuple(float(self.levels[edge - 1]) for edge in self.edges[1:-1])

    def positions(
        self, group: int, overlap: int = 0, grid: np.ndarray | None = None
    ) -> tuple[int, int]:
        """First and last position that a group's specialist trains on.

        overlap: so many steps of a sampler's grid, as it has them at the group's ends, beyond the
        group on either side. One is what a corrector needs, which is called at the cleaner end of
        the group's last step.
        """
        first, last = int(self.edges[group]), int(self.edges[group + 1]) - 1
        if not overlap:
            return first, last
        levels = np.sort(np.asarray(grid))
        nodes = np.searchsorted(self.levels, levels[levels > 0] * (1 - 1e-9))
        nodes = np.unique(np.clip(nodes, 0, len(self.levels) - 1))
        # nodes need not be borders: a step is counted from the last node inside to one outside
        cleanest = np.searchsorted(nodes, first)
        noisiest = np.searchsorted(nodes, last, "right") - 1
        below, above = max(cleanest - overlap, 0), min(noisiest + overlap, len(nodes) - 1)
        if below < cleanest < len(nodes):
            first = max(first - int(nodes[cleanest] - nodes[below]), 0)
        if above > noisiest >= 0:
            last = min(last + int(nodes[above] - nodes[noisiest]), len(self.levels) - 1)
        return first, last

    def decibels(self) -> np.ndarray:
        """Mean SNR of each group."""
        snr = process.decibels(self.levels)
        return np.array([snr[a:b].mean() for a, b in zip(self.edges, self.edges[1:])])


def levels_of(diffusion: dict) -> np.ndarray:
    """The sigmas of a teacher's positions, ascending."""
    if diffusion["process"] == "edm":
        ends = {name: diffusion[name] for name in ("sigma_min", "sigma_max", "rho")}
        return process.karras_grid(NODES, **ends)[::-1].copy()
    return process.vp_schedule(diffusion["process"]).sigmas


def anchor_positions(levels: np.ndarray) -> np.ndarray:
    """A few positions from end to end, at which what costs network calls is measured."""
    count = min(ANCHORS, len(levels))
    return np.unique(np.linspace(0, len(levels) - 1, count).round().astype(int))


def make_groups(
    diffusion: dict,
    count: int,
    kind: str = "equal",
    *,
    edges: Sequence[int] = (),
    grid: np.ndarray | None = None,
    anchors: np.ndarray | None = None,
    measured: np.ndarray | None = None,
) -> Groups:
    """Cut a teacher's levels into groups.

    kind: "equal" many positions; "nodes", equally many steps of a sampler's `grid`, whose nodes
    then are the borders (for an EDM teacher and 40 steps the same); "edges", the positions at which
    the groups but the cleanest begin; "decibels" of equal width, clipped to 20; or clustered by
    dynamic programming over SNR in decibels ("snr"), the loss ("loss"), the gradient ("gradient")
    or the ranks of the channels' scores ("scores") `measured` at the positions `anchors`.
    """
    levels = levels_of(diffusion)
    if kind == "equal":
        return Groups(levels, partition.equal_length(len(levels), count))
    if kind == "nodes":
        nodes = np.sort(grid[grid > 0])
        cut = partition.equal_length(len(nodes), count)[1:-1]
        inner = np.searchsorted(levels, nodes[cut - 1] * (1 - 1e-9)) + 1
        return Groups(levels, np.array([0, *inner, len(levels)]))
    if kind == "edges":
        return Groups(levels, partition.at(edges, len(levels), count))
    if kind == "decibels":
        return Groups(levels, partition.equal_decibels(process.decibels(levels), count))
    if kind == "snr":
        anchors = anchor_positions(levels)
        measured = process.decibels(levels[anchors])
    elif kind not in KINDS:
        raise ValueError(f"prune.partition is {kind!r}: choose one of {', '.join(KINDS)}")
    if anchors is None or measured is None:
        raise ValueError(f"prune.partition {kind!r} needs a measurement at some positions")
    similar = kind in ("gradient", "scores")
    cost = (partition.conflict if similar else partition.spread)(measured)
    found = partition.cluster(cost, count)
    return Groups(levels, partition.from_anchors(anchors, found, len(levels)))


def draw_levels(
    key: jax.Array, count: int, diffusion: dict, groups: Groups, positions: tuple[int, int]
) -> jax.Array:
    """sigma [count]: the teacher's own distribution cut to `positions` (first, last).

    Between two nodes of an EDM teacher the levels belong to the noisier one's group, so that groups
    without overlap leave no gap. Half of the draws are mirrored inside the interval (t' = lo + hi -
    t; of ln sigma, the opposite quantile), the interval's form of antithetic pairs.
    """
    first, last = positions
    u = jax.random.uniform(key, ((count + 1) // 2,), minval=1e-7)
    if diffusion["process"] == "edm":
        low = float(groups.levels[first - 1]) if first else 0.0
        high = float(groups.levels[last]) if last < len(groups.levels) - 1 else np.inf
        P_mean, P_std = diffusion["P_mean"], diffusion["P_std"]
        with np.errstate(divide="ignore"):
            a, b = (np.log([low, high]) - P_mean) / P_std
        # above the median by the other tail: near 1 float32 has too few probabilities
        side = -1.0 if -a < b else 1.0
        a, b = ndtr(np.sort([side * a, side * b]))
        p = a + (b - a) * jnp.concatenate([u, 1 - u])[:count]
        return jnp.exp(P_mean + side * P_std * jax.scipy.special.ndtri(p))
    t = first + jnp.floor(u * (last - first + 1)).astype(jnp.int32)
    t = jnp.concatenate([t, first + last - t])[:count]
    return jnp.asarray(groups.levels, jnp.float32)[t]


def weight(diffusion: dict, sigma: jax.Array) -> jax.Array:
    """What the teacher's own loss multiplies the squared error of x0 by."""
    if diffusion["process"] == "edm":
        return edm_weight(sigma, diffusion["sigma_data"])
    return 1 / sigma**2


def level_loss(D, x: jax.Array, sigma: jax.Array, key: jax.Array, diffusion: dict, **cond):
    """The teacher's loss at given levels, [b]."""
    return weight(diffusion, sigma) * squared_error(D, x, sigma, key, cond)
