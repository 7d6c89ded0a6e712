"""The common code of all config files: argument strings, presets, pipelines.

A config file has three functions. get_config("stage=grow,resolution=64,size=small") returns the
complete config of one stage; stages(arg) returns the argument strings of a pipeline's stages;
sweep(name) returns those of a study. An argument string is a list of NAME=VALUE, where NAME is one
of ARGUMENTS or a field of configs/fields.py, such as prune.k=0.3, total_steps=500 or
features.paths.inception_v3=FILE. A comma ends a word, except in brackets or in quotes around the
whole VALUE. A pipeline sets a field in every stage that has it; STAGE.NAME=VALUE sets it in one
stage, as pretrain.total_steps=300, or grow32.total_steps=100 in the growth to 32 px. Commands also
take a field as --config.NAME=VALUE.
"""

import ast
import difflib
import re
from typing import Any

from ml_collections import ConfigDict

from configs import fields
from configs.data_sets import DataSet
from configs.models import growth_widths, preset

ARGUMENTS = {
    "stage": "pretrain",
    "pipeline": "pagoda",  # one of PIPELINES
    "resolution": 0,  # resolution of stage grow or cascade; 0: the preset's
    "size": "",  # a key of the file's SIZES; "": the first
    "base": 0,  # the teacher's resolution; 0: the preset's
    "top": 0,  # the last resolution of a pipeline; 0: the data set's
    "data_dir": "",
    "controls": False,  # a pipeline also trains CONTROLS, for its report
    "control": "",  # train one of CONTROLS instead of the stage itself
    "guided": False,  # the generator takes the guidance scale omega
    "jump": False,  # grow from the base to `resolution` in one stage
    "unlabelled": False,  # ignore the labels
    "tune": "neck",  # weights that stage cascade trains
    "features": "",  # NAME=FILE of the frozen network of discriminator and distance
    "levels": 0,  # number of resolution levels of the teacher's U-Net; 0: the preset's
    "smoke": False,  # three steps on tiny scenes
}
KINDS = {bool: "True or False", int: "a whole number", float: "a number", dict: "a dictionary"}
PIPELINES = ("pagoda", "one_step", "cascade", "experts")
# Trainings that show what a part of PaGoDA's loss does: {name: {field: value}}. They begin as the
# stage does. Stage 2 without L_rec is GDD, a GAN that starts from the teacher: does inversion pay?
CONTROLS = {
    "no_rec": {
        f"{stage}.{term}_weight": 0.0
        for stage in ("distill", "grow") for term in ("feature", "pixel", "lpips")
    },
    "no_adv": {"distill.adversarial_weight": 0.0, "grow.adversarial_weight": 0.0},
    # L_dstl: pairs of the teacher's samples, which exist at its own resolution only
    "dstl": {"invert.direction": "sample", "distill.pairs": "teacher"},
}  # fmt: skip
# The words of stage invert that make the teacher's guided samples.
SAMPLES = "invert.direction=sample,invert.omega=uniform"
# Factors of the learning rate for some tunings of self-cascade, which train few weights.
TUNING_RATE = {"gain": 10, "2k": 10}


# NAME="VALUE" with any commas, or text whose commas stand in brackets.
WORD = re.compile(r"""[^,=]+=(['"]).*?\1(?=,|$)|(?:\([^)]*\)|[^,])+""", re.DOTALL)


def split(arg: str | None) -> list[str]:
    """The words NAME=VALUE of an argument string."""
    return [match[0] for match in WORD.finditer(arg or "")]


