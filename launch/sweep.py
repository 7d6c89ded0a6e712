"""The runs of a config's sweep, one after the other, or one of them.

    python -m launch.sweep --config=configs/cifar10.py:stage=distill,data_dir=DIR \\
        --config.teacher=runs/teacher --config.latents=runs/latents --workdir=runs/sweep
    python -m launch.sweep ... --list        # their numbers and changes; runs and writes nothing
    python -m launch.sweep ... --index=3     # one of them: a task of an array job

`sweep(stage)` stands beside `get_config` in the config file and yields flat changes, such as
{"seed": 1, "distill.distance": "pixel"}. Each run has a folder of its own in the work directory;
running the same command again resumes. The summary lists every run's changes and what it said.
"""

import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from cheapscale.stages.run import run
from launch.command import execute, start
from launch.pipeline import load_module


def planned(path: str, config: ConfigDict) -> list[tuple[str, dict[str, Any], ConfigDict]]:
    """[(folder, changes, config)] of the sweep of `config.stage` in the config file `path`.

    ValueError where there is none, or a change names a field that the config lacks.
    """
    module = load_module(path)
    changes = list(module.sweep(config.stage)) if hasattr(module, "sweep") else []
    if not changes:
        raise ValueError(
            f"sweep(stage) of {path} names no run of stage {config.stage}: add some, or choose "
            "another stage"
        )
    return [
        (folder(number, change), change, changed(config, change))
        for number, change in enumerate(changes)
    ]


def folder(number: int, change: dict[str, Any]) -> str:
    """ "02-seed=1,distance=pixel"."""
    words = (f"{name.rpartition('.')[2]}={value}" for name, value in change.items())
    return f"{number:02d}-" + re.sub(r"[^\w=.,-]+", "_", ",".join(words))


def changed(config: ConfigDict, change: dict[str, Any]) -> ConfigDict:
    """A copy of the config with those fields changed."""
    copy = ConfigDict(config.to_dict())
    for name, value in change.items():
        *groups, field = name.split(".")
        node = copy
        for group in groups:
            node = node.get(group) or ConfigDict()
        if field not in node:
            raise ValueError(
                f"the sweep changes {name}, which a config of this stage does not have"
            )
        node[field] = value
    return copy


def sweep(path: str, config: ConfigDict, workdir: str, only: Sequence[int] = ()) -> list[dict]:
    """Run them all, or the numbers `only`; returns [{"folder", "changes", **summary}]."""
    runs, rows = planned(path, config), []
    unknown = sorted(set(only) - set(range(len(runs))))
    if unknown:
        raise ValueError(f"--index={unknown[0]}: the sweep's runs are 0 ... {len(runs) - 1}")
    for number in only or range(len(runs)):
        name, changes, one = runs[number]
        logging.info("run %d of %d: %s", number, len(runs), name)
        summary = run(one, pathlib.Path(workdir) / name)
        rows.append({"folder": name, "changes": changes} | summary)
        jax.clear_caches()
    return rows


def main(argv) -> None:
    del argv
    given = flags.FLAGS
    path, _, _ = config_flags.get_config_filename(given["config"]).partition(":")

    if given.list:
        try:
            for name, changes, _ in planned(path, given.config):
                print(name, changes)
        except ValueError as error:
            sys.exit(f"error: {error}")
        return

    def body() -> dict:
        only = [] if given.index is None else [given.index]
        return {"runs": sweep(path, given.config, given.workdir, only)}

    name = "sweep" if given.index is None else f"sweep-{given.index}"
    execute(name, given.workdir, body)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file and its argument string.")
    flags.DEFINE_string("workdir", None, "Where every run's folder goes.")
    flags.DEFINE_integer("index", None, "Run this one alone, counted from 0.", lower_bound=0)
    flags.DEFINE_bool("list", False, "Say what the runs are and stop.")
    flags.DEFINE_bool("distributed", False, "Call jax.distributed.initialize() first.")
    flags.mark_flag_as_required("config")
    flags.register_multi_flags_validator(
        ["workdir", "list"],
        lambda given: given["workdir"] or given["list"],
        message="--workdir: where do the runs go?",
    )
    start(main)
