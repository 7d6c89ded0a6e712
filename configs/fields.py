"""The fields of every stage's config: defaults, meanings and allowed values.

    defaults(stage)   the complete ConfigDict of one stage
    check(config)     raises ValueError for an invalid field, with an argument that would be valid
    describe(config)  a text with every field, its value, its meaning and its allowed values

A stage has the fields of COMMON and of its sections in STAGES. Types, choices and ranges are only
checked here. A stage itself checks the rest, for example that a teacher fits the data.
"""

import difflib
import math
import sys
from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Field(NamedTuple):
    """A field of a config. Its type is that of its default; None is any type.

    choices, low, high: allowed values, or least and largest value; for a tuple, of each entry. The
      entries of a tuple are whole numbers if it has a range, else texts. Numbers are finite, and
      whole ones have 32 bits.
    keys: for a dictionary the fields of its keys, which a config need not have; or one field for
      all keys, such as --config.features.paths.NAME.
    """

    default: Any
    meaning: str
    choices: tuple = ()
    low: float = -math.inf
    high: float = math.inf
    keys: Any = None


ANY = Field(None, "any value")
OPTIONS = {  # of open_source (cheapscale/data/sources.py)
    "cache": Field(True, "keep decoded images in memory; left out: if they take at most 1 GiB"),
    "unlabelled": Field(False, "ignore the labels"),
    "size": Field(20000, "scenes: number of images", low=1),
    "seed": Field(0, "scenes: seed of the images", low=0, high=2**32 - 1),
    "single": Field(False, "scenes: draw only the main object"),
    "where": Field({}, "TFDS: fields that a record must have, as where.NAME=VALUE", keys=ANY),
    "allow_upscale": Field(False, "enlarge images that are too small"),
    "skip_corrupt": Field(False, "folder: leave out images that do not decode"),
    "probe": Field(True, "folder: read every header at the start"),
    "named_by_files": Field(False, "folder: a file's name is the caption of an image without one"),
    "recaptioned": Field(
        0.5, "folder: how often a caption of launch.recaption is drawn", low=0, high=1
    ),
    "train_split": Field("train", "folder: split whose classes have the numbers of all splits"),
}
RUN = {
    "seed": Field(0, "seed of weights, data order and noise", low=0, high=2**32 - 1),
    "total_steps": Field(1000, "number of updates of the whole run", low=0),
    "total_flops": Field(
        0.0, "FLOPs of this run and its earlier stages at which it ends; 0: no such end", low=0
    ),
    "batch_size": Field(64, "images per update, over all devices", low=1),
    "log_every": Field(50, "steps between two lines of the log", low=1),
    "eval_every": Field(1000, "steps between two previews", low=1),
    "save_every": Field(1000, "steps between two checkpoints", low=1),
    "keep": Field(2, "number of newest checkpoints to keep", low=1),
    "resume": Field("", "work directory of another run of this stage to continue"),
    "accept_other_data": Field(False, "resume although the images have changed"),
}
MESH = {
    "fsdp": Field(1, "devices over which large parameters are split", low=1),
}
DATA = {
    "name": Field(
        "scenes", "scenes, folder, latents of stage encode, or a prepared TFDS set such as cifar10"
    ),
    "split": Field("train", "split of the training images; also a slice, train[:50%]"),
    "eval_split": Field("test", "split of the images for evaluation"),
    "data_dir": Field("", "folder of the images, or of the TFDS data sets"),
    "resolution": Field(8, "height and width of the images in pixels", low=1, high=2**14),
    "flip": Field(True, "mirror half of the images"),
    "num_threads": Field(1, "threads that read images", low=1, high=1024),
    "options": Field({}, "options of the source", keys=OPTIONS),
}
EMA = {"decay": Field(0.999, "decay of the moving average of the weights", low=0, high=1)}

