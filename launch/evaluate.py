"""Score any checkpoint, folder or file of images against a data set.

    python -m launch.evaluate --model=runs/quickstart/grow32 --num=5000 --workdir=runs/eval
    python -m launch.evaluate --model=runs/teacher --steps=18 --workdir=runs/eval_teacher \\
        --network=inception_v3=pt_inception.pth --reference=imagenet64.npz --metrics=fd,score
    python -m launch.evaluate --images=samples.npz --data=cifar10 --data_dir=DIR --resolution=32 \\
        --network=resnet56=resnet56.th --metrics=fd,kid,prdc,memorisation --workdir=runs/eval_files

With --model the data set comes from the checkpoint, labels have its class frequencies, and a model
of captions draws those of the held-out images. A generator that takes the guidance scale beside its
teacher, each at several scales, in one record with a row for each:

    python -m launch.evaluate --model=runs/text/grow32 --model=runs/text/pretrain --num=1000 \\
        --num_reference=200 --cfg_scale=1 --cfg_scale=4 --metrics=composition --workdir=runs/scales

Without
--network the features are those of a small classifier of the data set, and metric names contain
"classifier" (fd_classifier). Metrics are called fid, kid and is only with the published Inception
weights.

The job is split into shards, and running the same command again resumes. It writes evaluate.json,
report.md (a Markdown row) and pictures into the work directory, and prints one JSON object on the
last line.
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags

from cheapscale import features
from cheapscale.data import sources
from cheapscale.data.digest import digest
from cheapscale.data.numbers import LARGEST
from cheapscale.data.pixels import from_uint8
from cheapscale.data.tokens import tokeniser
from cheapscale.diffusion.noise import SPACINGS
from cheapscale.diffusion.samplers import METHODS
from cheapscale.evaluation import image_sets
from cheapscale.evaluation.embedding import RESIZES
from cheapscale.evaluation.job import evaluation_job
from cheapscale.evaluation.request import (
    FEATURE_METRICS,
    METRICS,
    VIEW_METRICS,
    Clip,
    Evaluation,
    identity,
)
from cheapscale.features import clip as clip_network
from cheapscale.features import tokenizer
from cheapscale.features.contrastive import fit_contrastive
from cheapscale.features.fitted import fit_classifier
from cheapscale.teacher.codec import factor_of
from cheapscale.teacher.cost import sampler_cost
from cheapscale.teacher.data import match_classes
from cheapscale.teacher.load import load
from cheapscale.teacher.sampling import MOST_STEPS, ODE_OPTIONS, Model, check_labels
from cheapscale.teacher.teacher import Generator
from cheapscale.training import jobs
from cheapscale.training.log import image_grid, markdown, save_png
from cheapscale.training.loop import provenance
from cheapscale.training.mesh import barrier
from configs import common
from launch.command import execute, named_file, required, start

DEFAULT_METRICS, TRAIN_METRICS = ("fd", "kid", "prdc"), ("memorisation", "floor")
SAME_NAME = ("insist", "resize", "patch", "num_reference", "num_train", "batch_size", "per_shard")
COST = ("nfe", "parameters", "flops_per_image", "seconds_per_image", "peak_bytes",
        "training_flops", "training_device_seconds")  # fmt: skip
MOST_IMAGES = 10_000_000  # to sample or measure in one run; a larger number is a mistake
FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_multi_string(
        "model", [], "Work directory of a pretrain, distill or grow run; may be repeated."
    )
    flags.DEFINE_string("images", None, "Folder of images, or .npz with uint8 images or arr_0.")
    flags.DEFINE_string("workdir", None, "Folder for shards and results.")
    flags.DEFINE_string("data", None, "Data set to compare with (default: the model's).")
    flags.DEFINE_string("data_dir", "", "Folder of that data set (default: the model's).")
    flags.DEFINE_multi_string(
        "options", [], "NAME=VALUE of the data set, also as --config.data.options.probe=False."
    )
    flags.DEFINE_string("split", "test", "Split with held-out images (default: the model's).")
    flags.DEFINE_string(
        "train_split", "train", "Split with training images (default: the model's); '' for none."
    )
    flags.DEFINE_integer("resolution", 0, "Resolution of --images, else the model's.", 0, 2**14)
    flags.DEFINE_list("metrics", [], f"Some of {', '.join(METRICS)}.")
    flags.DEFINE_integer("num", 50_000, "Images to generate, or most to read.", 2, MOST_IMAGES)
    flags.DEFINE_integer("num_reference", 50_000, "Largest number of real images.", 2, MOST_IMAGES)
    flags.DEFINE_integer("num_train", 50_000, "Largest number of training images.", 2, MOST_IMAGES)
    flags.DEFINE_multi_string("network", [], "NAME or NAME=FILE of a feature network.")
    flags.DEFINE_multi_string("sha256", [], "NAME=HASH that the file of network NAME must have.")
    flags.DEFINE_multi_string("reference", [], "Statistics (.npz) to use in place of real images.")
    flags.DEFINE_enum("resize", "network", RESIZES, "Resizing to the network's input size.")
    flags.DEFINE_integer("batch_size", 64, "Images per call.", 1, LARGEST)
    flags.DEFINE_integer("per_shard", 1000, "Images per shard.", 1, LARGEST)
    flags.DEFINE_integer("seed", 0, "Seed of the latents.", 0, LARGEST)
    flags.DEFINE_integer("steps", 40, "Teacher: sigma levels.", 2, MOST_STEPS)
    text = "Teacher: solver; euler is DDIM, ancestral DDPM's."
    flags.DEFINE_enum("method", "heun", METHODS, text)
    text = "Teacher: spacing of levels; all but karras need VP."
    flags.DEFINE_enum("spacing", "karras", SPACINGS, text)
    text = "Guidance scale of a model trained for it; 1: none. May be repeated."
    flags.DEFINE_multi_float("cfg_scale", [1.0], text, 0)
    flags.DEFINE_bool("ema", True, "Use the EMA weights.")
    flags.DEFINE_integer("step", None, "Checkpoint step (default: the newest).", 0, LARGEST)
    flags.DEFINE_integer("patch", 0, "Side of the crops of the metric 'patch'.", 0, 2**14)
    flags.DEFINE_integer("base", 0, "Resolution of 'base' (default: the model's).", 0, 2**14)
    text = "NAME=FILE of a CLIP network, for the metric 'clip'; or contrastive: fitted on captions."
    flags.DEFINE_string("clip", None, text)
    flags.DEFINE_list(
        "vocabulary", [], "CLIP's bpe_simple_vocab or tokenizer.json, or vocab.json,merges.txt."
    )
    flags.DEFINE_string("prompt", "a photo of a {}", "Text for 'clip'; {} is the class's name.")
    flags.DEFINE_string("latents", None, "Generator: its latent store, for 'reconstruction'.")
    flags.DEFINE_string("targets", None, "Targets of --images, in order, for 'reconstruction'.")
    flags.DEFINE_string("lpips", None, "vgg16_lpips=VGG.pth+LIN.pth, for 'reconstruction'.")
    flags.DEFINE_bool("insist", False, "Allow a network that a loss used; metric names mark it.")
    flags.DEFINE_bool("cost", True, "Measure seconds, FLOPs and memory of the sampler too.")
    flags.DEFINE_bool("distributed", False, "Call jax.distributed.initialize() first.")
    required("workdir", "runs/eval")


def solver_flags(model: Model, scale: float) -> dict:
    """The options of a teacher's sampler; for a generator at most the guidance scale."""
    if isinstance(model, Generator):
        return {"cfg_scale": scale} if model.guided or scale != 1 else {}
    return {name: FLAGS[name].value for name in ODE_OPTIONS} | {"cfg_scale": scale}


