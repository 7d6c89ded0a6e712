"""From a config to a finished stage: the one place that turns `config.stage` into a module."""

import importlib
import pathlib

from cheapscale.training import jobs, loop
from cheapscale.training.stage import Job, Stage

STAGES = ("pretrain", "invert", "distill", "grow", "cascade", "assess", "prune")


def build(config) -> Stage | Job:
    """The Stage or Job that `config.stage` names."""
    if config.stage not in STAGES:
        raise ValueError(
            f"config.stage {config.stage!r} is unknown: choose one of {', '.join(STAGES)}"
        )
    return importlib.import_module(f"cheapscale.stages.{config.stage}").build(config)


def run(config, workdir: str | pathlib.Path) -> dict:
    """Build one stage and run it to its end in `workdir`; returns its summary."""
    stage = build(config)
    common = {"name": config.stage, "mesh": config.mesh.to_dict()}
    if isinstance(stage, Job):
        summary = jobs.run(stage, workdir, config.to_dict(), **common)
    else:
        summary = loop.train(
            stage,
            workdir,
            config.to_dict(),
            seed=config.seed,
            total_steps=config.total_steps,
            log_every=config.log_every,
            save_every=config.save_every,
            keep=config.keep,
            resume=config.resume,
            **common,
        )
    return summary | {"provenance": loop.provenance()}
