"""Score any checkpoint, folder or file of images against a data set.

    python -m launch.evaluate --model=runs/quick/grow32 --num=5000 --workdir=runs/eval
    python -m launch.evaluate --model=runs/teacher --steps=18 --workdir=runs/eval_teacher \\
        --network=inception_v3=pt_inception.pth --reference=imagenet64.npz --metrics=fd,score
    python -m launch.evaluate --images=samples.npz --data=cifar10 --data_dir=DIR --resolution=32 \\
        --network=resnet56=resnet56.th --metrics=fd,kid,prdc,memorisation --workdir=runs/eval_files

--model takes the data set from the checkpoint; labels follow its class frequencies. Without
--network the data set's small classifier measures, and the names say so (fd_classifier). Numbers
are called fid, kid and is only where the published Inception weights made them.

The job is cut into shards: running the same command again resumes. Out come evaluate.json,
report.md (a Markdown row) and pictures in the work directory; the last line is one JSON object.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from cheapscale.data import sources
from cheapscale.data.digest import digest
from cheapscale.diffusion.solvers import METHODS
from cheapscale.evaluation.pixels import from_uint8
from cheapscale.evaluation.quality import choice
from cheapscale.models import features
from cheapscale.models.features import clip as clip_network
from cheapscale.models.features import tokenizer
from cheapscale.stages import evaluate, image_sets
from cheapscale.stages.data import class_mix, open_data
from cheapscale.stages.evaluate_settings import (
    FEATURE_METRICS,
    METRICS,
    VIEW_METRICS,
    Clip,
    Inputs,
    Settings,
)
from cheapscale.stages.networks import load_model
from cheapscale.stages.sampler_cost import sampler_cost
from cheapscale.stages.sampling import OF_TEACHERS, SPACINGS, check_labels
from cheapscale.training import jobs
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.classifier import fit_classifier
from cheapscale.training.logging import image_grid, save_png
from cheapscale.training.loop import provenance
from cheapscale.training.sharding import together
from launch.command import execute, named_file, start

DEFAULT_METRICS = ("fd", "kid", "prdc", "memorisation", "floor")
COST = ("nfe", "parameters", "flops_per_image", "seconds_per_image", "peak_bytes",
        "training_flops", "training_device_seconds")  # fmt: skip
FLAGS = flags.FLAGS


def define_flags() -> None:
    what = "Work directory of a pretrain, distill or grow run."
    flags.DEFINE_string("model", None, what)
    flags.DEFINE_string("images", None, "Folder of images, or .npz with uint8 images or arr_0.")
    flags.DEFINE_string("workdir", None, "Where shards and results go.")
    flags.DEFINE_string("data", None, "Data set to compare with (default: the model's own).")
    flags.DEFINE_string("data_dir", "", "Where that data set lies (default: the model's own).")
    flags.DEFINE_string("split", "test", "Its split of held-out images.")
    flags.DEFINE_string("train_split", "train", "Its split of training images; '' for none.")
    flags.DEFINE_integer("resolution", 0, "Of --images (default: the model's own).")
    flags.DEFINE_list("metrics", [], f"Some of {', '.join(METRICS)}.")
    flags.DEFINE_integer("num", 50_000, "Images to generate, or at most to read.", lower_bound=2)
    flags.DEFINE_integer("num_reference", 50_000, "At most so many real images.", lower_bound=2)
    flags.DEFINE_integer(
        "num_train", 50_000, "At most so many training images, for memorisation and floor."
    )
    flags.DEFINE_multi_string("network", [], "NAME or NAME=FILE of a feature network.")
    flags.DEFINE_multi_string("sha256", [], "NAME=HASH that the file of network NAME must have.")
    flags.DEFINE_multi_string("reference", [], "Statistics (.npz) to use in place of real images.")
    flags.DEFINE_enum("resize", "network", ["network", "clean", "tf1"], "To the network's input.")
    flags.DEFINE_integer("batch_size", 64, "Images per call.", lower_bound=1)
    flags.DEFINE_integer("per_shard", 1000, "Images per shard.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the latents.")
    flags.DEFINE_integer("steps", 40, "Teacher: sigma levels.", lower_bound=2)
    flags.DEFINE_enum(
        "method", "heun", METHODS,
        "Teacher: solver; euler is DDIM, ancestral DDPM's.",
    )  # fmt: skip
    flags.DEFINE_enum(
        "spacing", "karras", SPACINGS, "Teacher: its levels; others than karras are a VP one's."
    )
    flags.DEFINE_float("cfg_scale", 1.0, "Teacher: guidance scale; 1 is none.")
    flags.DEFINE_bool("ema", True, "Use the EMA weights.")
    flags.DEFINE_integer("step", None, "Checkpoint step (default: the newest).")
    flags.DEFINE_integer("patch", 0, "Side of the crops of the metric 'patch'.")
    flags.DEFINE_integer("base", 0, "Base resolution of the metric 'base' (default: the model's).")
    flags.DEFINE_string("clip", None, "NAME=FILE of a CLIP network, for the metric 'clip'.")
    flags.DEFINE_list("vocabulary", [], "CLIP's bpe_simple_vocab file, or vocab.json,merges.txt.")
    flags.DEFINE_string("prompt", "a photo of a {}", "Text for 'clip'; {} is the class's name.")
    flags.DEFINE_string("latents", None, "Generator: its latent store, for 'reconstruction'.")
    flags.DEFINE_string("targets", None, "What --images should be, in order: for 'reconstruction'.")
    flags.DEFINE_string("lpips", None, "vgg16_lpips=VGG.pth+LIN.pth, for 'reconstruction'.")
    flags.DEFINE_bool("insist", False, "Score also with a network that a loss used; names say so.")
    flags.DEFINE_bool("cost", True, "Measure seconds, FLOPs and memory of the sampler too.")
    flags.DEFINE_bool("distributed", False, "Call jax.distributed.initialize() first.")


def model_images(loaded: Loaded, source, resolution: int) -> image_sets.Images:
    """The model's samples, labels drawn with the class frequencies of `source`."""
    (model,) = loaded.meta["networks"].values()
    labels = None
    if model["num_classes"]:
        labels = class_mix(source, FLAGS.num)
        check_labels(labels, model["num_classes"])
    return image_sets.sampled_images(
        loaded,
        resolution,
        labels,
        FLAGS.num,
        seed=FLAGS.seed,
        batch_size=FLAGS.batch_size,
        **solver_flags(loaded),
    )


