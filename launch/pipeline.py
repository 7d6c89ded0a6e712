"""Run all stages of a pipeline: PaGoDA's, or the one that the argument `pipeline` names.

    python -m launch.pipeline --config=configs/scenes.py --arg=size=quick --workdir=runs/quick
    python -m launch.pipeline --config=configs/scenes.py --arg=pipeline=experts,prune.k=0.4 \\
        --workdir=runs/experts

pipeline=pagoda     pretrain, invert, distill, grow, in small runs with regress before the last
                    two; then report.md with its pictures:
                    growth and one_step (each column shows one z), reconstruction, round_trip, data,
                    teacher, nearest (the samples nearest to a training image, above that image)
pipeline=one_step   the same without growth
pipeline=cascade    pretrain, then tune upsamplers
pipeline=experts    pretrain, assess, prune one expert for each range of noise levels (only some of
                    them with --groups=0 --groups=3)

The argument `controls` also trains the controls of both PaGoDA stages (configs/common.py), which
then stand in the report; in the folder of a finished pipeline only these are trained.
`guided` also makes guided samples of the teacher, and trains a generator for --cfg_scale.
`teacher=DIR` replaces pretraining, as does a shipped model, `teacher=pretrained:scenes16_teacher`.
Each stage has its own folder in the work directory, and running the same command again resumes.
"""

import importlib.util
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags, logging
from flax.traverse_util import flatten_dict

from cheapscale import features
from cheapscale.data.sources import open_pictures
from cheapscale.evaluation import report
from cheapscale.evaluation.measure import checked_name
from cheapscale.pagoda.loss_networks import load_features
from cheapscale.teacher.experts import group_folder
from cheapscale.training.checkpoint import PLACES, has_results, read_meta, saved_steps
from cheapscale.training.exported import files_of
from cheapscale.training.log import duration
from configs import common, fields
from launch.command import execute, named_file, pipeline_flags, required, start, write_record
from launch.train import run

# Controls that start from the teacher's weights, since stage regress has seen inverted pairs.
FROM_TEACHER = ("no_rec", "dstl")
# To these sizes in pixels a judge enlarges images; on CPUs its own 224 px would take minutes.
JUDGE_SIDES = {"mobilenet_v2": 96, "efficientnet_lite0": 96}


def load_module(path: str):
    """The config file as a module."""
    if not pathlib.Path(path).is_file() or pathlib.Path(path).suffix != ".py":
        raise FileNotFoundError(
            f"{path!r} is no config file: name one of configs/*.py, and its words in --arg"
        )
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it may raise anything
        raise ValueError(
            f"the config file {path} is not in order: {type(error).__name__}: {error}"
        ) from error
    return module


def stage_configs(path: str, arg: str, workdir: str) -> list[tuple[str, object]]:
    """[(folder, config)] of the pipeline's stages; each config has the paths of earlier stages."""
    module = load_module(path)
    if not hasattr(module, "stages"):
        raise ValueError(f"{path} describes no pipeline: it has no stages(arg)")
    if is_stage(arg):
        raise ValueError(
            f"a pipeline runs all of its stages: leave stage=... out of {arg!r}, or run "
            f"launch.train --config={path}:{arg}"
        )
    root = pathlib.Path(workdir)
    places = {"teacher": root / "pretrain", "latents": root / "latents", "experts": root / "set"}
    planned = []
    for words in module.stages(arg):
        config = module.get_config(",".join(filter(None, (arg, words))))
        stage, folder = config.stage, str(root / config.stage)
        control = common.parse(words)[0].control
        if stage == "invert" and config.invert.omega:  # the guided samples, not the pairs
            folder, config.latents = str(root / "sample"), str(root / "samples")
            places["samples"] = root / "samples"
        if common.parse(words)[0].resolution:
            folder += str(config.data.resolution)
        if stage == "assess":
            folder = str(places["experts"] / "assess")
        if stage == "prune":
            folder = group_folder(places["experts"], config.prune.group)
        if control:  # it begins as the stage itself does
            folder += f"-{control}"
            itself = next(c for _, c in planned if report.place(c) == report.place(config))
            config.update({name: itself[name] for name in (*places, "start") if name in itself})
        if control == "dstl":  # the pairs of the teacher's samples
            config.latents = str(root / "latents-dstl")
        for name, place in places.items():
            if name in config and not config[name]:
                config[name] = str(place)
        if control in FROM_TEACHER and "start" in config:
            config.start = ""
        if stage == "regress":
            places["start"] = folder
            if config.base:  # the teacher's samples have the base resolution
                config.samples = ""
        if stage in ("distill", "grow") and not control:
            places["base"] = folder  # the next growth starts from this generator
            places.pop("start", None)
        if stage == "cascade":
            config.cascade.init_from = str(places.get("tuned", ""))
            places["tuned"] = folder
        planned.append((folder, config))
    for name in common.parse(arg)[1]:
        fitting = (
            common.find(own, config.stage)
            for _, config in planned
            for own in common.own_changes({name: ""}, config)
        )
        if not any(fitting):
            raise ValueError(f"no stage of this pipeline has the field {name}: leave it out")
    for _, config in planned:  # at once, and not hours later when the stage begins
        fields.check(config)
    return planned


