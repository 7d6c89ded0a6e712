"""Run all stages of a pipeline: PaGoDA's, or the one that the argument `pipeline` names.

    python -m launch.pipeline --config=configs/scenes.py --arg=size=quick --workdir=runs/quick
    python -m launch.pipeline --config=configs/scenes.py --arg=pipeline=experts,prune.k=0.4 \\
        --workdir=runs/experts

pipeline=pagoda     pretrain, invert, distill, grow; then pictures and a table: data, teacher,
                    round_trip, one_step (each column shows one z at every resolution), nearest
                    (the samples nearest to a training image, above that image)
pipeline=one_step   the same without growth
pipeline=cascade    pretrain, then tune upsamplers
pipeline=experts    pretrain, assess, prune one expert for each range of noise levels (only some of
                    them with --groups=0 --groups=3)

The argument `teacher=DIR` replaces pretraining. Each stage has its own folder in the work
directory, and running the same command again resumes.
"""

import importlib.util
import pathlib
import time
from collections.abc import Sequence

import jax
from absl import flags, logging

from cheapscale import features
from cheapscale.evaluation import report
from cheapscale.teacher.experts import group_folder
from cheapscale.training.log import duration
from launch.command import execute, named_file, start, write_record
from launch.train import run


def load_module(path: str):
    """The config file as a module."""
    if not pathlib.Path(path).is_file() or pathlib.Path(path).suffix != ".py":
        raise FileNotFoundError(
            f"{path!r} is no config file: name one of configs/*.py, and its words in --arg"
        )
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stage_configs(path: str, arg: str, workdir: str) -> list[tuple[str, object]]:
    """[(folder, config)] of the pipeline's stages; each config has the paths of earlier stages."""
    module = load_module(path)
    if not hasattr(module, "stages"):
        raise ValueError(f"{path} describes no pipeline: it has no stages(arg)")
    root = pathlib.Path(workdir)
    places = {"teacher": root / "pretrain", "latents": root / "latents", "experts": root / "set"}
    planned = []
    for words in module.stages(arg):
        config = module.get_config(",".join(filter(None, (arg, words))))
        stage, folder = config.stage, str(root / config.stage)
        if stage in ("grow", "cascade"):
            folder += str(config.data.resolution)
        if stage == "assess":
            folder = str(places["experts"] / "assess")
        if stage == "prune":
            folder = group_folder(places["experts"], config.prune.group)
        for name, place in places.items():
            if name in config and not config[name]:
                config[name] = str(place)
        if stage in ("distill", "grow"):
            places["base"] = folder  # the next growth starts from this generator
        if stage == "cascade":
            config.cascade.init_from = str(places.get("tuned", ""))
            places["tuned"] = folder
        planned.append((folder, config))
    return planned


def pipeline(
    path: str,
    arg: str,
    workdir: str,
    num_samples: int,
    measure: Sequence[str] = (),
    groups: Sequence[int] = (),
) -> dict:
    """The figures of the report, after every stage has run.

    measure: "NAME=FILE" of further feature networks for the top resolution. groups: the experts to
    prune; () for all.
    """
    began = time.monotonic()
    measures = [features.load(*named_file(entry)) for entry in measure]
    planned = [
        (folder, config)
        for folder, config in stage_configs(path, arg, workdir)
        if not groups or config.stage != "prune" or config.prune.group in groups
    ]
    runs = []
    for position, (folder, config) in enumerate(planned, start=1):
        elapsed, name = duration(time.monotonic() - began), pathlib.Path(folder).name
        logging.info("stage %d of %d: %s (%s so far)", position, len(planned), name, elapsed)
        begun = time.monotonic()
        summary = run(config, folder)
        runs.append(report.Run(name, config, folder, summary, time.monotonic() - begun))
        jax.clear_caches()  # the programs of one stage are not used again
    if any(run.config.stage == "distill" for run in runs):
        summary = report.write(runs, workdir, num_samples=num_samples, measures=measures)
    else:
        summary = {"stages": {run.folder: run.summary for run in runs}}
    return summary | {"config": path, "arg": arg, "seconds": round(time.monotonic() - began, 1)}


def define() -> None:
    """The command's flags."""
    flags.DEFINE_string("config", None, "Config file with get_config and stages.")
    flags.DEFINE_string("arg", "", "Argument string for the config file, e.g. size=quick,seed=1.")
    flags.DEFINE_string("workdir", None, "Folder for the folders of all stages.")
    flags.DEFINE_integer("num_samples", 1000, "Generated images per network in the report.")
    flags.DEFINE_multi_string(
        "measure", [], "NAME=FILE of a further feature network for the top resolution."
    )
    flags.DEFINE_multi_integer("groups", [], "Prune only this expert; may be repeated.")
    flags.DEFINE_string("record", None, "Also write the figures to this file.")
    flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str] | None = None) -> dict:
    """Run the pipeline that the flags name; returns the report's figures."""

    def body(given) -> dict:
        def everything() -> dict:
            figures = pipeline(
                given.config, given.arg, given.workdir, given.num_samples, given.measure,
                given.groups,
            )  # fmt: skip
            write_record(given.record, figures)
            return figures

        return execute("pipeline", given.workdir, everything)

    return start(define, body, argv)


if __name__ == "__main__":
    main()