def solver_flags(loaded: Loaded) -> dict:
    """How a teacher is sampled; nothing for a generator."""
    if "net" not in loaded.meta["networks"]:
        return {}
    return {name: FLAGS[name].value for name in ("steps", "method", "cfg_scale", "spacing")}


def file_images(path: str, resolution: int, num: int) -> image_sets.Images:
    """At most `num` images, a fixed random choice in the order they stand in, of a folder (all
    below it, by path, without labels) or an .npz; resolution 0 takes what the .npz holds."""
    place = pathlib.Path(path)
    if place.is_dir():
        source = sources.open_source(
            "folder", "all", resolution=resolution, data_dir=path, unlabelled=True
        )
        return image_sets.chosen_images(source, np.sort(choice(len(source), num)))
    if place.suffix != ".npz" or not place.is_file():
        raise ValueError(f"{path} is neither a folder nor an .npz file: name images that exist")
    images = image_sets.npz_images(place, num)
    if resolution not in (0, images.resolution):
        raise ValueError(f"{path} holds {images.resolution} px images, not {resolution}")
    return images


def open_pairs(loaded: Loaded | None, real, train) -> image_sets.Pairs:
    """What "reconstruction" compares: see the flags --targets and --latents."""
    options = {"num": FLAGS.num, "batch_size": FLAGS.batch_size}
    if loaded is None:
        if not FLAGS.targets:
            raise ValueError("reconstruction of --images compares with --targets=FOLDER_OR_NPZ")
        images, targets = (
            file_images(path, FLAGS.resolution, FLAGS.num) for path in (FLAGS.images, FLAGS.targets)
        )
        return image_sets.file_pairs(images, targets)
    if "net" in loaded.meta["networks"]:
        return image_sets.teacher_pairs(loaded, real, nodes=FLAGS.steps, **options)
    if not FLAGS.latents:
        raise ValueError("reconstruction by a generator needs its latent store: give --latents=DIR")
    return image_sets.generator_pairs(loaded, train, FLAGS.latents, **options)


def open_network(entry: str, hashes: Sequence[str] = (), **options) -> features.FeatureNetwork:
    """The network of "NAME=FILE"; hashes: "NAME=HASH" that files must have."""
    name, path = named_file(entry)
    wanted = dict(named_file(pair) for pair in hashes)
    return features.load(name, path, sha256=wanted.get(name), **options)