MODEL = Field(
    {},
    "fields of the U-Net (cheapscale/models/plan.py); num_classes=-1: those of the images",
    keys=ANY,
)
DIFFUSION = {  # Karras et al. 2022 (arXiv 2206.00364), Table 1, in PaGoDA's range
    "process": Field("edm", "noise process", ("edm", "linear", "scaled_linear", "cosine")),
    "prediction": Field(
        "x0", "VP only: the quantity that the network predicts", ("x0", "eps", "v")
    ),
    "sigma_min": Field(0.002, "lowest noise level of sampling", low=1e-6, high=1e6),
    "sigma_max": Field(80.0, "highest noise level, that of the prior", low=1e-6, high=1e6),
    "rho": Field(7.0, "exponent of Karras' grid", low=1, high=100),
    "sigma_data": Field(
        0.5, "standard deviation of the data in EDM's preconditioning", low=1e-3, high=1e3
    ),
    "P_mean": Field(-1.2, "mean of ln sigma in training", low=-20, high=20),
    "P_std": Field(1.2, "standard deviation of ln sigma in training", low=1e-3, high=20),
}
TEXT = {
    "encoder": Field(
        "",
        "what reads captions; empty: classes condition the teacher; transformer: trains with "
        "it; the others are published and frozen",
        ("", "transformer", "minilm", "clip", "t5"),
    ),
    "files": Field("", "clip, t5: WEIGHTS+tokenizer.json; minilm: empty is its package"),
    "tokens": Field(32, "most tokens of a caption", low=1, high=4096),
    "vocabulary": Field(1000, "transformer: most tokens of its vocabulary", low=257, high=2**17),
    "width": Field(64, "transformer: width of its features", low=32, high=4096),
    "depth": Field(2, "transformer: number of blocks", low=1, high=64),
}
OPTIM = {
    "name": Field("adam", "update rule", ("adam", "adamw", "radam", "sgd")),
    "lr": Field(1e-3, "learning rate", low=0),
    "warmup_steps": Field(0, "updates during which the rate rises linearly", low=0),
    "decay_steps": Field(0, "update at which a cosine decay reaches 0; 0: no decay", low=0),
    "b2": Field(0.999, "decay of the second moment", low=0, high=0.999999),
}
PRETRAIN = {
    "label_dropout": Field(
        0.0, "probability of dropping a label or a caption, for guidance", low=0, high=1
    ),
    "augment": Field(0.0, "probability of each of EDM's augmentations", low=0, high=1),
    "antithetic": Field(False, "antithetic pairs of noise levels, as for experts"),
}
AUTOENCODE = {
    "start": Field("", "autoencoder that is trained further, as in encode.autoencoder; empty: new"),
    "decoder_only": Field(False, "keep the encoder, so that its latents stay valid"),
    "channels": Field(64, "channels of a new autoencoder", low=1),
    "levels": Field(3, "how often it halves the pictures", low=1, high=8),
    "blocks": Field(3, "blocks of each level", low=1),
    "latent_channels": Field(4, "channels of its latents", low=1),
}
ENCODE = {
    "autoencoder": Field(
        "",
        "diffusers folder (a pipeline, or its vae), file of a VAE, TAESD's ENCODER+DECODER, or the "
        "work directory of stage autoencode",
    ),
    "folder": Field("", "folder of the latent data set, then data.data_dir with data.name=latents"),
    "levels": Field(1, "sizes of the pictures, each half of the one before", low=1, high=8),
    "deviation": Field(
        0.5,
        "deviation to which each channel is scaled; 0: the autoencoder's own scale",
        low=0,
        high=100,
    ),
    "scale": Field(0.0, "scale of the latents; 0: the one that the files say", low=0, high=1e6),
    "per_shard": Field(1024, "latents per file; resuming continues at a file", low=1),
}
INVERT = {
    "direction": Field(
        "invert", "images to noise, or (sample) noise to images for L_dstl", ("invert", "sample")
    ),
    "nodes": Field(40, "number of noise levels of Heun's method", low=2, high=10_000),
    "clip": Field(False, "clamp the denoiser's output to [-1, 1]"),
    "noise": Field(
        0.0, "noise level at which the inversion starts, with such noise added to the image; "
        "0: no noise, from sigma_min (paper)", low=0,
    ),
    "cfg_scale": Field(1.0, "guidance scale; 1: no guidance", low=0),
    "omega": Field(
        "", "distribution of each record's guidance scale: uniform on [2, 10], or normal (2, 3) "
        "on [1, 10], for recaptions; empty: cfg_scale", ("", "uniform", "normal"),
    ),
    "dtype": Field("float32", "precision of the stored latents", ("float32", "float16")),
    "per_shard": Field(1024, "latents per file; resuming continues at a file", low=1),
}  # fmt: skip
COMPUTE = {
    "dtype": Field(
        "", "precision of network calls; empty: that of the teacher",
        ("", "float32", "bfloat16", "float16"),
    ),
    "remat": Field((), "prefixes of blocks recomputed in the backward pass; ('',) is all"),
}  # fmt: skip
LOSS = {  # PaGoDA (arXiv 2405.14822): L_rec + lambda L_adv
    "feature_weight": Field(1.0, "weight in L_rec of the networks' features (published)", low=0),
    "pixel_weight": Field(10.0, "weight in L_rec of the squared difference of pixels", low=0),
    "lpips_weight": Field(0.0, "weight in L_rec of LPIPS, the distance in the paper", low=0),
    "adversarial_weight": Field(0.2, "constant factor of lambda; 0 removes L_adv", low=0),
    "alignment_weight": Field(
        0.0, "weight beside L_adv of the angle between fakes and captions; 0: none", low=0
    ),
    "adaptive": Field(True, "multiply lambda by |grad L_rec| / |grad L_adv| at the last layer"),
    "squared_norms": Field(
        False, "square these norms, as in the paper but not in its published code"
    ),
    "gan_loss": Field("hinge", "hinge (published code) or logistic (paper)", ("hinge", "logistic")),
    "pairs": Field(
        "inverted", "L_rec on inverted pairs, or L_dstl on teacher samples", ("inverted", "teacher")
    ),
    "data_proportion": Field(
        1.0, "share of each class whose pairs are used in L_rec", low=1e-6, high=1
    ),
}
WIDTHS = Field((32,), "channels of the grown blocks, one entry per doubling", low=1)
FREEZE = Field(
    True, "train only the end of the decoder, as published; False: all that a base trains"
)
FEATURES = {
    "names": Field(
        ("efficientnet_lite0",),
        "frozen networks of discriminator and distance; classifier: one fitted to the images",
    ),
    "paths": Field({}, "weight files by network", keys=Field("", "weight file of a network")),
    "sha256": Field(
        {}, "SHA-256 of the weight files by network", keys=Field("", "SHA-256 of a weight file")
    ),
    "input_size": Field(
        0, "smaller images are enlarged to this size; 0: the network's", low=0, high=2**14
    ),
    "aligner": Field(
        "contrastive", "of alignment_weight: fitted on the captions, or CLIP, such as clip_vitl14"
    ),
    "fit_steps": Field(0, "updates of a fitted classifier; 0: its default", low=0),
}
DISCRIMINATOR = {
    "width": Field(16, "channels of the finest mixed map", low=1),
    "embedding_dim": Field(64, "size of a class embedding", low=1),
    "class_table": Field("", "file (.npy, .npz) of initial class embeddings [classes, n]"),
    "tokens": Field(
        False, "heads on every token of vision transformers (text-to-image); False: on mixed maps"
    ),
}
CASCADE = {  # self-cascade (arXiv 2402.10491), Algorithm 1
    "tune": Field("neck", "weights that are trained", ("neck", "gain", "2k", "full", "lora", "ft")),
    "k": Field("t0.7", "restart level, as in --cascade_k"),
    "sizes": Field((), "resolutions trained together; () is data.resolution", low=1),
    "mode": Field(
        "S",
        "add features to decoder skips, or to its stream (published code)",
        ("S", "M"),
    ),
    "init": Field(
        "zero", "initial upsampler: no effect, or identity (published code)", ("zero", "identity")
    ),
    "width": Field(8, "channels of a neck", low=1),
    "lora_rank": Field(4, "rank of LoRA, for tune=lora", low=1),
    "init_from": Field("", "work directory of the tuning at the previous resolution"),
}
ASSESS = {  # step-adaptive training (arXiv 2312.13307)
    "groups": Field(5, "number of experts", low=1, high=10_000),
    "partition": Field(
        "equal", "equal counts, equal decibels, or clusters of a curve",
        ("equal", "decibels", "snr", "loss"),
    ),
    "k": Field(0.5, "k in the budget F_i = (i/N + (1 - i/N) k) F_0", low=0, high=1),
    "order": Field(
        "snr_up", "group that keeps all FLOPs: cleanest, noisiest, middle; flat: equal shares",
        ("snr_up", "snr_down", "mid", "flat"),
    ),
    "mean": Field(0.0, "mean share of FLOPs, which replaces k; 0: use k", low=0, high=1),
    "steps": Field(40, "steps of the sampler that the experts are made for", low=2, high=10_000),
    "spacing": Field(
        "karras", "spacing of its levels; all but karras need VP",
        ("karras", "leading", "trailing", "quadratic"),
    ),
    "importance": Field("taylor", "score of a channel", ("taylor", "magnitude")),
    "images": Field(1024, "images for the scores and the proxy loss", low=1),
    "proposer": Field(
        "greedy", "proposer of widths; uniform: one ratio, no search; llm: a language model",
        ("greedy", "uniform", "llm"),
    ),
    "rounds": Field(12, "rounds of the search", low=1),
    "per_round": Field(8, "candidates per round", low=1),
    "remember": Field(True, "show earlier rounds to the proposer"),
    "llm_url": Field("", "URL of an OpenAI-compatible endpoint, for proposer llm"),
    "llm_model": Field("", "model at this endpoint"),
}  # fmt: skip
PRUNE = {
    "group": Field(0, "group to train, counted from the cleanest", low=0),
    "overlap": Field(1, "sampler steps beyond the group, on either side", low=0),
    "base_target": Field(0.0, "weight of the base's denoiser output as the target", low=0, high=1),
    "start": Field(
        "base", "initial weights; scratch: random, the single-stage control", ("base", "scratch")
    ),
}

