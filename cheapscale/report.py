"""What a finished pipeline shows: pictures of every stage, a table, and the same figures as a dict.

Every generator draws from the same latents, so that one column of `one_step.png` is one z at every
resolution; classes are drawn with the training set's own frequencies. The quality numbers come
from a classifier that no loss has seen.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from cheapscale.data.resize import area_mean
from cheapscale.evaluation.pixels import psnr
from cheapscale.evaluation.quality import quality, reference
from cheapscale.stages.data import class_mix, open_data
from cheapscale.stages.invert import round_trip
from cheapscale.stages.networks import load_teacher
from cheapscale.stages.sampling import sample
from cheapscale.training.checkpoint import Loaded, load_network
from cheapscale.training.classifier import fit_classifier
from cheapscale.training.logging import enlarge, image_grid, save_png

COLUMNS = 8


class Run(NamedTuple):
    """One finished stage of a pipeline."""

    folder: str
    config: Any
    workdir: str
    summary: dict
    seconds: float


def write(runs: list[Run], workdir: str | pathlib.Path, *, num_samples: int) -> dict:
    """Draw the pictures into `workdir`, print the table, and return the figures.

    runs: the pipeline's stages in order. num_samples: images per quality number.
    """
    folder = pathlib.Path(workdir)
    by_stage = {run.folder: run for run in runs}
    pretrain, invert = by_stage["pretrain"], by_stage["invert"]
    growing = [run for run in runs if run.config.stage in ("distill", "grow")]
    teacher = load_teacher(pretrain.workdir)
    top = growing[-1].config.data.resolution

    draw_data(folder / "data.png", growing, top)
    trip = inversion(folder / "round_trip.png", teacher, invert)
    ids = np.arange(num_samples)
    labels = class_mix(open_data(pretrain.config.data), num_samples)
    shared = {"labels": labels, "batch_size": 250}
    images = {"teacher": sample(teacher, ids, steps=invert.config.invert.nodes, **shared)[0]}
    for run in growing:
        images[run.folder] = sample(load_network(run.workdir), ids, **shared)[0]
    save_png(folder / "teacher.png", image_grid(images["teacher"][:64]))
    rows = [enlarge(images[run.folder][:COLUMNS], top) for run in growing]
    save_png(folder / "one_step.png", image_grid(np.concatenate(rows), COLUMNS), 1024)

    figures = {"round_trip": trip, "stages": {}}
    for name in images:
        run = by_stage["distill" if name == "teacher" else name]  # both at the base resolution
        figures["stages"][name] = score(run, images[name])
    for small, large in zip(growing, growing[1:]):
        shrunk = area_mean(images[large.folder], small.config.data.resolution)
        difference = shrunk - images[small.folder]
        figures["stages"][large.folder]["drift_rms"] = float(np.sqrt(np.mean(difference**2)))
    figures["seconds_per_stage"] = {run.folder: round(run.seconds, 1) for run in runs}
    figures["training_flops"] = growing[-1].summary["ledger"]["flops"]
    figures["rms_z_over_sigma_max"] = invert.summary["rms"]
    figures["provenance"] = growing[-1].summary["provenance"]
    text = table(figures)
    (folder / "report.md").write_text(text + "\n")
    print(text)
    return figures


def draw_data(path: pathlib.Path, growing: list[Run], top: int) -> None:
    """The same held-out images at every resolution of the pipeline, one row each."""
    rows = []
    for run in growing:
        source = held_out(run.config)
        rows.append(enlarge(np.stack([source[i]["image"] for i in range(COLUMNS)]), top))
    save_png(path, image_grid(np.concatenate(rows), COLUMNS), 1024)


def inversion(path: pathlib.Path, teacher: Loaded, run: Run, count: int = 256) -> dict:
    """Held-out images to noise and back on the same nodes; a picture of pairs, and the PSNR."""
    source = held_out(run.config)
    items = [source[i] for i in range(min(count, len(source)))]
    images = np.stack([item["image"] for item in items])
    labels = np.asarray([item["label"] for item in items], np.int32)
    nodes = run.config.invert.nodes
    trip = round_trip(teacher, images, labels, nodes=nodes, clip=run.config.invert.clip)
    pairs = np.concatenate([images[:COLUMNS], trip["images"][:COLUMNS]])
    save_png(path, image_grid(pairs, COLUMNS))
    sigma_max = teacher.meta["diffusion"]["sigma_max"]
    return {
        "psnr": float(np.mean(psnr(images, trip["images"]))),
        "num": len(images),
        "nodes": nodes,
        "rms_z_over_sigma_max": float(np.sqrt(np.mean(trip["z"] ** 2)) / sigma_max),
    }


def score(run: Run, images: np.ndarray) -> dict:
    """Quality numbers of one network's samples against held-out images of its resolution."""
    train = open_data(run.config.data)
    steps = run.config.features.classifier_steps or None
    network = fit_classifier(train, purpose="metric", steps=steps).network
    real = reference(network, held_out(run.config), train_source=train)
    used = run.summary["frozen_networks"]
    return {"resolution": train.resolution} | quality(real, images, used_in_loss=used)


def held_out(config):
    return open_data(config.data, split=config.data.eval_split)


def table(figures: dict) -> str:
    """The figures as a Markdown table, one row for each network."""
    first = next(iter(figures["stages"].values()))
    distance = next(name for name in first if name.startswith("fd_") and name != "fd_minus_floor")
    kernel = next(name for name in first if name.startswith("kd_") and name != "kd_floor")
    head = ["network", "px", distance, "floor", f"1000 {kernel}", "precision", "recall", "drift"]
    rows = [head, ["---"] * len(head)]
    for name, values in figures["stages"].items():
        drift = values.get("drift_rms")
        rows.append([
            name, str(values["resolution"]),
            f"{values[distance]:.3f}", f"{values['floor']:.3f}", f"{1000 * values[kernel]:.2f}",
            f"{values['precision']:.2f}", f"{values['recall']:.2f}",
            "" if drift is None else f"{drift:.3f}",
        ])  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    trip = figures["round_trip"]
    lines.append(
        f"\nInversion round trip on {trip['num']} held-out images, {trip['nodes']} nodes: "
        f"{trip['psnr']:.1f} dB; rms(z)/sigma_max {trip['rms_z_over_sigma_max']:.3f}. "
        "Drift: rms between the image downsampled and the smaller generator's, same z."
    )
    return "\n".join(lines)
