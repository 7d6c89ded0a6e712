"""The paper's mechanisms on two circles: a table, a picture, one JSON object.

    python -m launch.manifold --config=configs/manifold.py --workdir=runs/manifold
    python -m launch.manifold --config=configs/manifold.py --workdir=runs/manifold \\
        --record=notebooks/results/manifold.json

The record holds the configuration, where it was measured, and every figure by seed; the picture
(the first seed's samples, one row for each teacher) is written beside it with the suffix .png.
"""

import pathlib
import time

import numpy as np
from absl import flags, logging
from ml_collections import config_flags
from PIL import Image, ImageDraw, ImageFont

from cheapscale.training.loop import provenance
from launch.command import execute, start, write_record
from launch.manifold_experiment import experiment


def table(figures: dict) -> str:
    """The figures as text: mean and standard deviation over seeds."""

    def row(teacher, method, values):
        cells = [
            "{mean:9.4f} ±{sd:7.4f}".format(**values[name]) if name in values else " " * 18
            for name in ("off_manifold", "energy", "reconstruction_rmse", "rms_over_sigma_max")
        ]
        return f"{teacher:>8}  {method:<18}" + " ".join(cells)

    titles = ("off-manifold", "energy distance", "RMSE on latents", "rms(z)/80")
    lines = [f"{'teacher':>8}  {'method':<18}" + " ".join(f"{title:>18}" for title in titles)]
    lines.append(row("", "fresh data", figures["fresh data"]))
    for blur, teacher in figures["teachers"].items():
        lines.append(row(f"h={blur}", "the teacher itself", teacher["itself"]))
        lines += [row(f"h={blur}", name, values) for name, values in teacher["arms"].items()]
    lines.append(row("none", "adv", figures["adv"]))
    lines += [
        "",
        "Dirac-GAN, final distance from equilibrium: discriminator first, generator first",
    ]
    lines += [
        f"  eta = {eta:<5} {row['discriminator_first']:.4f}  {row['generator_first_float64']:.4f}"
        for eta, row in figures["dirac"].items()
    ]
    return "\n".join(lines)


PANEL, MARGIN, EXTENT = 240, 28, 1.15  # pixels of a panel and of a title; data units to its edge


def draw(pictures: dict, radii: tuple[float, ...]) -> Image.Image:
    """{row: {panel: points [m, 2]}} as scatter plots over the true circles."""
    names = list(next(iter(pictures.values())))
    size = (MARGIN + PANEL * len(names), (PANEL + MARGIN) * len(pictures))
    sheet = Image.new("RGB", size, "white")
    for i, (row, panels) in enumerate(pictures.items()):
        top = i * (PANEL + MARGIN)
        label = Image.new("RGB", (PANEL, MARGIN), "white")
        write(label, PANEL // 2, f"teacher {row}")
        sheet.paste(label.rotate(90, expand=True), (0, top + MARGIN))
        for j, name in enumerate(names):
            left = MARGIN + j * PANEL
            sheet.paste(scatter(panels[name], radii), (left, top + MARGIN))
            strip = Image.new("RGB", (PANEL, MARGIN), "white")
            write(strip, PANEL // 2, name)
            sheet.paste(strip, (left, top))
    return sheet


def write(image: Image.Image, centre: int, text: str) -> None:
    pen = ImageDraw.Draw(image)
    pen.text((centre, MARGIN // 2), text, "black", ImageFont.load_default(16), anchor="mm")


def scatter(points: np.ndarray, radii: tuple[float, ...]) -> Image.Image:
    """One panel, drawn at twice its size and halved so that dots have soft edges."""
    scale, half = 2 * PANEL / (2 * EXTENT), PANEL
    panel = Image.new("RGB", (2 * PANEL, 2 * PANEL), "white")
    pen = ImageDraw.Draw(panel)
    pen.rectangle((0, 0, 2 * PANEL - 1, 2 * PANEL - 1), outline="lightgray", width=2)
    for radius in radii:
        r = radius * scale
        pen.ellipse((half - r, half - r, half + r, half + r), outline="orange", width=2)
    for x, y in half + scale * np.asarray(points) * np.array([[1.0, -1.0]]):
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(30, 60, 140))
    return panel.resize((PANEL, PANEL), Image.Resampling.BOX)


def run(config, workdir: str, record: str) -> dict:
    """The experiment, its record and picture; returns the mean figures for the closing line."""
    began = time.monotonic()
    figures, pictures = experiment(config, logging.info)
    summary = {
        "config": config.to_dict(),
        "provenance": provenance(),
        "figures": figures,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(table(figures), flush=True)
    path = pathlib.Path(record or pathlib.Path(workdir) / "record.json")
    write_record(path, summary)
    draw(pictures, tuple(config.radii)).save(path.with_suffix(".png"))
    logging.info("record and picture: %s, %s", path, path.with_suffix(".png"))
    return {
        "record": str(path),
        "seconds": summary["seconds"],
        "off_manifold": {
            blur: {name: round(arm["off_manifold"]["mean"], 4) for name, arm in row["arms"].items()}
            for blur, row in figures["teachers"].items()
        },
        "dirac": figures["dirac"],
    }


def main(argv) -> None:
    del argv
    options = flags.FLAGS
    execute(
        "manifold", options.workdir, lambda: run(options.config, options.workdir, options.record)
    )


if __name__ == "__main__":
    # defined here, so that notebooks and tests can import `run` beside other commands
    config_flags.DEFINE_config_file("config", None, "Config file and its argument string.")
    flags.DEFINE_string("workdir", None, "Where the summary goes.")
    flags.DEFINE_string("record", "", "Where the record (.json) and picture (.png) go instead.")
    flags.mark_flags_as_required(["config", "workdir"])
    start(main)
