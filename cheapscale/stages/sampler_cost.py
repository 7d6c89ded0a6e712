"""What one image of a model costs: network calls, FLOPs, seconds, memory, and the training before.

FLOPs are the sum over network calls of one compiled call (a scan's body would be counted once);
seconds are of the whole sampler, warm and synchronised.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.evaluation.cost import cost_of_call, latency, param_count
from cheapscale.stages.networks import make_denoiser, make_generator
from cheapscale.stages.sampling import network_calls, prior, teacher_map
from cheapscale.training.checkpoint import Loaded

PyTree = Any


def sampler_cost(
    loaded: Loaded,
    *,
    batch_size: int,
    steps: int = 40,
    method: str = "heun",
    cfg_scale: float = 1.0,
    repeats: int = 3,
) -> dict:
    """{nfe, parameters, flops_per_image, seconds_per_image, peak_bytes, batch_size,
    training_flops, training_device_seconds}; the last two over all stages up to this model."""
    meta = loaded.meta
    (name, model), = meta["networks"].items()  # fmt: skip
    diffusion = meta["diffusion"]
    base = model["resolution"]
    ids = np.arange(batch_size)
    z = prior(0, ids, (base, base, model["in_channels"]), diffusion["sigma_max"])
    label = jnp.zeros(batch_size, jnp.int32)
    params = jax.tree.map(jnp.asarray, loaded.params)
    if name == "generator":
        run = one_call = make_generator(model, diffusion)
        nfe = 1
    else:
        run = teacher_map(model, diffusion, steps=steps, method=method, cfg_scale=cfg_scale)
        nfe = network_calls(diffusion, steps, "sample", method=method, cfg_scale=cfg_scale)

        def one_call(params: PyTree, x: jax.Array, label: jax.Array) -> jax.Array:
            return make_denoiser(model, diffusion)(params)(x, diffusion["sigma_max"], label=label)

    memory = jax.jit(run).lower(params, z, label).compile().memory_analysis()
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "nfe": nfe,
        "parameters": param_count(params),
        "flops_per_image": nfe * cost_of_call(one_call, params, z, label).flops / batch_size,
        "seconds_per_image": latency(run, params, z, label, repeats=repeats) / batch_size,
        "peak_bytes": resident + memory.temp_size_in_bytes - memory.alias_size_in_bytes,
        "batch_size": batch_size,
        "training_flops": meta["ledger"]["flops"],
        "training_device_seconds": meta["ledger"]["device_seconds"],
    }
