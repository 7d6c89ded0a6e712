"""The plan of a stage before it runs: parameters, FLOPs, memory, disk. Nothing is trained."""

import math
import pathlib
import shutil
from typing import Any

import jax

from cheapscale.training import loop, sharding
from cheapscale.training.stage import Job, Stage
from cheapscale.training.state import split, stream_key


def count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size(tree: Any) -> int:
    """Bytes of a tree of arrays or ShapeDtypeStructs."""
    leaves = [
        leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes") or hasattr(leaf, "dtype")
    ]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def describe(config, stage: Stage | Job, workdir: str) -> dict:
    """The plan as a dict; raises OSError where the disk has no room for what the run will write."""
    place = pathlib.Path(workdir)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if isinstance(stage, Job):
        images = stage.num_shards * stage.items_per_shard
        per_value = {"float32": 4, "float16": 2}[config.invert.dtype]
        disk = images * 3 * config.data.resolution**2 * per_value
        plan = {
            "shards": stage.num_shards,
            "shards_done": sum(stage.done(s) for s in range(stage.num_shards)),
            "latents": images,
            "network_calls_per_latent": 2 * (config.invert.nodes - 1),
        }
    else:
        plan, disk = describe_training(config, stage)
    plan |= {"stage": config.stage, "disk_bytes": disk, "disk_free_bytes": free}
    if disk > free:
        raise OSError(
            f"{workdir} needs {disk / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free: "
            "choose another disk, or invert.dtype=float16 for latents"
        )
    return plan


def describe_training(config, stage: Stage) -> tuple[dict, int]:
    """(plan, bytes of the checkpoints kept) of a training stage, from shapes alone."""
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    sharding.check_batch(stage.batch_size, mesh)
    state = loop.abstract_state(stage, mesh, config.seed)
    frozen = stage.load_frozen()
    batch = sharding.shard_batch(next(stage.batches(0)), mesh)
    with jax.set_mesh(mesh):
        lowered = jax.jit(stage.step).lower(state, frozen, batch, stream_key(0, "step", 0))
        flops = (lowered.cost_analysis() or {}).get("flops", 0.0)
    networks = {}
    for net, optimiser in stage.optimisers.items():
        trainable, _ = split(state.params[net], optimiser.trainable)
        networks[net] = {"parameters": count(state.params[net]), "trainable": count(trainable)}
    plan = {
        "networks": networks,
        "frozen_network_bytes": size(frozen),
        "state_bytes": size(state),
        "batch_bytes": size(batch),
        "flops_per_step": flops,
        "flops_total": flops * config.total_steps,
        "devices": mesh.size,
        "steps": config.total_steps,
    }
    return plan, size(state) * (config.keep + 1)