def open_networks(
    entries: Sequence[str], train, steps: int | None, hashes: Sequence[str] = ()
) -> tuple[list[features.FeatureNetwork], list[str]]:
    """(networks of "NAME[=FILE]" strings, warnings); without any the data's small classifier.

    steps: updates of the classifier, None for its default. hashes: see `open_network`.
    """
    networks = []
    for entry in entries:
        if entry != "classifier":
            networks.append(open_network(entry, hashes))
            continue
        if train is None:
            raise ValueError("--network=classifier is fitted on training images: give --data")
        networks.append(fit_classifier(train, purpose="metric", steps=steps).network)
    if networks or train is None:
        return networks, []
    text = (
        "no feature network was given: a small classifier of this data set measured, so no number "
        "compares with published ones"
    )
    return [fit_classifier(train, purpose="metric", steps=steps).network], [text]


def open_clip(class_names: list[str]) -> Clip:
    """CLIP and one prompt for each class, as the flags say."""
    network = open_network(FLAGS.clip, FLAGS.sha256)
    files = FLAGS.vocabulary
    words = tokenizer.load_tokenizer(files[0] if len(files) == 1 else tuple(files) or None)
    prompts = [FLAGS.prompt.format(name) for name in class_names]
    tokens = words(prompts or [FLAGS.prompt])
    return Clip(
        network,
        lambda texts: np.asarray(clip_network.text_features(network.params, words(list(texts)))),
        prompts,
        digest([prompts, np.asarray(tokens).tolist()]),
    )


# Flags that say nothing about the other kind of subject: silence would hide a misunderstanding.
ONLY_FOR = {
    "a teacher": OF_TEACHERS,
    "a generator": ("latents",),
    "--model": ("ema", "step", "seed"),
    "--images": ("resolution", "targets"),
    "the metric 'clip'": ("clip", "vocabulary", "prompt"),
    "the metric 'reconstruction'": ("latents", "targets", "lpips"),
    "the metric 'patch'": ("patch",),
}


def check_flags(loaded: Loaded | None, metrics: tuple[str, ...]) -> None:
    """Refuse flags that this evaluation would ignore."""
    networks = loaded.meta["networks"] if loaded else {}
    applies = {
        "a teacher": "net" in networks,
        "a generator": "generator" in networks,
        "--model": loaded is not None,
        "--images": loaded is None,
        "the metric 'clip'": "clip" in metrics,
        "the metric 'reconstruction'": "reconstruction" in metrics,
        "the metric 'patch'": "patch" in metrics,
    }
    for subject, names in ONLY_FOR.items():
        for name in names if not applies[subject] else ():
            if FLAGS[name].present:
                raise ValueError(f"--{name} is for {subject} only: leave it out")


