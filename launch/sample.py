"""Sample from any checkpoint: from a teacher by its ODE, or from a one-step generator.

    python -m launch.sample --model=pretrained:scenes64        (a shipped model; pretrained: lists them)
    python -m launch.sample --model=runs/quickstart/grow32 --num=64 --out=samples
    python -m launch.sample --model=runs/quickstart/pretrain --steps=18 --method=euler --labels=0,3
    python -m launch.sample --model=runs/text/pretrain --prompt="a small red star" --cfg_scale=4

from folders of diffusers, Stable Diffusion 1, 2 and XL (also a single .safetensors beside its
configs) and unconditional U-Nets, here with the steps of their own schedulers:

    python -m launch.sample --model=DIR --prompt="a red fox" --negative_prompt="blurry" \\
        --cfg_scale=7.5 --sampler=ddim --steps=50 --num=4 --batch_size=1 --dtype=bfloat16
    python -m launch.sample --model=ddpm-cifar10-32 --sampler=ddim --steps=50

or a teacher beyond the size it was trained at, by self-cascade (Guo et al. 2024, arXiv 2402.10491):

    python -m launch.sample --model=runs/quickstart/pretrain --cascade=2x,4x --cascade_k=t0.7
    python -m launch.sample --model=runs/quickstart/pretrain --cascade=2x --pivot=photo.png --labels=3
    python -m launch.sample --model=runs/quickstart/pretrain --cascade=2x --tuned=runs/tuned

Image i depends only on the seed and i, not on batch size, devices or JAX_ENABLE_X64. It writes
samples.npz (uint8 `images`, `labels`, `ids`) and samples.png; the last line is one JSON object. A
cascade also writes base.npz, the images of its first scale, and preview.png. The rows of the
preview are: the base enlarged, direct sampling at the last size, the tuning-free cascade, and (with
--tuned or --baseline) the tuned cascade or the baseline.
"""  # noqa: E501

import functools
import pathlib
import time

import numpy as np
from absl import flags, logging

import cheapscale
from cheapscale.cascade.baselines import BASELINES
from cheapscale.cascade.pivot import KERNELS, read_pivots, resize
from cheapscale.cascade.plan import named
from cheapscale.cascade.sample import EXPERT_RULES, make_cascade
from cheapscale.data.files import atomic_write
from cheapscale.data.numbers import LARGEST, consecutive
from cheapscale.data.pixels import to_uint8
from cheapscale.diffusion.noise import SPACINGS
from cheapscale.diffusion.samplers import METHODS
from cheapscale.model import Model
from cheapscale.models.plan import DTYPES
from cheapscale.teacher.sampling import MOST_STEPS, ODE_OPTIONS, check_labels
from cheapscale.teacher.teacher import Generator
from cheapscale.training.exported import files_of
from cheapscale.training.log import image_grid, save_png
from launch.command import condition_flag, execute, required, results_folder, start

CASCADE_FLAGS = (
    "cascade_k", "coupled", "resize_kernel", "pivot", "pivot_resolution", "expert_rule", "tuned",
    "baseline", "direct", "preview",
)  # fmt: skip
# (method, spacing) of published samplers, on the times that the model's own scheduler takes
SAMPLERS = {"ddim": ("euler", "own"), "ddpm": ("ancestral", "own")}
BEGINNING = "sampling %d images; every size compiles once, most of a short run"


