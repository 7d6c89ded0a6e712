"""The one training loop. It knows no stage by name: everything it runs is in the `Stage` value.

Start order: the work directory's newest checkpoint > `config.resume` > the stage's warm start >
scratch. Loop order, which keeps the device busy and every state saveable (do not reorder):

    batch -> step (asynchronous) -> log the previous step's metrics -> save -> evals -> pre-emption
"""

import json
import math
import pathlib
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging

from cheapscale.evaluation.cost import param_count
from cheapscale.training import checkpoint as ckpt
from cheapscale.training import sharding
from cheapscale.training.logging import Log
from cheapscale.training.stage import Stage
from cheapscale.training.state import TrainState, create_state, stream_key

PyTree = Any


class Preempted(Exception):
    """The run was asked to stop; its state is saved. Running it again goes on."""


class Diverged(Exception):
    """A loss was not finite; the state is saved beside the checkpoints."""


class StopSignal:
    """SIGTERM and SIGINT set a flag that the loop reads between steps (one process); a second one
    acts at once.

    With several processes the flag would be raised at different steps, so there Orbax's
    synchronised point decides instead. A signal that nothing has acted on when the block ends, as
    where a finished stage had no step left to do, raises Preempted there.
    """

    def __init__(self):
        self.raised = False

    def __enter__(self):
        self.previous = {}
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    self.previous[number] = signal.signal(number, self._raise)
                except ValueError:  # not the main thread (a notebook's worker): no handler there
                    break
        return self

    def __exit__(self, error, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.raised and error is None:
            raise Preempted("pre-empted; what was done is saved")

    def _raise(self, number, _):
        self.raised = True
        signal.signal(number, self.previous[number])


def abstract_state(stage: Stage, mesh: jax.sharding.Mesh, seed: int) -> TrainState:
    """Shapes, dtypes and shardings of the run's state; nothing is computed."""

    def make(key):
        return create_state(*stage.init_params(key), stage.optimisers, stage.meta["networks"])

    shapes = jax.eval_shape(make, stream_key(seed, "init", 0))
    return sharding.placed(shapes, mesh)


def fresh_state(stage: Stage, mesh: jax.sharding.Mesh, seed: int) -> TrainState:
    """Initialise on the mesh (no host copy), then warm-start, then make EMA and optimisers.

    Both programs run once and are compiled without optimisation: on two CPU cores the random
    draws of a U-Net and a discriminator took 12 s to optimise and take 3 s so.
    """
    abstract = abstract_state(stage, mesh, seed)
    places = jax.tree.map(lambda s: s.sharding, abstract)
    quickly = {"xla_backend_optimization_level": 0}
    init = jax.jit(
        stage.init_params,
        out_shardings=(places.params, places.extra),
        compiler_options=quickly,
    )
    params, extra = init(stream_key(seed, "init", 0))
    params = jax.tree.map(jax.device_put, stage.warm_start(params), places.params)
    make = jax.jit(
        lambda p, e: create_state(p, e, stage.optimisers, stage.meta["networks"]),
        out_shardings=places,
        compiler_options=quickly,
    )
    state = make(params, extra)
    if stage.warm_optimiser:
        warm = stage.warm_optimiser(state.opt_state)
        state = state.replace(opt_state=jax.tree.map(jax.device_put, warm, places.opt_state))
    return state


def compile_step(stage: Stage, mesh: jax.sharding.Mesh, state: PyTree, frozen: PyTree, batch):
    """The stage's step compiled once for this mesh: (callable, FLOPs of one step, peak bytes).

    state, frozen, batch: arrays, or their shapes with shardings.
    """
    places = jax.tree.map(lambda s: s.sharding, state)
    step = jax.jit(stage.step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))
    with jax.set_mesh(mesh):  # the caller's is not seen from another thread
        compiled = step.lower(state, frozen, batch, stream_key(0, "step", 0)).compile()
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0
    flops = float(cost.get("flops", 0.0)) * mesh.size  # the partitioned program is one device's
    return compiled, flops, peak


