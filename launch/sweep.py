"""Run all runs of a study in turn, or one of them.

    python -m launch.sweep --config=configs/scenes.py --sweep=pairs \\
        --arg=size=quick,teacher=runs/teacher,latents=runs/latents --workdir=runs/pairs
    python -m launch.sweep ... --list        # the runs as commands; nothing runs
    python -m launch.sweep ... --index=3     # one of them: a task of an array job

`sweep(name)` stands beside `get_config` in the config file and returns argument strings, such as
"stage=distill,distill.data_proportion=0.1,seed=2" (configs/sweeps.py). A run whose string has a
stage runs that stage; any other runs a whole pipeline. Each run has its own folder in the work
directory, which launch.evaluate can measure; running the same command again resumes.
"""

import pathlib
import re
import sys
from collections.abc import Sequence

import jax
from absl import flags, logging

from launch.command import execute, start
from launch.pipeline import load_module, pipeline
from launch.train import run


def planned(path: str, name: str, arg: str) -> list[tuple[str, str]]:
    """[(folder, argument string)] of the study `name` in the config file `path`."""
    module = load_module(path)
    if not hasattr(module, "sweep"):
        raise ValueError(f"{path} has no sweep(name): see configs/sweeps.py")
    words = module.sweep(name)
    return [
        (folder(number, one), ",".join(filter(None, (arg, one))))
        for number, one in enumerate(words)
    ]


def folder(number: int, words: str) -> str:
    """The folder of a run, such as "02-stage=distill,distance=pixel,seed=1"."""
    # Field names lose their section, and characters outside [\w=.,-] become "_".
    short = (word.partition("=")[0].rpartition(".")[0] for word in words.split(","))
    kept = (w.removeprefix(f"{section}.") for section, w in zip(short, words.split(",")))
    return f"{number:02d}-" + re.sub(r"[^\w=.,-]+", "_", ",".join(kept))


def is_stage(arg: str) -> bool:
    """Whether an argument string has a stage."""
    return any(word.startswith("stage=") for word in arg.split(","))


def sweep(runs: list[tuple[str, str]], path: str, workdir: str, only: Sequence[int] = ()) -> list:
    """[{"folder", "arg", **summary}] after all runs, or those with the numbers `only`."""
    unknown = sorted(set(only) - set(range(len(runs))))
    if unknown:
        raise ValueError(f"--index={unknown[0]}: the sweep's runs are 0 ... {len(runs) - 1}")
    rows = []
    for number in only or range(len(runs)):
        name, arg = runs[number]
        place = pathlib.Path(workdir) / name
        logging.info("run %d of %d: %s", number, len(runs), name)
        if is_stage(arg):
            summary = run(load_module(path).get_config(arg), place)
        else:
            summary = pipeline(path, arg, str(place), num_samples=1000)
        rows.append({"folder": name, "arg": arg} | summary)
        jax.clear_caches()
    return rows


def define() -> None:
    """The command's flags."""
    flags.DEFINE_string("config", None, "Config file with get_config and sweep.")
    flags.DEFINE_string("sweep", None, "Name of the study (configs/sweeps.py).")
    flags.DEFINE_string("arg", "", "Argument string that all runs share, e.g. size=quick.")
    flags.DEFINE_string("workdir", None, "Folder for the folders of all runs.")
    flags.DEFINE_integer("index", None, "Run only this one, counted from 0.", lower_bound=0)
    flags.DEFINE_bool("list", False, "Print the runs as commands and stop.")
    flags.DEFINE_bool("distributed", False, "Call jax.distributed.initialize() first.")
    flags.mark_flags_as_required(["config", "sweep"])
    flags.register_multi_flags_validator(
        ["workdir", "list"],
        lambda given: given["workdir"] or given["list"],
        message="give --workdir=DIR for the folders of the runs, or --list to print them",
    )


def main(argv: list[str] | None = None) -> dict | None:
    """Run the study that the flags name; returns {"runs": their summaries}."""

    def body(given) -> dict | None:
        try:
            runs = planned(given.config, given.sweep, given.arg)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        if given.list:
            for name, arg in runs:
                config = f"{given.config}:{arg}" if is_stage(arg) else f"{given.config} --arg={arg}"
                command = "train" if is_stage(arg) else "pipeline"
                place = pathlib.Path(given.workdir or f"runs/{given.sweep}") / name
                print(f"python -m launch.{command} --config={config} --workdir={place}")
            return None
        only = [] if given.index is None else [given.index]
        name = "sweep" if given.index is None else f"sweep-{given.index}"
        return execute(
            name, given.workdir,
            lambda: {"runs": sweep(runs, given.config, given.workdir, only)},
        )  # fmt: skip

    return start(define, body, argv)


if __name__ == "__main__":
    main()
