"""What a finished pipeline shows: pictures of every stage, a table, and the same figures as a dict.

Every generator draws from the same latents, so that one column of `one_step.png` is one z at every
resolution; classes are drawn with the training set's own frequencies. The quality numbers come
from a classifier that no loss has seen.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from cheapscale.data.resize import area_mean
from cheapscale.evaluation.memorisation import closest_pairs, nearest_features
from cheapscale.evaluation.naming import metric_name
from cheapscale.evaluation.pixels import from_uint8, psnr, to_uint8
from cheapscale.evaluation.quality import Reference, embed, quality, reference
from cheapscale.models.features import FeatureNetwork
from cheapscale.stages.data import class_mix, open_data, read
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


def write(
    runs: list[Run],
    workdir: str | pathlib.Path,
    *,
    num_samples: int,
    measures: Sequence[FeatureNetwork] = (),
) -> dict:
    """Draw the pictures into `workdir`, print the table, and return the figures.

    runs: the pipeline's stages in order. num_samples: images per quality number. measures: networks
    that judge the top resolution besides the small classifier; none may have been in a loss.
    """
    folder = pathlib.Path(workdir)
    by_stage = {run.folder: run for run in runs}
    pretrain, invert = by_stage["pretrain"], by_stage["invert"]
    growing = [run for run in runs if run.config.stage in ("distill", "grow")]
    teacher = load_teacher(pretrain.workdir, dtype=invert.config.compute.dtype)
    top = growing[-1].config.data.resolution

    draw_data(folder / "data.png", growing, top)
    trip = inversion(folder / "round_trip.png", teacher, invert)
    ids = np.arange(num_samples)
    labels = class_mix(open_data(pretrain.config.data), num_samples)
    shared = {"labels": labels, "batch_size": 250}
    logging.info("report: sampling %d images of each network", num_samples)
    images = {"teacher": sample(teacher, ids, steps=invert.config.invert.nodes, **shared)[0]}
    for run in growing:
        images[run.folder] = sample(load_network(run.workdir), ids, **shared)[0]
    save_png(folder / "teacher.png", image_grid(images["teacher"][:64]))
    rows = [enlarge(images[run.folder][:COLUMNS], top) for run in growing]
    save_png(folder / "one_step.png", image_grid(np.concatenate(rows), COLUMNS), 1024)

    figures = {"round_trip": trip, "stages": {}}
    for run in growing:
        train = open_data(run.config.data)
        steps = run.config.features.metric_steps or None
        network = fit_classifier(train, purpose="metric", steps=steps).network
        real = held_out_reference(run, train, network, num_samples)
        # the teacher has the base resolution, as the first generator
        for name in ("teacher", run.folder) if run is growing[0] else (run.folder,):
            logging.info("report: measuring %s", name)
            figures["stages"][name], verdict = score(run, real, images[name])
    final = growing[-1]  # the last run of the loop: `train` and `verdict` are its own
    for network in measures:
        real = held_out_reference(final, train, network, num_samples)
        more, verdict = score(final, real, images[final.folder])
        figures["stages"][final.folder] |= named(more, network)
    draw_nearest(folder / "nearest.png", verdict)
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


def inversion(path: pathlib.Path, teacher: Loaded, run: Run, count: int = 128) -> dict:
    """Held-out images to noise and back on the same nodes; a picture of pairs, and the PSNR."""
    source = held_out(run.config)
    images, labels = read(source, range(min(count, len(source))))
    nodes = run.config.invert.nodes
    z, again = round_trip(teacher, nodes=nodes, clip=run.config.invert.clip)(images, labels)
    pairs = np.concatenate([images[:COLUMNS], again[:COLUMNS]])
    save_png(path, image_grid(pairs, COLUMNS))
    sigma_max = teacher.meta["diffusion"]["sigma_max"]
    return {
        "psnr": float(np.mean(psnr(images, again))),
        "num": len(images),
        "nodes": nodes,
        "rms_z_over_sigma_max": float(np.sqrt(np.mean(z**2)) / sigma_max),
    }


class Verdict(NamedTuple):
    """Samples (uint8) and their features beside the real images they were compared with."""

    images: np.ndarray
    features: np.ndarray
    real: Reference


def held_out_reference(run: Run, train, network: FeatureNetwork, num_samples: int) -> Reference:
    """Held-out images of the run's resolution in one network's features; train: its training
    split, opened."""
    num = min(5000, 4 * num_samples)  # more would hardly move the figures of so few samples
    return reference(network, held_out(run.config), train_source=train, num=num)


def score(run: Run, real: Reference, images: np.ndarray) -> tuple[dict, Verdict]:
    """Quality numbers of samples against held-out images of their resolution."""
    stored = to_uint8(images)
    features = embed(real.network, stored)
    used = run.summary["frozen_networks"]
    values = quality(real, images, features=features, used_in_loss=used)
    return {"resolution": images.shape[1]} | values, Verdict(stored, features, real)


def named(values: dict, network: FeatureNetwork) -> dict:
    """What a further network adds to a row: its distances and their floors, by its name."""
    short = metric_name("fd", network.name).removeprefix("fd_")
    return {
        f"fd_{short}": values[f"fd_{network.name}"],
        f"fd_{short}_floor": values["floor"],
        f"kd_{short}": values[f"kd_{network.name}"],
        f"kd_{short}_floor": values["kd_floor"],
        f"nn_{short}": values["nn_features"],
        f"nn_{short}_real": values["nn_features_real"],
    }


def draw_nearest(path: pathlib.Path, verdict: Verdict) -> None:
    """Of all samples the eight nearest to a training image, and below them those images."""
    found = nearest_features(verdict.features, verdict.real.train_features)
    pairs = closest_pairs(verdict.images, verdict.real.train_images, found, COLUMNS)
    save_png(path, image_grid(from_uint8(pairs), COLUMNS), 1024)


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