def provenance() -> dict:
    """Where a result comes from: commit, package versions, device."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    import flax
    import optax
    import orbax.checkpoint

    return {
        "commit": commit or "unknown",
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "orbax": orbax.checkpoint.__version__,
        "numpy": np.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def train(
    stage: Stage,
    workdir: str,
    config: dict,
    *,
    name: str,
    seed: int,
    total_steps: int,
    log_every: int,
    save_every: int,
    keep: int = 2,
    mesh: dict | None = None,
    resume: str = "",
) -> dict:
    """Train to `total_steps` and return the summary.

    Raises Preempted or Diverged (state saved), ValueError on a batch that the mesh or the data
    cannot give, or a work directory of another config, teacher or data set.
    """
    device_mesh = sharding.make_mesh(**(mesh or {}))
    sharding.check_batch(stage.batch_size, device_mesh)
    with (
        ckpt.Checkpoints(workdir, keep=keep) as checkpoints,
        StopSignal() as stop,
        jax.set_mesh(device_mesh),
    ):
        # 1. Where to start, and the data; what these refuse is refused before anything compiles.
        begun = checkpoints.latest_step() is not None
        ckpt.claim_workdir(workdir, config, begun=begun)
        start, meta = 0, stage.meta
        if begun:
            start, meta = checkpoints.meta()
            check_same(workdir, inputs(meta), inputs(stage.meta))
            if start >= total_steps:
                logging.info("%s: already at step %d of %d", name, start, total_steps)
                return summarise(meta, name, workdir, start)
        elif resume:
            start, meta = ckpt.read_meta(resume)
        if start >= total_steps:
            raise ValueError(
                f"{resume or 'the run'} begins at step {start} and total_steps is {total_steps}: "
                "raise total_steps, which counts the steps before too"
            )
        ledger = dict(meta.get("ledger", {"flops": 0.0, "device_seconds": 0.0}))
        batches = stage.batches(start)

        # 2. State: restored, or made.
        if begun:
            state = checkpoints.restore(abstract_state(stage, device_mesh, seed))
        elif resume:
            with ckpt.Checkpoints(resume) as other:
                state = other.restore(abstract_state(stage, device_mesh, seed))
        else:
            state = fresh_state(stage, device_mesh, seed)
        if start:
            logging.info(
                "%s: goes on from step %d in %s", name, start, workdir if begun else resume
            )

        # 3. One compilation, and meanwhile the frozen weights, which may have to be fitted.
        batch = sharding.shard_batch(next(batches), device_mesh)
        shapes = sharding.placed(stage.frozen_shapes(), device_mesh)
        logging.info("%s: compiling one step", name)
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            compiling = pool.submit(compile_step, stage, device_mesh, state, shapes, batch)
            # Each process loads onto a device of its own; what is fitted, the first one fits.
            with jax.set_mesh(sharding.make_mesh(devices=jax.local_devices()[:1])):
                frozen, networks = stage.load_frozen()
            places = jax.tree.map(lambda s: s.sharding, shapes)
            frozen = jax.device_put(jax.tree.map(np.asarray, frozen), places)
            step_fn, flops, peak = compiling.result()
        logging.info(
            "%s: compiled in %.1f s, %s weights to train, %.3g FLOPs a step, %.0f MB",
            name, time.monotonic() - began, f"{param_count(state.params):,}", flops, peak / 1e6,
        )  # fmt: skip

        log = Log(workdir, name, total_steps)
        networks = {"frozen_networks": stage.meta.get("frozen_networks", {}) | networks}
        if begun:
            check_same(workdir, meta, networks)
        meta = stage.meta | networks | {"config": config, "provenance": provenance()}
        bill = Bill(ledger, flops, start)
        metrics, last, step = None, {}, start
        beside = 0.0  # seconds in evals and saves, which are not the step's

        # 4. The loop.
        try:
            while step < total_steps:
                previous = metrics
                state, metrics = step_fn(state, frozen, batch, stream_key(seed, "step", step))
                step += 1
                if step == start + 1:
                    jax.block_until_ready(metrics)  # the first call is not representative
                    log.start(step)
                    began = time.monotonic()
                if step < total_steps:
                    batch = sharding.shard_batch(next(batches), device_mesh)
                if previous is not None and due(step - 1, log_every):
                    last = finite(previous, step - 1, state, checkpoints, workdir, name)
                    log.scalars(step - 1, last, progress=True)
                stopping = stop.raised or checkpoints.reached_preemption(step)
                if due(step, save_every) or step == total_steps or stopping:
                    last = finite(metrics, step, state, checkpoints, workdir, name)
                    bill.update(step)
                    paused = time.monotonic()
                    rate = (step - start - 1) / max(paused - began - beside, 1e-9)
                    meta |= {"ledger": dict(ledger), "metrics": last, "steps_per_second": rate}
                    checkpoints.save(step, state, meta)
                    beside += time.monotonic() - paused
                for title, (every, evaluate) in stage.evals.items():
                    if due(step, every) or (every and step == total_steps):
                        jax.block_until_ready(metrics)  # the step before is not the eval's
                        paused = time.monotonic()
                        report(log, step, title, evaluate(state, frozen))
                        beside += time.monotonic() - paused
                if stopping:
                    log.scalars(step, last)
                    checkpoints.wait()
                    raise Preempted(f"pre-empted at step {step}")
            log.scalars(step, last, progress=True)
            checkpoints.wait()
            return summarise(meta, name, workdir, step)
        finally:
            log.close()


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps does so now; 0 is never."""
    return every > 0 and step % every == 0


