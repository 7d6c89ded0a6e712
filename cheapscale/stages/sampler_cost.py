"""What one image of a model costs: network calls, FLOPs, seconds, memory, and the training before.

FLOPs are the sum over network calls of one compiled call (a scan's body would be counted once);
seconds are of the whole sampler, warm and synchronised.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion import solvers
from cheapscale.evaluation.cost import cost_of_call, latency, param_count
from cheapscale.stages.networks import make_generator, make_segments, segment_grids
from cheapscale.stages.sampling import levels, network_calls, prior, teacher_map
from cheapscale.training.checkpoint import Loaded

PyTree = Any


def sampler_cost(
    loaded: Loaded,
    *,
    batch_size: int,
    steps: int = 40,
    method: str = "heun",
    cfg_scale: float = 1.0,
    spacing: str = "karras",
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
    inputs = (z, label)
    if name == "generator":
        run, nfe = make_generator(model, diffusion), 1
        flops = cost_of_call(run, params, z, label).flops / batch_size
    else:
        options = {"method": method, "cfg_scale": cfg_scale, "spacing": spacing}
        run = teacher_map(model, diffusion, steps=steps, **options)
        inputs = (z, label, jnp.asarray(ids))
        nfe = network_calls(diffusion, steps, "sample", **options)
        grid = levels(diffusion, steps, "sample", spacing)
        calls = segment_calls(model, diffusion, params, z.shape, grid, method=method)
        guided = nfe // sum(count for count, _ in calls)
        flops = guided * sum(count * each for count, each in calls)

    memory = jax.jit(run).lower(params, *inputs).compile().memory_analysis()
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "nfe": nfe,
        "parameters": param_count(params),
        "flops_per_image": flops,
        "seconds_per_image": latency(run, params, *inputs, repeats=repeats) / batch_size,
        "peak_bytes": resident + memory.temp_size_in_bytes - memory.alias_size_in_bytes,
        "batch_size": batch_size,
        "training_flops": meta["ledger"]["flops"],
        "training_device_seconds": meta["ledger"]["device_seconds"],
    }


def segment_calls(
    model: dict,
    diffusion: dict,
    params: PyTree,
    shape: tuple[int, ...],
    grid: np.ndarray,
    *,
    method: str = "heun",
    owner_shift: float = 1.0,
) -> list[tuple[int, float]]:
    """(network calls, FLOPs of one call for one image) of every segment of a grid: one segment for
    a teacher, one for each specialist that owns a step of it. shape: of a batch [b, h, w, c];
    owner_shift: see `make_segments`.

    Each network's call is compiled once and alone.
    """
    segments = make_segments(model, diffusion, owner_shift=owner_shift)
    params = jax.eval_shape(lambda p: p, params)
    x = jax.ShapeDtypeStruct(shape, np.float32)
    label = jax.ShapeDtypeStruct(shape[:1], np.int32)
    found = []
    for i, part in enumerate(segment_grids(diffusion, grid, owner_shift)):

        def one_call(params, x, label, i=i, part=part):
            D, _ = segments(params, label, grid)[i]
            return D(x, float(part[0]))

        count = sum(solvers.nfe([(None, part)], method))
        found.append((count, cost_of_call(one_call, params, x, label).flops / shape[0]))
    return found
