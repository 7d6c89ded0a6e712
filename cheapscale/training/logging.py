"""What a run tells its user: JSONL and tensorboard scalars, PNG previews, progress with ETA."""

import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image

from cheapscale.data.files import whole_or_nothing
from cheapscale.evaluation.pixels import to_uint8


def image_grid(images: np.ndarray, columns: int | None = None, pad: int = 2) -> np.ndarray:
    """[n, h, w, 3] floats in [-1, 1] -> one uint8 picture [H, W, 3] on a white ground."""
    pixels = to_uint8(images)
    n, h, w, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, 3), 255, np.uint8)
    for i in range(n):
        y, x = pad + (i // columns) * (h + pad), pad + (i % columns) * (w + pad)
        sheet[y : y + h, x : x + w] = pixels[i]
    return sheet


def enlarge(images: np.ndarray, resolution: int) -> np.ndarray:
    """[n, h, w, c] repeated to `resolution` pixels, so that grids of several sizes line up."""
    factor = resolution // images.shape[1]
    return np.repeat(np.repeat(images, factor, axis=1), factor, axis=2)


def save_png(path: str | pathlib.Path, picture: np.ndarray, min_side: int = 512) -> None:
    """Write a uint8 picture; small ones are enlarged by whole pixels so that they can be seen."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    factor = max(1, min_side // max(picture.shape[:2]))
    image = Image.fromarray(picture)
    size = (picture.shape[1] * factor, picture.shape[0] * factor)
    image.resize(size, Image.Resampling.NEAREST).save(path)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    m, s = divmod(int(round(max(seconds, 0))), 60)
    h, m = divmod(m, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


class Log:
    """Writes only on process 0; every other process's calls do nothing."""

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

    def start(self, done: int) -> None:
        """The clock of rate and ETA starts here: after compilation, with `done` units behind us."""
        self.started = self.marked = (time.monotonic(), done)

    def scalars(self, step: int, values: dict[str, Any], *, progress: bool = False) -> None:
        """One JSONL row and tensorboard scalars; with `progress`, the status line as well."""
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
        """uint8 [H, W, 3] pictures -> previews/<name>_<step>.png and tensorboard."""
        if not self.active:
            return
        for name, picture in pictures.items():
            save_png(self.workdir / "previews" / f"{name}_{step:07d}.png", picture)
            self.board.add_image(f"{self.name}/{name}", picture, step, dataformats="HWC")

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()


def finish(workdir: str | pathlib.Path, name: str, summary: dict) -> None:
    """A command's closing JSON object: <name>.json in the work directory, last line of stdout."""
    if jax.process_index() != 0:
        return
    with whole_or_nothing(pathlib.Path(workdir) / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2, default=_plain) + "\n")
    print(json.dumps(summary, default=_plain), flush=True)


def _plain(value: Any) -> Any:
    """NumPy and jax scalars and arrays as JSON."""
    return np.asarray(value).tolist()