def open_pairs(model: Model | None, real, train) -> image_sets.Pairs:
    """The pairs that "reconstruction" compares: see the flags --targets and --latents."""
    options = {"num": FLAGS.num, "batch_size": FLAGS.batch_size}
    if model is None:
        if not FLAGS.targets:
            raise ValueError("reconstruction of --images compares with --targets=FOLDER_OR_NPZ")
        images, targets = (open_images(path) for path in (FLAGS.images, FLAGS.targets))
        return image_sets.file_pairs(images, targets)
    if not isinstance(model, Generator):
        return image_sets.teacher_pairs(model, real, nodes=FLAGS.steps, **options)
    if not FLAGS.latents:
        raise ValueError("reconstruction by a generator needs its latent store: give --latents=DIR")
    if model.meta["config"]["data"]["name"] == "latents":
        train = sources.open_data(model.meta["config"]["data"])
    return image_sets.generator_pairs(model, train, FLAGS.latents, **options)


def open_images(path: str) -> image_sets.Images:
    """The images of a folder or file, opened with those of the data set's options that apply."""
    given = common.options(FLAGS.options).items()
    options = {name: value for name, value in given if name in image_sets.FOLDER_OPTIONS}
    return image_sets.file_images(path, FLAGS.resolution, FLAGS.num, **options)


