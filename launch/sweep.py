"""Run all runs of a study in turn, or one of them, and compare them with the study's control.

    python -m launch.sweep --config=configs/scenes.py --sweep=pairs --arg=size=ablation \\
        --measure=mobilenet_v2=FILE --workdir=runs/sweeps
    python -m launch.sweep ... --list        # the runs as commands; nothing runs
    python -m launch.sweep ... --index=3     # one of them: a task of an array job

`sweep(name)` stands beside `get_config` in the config file and returns argument strings, such as
"pipeline=one_step,distill.data_proportion=0.1,seed=2" (configs/sweeps.py). A run whose string has
a stage runs that stage; any other runs a whole pipeline.

Stages of pipelines are shared: the folder WORKDIR/stages/NAME-HASH is named by everything that the
stage depends on, so that one teacher serves all runs of its seed, also those of other sweeps in the
same work directory. Running the same command again resumes; finished stages are not opened. The
time left is estimated from the finished stages.

WORKDIR/<sweep>.md has the table: each figure's mean over the seeds, and its difference from that of
the first run of the same seed, with a 95 % interval. WORKDIR/<sweep>.json has all numbers.
"""

import functools
import pathlib
import re
import shlex
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags, logging
from flax.traverse_util import flatten_dict

from cheapscale.data.digest import digest
from cheapscale.data.files import atomic_write, read_json
from cheapscale.data.pixels import from_uint8, to_uint8
from cheapscale.data.sources import open_data
from cheapscale.evaluation import report
from cheapscale.evaluation.detail import detail_of
from cheapscale.evaluation.measure import checked_name
from cheapscale.evaluation.paired import compare, table
from cheapscale.evaluation.report_rows import Row, read_some
from cheapscale.teacher import load
from cheapscale.teacher.data import match_classes
from cheapscale.teacher.sampling import sample
from cheapscale.training.checkpoint import PLACES
from cheapscale.training.lock import Busy
from cheapscale.training.log import duration
from cheapscale.training.loop import provenance
from configs import common
from launch.command import execute, pipeline_flags, required, start, write_record
from launch.pipeline import is_stage, load_judge, load_module, stage_configs
from launch.train import run

GENERATORS = ("distill", "grow")  # stages whose results are measured
SIDE = 8  # in pixels, at which recall compares whole images
SHOWN = r"pkid.*(?<!_interval)$|recall|spectrum"  # figures of the report


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


# The stages of a run


def chain(path: str, arg: str, root: pathlib.Path, name: str) -> list:
    """[(folder, config)] of a run's stages. The folders of a pipeline are named by what they hold;
    experts, which belong to one assessment, stay in the run's own folder."""
    if is_stage(arg):
        stages = [(str(root / name), load_module(path).get_config(arg))]
    else:
        stages = stage_configs(path, arg, str(root / name))
    found, moved = [], {}
    for place, config in stages:
        given = flatten_dict(config.to_dict(), sep=".")
        common.change(config, {key: moved[given[key]] for key in PLACES if given.get(key) in moved})
        if not is_stage(arg) and config.stage not in ("assess", "prune"):
            held = config.to_dict() | ({"latents": ""} if config.stage == "invert" else {})
            mark = digest(repr(flatten_dict(held)).replace(f"{root}/", ""))[:10]
            moved[place] = str(root / "stages" / f"{kind(config)}-{mark}")
            place = moved[place]
            if config.stage == "invert":
                moved[config.latents] = config.latents = f"{place}/pairs"
        found.append((place, config))
    return found


def kind(config) -> str:
    """The stage with its resolution, "grow32": stages of one kind take about the same time."""
    return f"{config.stage}{config.data.resolution}"


def finished(place: str, config) -> dict:
    """The summary of a stage, after running it unless it is finished; waits for another process
    that runs it."""
    done = pathlib.Path(place) / "stage.json"
    while not done.exists():
        began = time.monotonic()
        try:
            summary = run(config, place)
        except Busy as busy:
            logging.info("%s", busy)
            time.sleep(30)
            continue
        seconds = time.monotonic() - began
        jax.clear_caches()  # the programs of one stage are not used again
        if jax.process_index():
            return summary
        write_record(done, summary | {"kind": kind(config), "seconds": seconds})
    return read_json(done, "kind", "seconds")


def left(chains: list[list], root: pathlib.Path) -> str:
    """The time that the unfinished stages of all runs will take, as text; shared ones count once. A
    stage takes as long as the finished ones of its kind on average, or as all if there are none."""
    known: dict[str, list[float]] = {}
    for path in root.glob("stages/*/stage.json"):
        summary = read_json(path, "kind", "seconds")
        known.setdefault(summary["kind"], []).append(summary["seconds"])
    if not known:
        return "an unknown time"
    kinds = {place: kind(config) for stages in chains for place, config in stages}
    ahead = [kinds[place] for place in kinds if not (pathlib.Path(place) / "stage.json").exists()]
    mean = {name: float(np.mean(seconds)) for name, seconds in known.items()}
    overall = float(np.mean(list(mean.values())))
    return "about " + duration(sum(mean.get(name, overall) for name in ahead))


