"""Sample from any checkpoint: a teacher through its ODE, or a one-step generator.

    python -m launch.sample --model=runs/quick/grow32 --num=64 --out=samples
    python -m launch.sample --model=runs/quick/pretrain --steps=18 --method=euler --labels=0,3

Image i depends on the seed and i alone, not on the batch size or the devices. Out come
samples.npz (uint8 `images`, `labels`, `ids`) and samples.png; the last line is one JSON object.
"""

import pathlib
import time

import numpy as np
from absl import app, flags

from cheapscale.evaluation.pixels import to_uint8
from cheapscale.stages.sampling import sample
from cheapscale.training.checkpoint import load_network
from cheapscale.training.logging import image_grid, save_png
from launch.command import execute

flags.DEFINE_string("model", None, "Work directory of a pretrain, distill or grow run.")
flags.DEFINE_string("out", None, "Folder for the results (default: <model>/samples).")
flags.DEFINE_integer("num", 64, "How many images.", lower_bound=1)
flags.DEFINE_integer("start", 0, "Number of the first image.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Seed of the latents and of random labels.")
flags.DEFINE_list("labels", [], "Classes, repeated in turn; default: drawn uniformly.")
flags.DEFINE_integer("batch_size", 64, "Images per call.", lower_bound=1)
flags.DEFINE_integer("steps", 40, "Teacher: sigma levels.", lower_bound=2)
flags.DEFINE_enum("method", "heun", ["heun", "euler"], "Teacher: solver; euler is DDIM.")
flags.DEFINE_float("cfg_scale", 1.0, "Teacher: guidance scale; 1 is none.")
flags.DEFINE_bool("ema", True, "Use the EMA weights.")
flags.DEFINE_integer("step", None, "Checkpoint step (default: the newest).")
FLAGS = flags.FLAGS


def run() -> dict:
    """Sample as the flags say; returns the summary."""
    loaded = load_network(FLAGS.model, ema=FLAGS.ema, step=FLAGS.step)
    ids = np.arange(FLAGS.start, FLAGS.start + FLAGS.num)
    labels = None
    if FLAGS.labels:
        labels = np.resize(np.asarray([int(label) for label in FLAGS.labels]), FLAGS.num)
    began = time.monotonic()
    images, labels = sample(
        loaded,
        ids,
        seed=FLAGS.seed,
        labels=labels,
        batch_size=FLAGS.batch_size,
        steps=FLAGS.steps,
        method=FLAGS.method,
        cfg_scale=FLAGS.cfg_scale,
    )
    seconds = time.monotonic() - began
    out = pathlib.Path(FLAGS.out or pathlib.Path(FLAGS.model) / "samples")
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "samples.npz", images=to_uint8(images), labels=labels, ids=ids)
    save_png(out / "samples.png", image_grid(images[:64]))
    return {
        "model": FLAGS.model,
        "step": loaded.step,
        "out": str(out),
        "num": len(images),
        "resolution": images.shape[1],
        "seconds_with_compilation": round(seconds, 2),
    }


def main(argv) -> None:
    del argv
    out = FLAGS.out or str(pathlib.Path(FLAGS.model) / "samples")
    execute("sample", out, run)


if __name__ == "__main__":
    flags.mark_flags_as_required(["model"])
    app.run(main)
