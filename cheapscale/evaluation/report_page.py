"""The text and the plot of a pipeline's report."""

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from cheapscale.evaluation.naming import suffixed

PANEL, MARGIN = 300, 40  # pixels
COLOURS = ("#000000", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")


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
    lines = [["network", *columns], ["---"] * (1 + len(columns))]
    for network, row in stages.items():
        lines.append([network, *(cell(row, *column) for column in columns.values())])
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *notes(figures)])


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
        "frequencies that half the resolution lacks (curves: spectrum.png)."
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


def draw_curves(panels: dict[str, dict[str, np.ndarray]]) -> np.ndarray:
    """uint8 [H, W, 3]: a panel for each {title: {name: spectrum [n]}}; power in dB against radius.

    The vertical axis spans 60 dB below the largest value; the first curve is drawn last.
    """
    height = PANEL + MARGIN + 14 * max(map(len, panels.values()))
    picture = Image.new("RGB", (len(panels) * (PANEL + MARGIN), height), "white")
    pen = ImageDraw.Draw(picture)
    for number, (title, curves) in enumerate(panels.items()):
        left, top = number * (PANEL + MARGIN) + MARGIN // 2, MARGIN // 2
        pen.rectangle((left, top, left + PANEL, top + PANEL), outline="#888888")
        pen.text((left, top - 14), f"{title}: power (60 dB) against frequency", fill="black")
        highest = 10 * np.log10(max(curve[1:].max() for curve in curves.values()))
        for place, (name, curve) in reversed(list(enumerate(curves.items()))):
            colour = COLOURS[place % len(COLOURS)]
            decibels = 10 * np.log10(np.maximum(curve[1:], 1e-30))
            depth = np.clip((highest - decibels) / 60, 0, 1) * PANEL
            across = left + np.arange(1, len(curve)) / (len(curve) - 1) * PANEL
            pen.line(list(zip(across, top + depth)), fill=colour, width=2)
            line = top + PANEL + 6 + 14 * place
            pen.line((left, line + 6, left + 20, line + 6), fill=colour, width=2)
            pen.text((left + 26, line), name, fill="black")
    return np.asarray(picture)