def open_network(entry: str, **options) -> features.FeatureNetwork:
    """The network "NAME=FILE"; if --sha256 has a hash for NAME, the file must have it."""
    name, path = named_file(entry)
    wanted = dict(named_file(pair) for pair in FLAGS.sha256)
    return features.load(name, path, sha256=wanted.get(name), **options)


def open_networks(train, steps: int | None) -> tuple[list[features.FeatureNetwork], list[str]]:
    """(networks of --network, warnings); without the flag, a small classifier of the data set.

    train: the training images to fit the classifier on. steps: its updates, None for the default.
    """
    if "classifier" in FLAGS.network and train is None:
        raise ValueError("--network=classifier is fitted on training images: give --data")
    entries, warnings = FLAGS.network, []
    if not entries and train is not None:
        entries = ["classifier"]
        warnings.append(
            "no feature network was given: the features are those of a small classifier of this "
            "data set, so the numbers are not comparable with published ones"
        )
    return [
        fit_classifier(train, purpose="metric", steps=steps)
        if entry == "classifier"
        else open_network(entry)
        for entry in entries
    ], warnings


def open_clip(model: Model | None, real, train) -> Clip:
    """CLIP with one prompt for each class, from the flags; or the network that is fitted on the
    captions of the training images."""
    if FLAGS.clip == "contrastive":
        if train is None:
            raise ValueError("--clip=contrastive is fitted on training images: give --data")
        fitted = fit_contrastive(train, purpose="metric")
        return Clip(fitted.network, fitted.texts, (), "captions", "alignment")
    network, files = open_network(FLAGS.clip), FLAGS.vocabulary
    vocabulary = tokenizer.read_vocabulary("+".join(files) or None)
    words = tokeniser(vocabulary, tokenizer.LENGTH, null=False)
    names = model.meta["data"]["class_names"] if model else real.class_names if real else []
    prompts = [FLAGS.prompt.format(name) for name in names]
    tokens = words(prompts or [FLAGS.prompt])
    return Clip(
        network,
        lambda texts: np.asarray(clip_network.text_features(network.params, words(texts))),
        prompts,
        digest([prompts, np.asarray(tokens).tolist()]),
    )


# Numbers of a summary that measure no quality.
NO_METRICS = ("device_seconds", "items_per_second", "cfg_scale")
# Flags that only apply to one kind of evaluation; ignoring them silently would hide a mistake.
ONLY_FOR = {
    "a teacher": ("steps", "method", "spacing"),
    "a generator": ("latents",),
    "--model": ("ema", "step", "seed"),
    "--images": ("resolution", "targets"),
    "the metric 'clip'": ("clip", "vocabulary", "prompt"),
    "the metric 'reconstruction'": ("latents", "targets", "lpips"),
    "the metric 'patch'": ("patch",),
}