# The figures of a run


def measured(place: str, config, judges: Sequence, num: int) -> dict[str, float]:
    """{name: figure} of a trained generator, from `num` samples and as many held-out images: those
    of launch.pipeline's report (patch distances, recall, spectrum), and the FLOPs of all training.
    The noise is the same for all generators with the same base."""
    generator = load(place)
    for judge in judges:
        checked_name(judge, generator.meta["frozen_networks"])
    asked = open_data(config.data, split=config.data.eval_split)  # its classes or captions
    match_classes(generator.meta, generator.num_classes, asked, place)
    labels = asked.class_mix(num)
    images = sample(generator, np.arange(num), labels=labels, batch_size=250)[0]
    row = Row(to_uint8(images), {})
    real = read_some(config.data, num, config.data.eval_split)
    scale = float(detail_of(from_uint8(real)).std())
    look = functools.partial(report.views, judges=judges, side=SIDE, scale=scale)
    numbers = report.measured(row, look(row.images), look(real), {}, None).numbers
    shown = {name: float(v) for name, v in numbers.items() if re.match(SHOWN, name)}
    return shown | {"training_flops": float(generator.meta["ledger"]["flops"])}


def results(runs: list[tuple[str, str]], arg: str, root: pathlib.Path) -> list[dict]:
    """The measured runs of a study, [{"arm", "seed", "figures", "model"}], in its order.

    An arm is named by the words that the control lacks, the control by all of its words.
    """
    rows, control = [], common.split(runs[0][1].removeprefix(arg).strip(","))[:-1]
    for name, words in runs:
        if (path := root / name / "measured.json").exists():
            *own, seed = common.split(words.removeprefix(arg).strip(","))
            arm = ",".join([word for word in own if word not in control] or own)
            seed = int(seed.removeprefix("seed="))
            rows.append({"arm": arm, "seed": seed} | read_json(path, "figures", "model"))
    return rows


def sweep(
    runs: list[tuple[str, str]],
    path: str,
    arg: str,
    target: pathlib.Path,
    *,
    only: Sequence[int] = (),
    judges: Sequence = (),
    num: int = 1000,
) -> dict:
    """{"runs": [{"folder", "arg", **summary of the last stage}], "results", "compared" ...} after
    all runs, or those with the numbers `only`; the results are those of all finished runs.

    target: the file of the table, in the work directory; written after each run.
    """
    root, numbers = target.resolve().parent, chosen(runs, only)
    setting = {"num": num, "judges": [judge.name for judge in judges]}
    rows = []
    for position, number in enumerate(numbers):
        name, words = runs[number]
        ahead = [chain(path, runs[n][1], root, runs[n][0]) for n in numbers[position:]]
        logging.info("run %d of %d: %s; %s left", number + 1, len(runs), name, left(ahead, root))
        for place, config in ahead[0]:
            summary = finished(place, config)
        rows.append({"folder": name, "arg": words} | summary)
        record = root / name / "measured.json"
        known = read_json(record) if record.exists() else {}
        if config.stage in GENERATORS and not setting.items() <= known.items():
            figures = measured(place, config, judges, num)
            model = str(pathlib.Path(place).relative_to(root))
            write_record(record, setting | {"model": model, "figures": figures})
        found = results(runs, arg, root)
        with atomic_write(target) as temporary:
            temporary.write_text(table(compare(found)) + "\n")
    shown = {"config": path, "arg": arg, "results": found, "compared": compare(found)}
    return {"runs": rows} | shown | {"provenance": provenance()}


def define() -> None:
    """The command's flags."""
    pipeline_flags()
    flags.DEFINE_string("sweep", None, "Name of the study (configs/sweeps.py).")
    flags.DEFINE_string("workdir", None, "Folder for the stages and tables of sweeps.")
    flags.DEFINE_integer("index", None, "Run only this one, counted from 0.", 0, 10_000)
    flags.DEFINE_bool("list", False, "Print the runs as commands and stop.")
    flags.DEFINE_integer("num_samples", 1000, "Generated images per run.", 8, 10_000_000)
    flags.DEFINE_multi_string(
        "measure", [], "NAME=FILE of a network that judges; no loss may have used it."
    )
    flags.DEFINE_string("record", None, "Also write the results to this file.")
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

        def everything() -> dict:
            judges = [load_judge(entry) for entry in given.measure]
            target = pathlib.Path(given.workdir) / f"{given.sweep}.md"
            found = sweep(
                runs, given.config, given.arg, target, only=only, judges=judges,
                num=given.num_samples,
            )  # fmt: skip
            print(target.read_text())
            write_record(given.record, {k: found[k] for k in found if k != "runs"})
            return found

        name = given.sweep if given.index is None else f"{given.sweep}-{given.index}"
        # The tasks of an array job write different folders in it.
        return execute(name, given.workdir, everything, alone=False)

    return start(define, body, argv)


if __name__ == "__main__":
    main()
