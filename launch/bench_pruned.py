"""A pruned specialist against its base, for launch/bench.py: what FLOPs saved are worth in seconds.

One ratio for all inner widths, repaired to within 2 % of a share; a step of training and a call of
the network. The record holds the shares that were reached.
"""

import jax
import numpy as np

from cheapscale.evaluation.cost import param_count
from cheapscale.models.unet import unet
from cheapscale.pruning import importance, search
from cheapscale.pruning.structure import prune
from cheapscale.stages.networks import complete, pruned_model
from launch.bench_ours import our_calls, random_weights


def prepare(model: dict, batch: int, shares: tuple[float, ...]) -> tuple[dict, dict]:
    """Returns what the record says of base and specialists; {use: {"base" or share: call}}."""
    model = complete(model)
    params, config = random_weights(model), unet(**model).config
    shape = (batch, model["resolution"], model["resolution"], 3)
    images = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    calls, flops, _ = our_calls(model, params, images)
    sides, costs = {"ours": calls}, {"ours": flops}
    facts: dict = {"model": model, "batch": batch, "parameters": {"ours": param_count(params)}}
    facts["analytic"], facts["compiled"] = {}, {}
    for share in shares:
        task = search.make_task(config, share, importance.magnitude(params, config))
        widths = search.uniform(task)
        keep, title = task.keep(widths), f"{100 * share:.0f} %"
        cut = jax.tree.map(np.asarray, prune(params, config, keep))
        sides[title], costs[title], _ = our_calls(pruned_model(model, keep), cut, images)
        facts["parameters"][title] = param_count(cut)
        facts["analytic"][title] = task.share(widths)
        facts["compiled"][title] = {
            use: costs[title][use] / flops[use] for use in ("sampling", "training")
        }
    uses = ("sampling", "training")
    return facts, {use: {side: rows[use] for side, rows in sides.items()} for use in uses}
