"""The cost of a stage before it runs: parameters, FLOPs, memory and disk space.

Nothing is trained or written. FLOPs come from the lowered step, and sizes of arrays from their
shapes, which takes seconds for networks of any size. The temporary memory of a step is only known
after compilation (`compiled`), on the backend that will run it.
"""

import pathlib
import shutil

import jax
from ml_collections import ConfigDict

from cheapscale.training import loop
from cheapscale.training import mesh as sharding
from cheapscale.training.checkpoint import saved_steps
from cheapscale.training.cost import param_count, traced_flops, tree_bytes
from cheapscale.training.stage import Job, Stage
from cheapscale.training.state import stream_key


def describe(config: ConfigDict, stage: Stage | Job, workdir: str, *, compiled: bool) -> dict:
    """The plan as a dict; raises OSError if the disk has too little space for the run's files."""
    plan = {"stage": config.stage, "devices": jax.device_count()}
    if isinstance(stage, Job):
        done = sum(map(stage.done, range(stage.num_shards)))
        plan |= {"shards": stage.num_shards, "shards_done": done} | stage.describe()
    else:
        plan |= training_cost(config, stage, compiled)
        if config.total_flops:
            each = plan["flops_per_step"]
            config.total_steps = loop.steps_within(config.total_flops, stage.meta, each)
        plan |= checkpoint_disk(config, plan["checkpoint_bytes"], pathlib.Path(workdir))
        plan["flops_total"] = plan["flops_per_step"] * plan["steps"]
        plan["flops_left"] = plan["flops_per_step"] * max(plan["steps"] - plan["steps_done"], 0)
    plan["disk_free_bytes"] = free = free_bytes(plan.get("disk", workdir))
    if plan.get("disk_bytes", 0) > free:
        raise OSError(
            f"{plan['disk']} needs {plan['disk_bytes'] / 1e9:.2f} GB, but its disk has "
            f"{free / 1e9:.2f} GB free: choose another disk, or --config.invert.dtype=float16 for "
            "latents"
        )
    return plan


def training_cost(config: ConfigDict, stage: Stage, compiled: bool) -> dict:
    """Parameters, FLOPs of a step, and bytes on one device: of the run's state (weights, EMA,
    optimiser moments), the frozen networks and one batch, and with `compiled` also the temporary
    memory of the compiled step. Previews are not counted."""
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    sharding.check_batch(stage.batch_size, mesh)
    state = loop.abstract_state(stage, mesh, config.seed)
    frozen = sharding.placed(stage.frozen_shapes(), mesh)
    # The shapes of the global batch, from the first batch of this process.
    batch = jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(
            (len(rows) * jax.process_count(), *rows.shape[1:]),
            jax.dtypes.canonicalize_dtype(rows.dtype),
            sharding=sharding.batch_sharding(mesh),
        ),
        next(stage.batches(0)),
    )
    arguments = (state, frozen, batch, stream_key(0, "step", 0))
    memory = {"state": tree_bytes(state), "frozen": tree_bytes(frozen), "batch": tree_bytes(batch)}
    with jax.set_mesh(mesh):
        flops = traced_flops(stage.step, *arguments)
    if compiled:
        program, _, _ = loop.compile_step(stage, mesh, state, frozen, batch)
        memory["step"] = program.memory_analysis().temp_size_in_bytes
    networks = {}
    for net, optimiser in stage.optimisers.items():
        params, (trainable, _) = state.params[net], optimiser.split(state.params[net])
        counts = {"parameters": param_count(params), "trainable": param_count(trainable)}
        networks[net] = counts
    # Without shardings: a checkpoint on disk holds the complete arrays once.
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    return {
        "networks": networks,
        "fits_first": stage.fits,
        "flops_per_step": flops,
        "memory": {"bytes_per_device": sum(memory.values())} | memory,
        "checkpoint_bytes": tree_bytes(whole),
    }


def checkpoint_disk(config: ConfigDict, checkpoint_bytes: int, workdir: pathlib.Path) -> dict:
    """{steps, steps_done, disk, disk_bytes}: the disk space in `workdir` that the remaining
    checkpoints need at the same time, without logs."""
    saved, steps = saved_steps(workdir), config.total_steps
    done = saved[-1] if saved else 0
    ahead = range(done + 1, steps + 1)
    coming = sum(loop.due(step, config.save_every) or step == steps for step in ahead)
    # An old checkpoint is deleted only after the new one is complete, so keep + 1 exist for a time.
    at_once = min(coming, max(config.keep + 1 - len(saved), 1))
    disk = {"disk": str(workdir), "disk_bytes": checkpoint_bytes * at_once}
    return {"steps": steps, "steps_done": done} | disk


def free_bytes(folder: str) -> int:
    """The free bytes on the disk of a folder, which need not exist yet."""
    place = pathlib.Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
