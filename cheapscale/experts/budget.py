"""The FLOPs of each group's network (step-adaptive training, arXiv 2312.13307).

The paper estimates the difficulty of a noise level from its signal-to-noise ratio,

    SNR_dB(t) = 10 log10(alpha_bar_t / (1 - alpha_bar_t)) = -20 log10 sigma,

and gives group i of N, counted from the lowest SNR, FLOPs that are linear in i:

    F_i = (i / N + (1 - i / N) k) F_0,    i = 1 (lowest SNR) ... N (highest),    0 < k <= 1

F_0 is the FLOPs of the base. (The equation number is not given because the paper's full text was
not available to us.) Shares F_i / F_0 are listed from clean to noisy, in the order of `partition`:
group j = 0 ... N - 1 has i = N - j.
"""

import numpy as np


def shares(N: int, k: float, order: str = "snr_up") -> np.ndarray:
    """F_i / F_0 of each group, float64 [N] from clean to noisy.

    order: the group that keeps the whole network: the one of highest SNR ("snr_up", the paper's),
        of lowest SNR ("snr_down"), or the middle one ("mid"). "flat" gives all groups the mean
        share.
    """
    j = np.arange(N)
    if order == "mid":
        # Rank by distance from the middle; of two groups at equal distance, the cleaner one first.
        rank = np.empty(N, int)
        rank[np.lexsort((j, np.abs(2 * j - (N - 1))))] = np.arange(N)
    else:
        rank = j[::-1] if order == "snr_down" else j
    i = N - rank
    share = i / N + (1 - i / N) * k  # the paper's formula
    return np.full(N, share.mean()) if order == "flat" else share


def targets(k: float, mean: float, order: str, sizes: np.ndarray) -> np.ndarray:
    """F_i / F_0 of each group, from clean to noisy.

    Args:
        mean: 0 uses `k`; otherwise k is solved so that the mean share over all noise levels is
            `mean`. In the order "flat" every group has this share, also for N = 1.
        sizes: [N], the number of noise levels of each group.
    """
    if mean and order == "flat":
        return np.full(len(sizes), mean)
    return shares(len(sizes), solve_k(mean, order, sizes) if mean else k, order)


def solve_k(mean: float, order: str, sizes: np.ndarray) -> float:
    """The k for which the mean of the shares, weighted by the groups' sizes, is `mean`.

    Raises ValueError if no k in (0, 1] exists.
    """
    # The mean is affine in k. With k = 1 every share is 1, so it is at_0 + k (1 - at_0).
    N = len(sizes)
    at_0 = float(np.average(shares(N, 0.0, order), weights=sizes))
    k = (mean - at_0) / (1 - at_0) if at_0 < 1 else float(mean == 1)
    if not 0 < k <= 1:
        raise ValueError(
            f"no k gives {N} groups the mean share prune.mean={mean}: choose one above {at_0:.3f} "
            "and at most 1, or --config.prune.order=flat"
        )
    return k
