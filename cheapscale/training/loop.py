"""The training loop of all stages; the `Stage` value holds everything that is special to one.

A run starts from the work directory's newest checkpoint, else from `config.resume`, else from the
stage's warm start, else from random weights. The order in the loop keeps the device busy and every
state saveable (do not reorder):

    batch -> step (asynchronous) -> log the previous step's metrics -> save -> evals -> pre-emption
"""

import contextlib
import functools
import json
import math
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from absl import logging

from cheapscale.training import checkpoint as ckpt
from cheapscale.training import mesh as sharding
from cheapscale.training.compiler import ONCE
from cheapscale.training.cost import Ledger, param_count
from cheapscale.training.exported import files_of, model_file
from cheapscale.training.lock import only_writer
from cheapscale.training.log import Log
from cheapscale.training.stage import Stage
from cheapscale.training.state import TrainState, create_state, stream_key

PyTree = Any

NOTHING_LEFT = "%s: nothing is left to train at step %d: raise --config.total_steps to go on"


class Preempted(Exception):
    """A signal stopped the run after its state was saved; running it again resumes."""


class Diverged(Exception):
    """A metric was not finite; the state is saved in the folder `diverged`."""


class StopSignal:
    """A context manager: SIGTERM and SIGINT set `raised`, which the loop reads between steps.

    A second signal has its usual effect. A block that ends normally after a signal raises
    Preempted. Of several processes none catches a signal here, because they would see it at
    different steps: Orbax determines their last step (`Checkpoints.reached_preemption`).
    """

    def __init__(self):
        self.raised, self.previous = False, {}

    def __enter__(self):
        if jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                for number in (signal.SIGTERM, signal.SIGINT):
                    self.previous[number] = signal.signal(number, self._raise)
        return self

    def __exit__(self, error, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.raised and error is None:
            raise Preempted("pre-empted; all results are saved")

    def _raise(self, number, _):
        self.raised = True
        signal.signal(number, self.previous[number])


def abstract_state(stage: Stage, mesh: jax.sharding.Mesh, seed: int) -> TrainState:
    """The shapes, dtypes and shardings of the run's state, without computing it."""

    def make(key):
        return create_state(*stage.init_params(key), stage.optimisers, stage.meta["networks"])

    shapes = jax.eval_shape(make, stream_key(seed, "init", 0))
    return sharding.placed(shapes, mesh)


def fresh_state(stage: Stage, mesh: jax.sharding.Mesh, seed: int) -> TrainState:
    """The state at step 0, computed on the mesh: initial weights, warm start, EMA, optimisers."""
    places = jax.tree.map(lambda s: s.sharding, abstract_state(stage, mesh, seed))
    quickly = functools.partial(jax.jit, compiler_options=ONCE)
    init = quickly(stage.init_params, out_shardings=(places.params, places.extra))
    params, extra = init(stream_key(seed, "init", 0))
    params = jax.tree.map(jax.device_put, stage.warm_start(params), places.params)

    def make(params, extra):
        return create_state(params, extra, stage.optimisers, stage.meta["networks"])

    return quickly(make, out_shardings=places)(params, extra)


def compile_step(
    stage: Stage, mesh: jax.sharding.Mesh, state: PyTree, frozen: PyTree, batch
) -> tuple[Callable, float, int]:
    """(compiled step of the stage, FLOPs of one step over all devices, peak bytes per device).

    state, frozen, batch: arrays, or their ShapeDtypeStructs with shardings.
    """
    # Donating the state lets the new one reuse its memory. The output shardings are fixed, so that
    # the result of one step is a valid argument of the same compiled program in the next.
    places = jax.tree.map(lambda s: s.sharding, state)
    step = jax.jit(stage.step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))
    # These contexts are per thread, and this runs in a thread of its own.
    with jax.set_mesh(mesh), sharding.pinned():
        lowered = step.lower(state, frozen, batch, stream_key(0, "step", 0))
        compiled = lowered.compile(compiler_options=stage.compiler_options)
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0
    flops = float(cost.get("flops", 0.0)) * mesh.size  # XLA counts the program of one device
    return compiled, flops, peak


def provenance(config: dict | None = None) -> dict:
    """The origin of a result: commit, package versions, device, and the SHA-256 of the exported
    models that its config names."""
    command, here = ["git", "rev-parse", "--short", "HEAD"], pathlib.Path(__file__).parent
    try:
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    packages = {"orbax": "orbax-checkpoint"} | {n: n for n in ("jax", "flax", "optax", "numpy")}
    return {
        "commit": commit or "unknown",
        **{name: version(package) for name, package in packages.items()},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "files": files_of(config or {}),
    }


