"""The log of a run: scalars (JSONL and TensorBoard), PNG previews, progress and time left."""

import datetime
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from einops import rearrange
from PIL import Image, ImageDraw

from cheapscale.data.files import atomic_write
from cheapscale.data.pixels import to_uint8


def image_grid(images: np.ndarray, columns: int | None = None, pad: int = 2) -> np.ndarray:
    """One uint8 picture [H, W, 3] of images [n, h, w, 3] in [-1, 1], with white gaps of `pad`
    pixels. columns: default the square root of n."""
    pixels = to_uint8(images)
    n, h, w, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    cells = np.full((math.ceil(n / columns) * columns, h + pad, w + pad, 3), 255, np.uint8)
    cells[:n, pad:, pad:] = pixels
    sheet = rearrange(cells, "(r c) h w d -> (r h) (c w) d", c=columns)
    return np.pad(sheet, ((0, pad), (0, pad), (0, 0)), constant_values=255)


def enlarge(images: np.ndarray, resolution: int) -> np.ndarray:
    """Images [n, h, w, c] enlarged to `resolution` by repeating pixels, to align grids."""
    factor = resolution // images.shape[1]
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def save_png(path: str | pathlib.Path, picture: np.ndarray, min_side: int = 512) -> None:
    """Write a uint8 picture; a small one is enlarged by an integer factor to be visible."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    factor = max(1, min_side // max(picture.shape[:2]))
    image = Image.fromarray(picture)
    size = (picture.shape[1] * factor, picture.shape[0] * factor)
    image.resize(size, Image.Resampling.NEAREST).save(path)


def tile(image: np.ndarray, side: int = 128) -> Image.Image:
    """An image [h, w, 3] in [-1, 1] with at least `side` pixels a side, enlarged unsmoothed."""
    size = max(side, *image.shape[:2])
    return Image.fromarray(to_uint8(image)).resize((size, size), Image.Resampling.NEAREST)


def captioned(pictures: list[tuple[str, np.ndarray]], columns: int = 10) -> Image.Image:
    """A sheet of square images of one or several sizes, all enlarged to one, under captions."""
    side = max(128, *(image.shape[0] for _, image in pictures))
    rows, columns = math.ceil(len(pictures) / columns), min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + 18) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (caption, image) in enumerate(pictures):
        left, top = 4 + n % columns * (side + 4), 4 + n // columns * (side + 18)
        pen.text((left, top), caption, fill="black")
        sheet.paste(tile(image, side), (left, top + 12))
    return sheet


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def duration(seconds: float) -> str:
    """A duration in seconds as the text "0:02:03"."""
    return str(datetime.timedelta(seconds=round(max(seconds, 0))))


class Log:
    """The log of a run, as a context manager. Only process 0 writes."""

    def __init__(self, workdir: str | pathlib.Path, name: str, total: int, unit: str = "step"):
        self.workdir, self.name = pathlib.Path(workdir), name
        self.total, self.unit = total, unit
        self.active = jax.process_index() == 0
        self.started = self.marked = None
        if self.active:
            from tensorboardX import SummaryWriter

            self.workdir.mkdir(parents=True, exist_ok=True)
            self.file = open(self.workdir / "metrics.jsonl", "a", buffering=1)
            self.board = SummaryWriter(str(self.workdir / "tensorboard"))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self.active:
            self.file.close()
            self.board.close()

    def start(self, done: int) -> None:
        """Start measuring the rate, after compilation. done: number of units already finished."""
        self.started = self.marked = (time.monotonic(), done)

    def scalars(self, step: int, values: dict[str, Any], *, progress: bool = False) -> None:
        """Write one JSONL row and TensorBoard scalars, and with `progress` a status line."""
        if not self.active:
            return
        values = {name: float(value) for name, value in values.items()}
        if progress and self.started:
            now, (began, base), (mark, last) = time.monotonic(), self.started, self.marked
            rate = (step - last) / max(now - mark, 1e-9)
            mean = (step - base) / max(now - began, 1e-9)
            self.marked = (now, step)
            values[f"{self.unit}s_per_second"] = rate
            left = duration((self.total - step) / mean) if mean else "?"
            shown = "  ".join(f"{n} {v:.4g}" for n, v in values.items())
            line = f"{self.name} {step}/{self.total}  {shown}  left {left}"
            if sys.stderr.isatty():
                print(f"\r\x1b[K{line}", end="\n" if step >= self.total else "", file=sys.stderr)
            else:
                logging.info(line)
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if math.isfinite(value):
                self.board.add_scalar(f"{self.name}/{name}", value, step)

    def images(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Write uint8 [H, W, 3] pictures to previews/<name>_<step>.png and to TensorBoard."""
        if not self.active:
            return
        for name, picture in pictures.items():
            save_png(self.workdir / "previews" / f"{name}_{step:07d}.png", picture)
            self.board.add_image(f"{self.name}/{name}", picture, step, dataformats="HWC")


def finish(workdir: str | pathlib.Path, name: str, summary: dict) -> None:
    """Write a command's summary to `workdir`/<name>.json, and print it as one line."""
    if jax.process_index() != 0:
        return
    with atomic_write(pathlib.Path(workdir) / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2, default=_plain) + "\n")
    print(json.dumps(summary, default=_plain), flush=True)


def _plain(value: Any) -> Any:
    """NumPy and JAX scalars and arrays as numbers and lists, for JSON."""
    return np.asarray(value).tolist()
