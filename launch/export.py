"""Write a trained network as one file, which every command takes in place of a work directory.

    python -m launch.export --model=runs/quickstart/grow32 --out=scenes32.safetensors
    python -m launch.sample --model=scenes32.safetensors --num=16

The file holds the averaged weights of a pretraining, distillation or growth run in float16, and the
description of the network, its noise process and its data. The last line has its SHA-256.
"""

import os

from absl import flags

from cheapscale.data.numbers import LARGEST
from cheapscale.teacher.load import load
from cheapscale.teacher.teacher import Generator, Teacher
from cheapscale.training.cost import param_count
from cheapscale.training.exported import SUFFIX, write_model
from launch.command import execute, required, start


def define() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", None, "Work directory of a pretrain, distill or grow run.")
    flags.DEFINE_string("out", None, f"File to write, ending in {SUFFIX}.")
    flags.DEFINE_integer("step", None, "Checkpoint's step; the newest by default.", 0, LARGEST)
    required("model", "runs/quickstart/grow32")
    required("out", "scenes32.safetensors")


def export(model: str, out: str, step: int | None) -> dict:
    """Write the file and return the command's summary."""
    if not out.endswith(SUFFIX):
        raise ValueError(f"--out={out} does not end in {SUFFIX}: give --out={out}{SUFFIX}")
    found = load(model, step=step)
    if not isinstance(found, (Teacher, Generator)):
        raise ValueError(f"{model} is a set of experts: give the work directory of one network")
    sha256 = write_model(out, found.params, found.meta, found.step)
    return {"file": out, "sha256": sha256, "step": found.step, "weights": param_count(found.params)}


def main(argv: list[str] | None = None) -> dict:
    """Export the model that the flags name; returns the summary."""

    def body(given) -> dict:
        folder = os.path.dirname(given.out) or "."
        return execute("export", folder, lambda: export(given.model, given.out, given.step))

    return start(define, body, argv)


if __name__ == "__main__":
    main()