TEACHER = Field("", "work directory of stage pretrain, or the folder of a set of experts")
SAMPLES = Field(
    "",
    "folder of the teacher's guided samples, which teach the generator omega; empty: no guidance",
)
BASE = Field("", "work directory of the smaller generator")
START = Field(
    "",
    "work directory of stage regress to start from, or of distill to add guidance to it; empty: "
    "the weights of the teacher, or in growth those of the base",
)
LATENTS = Field("", "folder of the data-latent pairs")
RESCALE = Field(False, "divide all latents by their rms / sigma_max, so that theirs is the prior's")
EXPERTS = Field("", "folder of the set of experts")
GROWTH = {"widths": WIDTHS, "freeze": FREEZE}

COMMON = RUN | {"mesh": MESH, "data": DATA, "ema": EMA}
GENERATOR = {
    "latents": LATENTS, "rescale_latents": RESCALE, "optim": OPTIM, "optim_discriminator": OPTIM,
    "features": FEATURES, "discriminator": DISCRIMINATOR, "compute": COMPUTE,
}  # fmt: skip
STAGES: dict[str, dict[str, Any]] = {
    "autoencode": {
        "optim": OPTIM, "optim_discriminator": OPTIM, "features": FEATURES,
        "discriminator": DISCRIMINATOR, "autoencode": AUTOENCODE | {
            name: LOSS[name]
            for name in ("feature_weight", "pixel_weight", "lpips_weight", "adversarial_weight",
                         "adaptive", "squared_norms", "gan_loss")
        },
    },
    "encode": {"encode": ENCODE},
    "pretrain": {
        "model": MODEL, "text": TEXT, "diffusion": DIFFUSION, "optim": OPTIM, "pretrain": PRETRAIN,
    },
    "invert": {
        "teacher": TEACHER, "latents": LATENTS, "invert": INVERT,
        "compute": {"dtype": COMPUTE["dtype"]},
    },
    "regress": {
        "teacher": TEACHER, "base": BASE, "samples": SAMPLES, **GENERATOR, "regress": LOSS,
        "grow": GROWTH,
    },
    "distill": {
        "teacher": TEACHER, "start": START, "samples": SAMPLES, **GENERATOR, "distill": LOSS,
    },
    "grow": {
        "base": BASE, "start": START, **GENERATOR, "grow": LOSS | GROWTH,
    },
    "cascade": {"teacher": TEACHER, "optim": OPTIM, "cascade": CASCADE},
    "assess": {"teacher": TEACHER, "experts": EXPERTS, "prune": ASSESS},
    "prune": {"teacher": TEACHER, "experts": EXPERTS, "optim": OPTIM, "prune": PRUNE},
}  # fmt: skip
PAGODA = {  # the published code's optimisers
    "optim.name": "radam", "optim.lr": 8e-6,
    "optim_discriminator.name": "radam", "optim_discriminator.lr": 2e-3,
}  # fmt: skip
# Where a stage's default differs from its field's.
STAGE_DEFAULTS = {
    "autoencode": {
        "optim.warmup_steps": 100, "optim_discriminator.name": "radam",
        "optim_discriminator.lr": 2e-3, "autoencode.adversarial_weight": 0.0,
    },
    "pretrain": {"optim.warmup_steps": 100},
    "regress": {
        "optim.warmup_steps": 100, "regress.adversarial_weight": 0.0, "regress.feature_weight": 0.0,
    },
    "distill": PAGODA,
    "grow": PAGODA | {"grow.adversarial_weight": 1.0, "grow.adaptive": False},
    "prune": {"optim.warmup_steps": 20},
}  # fmt: skip