def check_order(planned: list[tuple[str, Any]]) -> None:
    """Raise ValueError if a finished stage would train on, from which a later one has begun."""
    for position, (folder, config) in enumerate(planned):
        if not saved_steps(folder):
            continue
        step, meta = read_meta(folder)
        asked = meta.get("config", {}).get("total_steps", config.total_steps)
        if not (step < config.total_steps and asked < config.total_steps):
            continue
        for place, later in planned[position + 1 :]:
            words = flatten_dict(later.to_dict(), sep=".")
            made = filter(None, (place, words.get("latents"), words.get("experts")))
            if folder in map(words.get, PLACES) and any(map(has_results, made)):
                raise ValueError(
                    f"total_steps is {config.total_steps}, but {folder} ended at step {step}, from "
                    f"which {place} was made: name a new --workdir, or leave it at {asked}"
                )


def is_stage(arg: str) -> bool:
    """Whether an argument string has a stage."""
    return any(word.startswith("stage=") for word in common.split(arg))


def load_judge(entry: str) -> features.FeatureNetwork:
    """The network "NAME=FILE" of the report."""
    name, path = named_file(entry)
    return features.load(name, path, input_size=JUDGE_SIDES.get(name))


def pipeline(
    path: str,
    arg: str,
    workdir: str,
    num_samples: int,
    measure: Sequence[str] = (),
    groups: Sequence[int] = (),
) -> dict:
    """The figures of the report, after every stage has run.

    measure: "NAME=FILE" of feature networks that judge in the report. groups: the experts to prune;
    () for all.
    """
    began = time.monotonic()
    planned = stage_configs(path, arg, workdir)
    stages = {config.stage for _, config in planned}
    if measure and "distill" not in stages:
        raise ValueError(f"--measure={measure[0]} is for pipelines with generators: leave it out")
    experts = [config.prune.group for _, config in planned if config.stage == "prune"]
    if absent := sorted(set(groups) - set(experts)):
        has = f"the groups 0 ... {len(experts) - 1}" if experts else "no experts: leave it out"
        raise ValueError(f"--groups={absent[0]}: this pipeline has {has}")
    if groups:
        planned = [
            (folder, config)
            for folder, config in planned
            if config.stage != "prune" or config.prune.group in groups
        ]
    check_order(planned)
    judges = [load_judge(entry) for entry in measure]
    # What the last stage cannot read is refused before the first one begins.
    final = max((config for _, config in planned), key=lambda config: config.data.resolution)
    last, settings = final.data, final.get("features")
    seen = open_pictures(last)
    trained, _ = load_features(settings.to_dict(), seen) if settings else ((), {})
    for judge in judges:
        checked_name(judge, {known.name: known.sha256 for known in trained})
    for split in (last.split, last.eval_split) if "distill" in stages else (last.split,):
        source = open_pictures(last, split=split)
        if "distill" in stages and len(source) < 2:
            raise ValueError(
                f"the split {split} holds 1 image, and the report compares with at least 2: add "
                "images, or give --config.data.eval_split=SPLIT"
            )
    files = {k: v for _, config in planned for k, v in files_of(config.to_dict()).items()}
    runs = []
    for position, (folder, config) in enumerate(planned, start=1):
        elapsed, name = duration(time.monotonic() - began), pathlib.Path(folder).name
        logging.info("stage %d of %d: %s (%s so far)", position, len(planned), name, elapsed)
        begun = time.monotonic()
        summary = run(config, folder)
        control = name.partition("-")[2]
        runs.append(report.Run(name, config, folder, summary, time.monotonic() - begun, control))
        jax.clear_caches()  # the programs of one stage are not used again
    if any(run.config.stage == "distill" for run in runs):
        summary = report.write(runs, workdir, num_samples=num_samples, judges=judges)
    else:
        summary = {"stages": {run.folder: run.summary for run in runs}}
    return summary | {
        "config": path,
        "arg": arg,
        "files": files,
        "seconds": round(time.monotonic() - began, 1),
    }


def define() -> None:
    """The command's flags."""
    pipeline_flags()
    flags.DEFINE_string("workdir", None, "Folder for the folders of all stages.")
    flags.DEFINE_integer(
        "num_samples", 1000, "Generated images per network in the report.", 8, 10_000_000
    )
    flags.DEFINE_multi_string(
        "measure", [], "NAME=FILE of a feature network that judges; no loss may have used it."
    )
    flags.DEFINE_multi_integer("groups", [], "Prune only this expert; may be repeated.", 0, 10_000)
    flags.DEFINE_string("record", None, "Also write the figures to this file.")
    required("config", "configs/scenes.py")
    required("workdir", "runs/mine")


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
