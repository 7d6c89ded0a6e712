"""All three methods on one teacher, one after the other, and what each costs.

    python -m launch.compose --arg=size=cascade --workdir=runs/compose \\
        --record=notebooks/results/compose.json

    1  step-adaptive training   the teacher becomes a set of pruned specialists
    2  PaGoDA                   the specialists invert the data; a copy of the teacher learns the
                                one-step map from their latents and is grown to twice the size
    3  self-cascade             the grown image is the pivot, which the specialists take to twice
                                its size again

Each is an ordinary stage in a work directory of its own: the same command resumes. Distances are
Frechet distances in the features of the data's metric classifier at that size, above the floor.
"""

import pathlib

import jax
import numpy as np
from absl import app, flags, logging

from cheapscale.evaluation import quality
from cheapscale.evaluation.fid import frechet_distance
from cheapscale.evaluation.pixels import to_uint8
from cheapscale.stages import data
from cheapscale.stages.cascade_sampler import cascade_cost, cascade_plan, cascade_sampler
from cheapscale.stages.networks import load_model
from cheapscale.stages.run import run
from cheapscale.stages.sampler_cost import sampler_cost
from cheapscale.stages.sampling import sample
from cheapscale.training.checkpoint import Loaded, load_network
from cheapscale.training.classifier import fit_classifier
from cheapscale.training.logging import image_grid, save_png
from cheapscale.training.loop import provenance
from configs import scenes
from launch.command import execute, write_record
from launch.paired import with_deviation
from launch.pipeline import stage_configs
from launch.specialists import make_set

CONFIG = "configs/scenes.py"
RESAMPLES = 100


def train(arg: str, workdir: pathlib.Path) -> dict[str, dict]:
    """{folder: its summary} of every stage up to the first growth; "specialists" is the set."""
    summaries, folder = {}, str(workdir / "specialists")
    for name, config in stage_configs(CONFIG, arg, str(workdir)):
        if config.stage == "invert":

            def configured(stage):
                config = scenes.get_config(",".join(filter(None, (arg, f"stage={stage}"))))
                config.teacher, config.specialists = str(workdir / "pretrain"), folder
                return config

            summaries["specialists"] = make_set(configured, folder)
            config.teacher = folder
        logging.info("%s", name)
        summaries[name] = run(config, str(workdir / name))
        jax.clear_caches()
        if config.stage == "grow":
            return summaries
    raise ValueError(f"--arg={arg} has no growth stage: name a size of configs/scenes.py with one")


class Judges:
    """The real images of each size, read once."""

    def __init__(self, settings, steps: int | None):
        self.settings, self.steps, self.known = settings, steps, {}

    def at(self, resolution: int, num: int) -> quality.Reference:
        if resolution not in self.known:
            train_set = data.open_data(self.settings, resolution=resolution)
            test = data.open_data(
                self.settings, resolution=resolution, split=self.settings.eval_split
            )
            network = fit_classifier(train_set, purpose="metric", steps=self.steps).network
            self.known[resolution] = quality.reference(
                network, test, train_source=train_set, num=num, num_train=num
            )
        return self.known[resolution]

    def fd(self, images: np.ndarray, num_real: int) -> list[float]:
        """[distance above the floor, bootstrap deviation]."""
        judge = self.at(images.shape[1], num_real)
        features = quality.embed(judge.network, to_uint8(images))
        floor = judge.floor(len(features))[0]

        def figures(rows):
            return {"fd": frechet_distance(features[rows], judge.features) - floor}

        return with_deviation(figures, len(features), RESAMPLES)["fd"]


def compose(arg: str, workdir: str, num: int, num_real: int) -> dict:
    """Train what is missing, draw, measure; returns the figures."""
    root = pathlib.Path(workdir)
    summaries = train(arg, root)
    pretrain, grow = (config for name, config in stage_configs(CONFIG, arg, workdir) if name in (
        "pretrain", next(n for n in summaries if n.startswith("grow"))))  # fmt: skip
    teacher, specialists = load_model(root / "pretrain"), load_model(root / "specialists")
    one_step = load_network(root / "distill")
    grown = load_network(root / f"grow{grow.data.resolution}")
    ids = np.arange(num)
    labels = data.class_mix(data.open_data(pretrain.data), num)
    judges = Judges(pretrain.data, pretrain.total_steps if "smoke" in arg else None)

    rows, pictures = {}, {}

    def add(title: str, images: np.ndarray, calls: float, flops: float) -> None:
        fd = judges.fd(images, num_real)
        rows[title] = {
            "size": images.shape[1], "fd": fd, "calls": calls, "flops": flops
        }  # fmt: skip
        pictures[title] = images[:8]
        logging.info("%s: fd %.2f", title, fd[0])

    def drawn(title: str, loaded: Loaded) -> np.ndarray:
        images, _ = sample(loaded, ids, labels=labels)
        cost = sampler_cost(loaded, batch_size=min(64, num), repeats=1)
        add(title, images, cost["nfe"], cost["flops_per_image"])
        return images

    drawn("teacher", teacher)
    drawn("specialists", specialists)
    drawn("one step", one_step)
    pivots = drawn("one step, grown", grown)
    one_call = rows["one step, grown"]["flops"]
    for title, loaded in (("specialists", specialists), ("teacher", teacher)):
        plan = cascade_plan(loaded.meta, "2x", pivot_size=pivots.shape[1:3])
        cascade, cost = cascade_sampler(loaded, plan), cascade_cost(loaded, plan, batch_size=8)
        images = cascade.draw(ids, labels, pivots)[0][-1]
        calls, flops = cost["nfe"] + 1, cost["flops_per_image"] + one_call
        add(f"one step, grown, then cascade by the {title}", images, calls, flops)
    add(
        "teacher, directly",
        cascade.direct(ids, labels)[0],
        cost["direct"]["nfe"],
        cost["direct"]["flops_per_image"],
    )
    for title, images in pictures.items():
        save_png(root / "pictures" / f"{title.replace(', ', '_').replace(' ', '-')}.png",
                 image_grid(images, columns=8))  # fmt: skip
    return {
        "arg": arg,
        "num": num,
        "rows": rows,
        "ledger": ledger(summaries, specialists),
        "provenance": provenance(),
    }


def ledger(summaries: dict[str, dict], specialists: Loaded) -> dict:
    """Training FLOPs and device-seconds that each part added, and their sums."""
    after = {
        "pretrain": summaries["pretrain"]["ledger"],
        "specialists": specialists.meta["ledger"],
    }
    last = next(summary for name, summary in summaries.items() if name.startswith("grow"))
    after |= {
        "inversion and distillation": summaries["distill"]["ledger"],
        "growth": last["ledger"],
    }
    rows, before = {}, dict.fromkeys(after["pretrain"], 0.0)
    for name, paid in after.items():
        rows[name] = {unit: paid[unit] - before[unit] for unit in paid}
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
    flags.DEFINE_string("arg", "size=cascade", "Argument string of configs/scenes.py.")
    flags.DEFINE_string("workdir", None, "Where every stage's folder goes.")
    flags.DEFINE_integer("num", 512, "Images of a figure.", lower_bound=8)
    flags.DEFINE_integer("num_real", 2000, "Real images to compare with.", lower_bound=8)
    flags.DEFINE_string("record", None, "Also write the figures to this file.")
    flags.mark_flags_as_required(["workdir"])
    app.run(main)
