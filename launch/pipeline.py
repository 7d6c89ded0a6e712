"""The whole pipeline: pretrain, invert, distill, grow, then pictures, a table and one JSON object.

    python -m launch.pipeline --config=configs/scenes.py --arg=size=quick --workdir=runs/quick

Each stage has its own folder in the work directory; running the same command again resumes.
Pictures: data, teacher, round_trip, one_step (one column is one z at every resolution), nearest
(the samples nearest to a training image, and that image below).
"""

import importlib.util
import pathlib
import time

import jax
from absl import flags, logging

from cheapscale import report
from cheapscale.models import features
from cheapscale.stages.run import run
from cheapscale.training.logging import duration
from launch.command import execute, named_file, start, write_record


def load_module(path: str):
    """The config file as a module."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path!r}: see configs/")
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stage_configs(path: str, arg: str, workdir: str) -> list[tuple[str, object]]:
    """[(folder, config)] of the pipeline, with every path between the stages filled in."""
    module = load_module(path)
    if not hasattr(module, "stages"):
        raise ValueError(f"{path} describes no pipeline: it has no stages(arg)")
    root = pathlib.Path(workdir)
    planned, base = [], ""
    for stage_arg in module.stages(arg):
        config = module.get_config(",".join(filter(None, (arg, stage_arg))))
        folder = config.stage
        if config.stage == "grow":
            folder = f"grow{config.data.resolution}"
            config.base = base
        if "teacher" in config:
            config.teacher = str(root / "pretrain")
        if "latents" in config:
            config.latents = str(root / "latents")
        if config.stage in ("distill", "grow"):
            base = str(root / folder)
        planned.append((folder, config))
    return planned


def load_measures(named_files: list[str]) -> list[features.FeatureNetwork]:
    """Networks of "NAME=FILE" strings. Raises ValueError on a bad one, before anything runs."""
    return [features.load(*named_file(entry)) for entry in named_files]


def pipeline(
    path: str, arg: str, workdir: str, num_samples: int, measure: list[str] | None = None
) -> dict:
    """Run every stage in turn and report on them; returns the report's figures.

    measure: "name=FILE" of further networks that judge the top resolution.
    """
    began = time.monotonic()
    measures = load_measures(measure or [])
    planned = stage_configs(path, arg, workdir)
    runs = []
    for position, (folder, config) in enumerate(planned, start=1):
        elapsed = duration(time.monotonic() - began)
        logging.info("stage %d of %d: %s (%s so far)", position, len(planned), folder, elapsed)
        start = time.monotonic()
        place = str(pathlib.Path(workdir) / folder)
        summary = run(config, place)
        runs.append(report.Run(folder, config, place, summary, time.monotonic() - start))
        jax.clear_caches()
    summary = report.write(runs, workdir, num_samples=num_samples, measures=measures)
    summary |= {"config": path, "arg": arg, "seconds": round(time.monotonic() - began, 1)}
    return summary


def main(argv) -> None:
    del argv
    FLAGS = flags.FLAGS

    def body() -> dict:
        figures = pipeline(FLAGS.config, FLAGS.arg, FLAGS.workdir, FLAGS.num_samples, FLAGS.measure)
        write_record(FLAGS.record, figures)
        return figures

    execute("pipeline", FLAGS.workdir, body)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file with get_config and stages.")
    flags.DEFINE_string("arg", "", "Argument string for the config file, e.g. size=quick,seed=1.")
    flags.DEFINE_string("workdir", None, "Where every stage's folder goes.")
    flags.DEFINE_integer("num_samples", 1000, "Samples per quality number.")
    flags.DEFINE_multi_string(
        "measure", [], "NAME=FILE of a further network that judges the top resolution."
    )
    flags.DEFINE_string("record", None, "Also write the figures to this file.")
    flags.mark_flags_as_required(["config", "workdir"])
    start(main)
