"""The report of a finished pipeline: a table of its generators and their controls, and pictures.

The rows are those of `report_rows`; `notes` defines the columns for a reader. All generators get
the same noise, so a column of `one_step.png` or `growth.png` shows one z, and two rows are compared
with paired intervals. No number uses a network that trained a generator: judges are given by the
caller, and all other numbers read pixels.
"""

import functools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from cheapscale.data.pixels import from_uint8, psnr, to_uint8
from cheapscale.data.resize import area_mean, downsample
from cheapscale.evaluation import detail
from cheapscale.evaluation.coverage import nearest, prdc
from cheapscale.evaluation.embedding import embed
from cheapscale.evaluation.measure import checked_name
from cheapscale.evaluation.naming import metric_name, suffixed
from cheapscale.evaluation.patches import random_crops
from cheapscale.evaluation.report_rows import (
    Row,
    Run,
    make_noise,
    pixels,
    read_some,
    rows,
    targets,
)
from cheapscale.features import FeatureNetwork
from cheapscale.teacher import load_teacher
from cheapscale.teacher.codec import codec_of
from cheapscale.training.log import enlarge, image_grid, markdown, save_png

COLUMNS = 8  # of a picture
NUM_TRAIN = 10_000  # training images in which copies are searched for
CROP = 16  # side in pixels of a judge's crops: of 8 px it does not tell enlarged images from real
SMALL = 16  # largest side at which whole images are compared pixel by pixel
NEIGHBOURS = 3


class Views(NamedTuple):
    """What a set of n images is compared by.

    patches: {name of a distance: features [n, crops, d]}. whole: {judge or "pixels": [n, d]}.
    """

    patches: dict[str, np.ndarray]
    whole: dict[str, np.ndarray]
    spectrum: np.ndarray


class Measured(NamedTuple):
    """The numbers of a row, its patch distances by their names, and the first of its images."""

    numbers: dict[str, float]
    distances: dict[str, detail.PatchDistance]
    first: np.ndarray
    first_again: np.ndarray | None


def write(
    runs: list[Run],
    workdir: str | pathlib.Path,
    *,
    num_samples: int,
    judges: Sequence[FeatureNetwork] = (),
) -> dict:
    """The figures of a pipeline, as a dict; also writes pictures and report.md into `workdir`.

    runs: the pipeline's stages in order. num_samples: generated images of each network, and real
    images that they are compared with. judges: feature networks; ValueError for one that was part
    of a loss.
    """
    began, folder = time.monotonic(), pathlib.Path(workdir)
    inversions = (run for run in runs if run.config.stage == "invert")
    (invert,) = (run for run in inversions if run.config.invert.direction == "invert")
    trained = [run for run in runs if run.config.stage in ("distill", "grow")]
    growing = [run for run in trained if not run.control]
    for run, judge in ((run, judge) for run in trained for judge in judges):
        checked_name(judge, run.summary["frozen_networks"])
    teacher = load_teacher(invert.config.teacher, dtype=invert.config.compute.dtype)
    noise = make_noise(teacher, invert, num_samples, growing[0].config.rescale_latents)
    side = min(SMALL, pixels(invert, teacher))
    train = read_some(invert.config.data, NUM_TRAIN)
    if invert.config.data.flip or codec_of(teacher.meta):  # generators see mirror images too
        train = np.concatenate([train, train[:, :, ::-1]])
    known = small_pixels(train, side)

    drawn: dict[str, Row] = {}
    found: dict[str, Measured] = {}
    spectra: dict[str, dict[str, list[float]]] = {}
    for run in growing:
        real = read_some(run.config.data, num_samples, run.config.data.eval_split)
        scale = max(float(detail.detail_of(from_uint8(real)).std()), 1e-6)  # 0: of plain images
        look = functools.partial(views, judges=judges, side=side, scale=scale)
        reference, wanted = look(real), targets(run, invert, teacher, noise.split)
        shown = spectra[f"{real.shape[1]} px"] = {"held out": decibels(reference.spectrum)}
        beside = [c for c in trained if c.control and place(c.config) == place(run.config)]
        for name, row in rows(run, beside, teacher, noise, drawn):
            logging.info("report: measuring %s", name)
            seen, base = look(row.images), drawn.get(run.config.get("base"))
            found[name] = measured(row, seen, reference, wanted, base)
            if not name.startswith("data"):
                nearer = relative_nearest(seen, reference, known)
                found[name].numbers["nearest"] = nearer
            shown[name] = decibels(seen.spectrum)
    figures = {
        "round_trip": {
            "psnr": float(np.mean(psnr(*noise.trip))),
            "num": len(noise.trip[0]),
            "nodes": noise.nodes,
            "rms_z_over_sigma_max": noise.rms,
        },
        "stages": {name: row.numbers for name, row in found.items()},
        "spectra": spectra,
        "comparisons": comparisons(growing, found),
        "judges": {judge.name: judge.input_size for judge in judges},
        "frozen_networks": growing[-1].summary["frozen_networks"],
        "seconds_per_stage": {run.folder: round(run.seconds, 1) for run in runs},
        "training_flops": growing[-1].summary["ledger"]["flops"],
        "rms_z_over_sigma_max": invert.summary["rms"],
        "provenance": growing[-1].summary["provenance"],
    }
    save_rows(folder / "round_trip.png", [part[:COLUMNS] for part in noise.trip], 512)
    draw(folder, growing, found, real, wanted["held_out"])
    draw_nearest(folder / "nearest.png", drawn[growing[-1].workdir].images, train, known)
    figures["report_seconds"] = round(time.monotonic() - began, 1)
    text = table(figures)
    (folder / "report.md").write_text(text + "\n")
    print(text)
    return figures