def unquoted(text: str) -> str:
    """The text without the quotes around it, if it has them."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def parse(arg: str | None) -> tuple[ConfigDict, dict[str, str]]:
    """(ARGUMENTS updated from `arg`, {field: text} of the fields that `arg` sets).

    A NAME without a value sets a boolean to True. Raises ValueError for an unknown name.
    """
    args, changes = ConfigDict(ARGUMENTS), {}
    for word in split(arg):
        name, _, text = word.partition("=")
        # base=16 is the teacher's resolution, base=runs/distill the field of stage grow.
        if name in ARGUMENTS and (name != "base" or re.fullmatch(r"-?\d*", text)):
            args[name] = typed(name, text or "True", ARGUMENTS[name])
            if type(args[name]) is int and not 0 <= args[name] <= 2**14:
                raise ValueError(f"config argument {word}: give a number from 0 to {2**14}")
        elif any(find(name, stage) for stage in fields.STAGES):
            changes[name] = text
        elif name:
            near = difflib.get_close_matches(name, [*ARGUMENTS, *fields.every_field()], 1)
            hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(ARGUMENTS)}."
            raise ValueError(
                f"config argument {name!r} is unknown: {hint} A comma ends a word, except in "
                "quotes around its value, such as 'a,b'"
            )
    choices = {"stage": fields.STAGES, "pipeline": PIPELINES, "control": ("", *CONTROLS)}
    for name, known in choices.items():
        if args[name] not in known:
            raise ValueError(f"{name} {args[name]!r} is unknown: choose one of {', '.join(known)}")
    return args, changes


def word(item: tuple[str, str]) -> str:
    """The word "NAME=VALUE" of an argument string for a field that a command line gives."""
    name, text = item
    known = [field for stage in fields.STAGES if (field := find(name, stage))]
    if known and isinstance(known[0].default, tuple):
        text = f"({text.strip('()')})"  # its commas are no new words
    elif re.search("[,(]", text) and text == unquoted(text):
        text = f"'{text}'" if "'," not in text else f'"{text}"'
    return f"{name}={text}"


def find(name: str, stage: str) -> fields.Field | None:
    """The field `name` of a stage, which may be a key of a dictionary, or begin with the name of
    the stage; None if unknown."""
    first, _, rest = name.partition(".")
    own = fields.fields(stage)
    return fields.find(name, own) or (fields.find(rest, own) if whose(first) == stage else None)


def whose(name: str) -> str:
    """The stage that the first part of a field's name names: "grow" for "grow32", else ""."""
    stage = name.rstrip("0123456789")
    return stage if stage in fields.STAGES else ""