def train(
    stage: Stage,
    workdir: str,
    config: dict,
    *,
    name: str,
    seed: int,
    total_steps: int,
    total_flops: float = 0.0,
    log_every: int,
    save_every: int,
    keep: int = 2,
    mesh: dict | None = None,
    resume: str = "",
) -> dict:
    """Train to `total_steps`, or until the ledger has `total_flops`, and return the summary.

    Raises Preempted or Diverged after saving the state, and ValueError if the mesh cannot split the
    batch, or the work directory belongs to another config, teacher or data set.
    """
    device_mesh = sharding.make_mesh(**(mesh or {}))
    sharding.check_batch(stage.batch_size, device_mesh)
    with (
        only_writer(workdir),
        ckpt.Checkpoints(workdir, keep=keep) as saved,
        StopSignal() as stop,
        jax.set_mesh(device_mesh),
    ):
        # ---- The starting point and the data, so that their errors come before compilation.
        last_step = sys.maxsize if total_flops else total_steps
        source, start, meta = starting_point(stage, saved, workdir, config, resume, last_step)
        if start >= last_step or not steps_within(total_flops, meta, 1.0):
            logging.info(NOTHING_LEFT, name, start)
            return summarise(meta, name, workdir, start)
        batches = stage.batches(start)
        batch = sharding.shard_batch(next(batches), device_mesh)

        # ---- The state; then the compilation of the step, while the frozen weights load.
        state = starting_state(stage, device_mesh, seed, source)
        logging.info("%s: from step %d of %s", name, start, source or "a fresh state")
        step_fn, flops, frozen, hashes = prepare(stage, device_mesh, state, batch, name)
        networks = {"frozen_networks": stage.meta.get("frozen_networks", {}) | hashes}
        if source == workdir:
            check_same(workdir, meta, networks)
        ledger = Ledger(meta.get("ledger", {}), flops, start)
        total_steps = start + steps_within(total_flops, meta, flops) if total_flops else total_steps
        meta = stage.meta | networks | {"config": config, "provenance": provenance(config)}

        # ---- The loop: step (asynchronous), previous metrics, save, evals, pre-emption.
        step, metrics, last, stopping = start, None, {}, False
        with Log(workdir, name, total_steps) as log:
            while step < total_steps and not stopping:
                # Reading the new metrics would wait for the device: those before are logged.
                previous = metrics
                state, metrics = step_fn(state, frozen, batch, stream_key(seed, "step", step))
                step += 1
                if step == start + 1:  # the first call is slower, so the clocks start after it
                    ledger.time_from(metrics)
                    log.start(step)
                if step < total_steps:
                    batch = sharding.shard_batch(next(batches), device_mesh)
                if previous is not None and due(step - 1, log_every):
                    last = finite(previous, step - 1, state, saved, workdir, name)
                    log.scalars(step - 1, last, progress=True)
                stopping = stop.raised or saved.reached_preemption(step)
                if due(step, save_every) or step == total_steps or stopping:
                    # This waits for the step, so that no state with a NaN becomes a checkpoint.
                    last = finite(metrics, step, state, saved, workdir, name)
                    meta |= ledger.entry(step) | {"metrics": last}
                    with ledger.paused(metrics):
                        saved.save(step, state, meta)
                for title, (every, evaluate) in stage.evals.items():
                    if due(step, every) or (every and step == total_steps):
                        with ledger.paused(metrics):
                            report(log, step, title, evaluate, state, frozen)
            log.scalars(step, last, progress=not stopping)
            saved.wait()
            if stopping:
                raise Preempted(f"pre-empted at step {step}")
            return summarise(meta, name, workdir, step)


def starting_point(
    stage: Stage, saved: ckpt.Checkpoints, workdir: str, config: dict, resume: str, total_steps: int
) -> tuple[str, int, dict]:
    """(source, step, meta): the work directory whose state the run continues, or "" for none.

    The run's own newest checkpoint has priority over `resume`, the work directory of another run.
    """
    begun = saved.latest_step() is not None
    ckpt.claim_workdir(workdir, config, begun=begun)
    if begun:
        step, meta = saved.meta()
        accept = bool(config.get("accept_other_data"))
        check_same(workdir, inputs(meta), inputs(stage.meta), accept=accept)
        return workdir, step, meta
    if resume and model_file(resume):
        raise ValueError(f"config.resume={resume} has no optimiser's state: name the run's folder")
    source, step, meta = (resume, *ckpt.read_meta(resume)) if resume else ("", 0, stage.meta)
    if step >= total_steps:
        raise ValueError(
            f"{source or 'the run'} begins at step {step} and total_steps is {total_steps}: "
            "give a larger --config.total_steps, which includes the earlier steps"
        )
    return source, step, meta


def starting_state(stage: Stage, mesh: jax.sharding.Mesh, seed: int, source: str) -> TrainState:
    """The newest state in the work directory `source`, or a new state if that is ""."""
    if not source:
        return fresh_state(stage, mesh, seed)
    with ckpt.Checkpoints(source) as saved:
        return saved.restore(abstract_state(stage, mesh, seed))