def define() -> None:
    """The command's flags."""
    flags.DEFINE_string(
        "model",
        None,
        "Work directory of a run, folder of a set of experts, file of launch.export, folder of "
        "diffusers, or a shipped model, pretrained:NAME; pretrained: lists the names.",
    )
    flags.DEFINE_string(
        "out",
        None,
        "Folder for the results (default: <model>/samples; runs/NAME/samples of a file).",
    )
    flags.DEFINE_integer("num", 64, "How many images.", 1, LARGEST)
    flags.DEFINE_integer("start", 0, "Number of the first image.", 0, LARGEST)
    flags.DEFINE_integer("seed", 0, "Seed of the noise and of random labels.", 0, LARGEST)
    flags.DEFINE_list("labels", None, "Classes by number or name, repeated; default: at random.")
    flags.DEFINE_multi_string(
        "prompt", None, "Caption, of a model that was trained on captions; may be given repeatedly."
    )
    flags.DEFINE_string(
        "negative_prompt", None, "Caption that guidance leads away from, of a teacher of captions."
    )
    flags.DEFINE_enum(
        "sampler", "", ["", *SAMPLERS], "Teacher: a published sampler, for --method and --spacing."
    )
    flags.DEFINE_enum(
        "dtype", "", ["", *DTYPES], "Precision of the computation (default: as trained)."
    )
    flags.DEFINE_integer("batch_size", 64, "Images per call.", 1, LARGEST)
    flags.DEFINE_integer("steps", 40, "Teacher: sigma levels.", 2, MOST_STEPS)
    flags.DEFINE_enum(
        "method", "heun", METHODS, "Teacher: solver; euler is DDIM, ancestral DDPM's with noise."
    )
    flags.DEFINE_enum(
        "spacing", "karras", SPACINGS, "Teacher: spacing of levels; all but karras need VP."
    )
    flags.DEFINE_float("cfg_scale", 1.0, "Guidance scale of a model trained for it; 1: none.", 0)
    flags.DEFINE_bool("ema", True, "Use the EMA weights.")
    flags.DEFINE_integer("step", None, "Checkpoint step (default: the newest).", 0, LARGEST)
    flags.DEFINE_string(
        "cascade", "", "Factors per side, 2x,4x, or the last size as height x width, 64x96."
    )
    flags.DEFINE_list(
        "cascade_k", ["t0.7"], "Restart level of the stages, one for all or one for each: t0.7, "
        "t0.7@cosine, sigma3.32, snr-10.4dB, block-4.4dB, sd6.64.",
    )  # fmt: skip
    flags.DEFINE_bool("coupled", False, "Couple each stage's noise to that of the scale before.")
    flags.DEFINE_enum("resize_kernel", "bilinear", list(KERNELS), "Kernel that enlarges the pivot.")
    flags.DEFINE_enum(
        "expert_rule",
        "level",
        EXPERT_RULES,
        "How experts are chosen at larger sizes: by noise level or SNR.",
    )
    flags.DEFINE_string("pivot", "", "Picture or .npz that replaces the base samples.")
    flags.DEFINE_integer(
        "pivot_resolution", 0, "Shrink pivots to this side; 0 keeps their size.", 0, 2**14
    )
    flags.DEFINE_list(
        "tuned", [], "Work directories of tuned runs: one for all stages or for each."
    )
    flags.DEFINE_enum("baseline", "", ["", *BASELINES], "Another method for the larger sizes.")
    flags.DEFINE_bool("direct", False, "Also write direct.npz: direct sampling at the last size.")
    flags.DEFINE_integer("preview", 8, "Columns of preview.png; 0: none.", 0, 1000)
    required("model", "runs/quickstart/grow32")


def sample(given) -> dict:
    """The summary, after sampling and writing the files."""
    stray = [f"--{name}" for name in CASCADE_FLAGS if given[name].present and not given.cascade]
    if stray:
        raise ValueError(f"{', '.join(stray)}: only for a cascade: give --cascade=2x,4x as well")
    take_sampler(given)
    model = cheapscale.load(given.model, ema=given.ema, step=given.step, dtype=given.dtype)
    if given.negative_prompt is not None:
        if given.cfg_scale == 1:
            raise ValueError("--negative_prompt acts by guidance: give --cfg_scale=7.5 as well")
        model = model.avoiding(given.negative_prompt)
    taken = ODE_OPTIONS if given.cascade else ODE_OPTIONS[:-1]
    ode = [f"--{name}" for name in ("sampler", *taken) if given[name].present]
    if ode and isinstance(model.network, Generator):
        raise ValueError(
            f"{', '.join(ode)}: only for a teacher's ODE, but {given.model} holds a one-step "
            f"generator: leave out {', '.join(ode)}"
        )
    out = pathlib.Path(given.out)
    ids = consecutive(given.start, given.num, (model.resolution, model.resolution, 3))
    flag = condition_flag(given, model.captioned, "labels")
    labels = model.labels(given[flag].value, given.num)
    if labels is not None:
        check_labels(labels, model.network.num_classes)
    if (out / "samples.npz").is_file():
        logging.info("the samples in %s will be replaced: --out=DIR keeps them", out)
    began = time.monotonic()
    if given.cascade:
        images, labels, more = sample_cascade(model, given, ids, labels, out)
    else:
        options = {name: given[name].value for name in ("batch_size", *ODE_OPTIONS)}
        logging.info(BEGINNING, given.num)
        images, labels = model.sample(
            given.num, start=given.start, labels=labels, seed=given.seed, **options
        )
        more = {}
    seconds = time.monotonic() - began
    save_images(out / "samples.npz", images, labels, ids)
    save_png(out / "samples.png", image_grid(images[:64]))
    height, width = images.shape[1:3]
    return {
        "model": given.model,
        "step": model.network.step,
        "files": files_of({"model": given.model}),
        "out": str(out),
        "num": len(images),
        "resolution": height if height == width else [height, width],
        "seconds_with_compilation": round(seconds, 2),
    } | more


