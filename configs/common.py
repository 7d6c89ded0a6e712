"""What every config shares: the argument string and the fields of each stage.

A config file is a program of plain values: get_config("stage=grow,resolution=64,size=s") returns
the complete ConfigDict of one stage, stages(arg) the argument strings of the pipeline in order.
"""

from ml_collections import ConfigDict

STAGES = ("pretrain", "invert", "distill", "grow", "cascade", "assess", "prune")
# self-cascade's tunings -> the learning rate of a preset is multiplied by so much
TUNINGS = {"none": 1, "neck": 1, "gain": 10, "2k": 10, "full": 1, "lora": 1, "ft": 1}


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
    """ "a=1,flag" -> the defaults with those values, cast to the defaults' types.

    A bare word switches a boolean on. Raises ValueError on an unknown word, naming the known ones.
    """
    parsed = ConfigDict(defaults)
    for word in filter(None, (arg or "").split(",")):
        name, _, value = word.partition("=")
        if name not in defaults:
            raise ValueError(
                f"config argument {name!r} is unknown: this file takes {', '.join(defaults)}"
            )
        kind = type(defaults[name])
        if kind is bool:
            parsed[name] = value in ("", "1", "true", "True")
        else:
            try:
                parsed[name] = kind(value)
            except ValueError as error:
                raise ValueError(
                    f"config argument {word!r}: {value!r} is no {kind.__name__}: give one"
                ) from error
    if "stage" in parsed and parsed.stage not in STAGES:
        raise ValueError(f"stage {parsed.stage!r} is unknown: choose one of {', '.join(STAGES)}")
    return parsed


def stages(base: int, resolutions: tuple[int, ...]) -> list[str]:
    """Argument strings of a pipeline: three stages at `base`, then one growth per resolution."""
    grown = [f"stage=grow,resolution={r}" for r in resolutions if r > base]
    return ["stage=pretrain", "stage=invert", "stage=distill", *grown]


def base_config(stage: str, **fields) -> ConfigDict:
    """Every field of one stage with its default; `fields` replaces whole top-level entries.

    Paths: `teacher`, `latents` and `base` are the work directories of the stages this one reads;
    launch/pipeline.py fills them in.
    """
    config = ConfigDict()
    config.stage = stage
    config.seed = 0
    config.total_steps = 1000
    config.batch_size = 64
    config.log_every = 50
    config.eval_every = 1000
    config.save_every = 1000
    config.keep = 2
    config.resume = ""
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.data = ConfigDict(
        {
            "name": "scenes",
            "split": "train",
            "eval_split": "test",
            "data_dir": "",
            "resolution": 8,
            "flip": True,
            "num_threads": 1,  # of the loader
            "cache_latents": True,  # hold the whole latent store in memory
            "options": {},
        }
    )
    config.ema = ConfigDict({"decay": 0.999})
    if stage == "pretrain":
        config.model = ConfigDict()
        config.diffusion = edm()
        config.optim = optimiser("adam", 1e-3, warmup_steps=100)
        config.pretrain = ConfigDict(
            {
                "label_dropout": 0.0,
                "augment": 0.0,
                "antithetic": False,  # noise levels in mirrored pairs, as specialists train
                "preview_steps": 20,
            }
        )
    if stage in ("invert", "distill", "cascade", "assess", "prune"):
        config.teacher = ""
    if stage in ("invert", "distill", "grow"):
        config.latents = ""
    if stage == "invert":
        config.invert = ConfigDict(
            {
                "direction": "invert",  # "sample": teacher samples for the L_dstl baseline
                "nodes": 40,
                "clip": False,
                "cfg_scale": 1.0,
                "dtype": "float32",  # of the latents as they are stored
                "per_shard": 1024,
            }
        )
        # precision of the network's calls; "" keeps the teacher's. The solver's is float32
        config.compute = ConfigDict({"dtype": ""})
    if stage in ("distill", "grow"):
        config.optim = optimiser("radam", 8e-6)
        config.optim_discriminator = optimiser("radam", 2e-3)
        config.features = features()
        # class_table: file with a first class embedding [classes, any] (.npy, .npz of one array)
        config.discriminator = ConfigDict({"width": 16, "class_table": ""})
        config[stage] = generator_loss(stage)
        # precision and recomputation of the generator; "" and () keep the teacher's
        config.compute = ConfigDict({"dtype": "", "remat": ()})
    if stage == "grow":
        config.base = ""
    if stage == "cascade":
        config.optim = optimiser("adam", 1e-3)
        config.cascade = cascade()
    if stage in ("assess", "prune"):
        config.specialists = ""
        config.prune = prune(stage)
    if stage == "prune":
        config.optim = optimiser("adam", 1e-3, warmup_steps=20)
    for name, value in fields.items():
        config[name] = value
    return config


