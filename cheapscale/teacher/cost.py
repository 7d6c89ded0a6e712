"""The cost of one image of a model: network calls, FLOPs, seconds, memory, and earlier training.

FLOPs are those of one compiled network call times the number of calls, because XLA counts the body
of a scan once. Seconds are those of the whole sampler, after compilation and synchronised.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion.samplers import nfe
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.sampling import Model, levels, network_calls, ode_map, one_step, prior
from cheapscale.teacher.teacher import Generator, Teacher
from cheapscale.training.cost import cost_of_call, latency, param_count


def sampler_cost(
    model: Model,
    *,
    batch_size: int,
    steps: int = 40,
    method: str = "heun",
    cfg_scale: float = 1.0,
    spacing: str = "karras",
    repeats: int = 3,
) -> dict:
    """{nfe, parameters, flops_per_image, seconds_per_image, peak_bytes, batch_size,
    training_flops, training_device_seconds}; the last two sum over all stages up to this model."""
    model = jax.tree.map(jnp.asarray, model)
    ids = jnp.arange(batch_size)
    z = prior(0, ids, model.shape, model.process.sigma_max)
    label = jnp.zeros(model.label_shape(batch_size), jnp.int32)
    if isinstance(model, Generator):
        inputs, calls, run = (z, label), 1, one_step
        flops = cost_of_call(run, model, z, label).flops / batch_size
    else:
        options = {"method": method, "cfg_scale": cfg_scale, "spacing": spacing}
        inputs = (z, label, ids)
        run = functools.partial(ode_map, steps=steps, **options)
        calls = network_calls(model.process, steps, **options)
        grid = levels(model.process, steps, "sample", spacing)
        parts = segment_calls(model, z.shape, grid, method=method)
        guided = calls // sum(count for count, _ in parts)
        flops = guided * sum(count * each for count, each in parts)

    # XLA's peak: arguments, results and temporaries, minus results that reuse an argument's memory.
    memory = jax.jit(run).lower(model, *inputs).compile().memory_analysis()
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "nfe": calls,
        "parameters": param_count(model.params),
        "flops_per_image": flops,
        "seconds_per_image": latency(run, model, *inputs, repeats=repeats) / batch_size,
        "peak_bytes": resident + memory.temp_size_in_bytes - memory.alias_size_in_bytes,
        "batch_size": batch_size,
        "training_flops": model.meta["ledger"]["flops"],
        "training_device_seconds": model.meta["ledger"]["device_seconds"],
    }


def segment_calls(
    model: Teacher | Experts,
    shape: tuple[int, ...],
    grid: np.ndarray,
    *,
    method: str = "heun",
    shift: float = 1.0,
) -> list[tuple[int, float]]:
    """[(network calls, FLOPs of one call for one image)]: one pair for a teacher, one for each run
    of steps that one expert takes.

    shape: [b, h, w, c] of a batch. shift: see `Experts.parts`. Each network is compiled separately.
    """
    x = jax.ShapeDtypeStruct(shape, np.float32)
    ids = jax.ShapeDtypeStruct(model.label_shape(shape[0]), np.int32)

    def flops(member: Teacher) -> float:
        # Captions are encoded before the first call.
        label = jax.eval_shape(lambda m, ids: m.encode(ids), member, ids)
        return cost_of_call(_one_call, _abstract(member), x, label).flops / shape[0]

    return [(nfe(part, method), flops(member)) for member, part in model.parts(grid, shift)]


def _one_call(teacher: Teacher, x: jax.Array, label: jax.Array) -> jax.Array:
    return teacher.denoise(x, 1.0, label)


def _abstract(teacher: Teacher) -> Teacher:
    return jax.eval_shape(lambda model: model, teacher)