def fields(stage: str) -> dict[str, Field]:
    """{"optim.lr": Field, ...}: every field of a stage, with the stage's own default."""
    if not isinstance(stage, str) or stage not in STAGES:
        raise ValueError(f"stage {stage!r} is unknown: choose one of {', '.join(STAGES)}")
    rows = {"stage": Field(stage, "name of the stage", tuple(STAGES))}
    for name, row in (COMMON | STAGES[stage]).items():
        if isinstance(row, Field):
            rows[name] = row
        else:
            rows |= {f"{name}.{field}": value for field, value in row.items()}
    for name, default in STAGE_DEFAULTS.get(stage, {}).items():
        rows[name] = rows[name]._replace(default=default)
    return rows


def every_field(*stages: str) -> list[str]:
    """The names of the fields of some stages, or of all; with the named keys of dictionaries."""
    names: dict[str, None] = {}
    for stage in stages or STAGES:
        for name, field in fields(stage).items():
            keys = field.keys if isinstance(field.keys, dict) else {}
            names |= dict.fromkeys([name, *(f"{name}.{key}" for key in keys)])
    return list(names)


def defaults(stage: str) -> ConfigDict:
    """The complete config of a stage; ValueError for an unknown stage."""
    config = ConfigDict()
    for name, field in fields(stage).items():
        *sections, last = name.split(".")
        place = config
        for section in sections:
            if section not in place:
                place[section] = ConfigDict()
            place = place[section]
        place[last] = dict(field.default) if isinstance(field.default, dict) else field.default
    return config


