"""Write a trained network as one file, which every command takes in place of a work directory.

    python -m launch.export --model=runs/quickstart/grow32 --out=scenes32.safetensors
    python -m launch.sample --model=scenes32.safetensors --num=16

The file holds the averaged weights of a pretraining, distillation, growth or cascade run, or of a
set of experts, in float16, and the description of the network, its noise process and its data.
Beside it stand a picture of samples and the card, NAME.json: SHA-256, data and licence, training,
figures, and what float16 changes. A shipped model is written into the package, with its figures:

    python -m launch.evaluate --model=scenes32.safetensors --workdir=runs/eval32
    python -m launch.export --model=runs/quickstart/grow32 --figures=runs/eval32/evaluate.json \\
        --out=cheapscale/pretrained/scenes32.safetensors

A teacher may also become a folder of diffusers, a UNet2DModel with a scheduler that draws the same
pictures from the same noise (`interop.unconditional`):

    python -m launch.export --model=runs/mine/pretrain --format=diffusers --out=mine
"""

import contextlib
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from cheapscale.data.numbers import LARGEST
from cheapscale.data.pixels import psnr
from cheapscale.interop.unconditional import write_unconditional
from cheapscale.model import Model
from cheapscale.pagoda.edit import inversion_of
from cheapscale.teacher.experts import Experts, is_set, unpacked
from cheapscale.teacher.load import load
from cheapscale.teacher.teacher import Generator, Teacher, fingerprint
from cheapscale.training.checkpoint import Loaded, load_network, read_meta
from cheapscale.training.exported import SUFFIX, pretrained, rounded, write_model
from cheapscale.training.log import image_grid, save_png
from launch.card import card_of, moments, read_figures, shipped, write_page
from launch.command import execute, required, start


def define() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", None, "Work directory of a run, or folder of a set of experts.")
    flags.DEFINE_string("out", None, f"File to write, ending in {SUFFIX}.")
    flags.DEFINE_enum(
        "format", "safetensors", ["safetensors", "diffusers"], "One file, or diffusers' folder."
    )
    flags.DEFINE_integer("step", None, "Checkpoint's step; the newest by default.", 0, LARGEST)
    flags.DEFINE_integer("num", 32, "Samples of the picture and of the comparison.", 0, 10_000)
    flags.DEFINE_list("figures", [], "evaluate.json of this file, or pipeline.json of its run.")
    flags.DEFINE_string("licence", "", "Licence of the images (default: the data set's).")
    flags.DEFINE_string("commit", "", "Commit that trained it, where the run recorded none.")
    required("model", "runs/quickstart/grow32")
    required("out", "scenes32.safetensors")


def export(given) -> dict:
    """Write the file and its picture, and return its card, which is the command's summary."""
    out = pathlib.Path(given.out)
    if given.format == "diffusers":
        return export_folder(given, out)
    if out.suffix != SUFFIX:
        raise ValueError(f"--out={out} does not end in {SUFFIX}: give --out={out}{SUFFIX}")
    if not is_set(given.model) and "cascade" in read_meta(given.model, given.step)[1]:
        tuned = load_network(given.model, step=given.step)
        sha256 = write_model(out, tuned.params, tuned.meta | {"exported": {}}, tuned.step)
        return {"file": out.name, "sha256": sha256, "step": tuned.step}
    found = load(given.model, step=given.step)
    params, meta = found.packed() if isinstance(found, Experts) else (found.params, found.meta)
    small = jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded(params))
    if isinstance(found, Experts):
        read: Any = unpacked(Loaded(small, meta, found.step, found.workdir))
    else:
        read = found.replace(params=small)
    origin = {"from": found.fingerprint, "weights": fingerprint(read.params)}
    meta = meta | {"exported": origin}
    if isinstance(found, Generator):
        with contextlib.suppress(ValueError):  # neither the run nor its latents tell
            meta["inversion"] = inversion_of(found)._asdict()
    sha256 = write_model(out, params, meta, found.step)
    samples = compare(found, read, given.num, out.with_suffix(".png")) if given.num else {}
    card = card_of(
        out,
        found,
        samples=samples,
        figures=read_figures(given.figures, sha256, given.model),
        licence=given.licence,
        commit=given.commit,
    )
    if shipped(out):
        write_page(pretrained() | {out.stem: card})
    return card


def export_folder(given, out: pathlib.Path) -> dict:
    """Write a folder of diffusers and return the command's summary."""
    found = load(given.model, step=given.step)
    if not isinstance(found, Teacher):
        raise ValueError(
            f"{given.model} is a {type(found).__name__.lower()}, but diffusers samples a single "
            "denoiser: name a pretrain run, or leave out --format"
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"--out={out} exists and is not empty: name a new folder")
    write_unconditional(out, found)
    return {"folder": str(out), "step": found.step, "teacher": found.fingerprint}


def compare(
    model: Teacher | Experts | Generator, small: Any, num: int, picture: pathlib.Path
) -> dict[str, float]:
    """Moments of samples of `small`, the model with rounded weights, and their PSNR in dB, mean and
    least, against the model's own samples of the same noise; writes their picture."""
    images, labels = Model(small).sample(num)
    again, _ = Model(model).sample(num, labels=labels)
    save_png(picture, image_grid(images, columns=min(num, 8)))
    found = np.minimum(psnr(images, again), 200.0)  # of equal images it is infinite
    rounding = {"float16_psnr": round(found.mean(), 2), "float16_least_psnr": round(found.min(), 2)}
    return {"num": num} | moments(images) | rounding


def main(argv: list[str] | None = None) -> dict:
    """Export the model that the flags name; returns the summary."""

    def body(given) -> dict:
        out = pathlib.Path(given.out)
        return execute(out.stem, str(out.parent), lambda: export(given))

    return start(define, body, argv)


if __name__ == "__main__":
    main()
