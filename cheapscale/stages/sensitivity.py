"""Budgets by what each group can spare, solved exactly (spec section 3.4c).

    for each group g and share r of a menu:
        cut the base to r by one ratio, recover it for a few steps on the group's levels
        e_g(r) <- L_g(r) / L_g(1) - 1,  L_g(1) recovered alike
    minimise  sum_g w_g e_g(r_g)   subject to   sum_g n_g F(r_g) <= B sum_g n_g F0

n_g counts the sampler's steps of a group, w_g how far they move in ln SNR.
"""

import numpy as np

from cheapscale.pruning import budget, search
from cheapscale.pruning.partition import step_owners
from cheapscale.stages.recovery import Recovery

MENU = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)
FORBIDDEN = 1e12  # excess of a share that cannot be had


def targets(assessment, mean: float) -> np.ndarray:
    """F_i / F0 of every group, from the cleanest, as the allocation chooses from the menu.

    assessment: an `Assessment`, whose targets are not known yet. Shares that the network's widths
    cannot reach are left out of the menu.
    """
    recover = Recovery(assessment, assessment.settings["recovery"])
    steps = assessment.sampler_steps()
    excess, costs = [], []
    for group in range(assessment.groups.count):
        scores = assessment.scores(group)
        whole = recover(group, {})
        row, cost = [], []
        for share in MENU[:-1]:
            try:
                task = search.make_task(assessment.net.config, share, scores, "inner")
                widths = search.uniform(task)
            except ValueError:  # out of this group's reach: never worth choosing
                row.append(FORBIDDEN)
                cost.append(share)
                continue
            row.append(recover(group, task.keep(widths)) / whole - 1)
            cost.append(task.share(widths))
        excess.append([*row, 0.0])
        costs.append([*cost, 1.0])
    weights = travelled(assessment.grid(), assessment.groups.borders, len(steps)) + 1e-6
    chosen, _ = budget.allocate(np.array(excess), np.array(costs), weights, steps, mean)
    return np.array([costs[group][choice] for group, choice in enumerate(chosen)])


def travelled(grid: np.ndarray, borders, count: int) -> np.ndarray:
    """How far each group's steps move in ln SNR; the last, to sigma 0, is not counted."""
    levels = grid[grid > 0]
    owners = step_owners(levels, borders)
    return np.bincount(owners, weights=2 * np.abs(np.diff(np.log(levels))), minlength=count)