def take_sampler(given) -> None:
    """Put what --sampler stands for into --method and --spacing."""
    if given.sampler:
        if stray := [f"--{name}" for name in ("method", "spacing") if given[name].present]:
            raise ValueError(f"--sampler={given.sampler} stands for {', '.join(stray)}: give one")
        given.method, given.spacing = SAMPLERS[given.sampler]


def sample_cascade(
    model: Model, given, ids: np.ndarray, labels: np.ndarray | None, out: pathlib.Path
) -> tuple[np.ndarray, np.ndarray, dict]:
    """(images of the last scale, labels, the cascade's entries of the summary)."""
    pivots = None
    if given.pivot:
        side = model.resolution
        pivots, known = read_pivots(given.pivot, ids, given.pivot_resolution, side)
        labels = known if labels is None else labels
    make = functools.partial(
        make_cascade,
        model.network,
        given.cascade,
        k=given.cascade_k,
        pivot_size=None if pivots is None else pivots.shape[1:3],
        expert_rule=given.expert_rule,
        kernel=given.resize_kernel,
        coupled=given.coupled,
        seed=given.seed,
        batch_size=given.batch_size,
        **{name: given[name].value for name in ODE_OPTIONS},
    )
    chosen = make(tuned=given.tuned, baseline=given.baseline)
    path = zip(map(named, chosen.plan.sizes), chosen.nfe)
    logging.info("cascade: %s", ", ".join(f"{size} px in {n} calls" for size, n in path))
    ids, labels = chosen.rows(ids, labels)
    logging.info(BEGINNING, given.num)
    scales, labels = chosen.draw(ids, labels, pivots)
    save_images(out / "base.npz", scales[0], labels, ids)
    if given.direct:
        save_images(out / "direct.npz", chosen.direct(ids, labels)[0], labels, ids)
    summary = chosen.summary()
    if given.preview:
        logging.info("preview: sampling the rows for comparison (--preview=0: none)")
        few = slice(min(given.preview, len(ids)))
        # With tuned weights or a baseline, the preview also shows the tuning-free cascade.
        changed = bool(given.tuned or given.baseline)
        free = make() if changed else chosen
        rows = {
            "base": np.asarray(resize(scales[0][few], scales[-1].shape[1:3], "nearest")),
            "direct": free.direct(ids[few], labels[few])[0],
        }
        if changed:
            rows["tuning-free"] = free.draw(
                ids[few], labels[few], None if pivots is None else pivots[few]
            ).scales[-1]
        name = given.baseline or ("tuned" if given.tuned else "tuning-free")
        rows[name] = scales[-1][few]
        pictures = np.concatenate([*rows.values()])
        save_png(out / "preview.png", image_grid(pictures, columns=few.stop))
        logging.info("preview.png: from the top %s", ", ".join(rows))
        summary |= {"preview_rows": list(rows)}
    return scales[-1], labels, summary


def save_images(path: pathlib.Path, images: np.ndarray, labels: np.ndarray, ids: np.ndarray):
    """Write images with eight bits, their labels and ids to an .npz."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, images=to_uint8(images), labels=labels, ids=ids)


def main(argv: list[str] | None = None) -> dict:
    """Sample as the flags say; returns the summary."""

    def body(given) -> dict:
        given.out = given.out or results_folder(given.model, "samples")
        return execute("sample", given.out, lambda: sample(given))

    return start(define, body, argv)


if __name__ == "__main__":
    main()
