"""Sample from any checkpoint: a teacher through its ODE, or a one-step generator.

    python -m launch.sample --model=runs/quick/grow32 --num=64 --out=samples
    python -m launch.sample --model=runs/quick/pretrain --steps=18 --method=euler --labels=0,3

or a teacher beyond the size it was trained at, by a self-cascade (Guo et al. 2024):

    python -m launch.sample --model=runs/quick/pretrain --cascade=2x,4x --cascade_k=t0.7
    python -m launch.sample --model=runs/quick/pretrain --cascade=2x --pivot=photo.png --labels=3
    python -m launch.sample --model=runs/quick/pretrain --cascade=2x --tuned=runs/tuned

Image i depends on the seed and i alone, not on the batch size or the devices. Out come
samples.npz (uint8 `images`, `labels`, `ids`) and samples.png; the last line is one JSON object. A
cascade also leaves base.npz, its first scale, and preview.png: in rows the base enlarged, direct
sampling at the last size and the tuning-free cascade, all three of the model itself, and where they
are named the cascade with the tuned weights or with the baseline.
"""

import functools
import pathlib
import time

import numpy as np
from absl import flags, logging

from cheapscale.data.files import whole_or_nothing
from cheapscale.diffusion.pivot import KERNELS, named, resize
from cheapscale.diffusion.process import decibels
from cheapscale.diffusion.solvers import METHODS
from cheapscale.evaluation.pixels import to_uint8
from cheapscale.stages import cascade_sampler as cascade
from cheapscale.stages.cascade_baselines import BASELINES, baseline, num_windows
from cheapscale.stages.networks import load_model
from cheapscale.stages.pivot_images import read_pivots
from cheapscale.stages.sampling import OF_TEACHERS, SPACINGS, sample
from cheapscale.stages.tuned import load_tuned, tuned_cascade
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.logging import image_grid, save_png
from launch.command import execute, start

flags.DEFINE_string(
    "model", None, "Work directory of a pretrain, distill or grow run, or a set of specialists."
)
flags.DEFINE_string("out", None, "Folder for the results (default: <model>/samples).")
flags.DEFINE_integer("num", 64, "How many images.", lower_bound=1)
flags.DEFINE_integer("start", 0, "Number of the first image.", lower_bound=0)
flags.DEFINE_integer("seed", 0, "Seed of the latents and of random labels.")
flags.DEFINE_list("labels", [], "Classes, repeated in turn; default: drawn uniformly.")
flags.DEFINE_integer("batch_size", 64, "Images per call.", lower_bound=1)
flags.DEFINE_integer("steps", 40, "Teacher: sigma levels.", lower_bound=2)
flags.DEFINE_enum(
    "method", "heun", METHODS,
    "Teacher: solver; euler is DDIM, ancestral DDPM's, which draws noise at every step.",
)  # fmt: skip
flags.DEFINE_enum(
    "spacing", "karras", SPACINGS, "Teacher: its levels; others than karras are times of a VP one."
)
flags.DEFINE_float("cfg_scale", 1.0, "Teacher: guidance scale; 1 is none.")
flags.DEFINE_bool("ema", True, "Use the EMA weights.")
flags.DEFINE_integer("step", None, "Checkpoint step (default: the newest).")
flags.DEFINE_string(
    "cascade", "", "Scales per side, cumulative: 2x,4x; or a last size, height first: 64x96."
)
flags.DEFINE_list(
    "cascade_k", ["t0.7"], "Where stages restart, one for all or one for each: t0.7 (of latent "
    "diffusion's schedule), t0.7@cosine, sigma3.32, snr-10.4dB, block-4.4dB, sd6.64."
)  # fmt: skip
flags.DEFINE_list("stage_seeds", [], "A seed for each stage (default: --seed).")
flags.DEFINE_bool("coupled", False, "Each stage's noise continues that of the scale before.")
flags.DEFINE_enum("resize_kernel", "bilinear", list(KERNELS), "How the pivot is enlarged.")
flags.DEFINE_enum("resize_space", "model", cascade.SPACES, "What is enlarged.")
flags.DEFINE_enum(
    "owner", "level", cascade.OWNERS, "Of a set: who takes a step, by its level or by blocks' SNR."
)
flags.DEFINE_string("pivot", "", "Picture or .npz that takes the place of the base samples.")
flags.DEFINE_integer("pivot_resolution", 0, "Shrink pivots to this side first; 0: as they are.")
flags.DEFINE_list(
    "tuned", [], "Work directories of cascade runs (launch.train): one for all stages, or one each."
)
flags.DEFINE_enum(
    "baseline", "", ["", *BASELINES], "Another method on every larger canvas, for comparison."
)
flags.DEFINE_bool(
    "direct", False, "Also sample all images directly at the last size: direct.npz, by the baseline"
    " or the fine-tuned weights where they are given, beside upsamplers by the model itself."
)  # fmt: skip
flags.DEFINE_integer("preview", 8, "Columns of preview.png; 0: none.", lower_bound=0)
FLAGS = flags.FLAGS

