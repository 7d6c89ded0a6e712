"""The pipeline on scenes over several seeds, and growth with and without L_rec: one record.

    python -m launch.drift --arg=size=quick --seeds=0,1,2 --workdir=runs/drift \\
        --record=notebooks/results/scenes_quick.json

For each seed: the whole pipeline, then every growth stage once more without the reconstruction term
(same data, discriminator and number of updates). Both arms grow from the same distilled generator.
Reported for each doubling, on fresh noise: the rms between the image downsampled and the smaller
generator's, and how far the centre of what stands out from the ground moved, in base pixels.
Running it again resumes stage by stage.
"""

import pathlib

import jax
import numpy as np
from absl import flags, logging

from cheapscale.data.resize import area_mean
from cheapscale.stages.run import run
from cheapscale.stages.sampling import sample
from cheapscale.training.checkpoint import load_network
from cheapscale.training.loop import provenance
from launch.command import execute, start, write_record
from launch.pipeline import pipeline, stage_configs

CONFIG = "configs/scenes.py"


def centre(images: np.ndarray) -> np.ndarray:
    """[n, h, w, c] -> [n, 2]: centre of mass of the distance from the ground (the median colour of
    the border), in pixels."""
    n, h, w, c = images.shape
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
    ground = np.median(border, axis=1).reshape(n, 1, 1, c)
    weight = np.abs(images - ground).sum(-1) + 1e-6
    rows, columns = np.arange(h).reshape(1, h, 1), np.arange(w).reshape(1, 1, w)
    total = weight.sum((1, 2))
    return (
        np.stack([(weight * rows).sum((1, 2)), (weight * columns).sum((1, 2))], -1) / total[:, None]
    )


def drift(small: np.ndarray, large: np.ndarray, base: int) -> dict:
    """How far the larger images are from the smaller ones of the same noise."""
    shrunk = area_mean(large, small.shape[1])
    a, b = (area_mean(x, base) for x in (small, large))
    moved = np.linalg.norm(centre(a) - centre(b), axis=-1)
    return {
        "rms": float(np.sqrt(np.mean((shrunk - small) ** 2))),
        "centre_shift": float(moved.mean()),
    }


def without_reconstruction(arg: str, workdir: pathlib.Path) -> dict[str, str]:
    """Grow again with L_rec left out; {folder of the other arm: work directory}."""
    twins, base = {}, None
    for folder, config in stage_configs(CONFIG, arg, str(workdir)):
        if config.stage != "grow":
            continue
        config.grow.reconstruction_weight = 0.0
        config.base = base or config.base
        base = twins[folder] = str(workdir / f"{folder}_without")
        run(config, base)
        jax.clear_caches()
    return twins


def one_seed(arg: str, workdir: pathlib.Path, num_samples: int) -> dict:
    """Every figure of one seed."""
    figures = pipeline(CONFIG, arg, str(workdir), num_samples)
    twins = without_reconstruction(arg, workdir)
    planned = dict(stage_configs(CONFIG, arg, str(workdir)))
    base = planned["distill"].data.resolution
    ids = np.arange(num_samples)
    previous = dict.fromkeys(("with", "without"), images_of(workdir / "distill", ids))
    rows = {}
    for folder, twin in twins.items():
        rows[folder] = {}
        for arm, place in (("with", workdir / folder), ("without", twin)):
            images = images_of(place, ids)
            rows[folder][arm] = drift(previous[arm], images, base)
            previous[arm] = images
    stages = figures["stages"]
    return {
        "psnr": figures["round_trip"]["psnr"],
        "rms_z_over_sigma_max": figures["rms_z_over_sigma_max"],
        "fd_ratio_one_step_to_teacher": stages["distill"]["fd_minus_floor"]
        / stages["teacher"]["fd_minus_floor"],
        "drift": rows,
        "stages": stages,
        "seconds": figures["seconds"],
    }


def images_of(workdir, ids: np.ndarray) -> np.ndarray:
    return sample(load_network(workdir), ids, batch_size=250)[0]


def study(arg: str, seeds: list[int], workdir: str, num_samples: int, record: str | None) -> dict:
    """All seeds; writes the record after each one, so that nothing is lost."""
    figures: dict = {"arg": arg, "num_samples": num_samples, "seeds": {}}
    for seed in seeds:
        logging.info("seed %d", seed)
        place = pathlib.Path(workdir) / f"seed{seed}"
        figures["seeds"][str(seed)] = one_seed(f"{arg},seed={seed}", place, num_samples)
        figures["provenance"] = provenance()
        write_record(record, figures)
    return figures


def main(argv) -> None:
    del argv
    FLAGS = flags.FLAGS
    seeds = [int(seed) for seed in FLAGS.seeds]
    execute(
        "drift",
        FLAGS.workdir,
        lambda: study(FLAGS.arg, seeds, FLAGS.workdir, FLAGS.num_samples, FLAGS.record),
    )


if __name__ == "__main__":
    flags.DEFINE_string("arg", "size=quick", "Argument string of configs/scenes.py.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    flags.DEFINE_string("workdir", "runs/drift", "Where the runs go.")
    flags.DEFINE_integer("num_samples", 1000, "Samples per figure.")
    flags.DEFINE_string("record", None, "Also write the figures to this file.")
    start(main)