class Bill:
    """Adds this run's FLOPs and device-seconds to a ledger that started with its teachers' own."""

    def __init__(self, ledger: dict, flops_per_step: float, start: int):
        self.ledger, self.before = ledger, dict(ledger)
        self.flops_per_step, self.start = flops_per_step, start
        self.began = time.monotonic()

    def update(self, step: int) -> None:
        seconds = (time.monotonic() - self.began) * jax.device_count()
        self.ledger["flops"] = self.before["flops"] + self.flops_per_step * (step - self.start)
        self.ledger["device_seconds"] = self.before["device_seconds"] + seconds


def inputs(meta: dict) -> dict:
    """What a run depends on that its config names by path alone."""
    return {"teacher": meta.get("teacher"), "data": meta.get("data", {}).get("fingerprint")}


def check_same(workdir: str, old: dict, new: dict) -> None:
    """Refuse to go on with other inputs (all of `new`) than a run began with."""
    for name, value in json.loads(json.dumps(new)).items():
        if old.get(name) != value:
            raise ValueError(
                f"{workdir} began with another {name} ({old.get(name)} -> {value}): put it back, "
                "or use a new work directory"
            )


def finite(
    metrics: dict, step: int, state: PyTree, saved: ckpt.Checkpoints, workdir: str, name: str
) -> dict:
    """Fetch one step's metrics as floats; a non-finite one saves the state and raises Diverged."""
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    # a loss names the cause better than the gradient norm that it spoils
    for metric, value in sorted(values.items(), key=lambda item: "loss" not in item[0]):
        if not math.isfinite(value):
            folder = ckpt.save_diverged(workdir, int(state.step), state)
            before = saved.latest_step() is not None
            go_on = f"go on in a new work directory with --config.resume={workdir} and"
            raise Diverged(
                f"{name}: {metric} is {value} at step {step}: the state is saved in {folder}; "
                f"{go_on if before else 'start again with'} a lower optim.lr"
            )
    return values


def report(log: Log, step: int, title: str, result: dict) -> None:
    """Numbers to the scalars, uint8 pictures to the previews."""
    pictures = {k: v for k, v in result.items() if getattr(v, "ndim", 0) == 3}
    scalars = {f"{title}/{k}": v for k, v in result.items() if k not in pictures}
    log.images(step, {f"{title}_{k}": v for k, v in pictures.items()})
    if scalars:
        log.scalars(step, scalars)


def summarise(meta: dict, name: str, workdir: str, step: int) -> dict:
    """What a training run says about itself on its last line."""
    return {
        "stage": name,
        "workdir": str(workdir),
        "step": step,
        "metrics": meta.get("metrics", {}),
        "steps_per_second": round(meta.get("steps_per_second", 0.0), 3),
        "ledger": meta["ledger"],
        "frozen_networks": meta.get("frozen_networks", {}),
    }
