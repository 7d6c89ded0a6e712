"""The report of a finished pipeline: pictures of every stage, a table, and the numbers as a dict.

All generators use the same latents, so that a column of `one_step.png` shows one z at every
resolution; classes have the frequencies of the training set. `measure.evaluate` computes the
numbers in a classifier that is not part of any loss. Two controls accompany every grown generator:
the images of the base, enlarged by bicubic interpolation, and the grown generator at step 0, before
its training.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from cheapscale.data.pixels import from_uint8, psnr, to_uint8
from cheapscale.data.resize import area_mean, downsample
from cheapscale.data.source import Source
from cheapscale.data.sources import open_data
from cheapscale.evaluation.coverage import nearest
from cheapscale.evaluation.embedding import embed
from cheapscale.evaluation.image_sets import choice
from cheapscale.evaluation.measure import evaluate, statistics_of
from cheapscale.evaluation.naming import suffixed
from cheapscale.features import FeatureNetwork
from cheapscale.features.fitted import fit_classifier
from cheapscale.models.growth import grow_params
from cheapscale.models.unet import init_params
from cheapscale.teacher import Experts, Generator, Teacher, load, load_teacher
from cheapscale.teacher.data import match_classes
from cheapscale.teacher.sampling import round_trip, sample
from cheapscale.training.log import enlarge, image_grid, save_png

COLUMNS = 8
NUM_TRAIN = 10_000  # training images in which copies are searched for


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
    """The figures of a pipeline, as a dict; also writes pictures and report.md into `workdir`.

    runs: the pipeline's stages in order. num_samples: generated images per network. measures:
    further feature networks for the top resolution besides the small classifier; none of them may
    have been part of a loss.
    """
    folder = pathlib.Path(workdir)
    (invert,) = (run for run in runs if run.config.stage == "invert")
    growing = [run for run in runs if run.config.stage in ("distill", "grow")]
    final = growing[-1]
    teacher = load_teacher(invert.config.teacher, dtype=invert.config.compute.dtype)
    top = final.config.data.resolution

    sources = [held_out(run) for run in growing]
    rows = [enlarge(first_images(source), top) for source in sources]
    save_rows(folder / "data.png", rows)
    figures = {"round_trip": inversion(folder / "round_trip.png", teacher, invert), "stages": {}}

    logging.info("report: sampling %d images of each network", num_samples)
    images, controls = samples(teacher, invert, growing, num_samples)
    save_png(folder / "teacher.png", image_grid(images["teacher"][:64]))
    rows = [enlarge(images[run.folder][:COLUMNS], top) for run in growing]
    save_rows(folder / "one_step.png", rows)

    said: set[str] = set()  # a warning about small numbers is the same for every network
    for run in growing:
        train = open_data(run.config.data)
        steps = run.config.features.fit_steps or None
        classifier = fit_classifier(train, purpose="metric", steps=steps)
        for name in (*controls[run.folder], run.folder):
            logging.info("report: measuring %s", name)
            numbers = {"resolution": images[name].shape[1]}
            for network in (classifier, *(measures if run is final else ())):
                numbers |= evaluate(
                    to_uint8(images[name]),
                    held_out(run),
                    network,
                    train=train,
                    used_in_loss=run.summary["frozen_networks"],
                    # A larger reference would not reduce the variance of num_samples samples.
                    num_reference=min(5000, 4 * num_samples),
                    num_train=NUM_TRAIN,
                    said=said,
                )
            figures["stages"][name] = numbers
        if run is final:
            draw_nearest(folder / "nearest.png", images[run.folder], train, classifier)
    for small, large in zip(growing, growing[1:]):
        # Growth should keep the content of the smaller generator's image for the same z.
        shrunk = area_mean(images[large.folder], small.config.data.resolution)
        drift = np.sqrt(np.mean((shrunk - images[small.folder]) ** 2))
        figures["stages"][large.folder]["drift_rms"] = float(drift)
    figures["seconds_per_stage"] = {run.folder: round(run.seconds, 1) for run in runs}
    figures["training_flops"] = final.summary["ledger"]["flops"]
    figures["rms_z_over_sigma_max"] = invert.summary["rms"]
    figures["provenance"] = final.summary["provenance"]
    text = table(figures)
    (folder / "report.md").write_text(text + "\n")
    print(text)
    return figures


def samples(
    teacher: Teacher | Experts, invert: Run, growing: list[Run], num: int
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """({network or control: images [num, R, R, 3]}, {run: names of its controls}), for equal z."""
    ids, base = np.arange(num), growing[0].folder
    source = open_data(invert.config.data)
    match_classes(teacher.meta, teacher.num_classes, source, teacher.workdir)
    options = {"labels": source.class_mix(num), "batch_size": 250}
    images = {"teacher": sample(teacher, ids, steps=invert.config.invert.nodes, **options)[0]}
    controls = {base: ["teacher"]}  # the teacher has the resolution of the first generator
    for run in growing:
        generator, px = load(run.workdir), run.config.data.resolution
        images[run.folder] = sample(generator, ids, **options)[0]
        if run.folder != base:
            enlarged, start = f"{base} enlarged to {px} px", f"{run.folder} at step 0"
            controls[run.folder] = [enlarged, start]
            images[enlarged] = bicubic(images[base], px)
            untrained = step_zero(generator, load(run.config.base))
            images[start] = sample(untrained, ids, **options)[0]
    return images, controls


def held_out(run: Run) -> Source:
    """The source of held-out images at the run's resolution."""
    return open_data(run.config.data, split=run.config.data.eval_split)