def check_flags(models: list[Model | None]) -> None:
    """Raise ValueError for a flag that these evaluations would ignore."""
    metrics = FLAGS.metrics
    applies = {
        "a teacher": any(model and not isinstance(model, Generator) for model in models),
        "a generator": any(isinstance(model, Generator) for model in models),
        "--model": bool(FLAGS.model),
        "--images": not FLAGS.model,
        "the metric 'clip'": "clip" in metrics,
        "the metric 'reconstruction'": "reconstruction" in metrics,
        "the metric 'patch'": "patch" in metrics,
    }
    for subject, names in ONLY_FOR.items():
        for name in names if not applies[subject] else ():
            if FLAGS[name].present:
                raise ValueError(f"--{name} is for {subject} only: leave it out")


def open_splits(model: Model | None) -> tuple[Any, Any]:
    """(held-out images, training images) of --data or of the model's data set; None if there is
    none."""
    own = model.meta["config"]["data"] if model else {}
    name = FLAGS.data or own.get("name")
    if not name:
        return None, None
    if not model and not FLAGS.resolution:
        raise ValueError("--images needs --resolution: a data set is opened at it")
    same = name == own.get("name")
    data = own if same else {"split": "", "options": {}}
    own_dir = "" if name == "scenes" else own.get("data_dir", "")
    data = data | {
        "name": name,
        "data_dir": FLAGS.data_dir or own_dir,
        "options": data["options"] | common.options(FLAGS.options),
    }
    resolution = FLAGS.resolution
    if model:
        resolution = model.net.config.output_resolution * factor_of(model.meta)
    splits = (
        own[field] if same and not FLAGS[flag].present else FLAGS[flag].value
        for flag, field in (("split", "eval_split"), ("train_split", "split"))
    )
    opened = tuple(
        sources.open_pictures(data, split=split, resolution=resolution) if split else None
        for split in splits
    )
    for source in opened if model else ():
        if source and source.num_classes and model.num_classes:
            match_classes(model.meta, model.num_classes, source, model.workdir)
    return opened


def images_to_measure(model: Model | None, scale: float, real, train) -> image_sets.Images:
    """The model's samples, with the class frequencies of its training images or the captions of
    the held-out ones; or --images."""
    if model is None:
        return open_images(FLAGS.images)
    labels = captions = None
    if model.net.config.text and (asked := real or train):
        rows = np.random.default_rng(0).permutation(len(asked))
        captions = [asked.caption(int(i)) for i in np.resize(rows, FLAGS.num)]
    if model.num_classes:
        # Other class frequencies than those of the data would raise the Frechet distance.
        mix = next((source for source in (train, real) if source and source.num_classes), None)
        if mix is None:
            raise ValueError(
                f"{model.workdir} has {model.num_classes} classes, but no images are given whose "
                "labels say how many samples each gets: give labelled images in --train_split, "
                "or sample it first and give --images"
            )
        labels = mix.class_mix(FLAGS.num)
        check_labels(labels, model.num_classes)
    options = {"seed": FLAGS.seed, "batch_size": FLAGS.batch_size, "captions": captions}
    options |= solver_flags(model, scale)
    resolution = model.net.config.output_resolution * factor_of(model.meta)
    return image_sets.sampled_images(model, resolution, labels, FLAGS.num, **options)


def run() -> dict:
    """The summary of the evaluation that the flags describe; of several models or guidance scales
    {"rows": their summaries}, each in its own folder of the work directory."""
    if bool(FLAGS.model) == (FLAGS.images is not None):
        raise ValueError("give either --model=WORKDIR or --images=FOLDER_OR_NPZ")
    models = [load(path, ema=FLAGS.ema, step=FLAGS.step) for path in FLAGS.model] or [None]
    runs = [(model, scale) for model in models for scale in FLAGS.cfg_scale]
    check_flags(models)
    workdir = pathlib.Path(FLAGS.workdir)
    if len(runs) == 1:
        return measured(*runs[0], workdir)
    places = [
        workdir / f"{pathlib.Path(model.workdir).name if model else 'images'}-{scale:g}"
        for model, scale in runs
    ]
    return {"rows": [measured(*one, place) for one, place in zip(runs, places)]}