def run() -> dict:
    """Evaluate as the flags say; returns the summary."""
    if (FLAGS.model is None) == (FLAGS.images is None):
        raise ValueError("give either --model=WORKDIR or --images=FOLDER_OR_NPZ")
    loaded = load_model(FLAGS.model, ema=FLAGS.ema, step=FLAGS.step) if FLAGS.model else None
    trained = loaded.meta["config"]["data"] if loaded else {}
    name = FLAGS.data or trained.get("name")
    if loaded:
        (model,) = loaded.meta["networks"].values()
        resolution = model["resolution"] * 2 ** len(model["growth"])
    else:
        resolution = FLAGS.resolution
        if (name or pathlib.Path(FLAGS.images).is_dir()) and not resolution:
            raise ValueError("--images needs --resolution: a folder or a data set is opened at it")

    own_data = trained if name == trained.get("name") else {"split": "", "options": {}}
    data = own_data | {"name": name, "data_dir": FLAGS.data_dir or trained.get("data_dir", "")}

    def open_split(split: str):
        return open_data(data, split=split, resolution=resolution) if name and split else None

    train_split = FLAGS.train_split
    if loaded and name == trained.get("name") and not FLAGS["train_split"].present:
        train_split = trained["split"]
    real, train = open_split(FLAGS.split), open_split(train_split)
    if loaded:
        generated = model_images(loaded, train or real, resolution)
    else:
        generated = file_images(FLAGS.images, resolution, FLAGS.num)
    known = generated.labelled or generated.captions is not None
    metrics = tuple(FLAGS.metrics) or tuple(
        m for m in DEFAULT_METRICS if train is not None or m not in ("memorisation", "floor")
    ) + (("composition",) if name == "scenes" and known else ())
    check_flags(loaded, metrics)
    settings = Settings(
        metrics=metrics,
        batch_size=FLAGS.batch_size,
        per_shard=FLAGS.per_shard,
        resize=FLAGS.resize,
        patch=FLAGS.patch,
        base=FLAGS.base or (model["resolution"] if loaded else 0),
        num_reference=FLAGS.num_reference,
        num_train=FLAGS.num_train,
        insist=FLAGS.insist,
    )
    networks, warnings = [], []
    if set(metrics) & {*FEATURE_METRICS, *VIEW_METRICS}:
        own = loaded.meta["config"].get("features", {}) if loaded else {}
        steps = own.get("metric_steps") or None
        networks, warnings = open_networks(FLAGS.network, train, steps, FLAGS.sha256)
    inputs = Inputs(
        generated,
        networks,
        real,
        train,
        references=FLAGS.reference,
        used_in_loss=loaded.meta.get("frozen_networks", {}) if loaded else {},
        clip=open_clip(list(real.class_names) if real else []) if FLAGS.clip else None,
        pairs=open_pairs(loaded, real, train) if "reconstruction" in metrics else None,
        # the published LPIPS looks at images as large as they are
        lpips=open_network(FLAGS.lpips, FLAGS.sha256, input_size=0) if FLAGS.lpips else None,
    )
    job = evaluate.evaluation_job(inputs, settings, FLAGS.workdir)
    summary = jobs.run(job, FLAGS.workdir, evaluate.identity(inputs, settings), name="evaluate")
    with together("the report"):  # the first process writes it, and the others wait
        return report(summary, warnings, loaded, inputs) if "num" in summary else summary


def report(summary: dict, warnings: list[str], loaded: Loaded | None, inputs: Inputs) -> dict:
    """The job's summary with what was measured, its cost, pictures and a Markdown row."""
    summary["warnings"] = warnings + summary["warnings"]
    if loaded:
        summary |= {"model": FLAGS.model, "checkpoint_step": loaded.step, "ema": FLAGS.ema,
                    "seed": FLAGS.seed}  # fmt: skip
        summary |= solver_flags(loaded)
    else:
        summary["images"] = FLAGS.images
    summary |= {
        "data": inputs.real and inputs.real.name,
        "split": FLAGS.split,
        "resolution": inputs.generated.resolution,
        "references": list(FLAGS.reference),
        "resize": FLAGS.resize,
        "provenance": provenance(),
    }
    if loaded and FLAGS.cost:
        batch_size = min(FLAGS.batch_size, FLAGS.num)
        summary["cost"] = sampler_cost(loaded, batch_size=batch_size, **solver_flags(loaded))
    show(pathlib.Path(FLAGS.workdir), summary)
    return summary


def show(workdir: pathlib.Path, summary: dict) -> None:
    """Pictures and the Markdown row, in the work directory and on stdout."""
    for kind, picture in (("generated", "samples"), ("pairs", "reconstructions")):
        first = workdir / "shards" / f"{kind}-{0:07d}.npz"
        if first.exists():
            with np.load(first) as stored:
                save_png(workdir / f"{picture}.png", image_grid(from_uint8(stored["preview"])))
    text = row(summary)
    (workdir / "report.md").write_text(text + "\n")
    print(text)
    for warning in summary["warnings"]:
        print(f"note: {warning}")


def row(summary: dict) -> str:
    """The numbers as a Markdown table of one row, quality first and its cost behind."""
    skipped = ("num", "checkpoint_step", "seed", "resolution", "num_reference", "device_seconds",
               "steps", "cfg_scale")  # fmt: skip
    cells = {"images": summary.get("model") or summary.get("images"), "num": summary["num"]}
    for key, value in summary.items():
        if isinstance(value, float) and key not in skipped:
            cells[key] = f"{value:.4g}"
    cost = summary.get("cost", {})
    for key in COST:
        if key in cost:
            cells[key] = f"{cost[key]:.4g}"
    head = "| " + " | ".join(cells) + " |"
    return "\n".join([
        head, "|" + " --- |" * len(cells), "| " + " | ".join(map(str, cells.values())) + " |"
    ])  # fmt: skip


def main(argv) -> None:
    del argv
    execute("evaluate", FLAGS.workdir, run)


if __name__ == "__main__":
    define_flags()
    flags.mark_flags_as_required(["workdir"])
    start(main)