def edm() -> ConfigDict:
    """The EDM process (Karras et al. 2022) in PaGoDA's range."""
    return ConfigDict(
        {
            "process": "edm",
            "prediction": "x0",
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "rho": 7.0,
            "sigma_data": 0.5,
            "P_mean": -1.2,
            "P_std": 1.2,
        }
    )


def optimiser(name: str, lr: float, **changes) -> ConfigDict:
    return ConfigDict(
        {
            "name": name,
            "lr": lr,
            "warmup_steps": 0,
            "decay_steps": 0,
            "decay": "cosine",  # tail: constant, then linear in the last fifth
            "clip_norm": 0.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
        }
        | changes
    )


def features(names: tuple[str, ...] = ("classifier",), **changes) -> ConfigDict:
    """Frozen networks of the discriminator and the distance; files and hashes by name."""
    fields = {
        "names": names,
        "paths": {},
        "sha256": {},
        "input_size": 0,  # images with a shorter side are enlarged to it; 0 = the network's own
        "classifier_steps": 0,  # updates of the small classifier; 0 = its default
        "metric_steps": 0,  # the same of the one that measures
        "lpips_pooling": "avg",  # of distance=lpips: the published code's; "max" is LPIPS' own
    }
    return ConfigDict(fields | changes)


def generator_loss(stage: str) -> ConfigDict:
    """Weights and switches of stages 2 and 3, at the specification's defaults (section 3.2-4.4)."""
    loss = ConfigDict(
        {
            "distance": "feature",  # feature | lpips | pixel
            "reconstruction_weight": 1.0,
            "adversarial_weight": 0.2,  # lambda's constant factor
            "adaptive": True,  # times |grad L_rec| / |grad L_adv| at the last layer
            "squared_norms": False,  # the paper's formula; the code's norms are not squared
            "gan_loss": "hinge",  # hinge (the code's) | logistic (the paper's)
            "pairs": "inverted",  # "teacher": L_dstl on teacher samples (base resolution only)
            "separate_updates": False,  # two optimiser steps, L_rec then L_adv
            "data_proportion": 1.0,  # share of each class whose pairs feed L_rec
        }
    )
    if stage == "grow":
        loss.adversarial_weight = 1.0
        loss.adaptive = False
        loss.widths = (32,)  # channels of the grown blocks, one entry for each doubling
    return loss


def cascade(tune: str = "neck") -> ConfigDict:
    """Self-cascade as the paper has it; the released code's choices are other values of these.

    Of the code: mode M, init identity, resize nearest, features step, pivot sampled, times all,
    off_below t0.1, pivot_decay 0.13025.
    """
    return ConfigDict(
        {
            "tune": tune,  # none | neck | gain | 2k | full | lora | ft
            "k": "t0.7",  # where stages restart, as --cascade_k (of tune=none "t0.7,t0.5" too)
            "ratio": 2,  # of a canvas to its pivot, per side
            "sizes": (),  # sides tuned at, sharing weights; () is data.resolution alone
            "mode": "S",  # u joins the decoder's skips (S) or the main stream (M)
            "init": "zero",  # zero: starts tuning-free | identity: u starts as the feature itself
            "width": 8,  # of a neck
            "resize": "bilinear",  # of features: bilinear | nearest
            "features": "clean",  # of the pivot at step 0, once | "step": at every step's own
            "pivot": "aligned",  # the image downsampled | "sampled": a base sample of its class
            "pivot_steps": 18,
            "pivot_decay": 1.0,
            "times": "",  # levels trained at: to_k | all; "": all for lora and ft, else to_k
            "off_below": "",  # no injection below this level, written as k is
            "label_dropout": -1.0,  # for guidance; below 0: as the teacher was trained
            "lora_rank": 4,
            "lora_scale": 1.0,
            "init_from": "",  # work directory of the stage before
            "preview_steps": 20,
            # of tune=none, which draws images and trains nothing
            "out": "",
            "scales": "",  # as --cascade; "" is data.resolution in one stage
            "num": 64,
            "per_shard": 64,
            "steps": 40,
            "method": "heun",
            "spacing": "karras",
            "cfg_scale": 1.0,
            "kernel": "bilinear",  # and below: as launch.sample's flags
            "space": "model",
            "coupled": False,
            "stage_seeds": (),
            "owner": "level",
        }
    )