def place(config) -> tuple[str, int]:
    """What the config of a control shares with that of the run that it is compared with."""
    return config.stage, config.data.resolution


def views(
    images: np.ndarray, *, judges: Sequence[FeatureNetwork], side: int, scale: float
) -> Views:
    """The views of uint8 images [n, R, R, 3].

    side: at which whole images are compared pixel by pixel. scale: of `detail.detail_patches`.
    """
    floats, n = from_uint8(images), len(images)
    patches = {"pkid_detail": detail.detail_patches(floats, scale)}
    whole = {"pixels": small_pixels(images, side)}
    for judge in judges:
        whole[judge.name] = embed(judge, images)
        name = metric_name("kid", judge.name, judge.sha256, variant="patch")
        patches[name] = whole[judge.name][:, None]
        if images.shape[1] > CROP:
            crops = random_crops(images, np.arange(n), CROP, crops=2)
            patches[name] = embed(judge, crops).reshape(n, 2, -1)
    return Views(patches, whole, detail.power_spectrum(floats))


def decibels(spectrum: np.ndarray) -> list[float]:
    """The power at each radius, in decibels."""
    return np.round(10 * np.log10(np.maximum(spectrum, 1e-30)), 1).tolist()


def small_pixels(images: np.ndarray, side: int) -> np.ndarray:
    """The pixels [n, d] of uint8 images that are reduced to `side`."""
    return np.stack([downsample(image, side) for image in images]).reshape(len(images), -1)