OF_CASCADES = (
    "cascade_k", "stage_seeds", "coupled", "resize_kernel", "resize_space", "pivot",
    "pivot_resolution", "owner", "tuned", "baseline", "direct", "preview",
)  # fmt: skip


def run() -> dict:
    """Sample as the flags say; returns the summary."""
    stray = [f"--{name}" for name in OF_CASCADES if FLAGS[name].present and not FLAGS.cascade]
    if stray:
        raise ValueError(f"{', '.join(stray)} say how to cascade: give --cascade=2x,4x as well")
    loaded = load_model(FLAGS.model, ema=FLAGS.ema, step=FLAGS.step)
    of_teachers = [f"--{name}" for name in OF_TEACHERS if FLAGS[name].present]
    if of_teachers and "generator" in loaded.meta["networks"]:
        raise ValueError(
            f"{', '.join(of_teachers)} say how to solve a teacher's ODE, but {FLAGS.model} holds a "
            "one-step generator: leave them out"
        )
    ids = np.arange(FLAGS.start, FLAGS.start + FLAGS.num)
    labels = None
    if FLAGS.labels:
        if not all(label.strip().isdigit() for label in FLAGS.labels):
            names = loaded.meta["data"]["class_names"]
            raise ValueError(
                f"--labels={','.join(FLAGS.labels)}: give numbers from 0 on; the classes are "
                f"{', '.join(f'{i} {name}' for i, name in enumerate(names)) or 'none'}"
            )
        labels = np.resize(np.asarray([int(label) for label in FLAGS.labels]), FLAGS.num)
    out = pathlib.Path(FLAGS.out or pathlib.Path(FLAGS.model) / "samples")
    began = time.monotonic()
    logging.info("sampling %d images; every size compiles once, most of a short run", len(ids))
    if FLAGS.cascade:
        images, labels, more = run_cascade(loaded, ids, labels, out)
    else:
        images, labels = sample(
            loaded, ids, labels=labels, seed=FLAGS.seed, steps=FLAGS.steps, spacing=FLAGS.spacing,
            **sampler_options(),
        )  # fmt: skip
        more = {}
    seconds = time.monotonic() - began
    save_images(out / "samples.npz", images, labels, ids)
    save_png(out / "samples.png", image_grid(images[:64]))
    height, width = images.shape[1:3]
    return {
        "model": FLAGS.model,
        "step": loaded.step,
        "out": str(out),
        "num": len(images),
        "resolution": height if height == width else [height, width],
        "seconds_with_compilation": round(seconds, 2),
        **more,
    }


