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
import shlex
from collections.abc import Sequence

import jax
from absl import flags, logging

from configs import common
from launch.command import execute, pipeline_flags, required, start
from launch.pipeline import is_stage, load_module, pipeline
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
    """The folder of a run, such as "02-stage=distill_pixel_weight=10_seed=1"."""
    # Field names lose their section, and characters outside [\w=.-] become "_".
    kept = (re.sub(r"^[\w.]+\.(?=\w+=)", "", word) for word in common.split(words))
    return f"{number:02d}-" + re.sub(r"[^\w=.-]+", "_", ",".join(kept))


def chosen(runs: list, only: Sequence[int]) -> Sequence[int]:
    """The numbers `only`, or of all runs; ValueError for one that is no run."""
    if unknown := sorted(set(only) - set(range(len(runs)))):
        raise ValueError(f"--index={unknown[0]}: the sweep's runs are 0 ... {len(runs) - 1}")
    return only or range(len(runs))


def sweep(runs: list[tuple[str, str]], path: str, workdir: str, only: Sequence[int] = ()) -> list:
    """[{"folder", "arg", **summary}] after all runs, or those with the numbers `only`."""
    rows = []
    for number in chosen(runs, only):
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
    pipeline_flags()
    flags.DEFINE_string("sweep", None, "Name of the study (configs/sweeps.py).")
    flags.DEFINE_string("workdir", None, "Folder for the folders of all runs.")
    flags.DEFINE_integer("index", None, "Run only this one, counted from 0.", 0, 10_000)
    flags.DEFINE_bool("list", False, "Print the runs as commands and stop.")
    flags.DEFINE_bool("distributed", False, "Call jax.distributed.initialize() first.")
    required("config", "configs/scenes.py")
    required("sweep", "losses")
    flags.register_multi_flags_validator(
        ["workdir", "list"],
        lambda given: given["workdir"] or given["list"],
        message="--workdir is missing: give --workdir=DIR for the runs, or --list to print them",
    )


def main(argv: list[str] | None = None) -> dict | None:
    """Run the study that the flags name; returns {"runs": their summaries}."""

    def body(given) -> dict | None:
        runs = planned(given.config, given.sweep, given.arg)
        only = [] if given.index is None else [given.index]
        if given.list:
            for name, arg in (runs[number] for number in chosen(runs, only)):
                command = "train" if is_stage(arg) else "pipeline"
                place = pathlib.Path(given.workdir or f"runs/{given.sweep}") / name
                words = [f"--config={given.config}", f"--arg={arg}", f"--workdir={place}"]
                print(shlex.join(["python", "-m", f"launch.{command}", *words]))
            return None
        name = "sweep" if given.index is None else f"sweep-{given.index}"
        return execute(
            name, given.workdir,
            lambda: {"runs": sweep(runs, given.config, given.workdir, only)},
            alone=False,  # the tasks of an array job write different folders in it
        )  # fmt: skip

    return start(define, body, argv)


if __name__ == "__main__":
    main()