def measured(
    row: Row, seen: Views, real: Views, wanted: dict[str, np.ndarray], base: Row | None
) -> Measured:
    """The numbers of a row, from its views and those of real images.

    wanted: the images that `row.again` should equal. base: the smaller generator's row.
    """
    numbers: dict[str, float] = {"resolution": row.images.shape[1]}
    distances = {}
    for name, features in seen.patches.items():
        distance = distances[name] = detail.patch_distance(features, real.patches[name])
        numbers |= {name: distance.value, suffixed(name, "_interval"): distance.interval}
    numbers["spectrum_db"] = detail.spectrum_error(seen.spectrum, real.spectrum)
    for key, features in seen.whole.items():
        if min(len(features), len(real.whole[key])) > NEIGHBOURS:
            (scores,) = prdc(real.whole[key], features, ks=(NEIGHBOURS,)).values()
            numbers |= {
                suffixed(metric_name(kind, key), f"_k{NEIGHBOURS}"): value
                for kind, value in scores._asdict().items()
            }
    for part, images in row.again.items():
        numbers[f"psnr_{part}"] = float(np.mean(psnr(images, wanted[part])))
    if base and row.again:
        # Growth should keep the content of the smaller generator's image of the same noise.
        shrunk = area_mean(from_uint8(row.images), base.images.shape[1])
        numbers["drift_rms"] = float(np.sqrt(np.mean((shrunk - from_uint8(base.images)) ** 2)))
    again = to_uint8(row.again["held_out"][:COLUMNS]) if row.again else None
    return Measured(numbers, distances, row.images[:COLUMNS], again)


def relative_nearest(seen: Views, real: Views, known: np.ndarray) -> float:
    """The mean distance of images to their nearest training images, as a share of that of held-out
    images: 1 for new images, 0 for copies."""
    own, unseen = (nearest(view.whole["pixels"], known)[0].mean() for view in (seen, real))
    return float(own / unseen)


def comparisons(growing: list[Run], found: dict[str, Measured]) -> list[dict]:
    """[{"network", "of", "by", "ratio", "interval"}]: the patch distance of each grown generator as
    a share of that of its enlarged base, the better of both; that of the one-step generator as a
    share of the teacher's; and the recall of the last generator as a share of the first one's."""
    result = []
    for run in growing:
        mine = found[run.folder]
        px = int(mine.numbers["resolution"])
        base = pathlib.Path(run.config.get("base", "")).name
        others = [f"{base}-nearest{px}", f"{base}-bicubic{px}"] if base else ["teacher"]
        for key in mine.distances:
            other = min(others, key=lambda name: found[name].distances[key].value)
            control = found[other].distances[key]
            if control.value < control.interval:
                continue  # the control equals real images, as far as this distance can tell
            ratio, interval = detail.ratio(mine.distances[key], control)
            shares = {"ratio": ratio, "interval": interval}
            result.append({"network": run.folder, "of": other, "by": key} | shares)
    first, last = growing[0].folder, growing[-1].folder
    for name, recall in found[first].numbers.items():
        if name.startswith("recall") and recall and first != last:
            share = found[last].numbers[name] / recall
            result.append({"network": last, "of": first, "by": name, "ratio": share})
    return result


def draw(
    folder: pathlib.Path,
    growing: list[Run],
    found: dict[str, Measured],
    real: np.ndarray,
    held_out: np.ndarray,
) -> None:
    """Write the pictures of samples.

    data.png: real images at every resolution. teacher.png. one_step.png: the generators, one noise
    a column. growth.png: real images, the base enlarged (nearest, bicubic), the grown generator.
    reconstruction.png: the same with held-out images and their latents.
    """
    final = growing[-1]
    top, real = real.shape[1], from_uint8(real[:COLUMNS])
    sides = [found[run.folder].first.shape[1] for run in growing]
    save_rows(folder / "data.png", [enlarge(area_mean(real, side), top) for side in sides])
    save_rows(folder / "teacher.png", [from_uint8(found["teacher"].first)], 512)
    rows = [enlarge(from_uint8(found[run.folder].first), top) for run in growing]
    save_rows(folder / "one_step.png", rows)
    if len(growing) == 1:
        return
    base = pathlib.Path(final.config.base).name
    names = [f"{base}-nearest{top}", f"{base}-bicubic{top}", final.folder]
    save_rows(folder / "growth.png", [real, *(from_uint8(found[name].first) for name in names)])
    again = [from_uint8(found[name].first_again) for name in names]
    save_rows(folder / "reconstruction.png", [held_out[:COLUMNS], *again])