def measured(model: Model | None, scale: float, workdir: pathlib.Path) -> dict:
    """The summary of one model at one guidance scale, or of --images."""
    real, train = open_splits(model)
    generated = images_to_measure(model, scale, real, train)
    metrics = tuple(FLAGS.metrics)
    if not metrics:
        metrics = DEFAULT_METRICS + (TRAIN_METRICS if train is not None else ())
        known = generated.labelled or generated.captions is not None
        if real is not None and real.name == "scenes" and known:
            metrics += ("composition",)
    networks, warnings = [], []
    if set(metrics) & {*FEATURE_METRICS, *VIEW_METRICS}:
        own = model.meta["config"].get("features", {}) if model else {}
        networks, warnings = open_networks(train, own.get("fit_steps") or None)
    evaluation = Evaluation(
        generated,
        metrics,
        networks,
        real,
        train,
        references=FLAGS.reference,
        used_in_loss=model.meta.get("frozen_networks", {}) if model else {},
        clip=open_clip(model, real, train) if FLAGS.clip else None,
        pairs=open_pairs(model, real, train) if "reconstruction" in metrics else None,
        # The published LPIPS does not resize images; input_size=0 keeps their size.
        lpips=open_network(FLAGS.lpips, input_size=0) if FLAGS.lpips else None,
        base=FLAGS.base or (model.resolution * factor_of(model.meta) if model else 0),
        **{name: FLAGS[name].value for name in SAME_NAME},
    )
    job = evaluation_job(evaluation, workdir)
    summary = jobs.run(job, str(workdir), identity(evaluation), name="evaluate")
    with barrier("the report"):  # process 0 writes it, and the others wait
        if "num" not in summary:
            return summary
        summary["warnings"] = warnings + summary["warnings"]
        return report(summary, model, scale, evaluation, workdir)


def report(
    summary: dict, model: Model | None, scale: float, evaluation: Evaluation, workdir: pathlib.Path
) -> dict:
    """The job's summary with model, settings and cost; also writes pictures and a Markdown row."""
    if model:
        made = {"ema": FLAGS.ema, "seed": FLAGS.seed} | solver_flags(model, scale)
        summary |= {"model": model.workdir, "checkpoint_step": model.step} | made
    else:
        summary["images"] = FLAGS.images
    summary |= {
        "data": evaluation.real and evaluation.real.name,
        "split": evaluation.real and evaluation.real.split,
        "resolution": evaluation.generated.resolution,
        "references": list(FLAGS.reference),
        "resize": FLAGS.resize,
        "provenance": provenance({"model": model.workdir if model else ""}),
    }
    if model and FLAGS.cost:
        batch_size = min(FLAGS.batch_size, FLAGS.num)
        summary["cost"] = sampler_cost(model, batch_size=batch_size, **solver_flags(model, scale))
    show(workdir, summary)
    return summary


def show(workdir: pathlib.Path, summary: dict) -> None:
    """Write pictures and the Markdown row into the work directory, and print the row."""
    for kind, picture in (("generated", "samples"), ("pairs", "reconstructions")):
        first = workdir / "shards" / f"{kind}-{0:07d}.npz"
        if first.exists():
            with np.load(first) as stored:
                save_png(workdir / f"{picture}.png", image_grid(from_uint8(stored["preview"])))
    text = row(summary)
    (workdir / "report.md").write_text(text + "\n")
    print(text, *(f"note: {warning}" for warning in summary["warnings"]), sep="\n")


def row(summary: dict) -> str:
    """The numbers as a Markdown table with one row: metrics first, then cost."""
    cells = {"images": summary.get("model") or summary.get("images"), "num": summary["num"]}
    for key, value in summary.items():
        if isinstance(value, float) and key not in NO_METRICS:
            cells[key] = f"{value:.4g}"
    cost = summary.get("cost", {})
    cells |= {key: f"{cost[key]:.4g}" for key in COST if key in cost}
    return markdown([[*cells], [*cells.values()]])


def main(argv: list[str] | None = None) -> dict:
    """Evaluate; returns the summary."""
    return start(define_flags, lambda given: execute("evaluate", given.workdir, run), argv)


if __name__ == "__main__":
    main()