def prune(stage: str = "assess") -> ConfigDict:
    """Step-adaptive training. The body of the paper was not to be had: all but the formula of the
    budgets, the SNR in decibels and that there is a memory is reconstruction. stage=prune has the
    fields of fine-tuning alone: what the set was assessed with stands in its manifest."""
    fine_tuning = ConfigDict(
        {
            "group": 0,  # of stage=prune, counted from the cleanest
            "overlap": 1,  # steps of that sampler trained on beyond the group, on either side
            "distil": 0.0,  # weight of the base's estimate as the target
            "start": "base",  # scratch: single-stage training, a control
            "optimiser": "fresh",  # sliced: the base's moments, cut like its weights
            "whole_rate": 1.0,  # factor of the rate of a group that keeps the whole network
        }
    )
    if stage == "prune":
        return fine_tuning
    return ConfigDict(
        {
            "groups": 5,
            # equal | nodes | edges | decibels, or clustered: snr | loss | gradient | scores
            "partition": "equal",
            "edges": (),  # of partition edges: where all groups but the cleanest begin
            # linear (the paper's) | snr | loss | flat | sensitivity (solved from measured losses)
            "budget": "linear",
            "recovery": 200,  # optimiser steps before a loss of "sensitivity" is measured
            "k": 0.5,  # of budget linear
            # of budget linear: the cleanest group keeps the whole network | snr_down | mid
            "order": "snr_up",
            "mean": 0.0,  # solve k for this mean instead; of the other budgets, whose 0 means 0.8
            # what a mean is over: positions | steps, of the sampler (as always of sensitivity)
            "weigh": "positions",
            "steps": 40,  # of that sampler
            "spacing": "karras",  # of its levels; leading | trailing | quadratic, of VP teachers
            "plan": "inner",  # widths inside blocks | all: streams too
            # taylor | accumulated | all_times | diff_pruning | magnitude | chance
            "importance": "taylor",
            "threshold": 0.05,  # of diff_pruning
            "score_batches": 8,
            "score_images": 128,
            "proposer": "greedy",  # greedy | evolution | chance | uniform | llm
            "rounds": 12,
            "per_round": 8,
            "remember": True,
            "finalists": 0,  # the best candidates of a search, compared after a trial instead
            "trial": 50,  # optimiser steps
            "proxy_images": 1024,
            "proxy_levels": 16,
            "llm_url": "",
            "llm_model": "",
            **fine_tuning,
        }
    )


def smoke(config: ConfigDict, base: int) -> ConfigDict:
    """The same stage cut down to 3 steps on 24 tiny scenes, base 8 px: what the tests run."""
    config.data.resolution = config.data.resolution * 8 // base
    config.total_steps = 3
    config.batch_size = 8
    config.log_every = 1
    config.eval_every = 3
    config.save_every = 3
    config.data.name = "scenes"
    kept = {name: True for name in ("unlabelled", "single") if config.data.options.get(name)}
    config.data.options = {"size": 24} | kept
    if "model" in config:  # the file's own U-Net at a size that compiles in seconds
        config.model.resolution, config.model.channels, config.model.channel_mult = 8, 16, (1, 2)
        config.model.num_blocks, config.model.attention = 1, ()
        config.model.group_size = 4
        config.model.num_classes = 0 if "unlabelled" in kept else 8
    config.data.split, config.data.eval_split = "train", "test"
    config.data.data_dir = ""
    if "discriminator" in config:
        config.discriminator.width = 4
        config.features = features(classifier_steps=3, metric_steps=3)
    if "grow" in config:
        config.grow.widths = (16,) * len(config.grow.widths)
    if "invert" in config:
        config.invert.nodes = 3
        config.invert.per_shard = 16
    if "pretrain" in config:
        config.pretrain.preview_steps = 2
    if config.stage == "assess":
        config.prune.groups, config.prune.rounds, config.prune.per_round = 2, 1, 2
        config.prune.score_batches, config.prune.score_images = 2, 8
        config.prune.proxy_images, config.prune.proxy_levels = 16, 4
        config.prune.recovery = config.prune.trial = 2
    if "cascade" in config:
        config.cascade.preview_steps = config.cascade.steps = 2
        config.cascade.num = config.cascade.per_shard = 4
    return config