def draw_nearest(
    path: pathlib.Path, images: np.ndarray, train: np.ndarray, known: np.ndarray
) -> None:
    """Write a picture of the samples nearest to a training image, above those images, at the
    training images' size. known: the pixels of the training images at `SMALL` or their size."""
    side = train.shape[1]
    distance, index = nearest(small_pixels(images, min(SMALL, side)), known)
    order = np.argsort(distance)[:COLUMNS]
    rows = [area_mean(from_uint8(images[order]), side), from_uint8(train[index[order]])]
    save_rows(path, rows)


def save_rows(path: pathlib.Path, rows: Sequence[np.ndarray], min_side: int = 1600) -> None:
    """Write a picture with one row for each set of images; every set [n, h, w, 3] has one shape."""
    width = min(len(row) for row in rows)
    save_png(path, image_grid(np.concatenate([row[:width] for row in rows]), width), min_side)


def table(figures: dict) -> str:
    """The report as Markdown: a row for each network or control, what the columns mean, and the
    comparisons that matter."""
    stages = figures["stages"]
    kernels = [name for name in next(iter(stages.values())) if name.startswith("pkid")]
    kernels = [name for name in kernels if "_interval" not in name]
    recalls = sorted({name for row in stages.values() for name in row if name.startswith("recall")})
    judged = [name for name in recalls if "pixels" not in name] or recalls
    columns = {"px": ("resolution", "d")}
    columns |= {f"1000 {name}": (name, "") for name in kernels}
    columns |= {"spectrum": ("spectrum_db", ".1f")} | {name: (name, ".2f") for name in judged}
    columns |= {"train": ("psnr_train", ".1f"), "held out": ("psnr_held_out", ".1f")}
    columns |= {"nearest": ("nearest", ".2f")}
    lines = [["network", *columns]]
    for network, row in stages.items():
        lines.append([network, *(cell(row, *column) for column in columns.values())])
    return "\n".join([markdown(lines), "", *notes(figures)])


def cell(row: dict, name: str, form: str) -> str:
    """One entry of the table; a kernel distance is multiplied by 1000 and has its interval."""
    if name not in row:
        return ""
    if not form:
        value, interval = 1000 * row[name], 1000 * row[suffixed(name, "_interval")]
        digits = max(0, 1 - math.floor(math.log10(max(interval, 1e-3))))
        return f"{value:.{digits}f} ± {interval:.{digits}f}"
    return f"{row[name]:{form}}"


def notes(figures: dict) -> Iterator[str]:
    """The lines below the table."""
    for found in figures["comparisons"]:
        interval = f" ± {found['interval']:.2f}" if "interval" in found else ""
        yield (
            f"- {found['network']}: **{found['ratio']:.2f}{interval}** of the {found['by']} of "
            f"{found['of']}"
        )
    trip = figures["round_trip"]
    judges = ", ".join(f"{name} at {side} px" for name, side in figures["judges"].items())
    yield (
        "- *pkid*: kernel distance of random patches to those of held-out images (0: equal), and "
        "its 95 % interval; *detail*: of what an image loses when it is halved and enlarged, "
        "without a network"
        + (f"; {judges}: in features of a network that trained nothing here." if judges else
           ". Name a network that judges: --measure=mobilenet_v2=FILE.")
    )  # fmt: skip
    yield (
        "- *spectrum*: rms difference in dB from the power spectrum of held-out images, at the "
        "frequencies that half the resolution lacks (whole spectra: pipeline.json)."
    )
    yield "- *recall*: share of held-out images among the 3-neighbourhoods of the samples."
    yield (
        "- *train*, *held out*: PSNR in dB of images, regenerated from their latents. The "
        f"teacher's own round trip on {trip['nodes']} nodes: {trip['psnr']:.1f} dB; "
        f"rms(z)/sigma_max {trip['rms_z_over_sigma_max']:.3f}."
    )
    yield (
        "- *nearest*: distance of the samples to their nearest training images, as a share of that "
        "of held-out images (0: copies)."
    )
    trained = ", ".join(figures["frozen_networks"])
    yield f"- Networks of the losses: {trained}. The report took {figures['report_seconds']:.0f} s."
