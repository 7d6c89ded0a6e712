"""All three methods on one teacher, one after the other, and what each costs.

    python -m launch.compose --arg=size=quick --workdir=runs/compose \\
        --record=notebooks/results/compose.json

    1  step-adaptive training   the teacher becomes a set of pruned specialists
    2  PaGoDA                   the specialists invert the data; a copy of the teacher learns the
                                one-step map from their latents and is grown to twice the size
    3  self-cascade             the grown image is the pivot, which the specialists take to twice
                                its size again
    control                     the teacher trained on for the same FLOPs, as one network: it
                                inverts, is distilled and takes the pivot further as well

Each is an ordinary stage in a work directory of its own: the same command resumes. Distances are
Frechet distances in the features of the data's metric classifier at that size, above the floor.
"""

import functools
import pathlib

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from cheapscale.evaluation.quality import Reference
from cheapscale.stages import data
from cheapscale.stages.cascade_sampler import cascade_cost, cascade_plan, cascade_sampler
from cheapscale.stages.networks import load_model
from cheapscale.stages.run import run
from cheapscale.stages.sampler_cost import sampler_cost
from cheapscale.stages.sampling import sample
from cheapscale.stages.specialists import read_manifest
from cheapscale.training.checkpoint import Loaded, load_network
from cheapscale.training.logging import image_grid, save_png
from cheapscale.training.loop import provenance
from launch.command import execute, start, write_record
from launch.judge import distance, make_judge
from launch.paired import difference
from launch.pipeline import stage_configs
from launch.round_trips import round_trips
from launch.specialists import make_set, stage_config

CONFIG = "configs/scenes.py"
RESAMPLES = 100
WHOLE = ("groups=1", "budget=flat", "mean=1.0")
SEARCH = ("rounds=6", "proxy_images=256")  # so that it costs less than it saves


def train(arg: str, workdir: pathlib.Path) -> dict[str, ConfigDict]:
    """{folder: its config} of every stage up to the first growth, which comes last; before it
    inverts, the teacher becomes the sets "specialists" and "control/network", which invert."""
    done, control = {}, workdir / "control"
    stages = stage_configs(CONFIG, arg, str(workdir))
    if all(config.stage != "grow" for _, config in stages):
        raise ValueError(
            f"--arg={arg} has no growth stage: name a size of configs/scenes.py with one"
        )
    for name, config in stages:
        if config.stage == "invert":
            make_sets(arg, config.teacher, str(workdir / "specialists"), str(control / "network"))
        if config.stage in ("invert", "distill"):
            other = config.copy_and_resolve_references()
            other.latents = str(control / "latents")
            if config.stage == "invert":
                config.teacher = str(workdir / "specialists")
                other.teacher = str(control / "network")
            logging.info("control: %s", name)
            run(other, str(control / name))
        logging.info("%s", name)
        run(config, str(workdir / name))
        done[name] = config
        jax.clear_caches()
        if config.stage == "grow":
            break
    return done


def make_sets(arg: str, teacher: str, folder: str, control: str) -> None:
    """The specialists; and one network, the whole teacher fine-tuned as they are for what they have
    cost, their search included."""

    def specialists(stage: str, group: int):
        return stage_config(CONFIG, arg, stage, teacher, folder, SEARCH)

    make_set(specialists, folder)
    base = load_model(teacher)
    paid = base.meta["ledger"]["flops"]
    cost = load_model(folder).meta["ledger"]["flops"] - paid

    def whole(stage: str, group: int):
        changes = [*SEARCH, *WHOLE]
        if stage == "prune":
            left = cost - read_manifest(control)["ledger"]["flops"]  # its own assessment
            changes.append(f"total_steps={max(1, round(left / (paid / base.step)))}")
        config = stage_config(CONFIG, arg, stage, teacher, control, changes)
        config.save_every = config.total_steps  # a save may take longer than many updates
        return config

    make_set(whole, control)


