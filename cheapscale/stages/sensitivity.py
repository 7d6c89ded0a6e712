"""Budgets by what each group can spare, solved exactly (spec section 3.4c).

    for each group g and share r of a menu:
        cut the base to r by one ratio, recover it for a few steps on the group's levels
        e_g(r) <- L_g(r) / L_g(1) - 1,  L_g(1) recovered alike
    minimise  sum_g w_g e_g(r_g)   subject to   sum_g n_g F(r_g) <= B sum_g n_g F0

n_g counts the sampler's steps of a group, w_g how far they move in ln SNR. Networks are masked, not
sliced: one program serves every group and share.
"""

import jax
import numpy as np
import optax

from cheapscale.evaluation.cost import Billed
from cheapscale.pruning import budget, search
from cheapscale.pruning.partition import step_owners
from cheapscale.pruning.structure import masked
from cheapscale.stages.groups import draw_levels
from cheapscale.training.state import stream_key

MENU = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)
RATE, BATCH = 1e-3, 64  # of the recovery
FORBIDDEN = 1e12  # excess of a share that cannot be had


def targets(assessment, mean: float) -> np.ndarray:
    """F_i / F0 of every group, from the cleanest, as the allocation chooses from the menu.

    assessment: an `Assessment`, whose targets are not known yet. Shares that the network's widths
    cannot reach are left out of the menu.
    """
    recover = Recovery(assessment)
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


class Recovery:
    """loss(group, keep): the loss of the base cut to `keep` on one half of the proxy's images,
    after a short fine-tuning on the other."""

    def __init__(self, assessment):
        self.assessment, self.adam = assessment, optax.adam(RATE)
        self.step = Billed(self._step)
        half = len(assessment.proxy.images) // 2
        self.taught, self.unseen = (
            assessment.proxy._make(rows[part] for rows in assessment.proxy)
            for part in (slice(half), slice(half, None))
        )

    def _step(self, params, opt_state, keep, support, x, label, sigma, key):
        def objective(params):
            variables = {"params": params, "keep": keep}
            return self.assessment.level_loss(variables, x, label, sigma, key).mean()

        updates, opt_state = self.adam.update(jax.grad(objective)(params), opt_state)
        params = optax.apply_updates(params, updates)
        # what reads a masked channel stays zero, so that the network stays the pruned one
        return jax.tree.map(lambda p, s: p * s, params, support), opt_state

    def __call__(self, group: int, keep: dict) -> float:
        of = self.assessment
        ones = jax.tree.map(np.ones_like, of.teacher.params)
        support = masked(ones, of.net.config, keep)["params"]
        variables = of.masked(keep)
        params, opt_state = variables["params"], self.adam.init(variables["params"])
        before = self.step.flops
        for i in range(of.settings["recovery"]):
            k_level, k_noise = jax.random.split(stream_key(of.seed, f"recover {group}", i))
            rng = np.random.default_rng((of.seed, group, i))
            rows = rng.integers(0, len(self.taught.images), BATCH)
            positions = of.groups.positions(group)
            sigma = draw_levels(k_level, BATCH, of.diffusion, of.groups, positions)
            params, opt_state = self.step(
                params, opt_state, variables["keep"], support, self.taught.images[rows],
                self.taught.labels[rows], sigma, k_noise,
            )  # fmt: skip
        of.others += self.step.flops - before
        return of.proxy_loss(variables | {"params": params}, group, proxy=self.unseen)