def first_images(source: Source) -> np.ndarray:
    """The images of one row of a picture: at most COLUMNS."""
    return source.read(range(min(COLUMNS, len(source))))[0]


def bicubic(images: np.ndarray, resolution: int) -> np.ndarray:
    """Images [n, r, r, 3] in [-1, 1], enlarged to [n, R, R, 3]."""
    return np.stack([downsample(image, resolution, allow_upscale=True) for image in images])


def step_zero(grown: Generator, smaller: Generator) -> Generator:
    """The grown generator before training: `smaller`'s weights, and fresh weights of new blocks."""
    fresh = jax.jit(functools.partial(init_params, grown.fields))(jax.random.key(0))
    params, _ = grow_params(fresh, smaller.params, grown.net.config)
    return grown.replace(params=params)


def inversion(path: pathlib.Path, teacher: Teacher | Experts, run: Run, count: int = 128) -> dict:
    """PSNR and rms(z)/sigma_max of held-out images after the teacher's round trip on the same
    nodes; writes a picture of the first images and their reconstructions to `path`."""
    source = held_out(run)
    if teacher.num_classes and not source.num_classes:
        logging.warning("the round trip is of training images, as the others have no labels")
        source = open_data(run.config.data)
    match_classes(teacher.meta, teacher.num_classes, source, teacher.workdir)
    images, labels = source.read(range(min(count, len(source))))
    nodes = run.config.invert.nodes
    z, again = round_trip(teacher, nodes=nodes, clip=run.config.invert.clip)(images, labels)
    save_rows(path, [images[:COLUMNS], again[:COLUMNS]], 512)
    sigma_max = teacher.process.sigma_max
    return {
        "psnr": float(np.mean(psnr(images, again))),
        "num": len(images),
        "nodes": nodes,
        "rms_z_over_sigma_max": float(np.sqrt(np.mean(z**2)) / sigma_max),
    }


def draw_nearest(path: pathlib.Path, images: np.ndarray, train, network: FeatureNetwork) -> None:
    """Write a picture of the eight samples nearest to a training image, above those images."""
    images = to_uint8(images)
    known = statistics_of(train, network, num=NUM_TRAIN).features
    distance, index = nearest(embed(network, images), known)
    order = np.argsort(distance)[:COLUMNS]
    originals, _ = train.read(choice(len(train), NUM_TRAIN)[index[order]])
    save_rows(path, [from_uint8(images[order]), originals])


def save_rows(path: pathlib.Path, rows: Sequence[np.ndarray], min_side: int = 1024) -> None:
    """Write a picture with one row for each set of images; every set [n, h, w, 3] has one shape."""
    save_png(path, image_grid(np.concatenate(rows), len(rows[0])), min_side)


def table(figures: dict) -> str:
    """The figures as a Markdown table, one row for each network."""
    first = next(iter(figures["stages"].values()))
    fd = next(name for name in first if name.startswith("fd_"))
    kid = fd.replace("fd", "kid", 1)
    precision, recall = (suffixed(fd.replace("fd", w, 1), "_k3") for w in ("precision", "recall"))
    head = ["network", "px", fd, "floor", f"1000 {kid}", "precision", "recall", "drift"]
    rows = [head, ["---"] * len(head)]
    for network, values in figures["stages"].items():
        drift = values.get("drift_rms")
        rows.append([
            network, str(values["resolution"]),
            f"{values[fd]:.3f}", f"{values[suffixed(fd, '_floor')]:.3f}",
            f"{1000 * values[kid]:.2f}",
            *(f"{values[name]:.2f}" if name in values else "" for name in (precision, recall)),
            "" if drift is None else f"{drift:.3f}",
        ])  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    trip = figures["round_trip"]
    lines.append(
        f"\nInversion round trip on {trip['num']} held-out images, {trip['nodes']} nodes: "
        f"{trip['psnr']:.1f} dB; rms(z)/sigma_max {trip['rms_z_over_sigma_max']:.3f}. "
        "Drift: rms difference between the downsampled image and the smaller generator's image of "
        "the same z."
    )
    return "\n".join(lines)