def compose(arg: str, workdir: str, num: int, num_real: int) -> dict:
    """Train what is missing, draw, measure; returns the figures."""
    root = pathlib.Path(workdir)
    done = train(arg, root)
    *_, last = done
    settings, steps = done["pretrain"].data, done[last].features.metric_steps or None
    teacher, specialists = load_model(root / "pretrain"), load_model(root / "specialists")
    control = load_model(root / "control" / "network")
    one_step, grown = load_network(root / "distill"), load_network(root / last)
    other_step = load_network(root / "control" / "distill")
    ids = np.arange(num)
    labels = data.class_mix(data.open_data(settings), num)

    @functools.cache
    def judge(resolution: int) -> Reference:
        return make_judge(settings, resolution, num_real=num_real, steps=steps)

    rows, pictures = {}, {}

    def add(title: str, images: np.ndarray, calls: float, flops: float) -> None:
        size = images.shape[1]
        found = distance(judge(size), images, RESAMPLES)
        rows[title] = {"size": size, "calls": calls, "flops": flops} | found
        pictures[title] = images[:8]
        logging.info("%s: fd %.2f", title, found["fd"][0])

    def drawn(title: str, loaded: Loaded) -> np.ndarray:
        images, _ = sample(loaded, ids, labels=labels)
        cost = sampler_cost(loaded, batch_size=min(64, num), repeats=1)
        add(title, images, cost["nfe"], cost["flops_per_image"])
        return images

    drawn("teacher", teacher)
    drawn("control", control)
    drawn("specialists", specialists)
    drawn("one step", one_step)
    drawn("one step, control", other_step)
    pivots = drawn("one step, grown", grown)
    one_call = rows["one step, grown"]["flops"]
    onward = "one step, grown, then cascade by the {}"
    for title, loaded, owner in (
        ("specialists, by the SNR of blocks", specialists, "snr"),
        ("specialists", specialists, "level"),
        ("control", control, "level"),
    ):
        plan = cascade_plan(loaded.meta, "2x", pivot_size=pivots.shape[1:3])
        cascade = cascade_sampler(loaded, plan, owner=owner)
        cost = cascade_cost(loaded, plan, batch_size=8, owner=owner)
        images = cascade.draw(ids, labels, pivots)[0][-1]
        calls, flops = cost["nfe"] + 1, cost["flops_per_image"] + one_call
        add(onward.format(title), images, calls, flops)
    add(
        "control, directly",
        cascade.direct(ids, labels)[0],
        cost["direct"]["nfe"],
        cost["direct"]["flops_per_image"],
    )
    for title, images in pictures.items():
        save_png(root / "pictures" / f"{title.replace(', ', '_').replace(' ', '-')}.png",
                 image_grid(images, columns=8))  # fmt: skip
    test = data.open_data(settings, split=settings.eval_split)
    held = data.read(test, range(min(num, len(test))))
    return {
        "arg": arg,
        "num": num,
        "rows": rows,
        "specialists - control": {
            "sampling": difference(rows["specialists"], rows["control"]),
            "one step": difference(rows["one step"], rows["one step, control"]),
            "cascade": difference(*(rows[onward.format(t)] for t in ("specialists", "control"))),
        },
        "inversion": round_trips(control, specialists, *held),
        "ledger": ledger(
            {
                "pretrain": teacher.meta["ledger"],
                "specialists": specialists.meta["ledger"],
                "inversion and distillation": one_step.meta["ledger"],
                "growth": grown.meta["ledger"],
            }
        ),
        "ledger of the control": ledger(
            {
                "pretrain": teacher.meta["ledger"],
                "training on": control.meta["ledger"],
                "inversion and distillation": other_step.meta["ledger"],
            }
        ),
        "provenance": provenance(),
    }


def ledger(after: dict[str, dict]) -> dict:
    """What each part added, from the bill after each of them, and the last bill as "all"."""
    rows, before = {}, {}
    for name, paid in after.items():
        rows[name] = {unit: paid[unit] - before.get(unit, 0.0) for unit in paid}
        before = paid
    return rows | {"all": before}


def table(figures: dict) -> str:
    """The rows as Markdown."""
    lines = ["| | px | calls | MFLOPs an image | FD above floor |", "|---|---|---|---|---|"]
    for title, row in figures["rows"].items():
        value, deviation = row["fd"]
        lines.append(
            f"| {title} | {row['size']} | {row['calls']:g} | {row['flops'] / 1e6:.0f} | "
            f"{value:.2f} ± {1.96 * deviation:.2f} |"
        )
    return "\n".join(lines)


def main(argv) -> None:
    del argv
    given = flags.FLAGS

    def body() -> dict:
        figures = compose(given.arg, given.workdir, given.num, given.num_real)
        write_record(given.record, figures)
        print(table(figures))
        return figures

    execute("compose", given.workdir, body)


if __name__ == "__main__":
    flags.DEFINE_string("arg", "size=quick", "Argument string of configs/scenes.py.")
    flags.DEFINE_string("workdir", None, "Where every stage's folder goes.")
    flags.DEFINE_integer("num", 512, "Images of a figure.", lower_bound=8)
    flags.DEFINE_integer("num_real", 2000, "Real images to compare with.", lower_bound=8)
    flags.DEFINE_string("record", None, "Also write the figures to this file.")
    flags.mark_flags_as_required(["workdir"])
    start(main)
