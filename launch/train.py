"""Run the stage that `config.stage` names: a training run or a job.

    python -m launch.train --config=configs/scenes.py:stage=pretrain --workdir=runs/teacher
    python -m launch.train --config=configs/scenes.py:stage=invert --workdir=runs/invert \\
        --config.teacher=runs/teacher --config.latents=runs/latents
    python -m launch.train --config=configs/scenes.py:stage=distill --describe

Running the same command again resumes. After SIGTERM the command saves its state, prints
"pre-empted at step N" and ends with status 143. The last line of stdout is one JSON object, which
is also written to the work directory.
"""

import functools
import pathlib

from absl import flags
from ml_collections import ConfigDict

from cheapscale.cascade import tune
from cheapscale.experts import assess, prune
from cheapscale.interop import encode
from cheapscale.interop.autoencoders import read_autoencoder
from cheapscale.pagoda import autoencode, distill, grow, invert
from cheapscale.teacher import pretrain
from cheapscale.training import jobs, loop
from cheapscale.training.stage import Job, Stage
from configs import fields
from launch import dry_run
from launch.command import config_flag, execute, required, start

# Neither stage autoencode nor its pictures depend on the scale that an autoencoder's files say.
STAGES = {
    "autoencode": lambda config: autoencode.build(
        config, functools.partial(read_autoencoder, scale=1.0)
    ),
    "encode": encode.build,
    "pretrain": pretrain.build,
    "invert": invert.build,
    "regress": lambda config: (grow if config.base else distill).build(config),
    "distill": distill.build,
    "grow": grow.build,
    "cascade": tune.build,
    "assess": assess.build,
    "prune": prune.build,
}


def build(config: ConfigDict) -> Stage | Job:
    """The Stage or Job that `config.stage` names; ValueError if the config is not valid."""
    fields.check(config)
    return STAGES[config.stage](config)


def run(config: ConfigDict, workdir: str | pathlib.Path) -> dict:
    """The summary of a stage, after running it to its end in `workdir`."""
    stage, origin = build(config), loop.provenance(config.to_dict())
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
            total_flops=config.total_flops,
            log_every=config.log_every,
            save_every=config.save_every,
            keep=config.keep,
            resume=config.resume,
            **common,
        )
    return summary | {"provenance": origin}


def define() -> None:
    """The command's flags."""
    config_flag()
    flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and previews.")
    flags.DEFINE_bool("describe", False, "Only print every field of the config.")
    flags.DEFINE_bool("dry_run", False, "Only print the cost: parameters, FLOPs, memory, disk.")
    flags.DEFINE_bool("compile", False, "With --dry_run: also compile the step, for its memory.")
    flags.DEFINE_bool("distributed", False, "Call jax.distributed.initialize() first.")
    required("config", "configs/scenes.py:stage=pretrain")
    flags.register_multi_flags_validator(
        ["workdir", "describe"],
        lambda given: given["workdir"] or given["describe"],
        message="--workdir is missing: give --workdir=DIR, the folder of the run",
    )


def main(argv: list[str] | None = None) -> dict | None:
    """Run the stage that the flags name; returns its summary."""

    def body(given) -> dict | None:
        config, workdir = given.config, given.workdir
        if given.describe:
            print(fields.describe(config))
            return None
        if given.dry_run:
            compiled = given.compile
            return execute(
                "plan", workdir,
                lambda: dry_run.describe(config, build(config), workdir, compiled=compiled),
                keep=compiled, alone=False,
            )  # fmt: skip
        return execute(config.stage, workdir, lambda: run(config, workdir))

    return start(define, body, argv)


if __name__ == "__main__":
    main()
