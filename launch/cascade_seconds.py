"""E9 of the self-cascade study: seconds of sampling and of a training step, side by side.

All sides take turns in one process, so that their ratios hold on any machine; the seconds
themselves hold only where nothing else ran.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cheapscale.models.upsampler import DESIGNS
from cheapscale.stages.cascade_sampler import cascade_sampler, network_calls
from cheapscale.stages.run import build
from cheapscale.stages.sampling import sampler
from cheapscale.stages.tuned import load_tuned, tuned_cascade
from cheapscale.training.loop import compile_step, fresh_state
from cheapscale.training.sharding import make_mesh, placed, shard_batch
from cheapscale.training.state import stream_key
from launch.bench import alternate


def seconds(study, key: tuple) -> dict:
    """A batch of samples: the base, direct sampling, tuning-free, tuned; and a step of tuning.

    model: 1/C + share of the steps, C being direct sampling over the base, the paper's time model.
    """
    config, teacher = study.config, study.teacher(*key)
    method, ids = config.method, np.arange(config.timing.batch)
    options = {"method": method, "batch_size": config.timing.batch}
    plan = study.plan(key, "2x", config.k, given=False)
    free = cascade_sampler(teacher, plan, **options)
    base = sampler(teacher, steps=config.steps, **options)
    labels = study.base(*key).labels[: len(ids)]
    calls: dict[str, Callable[[], Any]] = {
        "base": lambda: base(ids, labels),
        "direct": lambda: free.direct(ids, labels),
        "tuning-free": lambda: free.draw(ids, labels),
    }
    training: dict[str, Callable[[], Any]] = {}
    for name, (arg, changes, lr, steps) in config.tunings.to_dict().items():
        if name in config.same_programs:
            continue
        limits = {"lr": lr, "steps": steps}
        tuning = study.tuning(key, arg, changes, **limits)
        training[name] = one_step(tuning)
        if tuning.cascade.tune in DESIGNS:  # the others sample as the base does
            place, _ = study.tune(key, name, arg, changes, **limits)
            subject, denoisers = tuned_cascade(teacher, [load_tuned(place, teacher)], plan)
            cascade = cascade_sampler(subject, plan, **options, **denoisers)
            calls[name] = functools.partial(cascade.draw, ids, labels)
    walls = measured(calls, config.timing.rounds)
    (at_base, at_top), alone = network_calls(plan, method=method)
    C = float(np.median(walls["direct"] / walls["base"]))
    return {
        "batch": config.timing.batch,
        "seconds": medians(walls),
        "over_direct": medians({s: w / walls["direct"] for s, w in walls.items()}),
        "over_tuning_free": medians({s: w / walls["tuning-free"] for s, w in walls.items()}),
        "C": C,
        "share": at_top / alone,
        "model": at_base / alone / C + at_top / alone,
        "training_step": medians(measured(training, config.timing.rounds)),
    }


def measured(calls: dict[str, Callable], rounds: int) -> dict[str, np.ndarray]:
    """Wall seconds of every round."""
    return {side: np.array(clocks["wall"]) for side, clocks in alternate(calls, rounds).items()}


def medians(walls: dict[str, np.ndarray]) -> dict[str, float]:
    return {side: float(np.median(wall)) for side, wall in walls.items()}


def one_step(config) -> Callable[[], Any]:
    """A training step of this config's stage, on the same batch every time."""
    stage, mesh = build(config), make_mesh()
    with jax.set_mesh(mesh):
        state = fresh_state(stage, mesh, config.seed)
        batch = shard_batch(next(stage.batches(0)), mesh)
        shapes = placed(stage.frozen_shapes(), mesh)
        frozen = jax.device_put(stage.load_frozen()[0], jax.tree.map(lambda s: s.sharding, shapes))
        step, _, _ = compile_step(stage, mesh, state, shapes, batch)

    def call():
        nonlocal state
        state, metrics = step(state, frozen, batch, stream_key(config.seed, "step", 0))
        jax.block_until_ready((state, metrics))

    return call