def prepare(
    stage: Stage, mesh: jax.sharding.Mesh, state: TrainState, batch: PyTree, name: str
) -> tuple[Callable, float, PyTree, dict]:
    """(compiled step, FLOPs of one step, frozen weights on the mesh, {frozen network: hash}).

    The step compiles in a thread, while the main thread loads or fits the frozen networks.
    """
    shapes = sharding.placed(stage.frozen_shapes(), mesh)
    logging.info("%s: compiling one step", name)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(compile_step, stage, mesh, state, shapes, batch)
        # Each process loads onto its first local device; networks that have to be fitted are
        # fitted by process 0. The result then moves to the mesh.
        with jax.set_mesh(sharding.make_mesh(devices=jax.local_devices()[:1])):
            frozen, hashes = stage.load_frozen()
        places = jax.tree.map(lambda s: s.sharding, shapes)
        frozen = jax.device_put(jax.tree.map(np.asarray, frozen), places)
        step, flops, peak = compiling.result()
    logging.info(
        "%s: compiled in %.1f s, %s weights to train, %.3g FLOPs a step, %.0f MB",
        name, time.monotonic() - began, f"{param_count(state.params):,}", flops, peak / 1e6,
    )  # fmt: skip
    return step, flops, frozen, hashes


def due(step: int, every: int) -> bool:
    """Whether an action that runs every `every` steps is due; never if `every` is 0."""
    return every > 0 and step % every == 0


def steps_within(total_flops: float, meta: dict, flops: float) -> int:
    """The steps of `flops` each after which the ledger of `meta` has total_flops; 1 for 0.

    Raises ValueError if the stages before this run took more.
    """
    spent = meta.get("ledger", {}).get("flops", 0.0)
    if total_flops and spent >= total_flops and "metrics" not in meta:
        raise ValueError(
            f"the earlier stages took {spent:.3g} FLOPs and total_flops is {total_flops:.3g}: give "
            f"a larger --config.total_flops={2 * spent:.2g}, which includes them"
        )
    return math.ceil(max(total_flops * (1 - 1e-9) - spent, 0) / flops) if total_flops else 1


def inputs(meta: dict) -> dict:
    """The identities of teacher, classes, vocabulary and data, which the config does not hold."""
    data = meta.get("data", {})
    names = ("class_names", "vocabulary")
    found = {"teacher": meta.get("teacher")} | {name: data.get(name) for name in names}
    return found | {"data": data.get("fingerprint")}


def check_same(workdir: str, old: dict, new: dict, *, accept: bool = False) -> None:
    """Raise ValueError if a value of `new` differs from the run's recorded value in `old`; accept:
    only log it where the images differ."""
    for name, value in json.loads(json.dumps(new)).items():
        if old.get(name) == value:
            continue
        if name == "data" and accept:
            logging.warning("%s began with other data: it goes on with these", workdir)
            continue
        go_on = ", give --config.accept_other_data=True to go on with it" * (name == "data")
        raise ValueError(
            f"{workdir} began with another {name} ({old.get(name)} -> {value}): undo the change"
            f"{go_on}, or use a new work directory"
        )


def finite(
    metrics: dict, step: int, state: PyTree, saved: ckpt.Checkpoints, workdir: str, name: str
) -> dict:
    """One step's metrics as floats; saves the state and raises Diverged if one is not finite."""
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    # Losses come first: a NaN loss also makes the gradient norm NaN, but is the cause of it.
    for metric, value in sorted(values.items(), key=lambda item: "loss" not in item[0]):
        if not math.isfinite(value):
            folder = ckpt.save_diverged(workdir, int(state.step), state)
            before = saved.latest_step() is not None
            go_on = f"continue in a new work directory with --config.resume={workdir} and"
            raise Diverged(
                f"{name}: {metric} is {value} at step {step}: the state is saved in {folder}; "
                f"{go_on if before else 'start again with'} a lower --config.optim.lr"
            )
    return values


def report(log: Log, step: int, title: str, evaluate: Callable, state, frozen) -> None:
    """Log an eval's scalars and uint8 pictures; if it fails, save the state and raise Diverged."""
    try:
        result = evaluate(state, frozen)
    except ValueError as error:
        folder = ckpt.save_diverged(log.workdir, step, state)
        raise Diverged(f"{title}: {error}; the state is saved in {folder}") from error
    pictures = {k: v for k, v in result.items() if getattr(v, "ndim", 0) == 3}
    scalars = {f"{title}/{k}": v for k, v in result.items() if k not in pictures}
    log.images(step, {f"{title}_{k}": v for k, v in pictures.items()})
    if scalars:
        log.scalars(step, scalars)


def summarise(meta: dict, name: str, workdir: str, step: int) -> dict:
    """The summary of a training run."""
    return {
        "stage": name,
        "workdir": str(workdir),
        "step": step,
        "metrics": meta.get("metrics", {}),
        "steps_per_second": round(meta.get("steps_per_second", 0.0), 3),
        "flops_per_step": meta.get("flops_per_step", 0.0),
        "ledger": meta["ledger"],
        "frozen_networks": meta.get("frozen_networks", {}),
    }
