"""How large each group's network may be (step-adaptive training, spec section 3).

    SNR_dB(t) = 10 log10(alpha_bar / (1 - alpha_bar)) = -20 log10 sigma
    (1)  F(i) = (i/N + (1 - i/N) k) F0,   i = 1 (lowest SNR) ... N (highest),  0 < k <= 1

Shares F / F0 are given for groups from clean to noisy, as `partition` counts them: i = N - j. A
mean is over training positions or over the steps of a sampler, by its weights; the two differ,
and so does what "80 %" means.
"""

from collections.abc import Sequence

import numpy as np

ORDERS = ("snr_up", "snr_down", "mid")


def shares(groups: int, k: float, order: str = "snr_up") -> np.ndarray:
    """Equation (1), [N] from clean to noisy.

    order: which group keeps the whole network: the one of highest SNR ("snr_up", the default), of
    lowest ("snr_down"), or the middle one ("mid", both ends small).
    """
    if not 0 < k <= 1:
        raise ValueError(f"k is {k}: choose a number above 0 and at most 1")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}: choose one of {', '.join(ORDERS)}")
    j = np.arange(groups)
    if order == "mid":  # ranks by distance from the middle; of two alike the cleaner is larger
        rank = np.empty(groups, int)
        rank[np.lexsort((j, np.abs(2 * j - (groups - 1))))] = np.arange(groups)
    else:
        rank = j if order == "snr_up" else j[::-1]
    i = groups - rank
    return i / groups + (1 - i / groups) * k


def mean_share(share: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Mean FLOPs over the base's; weights: positions or sampler steps of each group."""
    return float(np.average(np.asarray(share, np.float64), weights=weights))


def solve_k(
    groups: int, mean: float, *, order: str = "snr_up", weights: Sequence[float] | None = None
) -> float:
    """The k whose shares have that mean (section 3.2; with a sampler's steps as weights, 3.4d)."""
    # the mean is affine in k
    at_1 = mean_share(shares(groups, 1.0, order), weights)
    at_half = mean_share(shares(groups, 0.5, order), weights)
    slope = 2 * (at_1 - at_half)
    k = 1 - (at_1 - mean) / slope if slope else 1.0
    if not 0 < k <= 1 + 1e-12 or not np.isclose(
        mean_share(shares(groups, min(k, 1), order), weights), mean
    ):
        lowest = at_1 - slope
        raise ValueError(
            f"no k gives {groups} groups the mean share {mean}: choose one above {lowest:.3f} and "
            "at most 1"
        )
    return min(k, 1.0)


def by_difficulty(
    difficulty: Sequence[float], mean: float, weights: Sequence[float] | None = None
) -> np.ndarray:
    """Shares that rise linearly with a difficulty [N], from k' at the least to 1 at the greatest,
    with k' solved from the mean (sections 3.4a: mean SNR_dB, clipped by the caller; 3.4b: the
    logarithm of the base's loss)."""
    u = np.asarray(difficulty, np.float64)
    width = np.ptp(u)
    if width == 0:
        return np.full(len(u), float(mean))
    u = (u - u.min()) / width
    average = float(np.average(u, weights=weights))
    lowest = (mean - average) / (1 - average)
    if not 0 < lowest <= 1:
        raise ValueError(
            f"no share of the easiest group gives the mean {mean}: choose one above {average:.3f} "
            "and at most 1"
        )
    return lowest + (1 - lowest) * u


def allocate(
    excess: np.ndarray,
    cost: np.ndarray,
    weights: Sequence[float],
    steps: Sequence[float],
    mean: float,
) -> tuple[np.ndarray, float]:
    """The choice from a menu of least weighted excess loss within a budget, exactly (3.4c).

    Args:
        excess: [N, R], L_g(r) / L_g(1) - 1 of group g at menu entry r after a short recovery.
        cost: [R] or [N, R], F(r) / F0.
        weights: [N], what a group's excess counts. steps: [N], sampler steps of each group.
        mean: the steps' mean share must not exceed it.

    Returns:
        (indices into the menu [N], weighted excess). ValueError where even the cheapest is over.
    """
    excess = np.asarray(excess, np.float64)
    cost = np.broadcast_to(np.asarray(cost, np.float64), excess.shape)
    steps, weights = np.asarray(steps, np.float64), np.asarray(weights, np.float64)
    limit = mean * steps.sum() * (1 + 1e-12)
    # (spent, lost, choices): all that no other undercuts in both
    frontier: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for g in range(len(excess)):
        extended = sorted(
            (spent + steps[g] * cost[g, r], lost + weights[g] * excess[g, r], (*chosen, r))
            for spent, lost, chosen in frontier
            for r in range(excess.shape[1])
        )
        frontier = []
        for row in extended:
            if row[0] <= limit and (not frontier or row[1] < frontier[-1][1]):
                frontier.append(row)
    if not frontier:
        least = float(np.sum(steps * cost.min(axis=1)) / steps.sum())
        raise ValueError(
            f"the cheapest choice has the mean share {least:.3f}, above {mean}: raise the mean or "
            "add cheaper entries to the menu"
        )
    _, lost, chosen = frontier[-1]
    return np.array(chosen), lost