# Arguments that every image config takes, with their defaults.
ARGUMENTS = {
    "stage": "pretrain",
    "resolution": 0,  # of a growth stage; 0 means the base resolution
    "size": "",  # a row of the file's SIZES; "" means the first
    "data_dir": "",
    "seed": 0,
    "jump": False,  # grow from the base to `resolution` in one stage
    "unlabelled": False,  # ignore the labels
    "tune": "neck",  # of stage=cascade: what is trained beside the teacher
    "mobilenet": "",  # weight file of ImageNet MobileNetV2: the discriminator's feature network
    "levels": 0,  # of the teacher's U-Net, from the top; 0: all of the preset's
    "smoke": False,
}


def image_config(
    arg: str | None, sizes: dict, *, name: str, num_classes: int, **data
) -> ConfigDict:
    """One stage of PaGoDA on an image set, from a row of presets.

    sizes: {size: preset}; a preset holds base, top, model (U-Net fields), widths {resolution: width
    of its grown blocks}, and for each stage steps, lr and batch; see configs/scenes.py.
    data: further fields of config.data.
    """
    args = parse_arg(arg, **ARGUMENTS)
    preset = pick_size(args.size, sizes)
    base, stage = preset["base"], args.stage
    config = base_config(stage)
    config.seed = args.seed
    config.data.update(data)
    config.data.name = name
    config.data.data_dir = args.data_dir or config.data.data_dir
    config.data.split = preset.get("split", "train")
    config.data.resolution = args.resolution or (2 * base if stage == "cascade" else base)
    config.data.options = dict(preset.get("options", {}))
    if args.unlabelled:
        config.data.options.unlabelled = True
    if stage == "pretrain":
        classes = 0 if args.unlabelled else num_classes
        config.model = ConfigDict(preset["model"] | {"resolution": base, "num_classes": classes})
    if stage == "invert":
        config.batch_size = preset["invert_batch"]
        config.invert.per_shard = preset.get("per_shard", 1024)
    elif stage != "assess":
        if stage not in preset:
            raise ValueError(f"size {args.size!r} has no stage {stage}: choose another size")
        steps, lr, config.batch_size = preset[stage]
        config.total_steps = steps
        config.optim.lr = lr
        if stage == "cascade":
            if args.tune not in TUNINGS:
                raise ValueError(
                    f"tune {args.tune!r} is unknown: choose one of {', '.join(TUNINGS)}"
                )
            config.cascade = cascade(args.tune)
            config.optim.lr = lr * TUNINGS[args.tune]
        config.eval_every = config.save_every = min(max(steps // 4, 1), 5000)
    if stage == "grow":
        reached = config.data.resolution
        if reached not in preset["widths"]:
            known = ", ".join(map(str, preset["widths"]))
            raise ValueError(
                f"stage=grow takes resolution={known}, not {reached}: name one of them"
            )
        first = base if args.jump else reached // 2
        grown = [r for r in preset["widths"] if first < r <= reached]
        config.grow.widths = tuple(preset["widths"][r] for r in grown)
    if stage in ("distill", "grow"):
        config.optim.b2 = config.optim_discriminator.b2 = preset.get("b2", 0.999)
        config.discriminator.width = preset["discriminator_width"]
        if args.mobilenet:
            config.features = features(
                ("mobilenet_v2",), paths={"mobilenet_v2": args.mobilenet}, input_size=128
            )
    if args.smoke:
        smoke(config, base)
    if args.levels and "model" in config:
        model = config.model
        sides = [model.resolution >> level for level in range(args.levels)]
        model.channel_mult = model.channel_mult[: args.levels]
        model.attention = tuple(side for side in model.attention if side in sides)
    return config


def image_stages(arg: str | None, sizes: dict) -> list[str]:
    """The argument strings of the pipeline of one preset."""
    args = parse_arg(arg, **ARGUMENTS)
    preset = pick_size(args.size, sizes)
    grown = [r for r in preset["widths"] if r <= preset["top"]]
    if args.jump:
        return [*stages(preset["base"], ()), f"stage=grow,resolution={preset['top']}"]
    return stages(preset["base"], tuple(grown))


def pick_size(size: str, sizes: dict) -> dict:
    """A row of presets by name, the first one for ""."""
    size = size or next(iter(sizes))
    if size not in sizes:
        raise ValueError(f"size {size!r} is unknown: choose one of {', '.join(sizes)}")
    return sizes[size]