def own_changes(changes: dict[str, Any], config: ConfigDict) -> dict[str, Any]:
    """The changes of one stage: "grow32.total_steps" is its total_steps, or another stage's."""
    mine = {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        sections = (fields.find(name, fields.fields(stage)) for stage in fields.STAGES)
        if whose(first) and not any(sections):  # prune.k is a field of assess
            if first not in (config.stage, f"{config.stage}{config.data.resolution}"):
                continue
            name = rest
        mine[name] = value
    return mine


def typed(name: str, text: str, default: Any) -> Any:
    """`text` converted to the type of `default`; if that is None, to the Python literal it is.

    One entry of a tuple needs no brackets, and its strings need no quotes.
    """
    if isinstance(default, (str, dict)):
        text = unquoted(text)
    if isinstance(default, str):
        return text
    if isinstance(default, bool) and text.lower() in ("1", "true", "0", "false"):
        return text.lower() in ("1", "true")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if isinstance(default, tuple):
        if isinstance(value, str):
            value = tuple(filter(None, re.split("[, ]+", value.strip("()[] "))))
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if isinstance(default, float) and isinstance(value, int):
        value = float(value)
    if default is not None and type(value) is not type(default):
        kind = KINDS[type(default)]
        raise ValueError(f"{name}={text}: {text!r} is not {kind}: give one, as {name}={default}")
    return value


def change(config: ConfigDict, values: dict[str, Any], *, strict: bool = False) -> ConfigDict:
    """The config with values such as {"optim.lr": 1e-3}, as far as its stage has the fields.

    strict: raise ValueError for a field that the stage lacks.
    """
    for name, value in values.items():
        field = find(name, config.stage)
        if field is None and strict:
            raise ValueError(fields.unknown(name, config.stage))
        if field is None:
            continue
        *sections, last = name.split(".")
        place = config
        for section in sections:
            if section not in place:  # a dictionary in a dictionary, such as data.options.where
                place[section] = ConfigDict()
            place = place[section]
        value = typed(name, value, field.default) if isinstance(value, str) else value
        with place.ignore_type():  # `fields.check` knows the types
            place[last] = value
    return config


def options(words: list[str]) -> dict[str, Any]:
    """The options of a data set from words such as "skip_corrupt=True"."""
    config = fields.defaults("pretrain")
    pairs = (one.partition("=") for one in words)
    change(config, {f"data.options.{name}": text for name, _, text in pairs}, strict=True)
    fields.check(config)
    return config.data.options.to_dict()


def train(steps: int, lr: float, batch: int, more: dict[str, Any] | None = None) -> dict:
    """{field: value} for a training stage: steps, learning rate, batch size, and `more`."""
    every = min(max(steps // 4, 1), 5000)
    return {
        "total_steps": steps, "optim.lr": lr, "batch_size": batch, "eval_every": every,
        "save_every": every,
    } | (more or {})  # fmt: skip


def decayed(steps: int, lr: float, batch: int, more: dict[str, Any] | None = None) -> dict:
    """`train` with a learning rate that decays to 0 at the last step."""
    return train(steps, lr, batch, {"optim.decay_steps": steps} | (more or {}))


# The layout of a picture of few pixels is decided at higher noise levels than those that EDM trains
# most: with its -1.2 and 1.2 the samples' grounds have wrong frequencies after so few updates.
LEVELS = {"diffusion.P_mean": -0.9, "diffusion.P_std": 1.5}
# RAdam's rectification lasts about 2 / (1 - b2) updates, too long for short runs with b2 = 0.999.
# A grown image's colours drift if lambda is 1, as published.
SHORT_GAN = {
    "optim.b2": 0.99, "optim_discriminator.b2": 0.99,
    "grow.adversarial_weight": 0.2, "grow.adaptive": True,
}  # fmt: skip
# Settings of the small data sets, for two CPU cores and for one accelerator.
CPU = {
    "pretrain": train(1500, 2e-3, 64),
    "invert": {"batch_size": 125, "invert.per_shard": 250},
    "distill": train(500, 1e-3, 32, SHORT_GAN),
    "grow": train(150, 1e-3, 8, SHORT_GAN),
    "cascade": train(300, 1e-3, 16),
    "prune": train(200, 1e-3, 64),
}
GPU = {
    "pretrain": train(15000, 5e-4, 256),
    "invert": {"batch_size": 2048},
    "distill": train(5000, 1e-4, 64, {"discriminator.width": 32}),
    "grow": train(3000, 1e-4, 64, {"discriminator.width": 32}),
    "cascade": train(4000, 5e-4, 64),
    "prune": train(2500, 2e-4, 256),
}


def gallery(more: dict[str, Any] | None = None) -> dict:
    """The row of a model that ships: 16 to 64 px in about two hours of two CPU cores.

    more: {field: value} of all stages after the teacher.
    """
    more = more or {}
    teacher = {"pretrain.label_dropout": 0.1, "ema.decay": 0.9995} | LEVELS
    invert = {"batch_size": 250, "invert.per_shard": 1000}
    return {
        "model": "tiny16",
        "top": 64,
        "pretrain": decayed(5000, 2e-3, 32, teacher),
        "invert": invert | {"invert.nodes": 12, "invert.noise": 0.05} | more,
        "regress": decayed(2000, 2e-3, 32, more),
        "distill": decayed(600, 5e-4, 24, SHORT_GAN | more),
        "regress_grown": decayed(800, 2e-3, 16, more),
        "grow": decayed(600, 5e-4, 16, SHORT_GAN | {"features.input_size": 64} | more),
    }


def image_config(arg: str | None = "", *, sizes: dict[str, dict], data: DataSet) -> ConfigDict:
    """The config of one stage on a data set; words of `arg`: ARGUMENTS, and any field.

    sizes: {size: row}, see configs/scenes.py. A row has `model`, the name of a preset, or of
    several by their resolution; for each stage {field: value} that differ from the defaults, and
    for "grow64", say, those of one resolution; and optionally `split`, `options` and `top`.
    `latents`: pixels of one latent; then stages autoencode and encode read the data set, and the
    others its latents, in data_dir.
    """
    args, changes = parse(arg)
    row, stage = pick(args.size, sizes), args.stage
    name = model_name(row, args)
    if stage not in row and stage not in ("assess", "encode", "autoencode"):
        raise ValueError(f"size {args.size!r} has no stage {stage}: choose another size")
    model = preset(name)
    base = model["resolution"]
    config = fields.defaults(stage)
    config.data.update(
        name=data.name,
        data_dir=args.data_dir,
        split=row.get("split", "train"),
        eval_split=data.eval_split,
        resolution=args.resolution or first_size(stage, base, row.get("top", data.top)),
        flip=data.flip,
    )
    config.data.options = data.options | row.get("options", {})
    if "latents" in row:
        read_latents(config, row, args)
    if args.unlabelled:
        config.data.options.unlabelled = True
    if stage == "pretrain":
        classes = 0 if args.unlabelled else data.num_classes
        config.model = ConfigDict(model | {"num_classes": classes})
        if args.guided:
            config.pretrain.label_dropout = 0.1
    grown = stage in ("grow", "regress") and config.data.resolution != base
    if grown or stage == "grow":
        known = growth_widths(name, args.top or row.get("top", data.top))
        config.grow.widths = widths(known, config.data.resolution, base if args.jump else 0)
    if "features" in config:
        pixels = 1 if stage == "autoencode" else row.get("latents", 1)
        config.features.input_size = input_size(config.data.resolution * pixels)
    change(config, row.get("regress_grown" if grown and stage == "regress" else stage, {}))
    change(config, row.get(f"{stage}{config.data.resolution}", {}))
    if stage == "cascade":
        config.cascade.tune = args.tune
        config.optim.lr *= TUNING_RATE.get(args.tune, 1)
    if args.features and "features" in config:
        name, _, path = args.features.partition("=")
        config.features.names = (name,)
        config.features.paths = {name: path} if path else {}
        config.features.input_size = 0
    if args.smoke:
        smoke(config, base)
    if args.levels and "model" in config:
        keep_levels(config.model, args.levels)
    changes = own_changes(changes, config)
    change(config, changes)
    change(config, CONTROLS.get(args.control, {}))
    if stage == "prune" and "optim.decay_steps" not in changes:
        # An expert has few updates, so the rate rises in at most a fifth of them and decays to 0.
        config.optim.decay_steps = config.total_steps
        config.optim.warmup_steps = min(config.optim.warmup_steps, config.total_steps // 5)
    return config


def first_size(stage: str, base: int, top: int) -> int:
    """The resolution of a stage that is given none."""
    return {"cascade": 2 * base, "autoencode": top}.get(stage, base)


def read_latents(config: ConfigDict, row: dict, args: ConfigDict) -> None:
    """Set the data of a stage of a row with `latents`: for stages autoencode and encode pictures of
    the row's top, for encode also of its halves down to the smallest base; else their latents."""
    if config.stage not in ("autoencode", "encode"):
        config.data.update(name="latents", split=row.get("split", "train").partition("[")[0])
        config.data.flip, config.data.options = False, {}
        return
    bases = row["model"] if isinstance(row["model"], dict) else [preset(row["model"])["resolution"]]
    top = args.top or row["top"]
    config.data.resolution = args.resolution or top * row["latents"]
    if config.stage == "encode":
        config.encode.levels = 1 + (top // min(bases)).bit_length() - 1


def input_size(resolution: int) -> int:
    """The size to which images are enlarged for EfficientNet; 0: the published one, 224 px.

    Images of up to 96 px hold so little detail that a smaller size serves, in less time.
    """
    return 64 if resolution <= 32 else 96 if resolution <= 96 else 0


def model_name(row: dict, args: ConfigDict) -> str:
    """The preset of a row for the base resolution in `args`; 0 is that of its first preset."""
    name = row["model"]
    names = name if isinstance(name, dict) else {preset(name)["resolution"]: name}
    base = args.base or next(iter(names))
    if base not in names:
        sides = " or ".join(map(str, names))
        raise ValueError(f"base={base}: this size starts at {sides} px: give one, or leave it out")
    return names[base]


def widths(known: dict[int, int], resolution: int, first: int) -> tuple[int, ...]:
    """The widths of the blocks that grow a generator to `resolution`.

    known: {resolution: width}. first: resolution to grow from; 0 is half of `resolution`.
    """
    if resolution not in known:
        sides = ", ".join(map(str, known))
        raise ValueError(f"stage=grow takes resolution={sides}, not {resolution}: name one of them")
    first = first or resolution // 2
    return tuple(width for side, width in known.items() if first < side <= resolution)


def keep_levels(model: ConfigDict, levels: int) -> None:
    """Keep only the `levels` highest resolutions of the U-Net."""
    if levels > len(model.channel_mult):
        raise ValueError(f"levels={levels}: this size has {len(model.channel_mult)}, give fewer")
    sides = [model.resolution >> level for level in range(levels)]
    model.channel_mult = model.channel_mult[:levels]
    model.attention = tuple(side for side in model.attention if side in sides)


def smoke(config: ConfigDict, base: int) -> None:
    """Reduce a stage to 3 steps on 24 scenes with a base of 8 px, for the tests."""
    options = {name: True for name in ("unlabelled", "single") if config.data.options.get(name)}
    side = config.data.resolution * 8 // base
    config.data.update(name="scenes", split="train", eval_split="test", data_dir="")
    config.data.update(resolution=side, num_threads=1)
    config.data.options = {"size": 24} | options
    if "model" in config:  # the file's own U-Net at a size that compiles in seconds
        classes = 0 if "unlabelled" in options else 8
        config.model.update(resolution=8, channels=16, channel_mult=(1, 2), num_blocks=1)
        config.model.update(attention=(), group_size=4, num_classes=classes, dtype="float32")
    if "autoencode" in config:
        config.autoencode.update(channels=8, levels=1, blocks=1)
    if "grow" in config:
        config.grow.widths = (16,) * len(config.grow.widths)
    if "features" in config:
        config.features.names, config.features.paths = ("classifier",), {}
    change(config, SMOKE)


SMOKE = {
    "total_steps": 3, "batch_size": 8, "log_every": 1, "eval_every": 3, "save_every": 3,
    "discriminator.width": 4, "features.fit_steps": 3,
    "compute.dtype": "", "invert.nodes": 3, "invert.per_shard": 16,
    "prune.groups": 2, "prune.rounds": 1, "prune.per_round": 2, "prune.images": 16,
}  # fmt: skip


def image_stages(arg: str | None = "", *, sizes: dict[str, dict], data: DataSet) -> list[str]:
    """The argument strings of a pipeline's stages, in order.

    pagoda: pretrain, invert (with `guided` also for the teacher's samples), distill, and one growth
    per doubling; regress before each of them (if the size has it, and not in smoke runs).
    one_step: the same without growth. cascade: pretrain, and one tuning per doubling. experts:
    pretrain, assess, and prune for each group. `teacher=DIR` in `arg` replaces pretraining.
    `controls` adds CONTROLS to the first two.
    """
    args, changes = parse(arg)
    row = pick(args.size, sizes)
    base = preset(model_name(row, args))["resolution"]
    first = [] if changes.get("teacher") else ["stage=pretrain"]
    if args.pipeline == "experts":
        assess = image_config(f"{arg or ''},stage=assess", sizes=sizes, data=data)
        groups = range(assess.prune.groups)
        return [*first, "stage=assess", *(f"stage=prune,prune.group={g}" for g in groups)]
    if args.pipeline == "cascade":
        top = args.top or 2 * base
        return [*first, *(f"stage=cascade,resolution={r}" for r in doublings(base, top))]
    regress = ["stage=regress"] * ("regress" in row and not args.smoke)
    samples = [f"stage=invert,{SAMPLES}"] * args.guided
    planned = ["stage=invert", *samples, *regress, "stage=distill"]
    if args.pipeline == "pagoda":
        top = args.top or max(row.get("top", data.top), base)
        reached = doublings(base, top)
        regress = ["stage=regress"] * ("regress_grown" in row and not args.smoke)
        for side in reached[-1:] if args.jump else reached:
            planned += [f"{stage},resolution={side}" for stage in (*regress, "stage=grow")]
    if args.controls:
        for one in [words for words in planned if re.match("stage=(distill|grow)", words)]:
            planned = [*planned, f"{one},control=no_rec", f"{one},control=no_adv"]
        planned += ["stage=invert,control=dstl", "stage=distill,control=dstl"]
    return first + planned


def doublings(base: int, top: int) -> list[int]:
    """The resolutions 2 * base, 4 * base, ... `top`."""
    if top not in [base << n for n in range(12)]:
        near = base << max((top // base).bit_length() - 1, 1)
        raise ValueError(f"top={top} is no doubling of the base {base}: give --arg=top={near}, say")
    return [base << n for n in range(1, (top // base).bit_length())]


def pick(size: str, sizes: dict[str, dict]) -> dict:
    """The row `size` of `sizes`; the first one for ""."""
    size = size or next(iter(sizes))
    if size not in sizes:
        raise ValueError(f"size {size!r} is unknown: choose one of {', '.join(sizes)}")
    return sizes[size]