def find(name: str, rows: dict[str, Field]) -> Field | None:
    """The field `name`, which may be a key of a dictionary; None if `rows` has no such field."""
    if name in rows:
        return rows[name]
    section, _, key = name.rpartition(".")
    holder = find(section, rows) if section else None
    if holder is None or holder.keys is None:
        return ANY if holder is ANY else None
    return holder.keys.get(key) if isinstance(holder.keys, dict) else holder.keys


def check(config: ConfigDict) -> None:
    """Raise ValueError for the first field that is unknown or missing or has an invalid value."""
    if "stage" not in config:
        raise ValueError(f"the config has no stage: choose one of {', '.join(STAGES)}")
    rows = fields(config.stage)
    given = flat(config, rows)
    for name, value in given.items():
        field = find(name, rows)
        if field is None:
            raise ValueError(unknown(name, config.stage))
        if why := fault(value, field):
            raise ValueError(f"config.{name} is {value!r}, {why}: {remedy(name, field)}")
    for name, field in rows.items():
        if name not in given and not any(key.startswith(f"{name}.") for key in given):
            raise ValueError(
                f"the config has no {name}: give it, as --config.{name}={field.default}"
            )


def flat(config: ConfigDict, rows: dict[str, Field], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": value, ...} of a config; a dictionary without named keys is one value."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        path = prefix + name
        field = find(path, rows)
        inside = field is None or field.keys not in (None, ANY)
        if isinstance(value, (dict, ConfigDict)) and value and inside:
            found |= flat(value, rows, f"{path}.")
        else:
            found[path] = value.to_dict() if isinstance(value, ConfigDict) else value
    return found


def fault(value: Any, field: Field) -> str:
    """The reason why `value` is invalid for the field, or ""."""
    kind = type(field.default)
    if field.default is None:
        return ""
    kinds = {float: (int, float), tuple: (list, tuple)}.get(kind, kind)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        return f"not of type {kind.__name__}"
    entries = value if kind is tuple else (value,)
    entry_kind = int if math.isfinite(field.low) else str
    if kind is tuple and any(type(entry) is not entry_kind for entry in entries):
        return f"with entries not of type {entry_kind.__name__}"
    if field.choices and any(entry not in field.choices for entry in entries):
        return f"not one of {', '.join(repr(choice) for choice in field.choices)}"
    most = sys.float_info.max if kind is float else 2**31 - 1
    most = field.high if math.isfinite(field.high) else most
    for number in (entry for entry in entries if isinstance(entry, (int, float))):
        if not field.low <= number <= field.high:  # a NaN is in no range
            return f"not {limits(field) or 'a number'}"
        if abs(number) > most:
            return "not finite" if kind is float else f"above {most}"
    return ""


def limits(field: Field) -> str:
    """The range of a field as a text: "at least 0", "from 0 to 1" or ""."""
    if math.isfinite(field.low) and math.isfinite(field.high):
        return f"from {field.low} to {field.high}"
    return f"at least {field.low}" if math.isfinite(field.low) else ""


def remedy(name: str, field: Field) -> str:
    """The advice at the end of an error: "give another, as --config.optim.lr=0.001"."""
    value = f'"{field.default}"' if isinstance(field.default, tuple) else field.default
    return f"give another, as --config.{name}={value}"


def unknown(name: str, stage: str) -> str:
    """The error for a field that a stage lacks, with the most similar field that it has."""
    names = every_field(stage)
    section, _, key = name.rpartition(".")
    holder = find(section, fields(stage))
    if holder and isinstance(holder.keys, dict):
        near = [f"{section}.{one}" for one in difflib.get_close_matches(key, holder.keys, 1)]
        if not near:
            return f"--config.{name} is no field: {section} takes {', '.join(holder.keys)}"
    else:
        near = difflib.get_close_matches(name, names, 1, 0.5)
    known = near or [row for row in names if row.rpartition(".")[0] == section] or names
    return (
        f"--config.{name} is no field of stage {stage}: leave it out, or did you mean "
        f"--config.{known[0]}?"
    )


def describe(config: ConfigDict) -> str:
    """A text with one line for each field: its flag with the value, its meaning, its values."""
    rows = fields(config.stage)
    given = flat(config, rows)
    lines, section = [], None
    for name in every_field(config.stage)[1:]:  # all but the stage
        if section != (section := name.rpartition(".")[0]):
            lines.append("")
        field = find(name, rows)
        may = " | ".join(str(choice) or "''" for choice in field.choices) or limits(field)
        kind = "NAME=VALUE" if field.keys else type(field.default).__name__
        note = f"{field.meaning} ({may or kind})"
        lines.append(f"--config.{name}={given.get(name, field.default)}".ljust(52) + f"  {note}")
    return "\n".join([f"stage {config.stage}", *lines])