def run_cascade(
    loaded: Loaded, ids: np.ndarray, labels: np.ndarray | None, out: pathlib.Path
) -> tuple[np.ndarray, np.ndarray, dict]:
    """(images of the last scale, labels, what the summary says of the cascade)."""
    pivots = None
    if FLAGS.pivot:
        pivots, known = read_pivots(FLAGS.pivot, ids, FLAGS.pivot_resolution)
        labels = known if labels is None else labels
    make_plan = functools.partial(
        cascade.cascade_plan, loaded.meta, FLAGS.cascade,
        k=FLAGS.cascade_k, steps=FLAGS.steps, spacing=FLAGS.spacing,
        pivot_size=None if pivots is None else pivots.shape[1:3],
    )  # fmt: skip
    plan = make_plan(shifted=FLAGS.baseline == "shifted")
    options = sampler_options() | {
        "seed": FLAGS.seed,
        "stage_seeds": [int(seed) for seed in FLAGS.stage_seeds],
        "kernel": FLAGS.resize_kernel,
        "space": FLAGS.resize_space,
        "coupled": FLAGS.coupled,
        "owner": FLAGS.owner,
    }
    calls, alone = cascade.network_calls(plan, method=FLAGS.method, cfg_scale=FLAGS.cfg_scale)
    path = zip(map(named, plan.sizes), calls)
    logging.info("cascade: %s", ", ".join(f"{size} px in {n} calls" for size, n in path))
    subject, denoisers = cascade_denoisers(loaded, plan)
    sampler = cascade.cascade_sampler(subject, plan, **denoisers, **options)
    scales, labels = sampler.draw(ids, labels, pivots)
    save_images(out / "base.npz", scales[0], labels, ids)
    if FLAGS.direct:
        save_images(out / "direct.npz", sampler.direct(ids, labels)[0], labels, ids)
    shown = {}
    if FLAGS.preview:
        logging.info("preview: direct sampling, and what else it shows (--preview=0: none)")
        few = slice(min(FLAGS.preview, len(ids)))
        free = cascade.cascade_sampler(loaded, make_plan(), **options) if denoisers else sampler
        rows = {
            "base": np.asarray(resize(scales[0][few], plan.sizes[-1], "nearest")),
            "direct": free.direct(ids[few], labels[few])[0],
        }
        if denoisers:
            given = None if pivots is None else pivots[few]
            rows["tuning-free"] = free.draw(ids[few], labels[few], given)[0][-1]
        rows[FLAGS.baseline or ("tuned" if FLAGS.tuned else "tuning-free")] = scales[-1][few]
        pictures = np.concatenate([*rows.values()])
        save_png(out / "preview.png", image_grid(pictures, columns=few.stop))
        shown = {"preview_rows": list(rows)}
    if FLAGS.baseline == "windows":  # one call for each of them, on canvases of the trained size
        times = [num_windows(size, loaded.meta["networks"]["net"]) for size in plan.sizes]
        calls, alone = [n * c for n, c in zip(times, calls)], times[-1] * alone
    sigmas = [float(grid[0]) for grid in plan.restarts]
    return scales[-1], labels, {
        "sizes": [named(size) for size in plan.sizes],
        "restart_sigmas": sigmas,
        "restart_decibels": [float(decibels(sigma)) if sigma else None for sigma in sigmas],
        "nfe": calls,
        "nfe_direct": alone,
    } | shown  # fmt: skip


def cascade_denoisers(loaded: Loaded, plan: cascade.CascadePlan) -> tuple[Loaded, dict]:
    """(weights, denoisers of the scales) as --tuned and --baseline say; none: the teacher's own."""
    if FLAGS.tuned and FLAGS.baseline:
        raise ValueError(
            f"--tuned={','.join(FLAGS.tuned)} and --baseline={FLAGS.baseline} are two methods for "
            "the same canvas: give one of them"
        )
    if FLAGS.tuned:
        tuned = [load_tuned(folder, loaded, ema=FLAGS.ema) for folder in FLAGS.tuned]
        return tuned_cascade(loaded, tuned, plan, FLAGS.cfg_scale)
    if FLAGS.baseline:
        stages = [
            baseline(FLAGS.baseline, loaded.meta, size, FLAGS.cfg_scale) for size in plan.sizes
        ]
        model, diffusion = loaded.meta["networks"]["net"], loaded.meta["diffusion"]
        stages[0] = cascade.frozen_teacher(model, diffusion, FLAGS.cfg_scale)
        return loaded, {"denoisers": stages, "direct_denoiser": stages[-1]}
    return loaded, {}


def sampler_options() -> dict:
    """What plain sampling and a cascade are both told."""
    return {
        "batch_size": FLAGS.batch_size,
        "method": FLAGS.method,
        "cfg_scale": FLAGS.cfg_scale,
    }


def save_images(path: pathlib.Path, images: np.ndarray, labels: np.ndarray, ids: np.ndarray):
    """As eight bits, with their labels and numbers."""
    with whole_or_nothing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, images=to_uint8(images), labels=labels, ids=ids)


def main(argv) -> None:
    del argv
    out = FLAGS.out or str(pathlib.Path(FLAGS.model) / "samples")
    execute("sample", out, run)


if __name__ == "__main__":
    flags.mark_flags_as_required(["model"])
    start(main)
