"""The seconds of pruned experts against their base, for the same share of FLOPs.

All widths inside blocks shrink by one ratio, adjusted to a share of the base's FLOPs within 2 %.
"""

import dataclasses

import jax
import numpy as np

from cheapscale.experts import importance, search
from cheapscale.experts.structure import prune, pruned_config
from cheapscale.models.unet import unet
from cheapscale.training.cost import param_count
from launch.bench.ours import our_calls, random_weights


def prepare(model: dict, batch: int, shares: tuple[float, ...]) -> tuple[dict, dict]:
    """(facts for the record, {use: {"base" or a share: call}})."""
    params, config = random_weights(model), unet(**model).config
    shape = (batch, model["resolution"], model["resolution"], 3)
    images = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    calls, flops = {}, {}
    calls["base"], flops["base"] = our_calls(model, params, images)
    facts: dict = {
        "model": model, "batch": batch, "parameters": {"base": param_count(params)},
        "analytic": {}, "compiled": {},
    }  # fmt: skip
    for share in shares:
        task = search.make_task(config, share, importance.magnitude(params, config))
        widths = search.uniform(task)
        keep, title = task.keep(widths), f"{share:.0%}"
        cut = jax.tree.map(np.asarray, prune(params, config, keep))
        fields = dataclasses.asdict(pruned_config(config, widths))
        calls[title], flops[title] = our_calls(fields, cut, images)
        facts["parameters"][title] = param_count(cut)
        facts["analytic"][title] = task.share(widths)
        facts["compiled"][title] = {u: flops[title][u] / f for u, f in flops["base"].items()}
    uses = ("sampling", "training")
    return facts, {use: {side: calls[side][use] for side in calls} for use in uses}
