"""The plan of a stage before it runs: parameters, FLOPs, memory, disk.

Nothing is compiled, trained or written: every figure comes from shapes and from tracing the step.
Compiling it would give the backend's own figure of memory, but takes minutes at the sizes for which
one asks; the figure here counts the values alive at once in the order of the program.
"""

import pathlib
import shutil

import jax

from cheapscale.evaluation.cost import param_count
from cheapscale.training import loop, sharding
from cheapscale.training.footprint import traced_bytes, traced_flops, tree_bytes
from cheapscale.training.stage import Job, Stage
from cheapscale.training.state import split, stream_key


def describe(config, stage: Stage | Job, workdir: str) -> dict:
    """The plan as a dict; raises OSError where the disk has no room for what the run will write."""
    plan = {"stage": config.stage, "devices": jax.device_count()}
    if isinstance(stage, Job):
        done = sum(map(stage.done, range(stage.num_shards)))
        plan |= {"shards": stage.num_shards, "shards_done": done} | stage.describe()
    else:
        plan |= describe_training(config, stage, pathlib.Path(workdir))
    plan["disk_free_bytes"] = free = free_bytes(plan.get("disk", workdir))
    if plan.get("disk_bytes", 0) > free:
        raise OSError(
            f"{plan['disk']} needs {plan['disk_bytes'] / 1e9:.2f} GB, but its disk has "
            f"{free / 1e9:.2f} GB free: choose another disk, or invert.dtype=float16 for latents"
        )
    return plan


def free_bytes(folder: str) -> int:
    """Free bytes of the disk that holds a folder, or would hold it."""
    place = pathlib.Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def describe_training(config, stage: Stage, workdir: pathlib.Path) -> dict:
    """The plan of a training stage.

    memory: bytes on one device of the run's state (weights, their average, optimiser moments), the
    frozen networks, one batch, and the values alive at once inside a step; previews are left out.
    disk_bytes: of the checkpoints still to come that lie there at the same time; logs are left out.
    """
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    sharding.check_batch(stage.batch_size, mesh)
    state = loop.abstract_state(stage, mesh, config.seed)
    frozen = sharding.placed(stage.frozen_shapes(), mesh)
    batch = jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(
            (len(rows) * jax.process_count(), *rows.shape[1:]),
            jax.dtypes.canonicalize_dtype(rows.dtype),
            sharding=sharding.batch_sharding(mesh),
        ),
        next(stage.batches(0)),
    )
    arguments = (state, frozen, batch, stream_key(0, "step", 0))
    with jax.set_mesh(mesh):
        flops = traced_flops(stage.step, *arguments)
        values = traced_bytes(
            stage.step,
            *arguments,
            donated=len(jax.tree.leaves(state)),
            batch_size=stage.batch_size,
            ways=mesh.shape["data"] * mesh.shape["fsdp"],
        )
    memory = {"state": tree_bytes(state), "frozen": tree_bytes(frozen), "batch": tree_bytes(batch)}
    memory["values"] = values
    networks = {}
    for net, optimiser in stage.optimisers.items():
        trainable, _ = split(state.params[net], optimiser.trainable)
        counts = {"parameters": param_count(state.params[net]), "trainable": param_count(trainable)}
        networks[net] = counts
    saved = saved_steps(workdir)
    done, steps = max(saved, default=0), config.total_steps
    checkpoint = tree_bytes(jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), state))
    ahead = range(done + 1, steps + 1)
    coming = sum(loop.due(step, config.save_every) or step == steps for step in ahead)
    return {
        "networks": networks,
        "fits_first": stage.fits,
        "steps": steps,
        "steps_done": done,
        "flops_per_step": flops,
        "flops_total": flops * steps,
        "flops_left": flops * max(steps - done, 0),
        "memory": {"bytes_per_device": sum(memory.values())} | memory,
        "disk": str(workdir),
        "checkpoint_bytes": checkpoint,
        # an old checkpoint is deleted only after a new one is whole
        "disk_bytes": checkpoint * min(coming, max(config.keep + 1 - len(saved), 1)),
    }


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of a work directory's checkpoints."""
    return [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
