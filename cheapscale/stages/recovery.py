"""What a cut network is worth after a short fine-tuning on its group's levels.

Networks are masked, not sliced: one program serves every group and every candidate.
"""

import jax
import numpy as np
import optax

from cheapscale.evaluation.cost import Billed
from cheapscale.pruning.structure import masked
from cheapscale.stages.groups import draw_levels
from cheapscale.training.state import stream_key

RATE, BATCH = 1e-3, 64


class Recovery:
    """loss(group, keep): the loss of the base cut to `keep` on one half of the proxy's images,
    after so many steps of fine-tuning on the other. Billed to the assessment."""

    def __init__(self, assessment, steps: int):
        self.assessment, self.steps, self.adam = assessment, steps, optax.adam(RATE)
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
        for i in range(self.steps):
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
