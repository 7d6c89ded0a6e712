"""PaGoDA on procedural scenes: the embedded default, no files needed.

Paper: Kim et al. 2024 (arXiv 2405.14822), the pipeline of Figure 2 at toy scale: base 8 px, grown
to 16 and 32 (size=quick), or base 16 grown to 128 (size=small).
Hardware: 2 CPU cores, about 12 minutes (quick).

    python -m launch.pipeline --config=configs/scenes.py --arg=size=quick --workdir=runs/quick
    python -m launch.train --config=configs/scenes.py:stage=pretrain --workdir=runs/teacher
"""

from configs import common

SIZES = {
    # images, base, resolutions, channels, steps of pretrain / distill / each growth, batch
    "quick": dict(images=2000, base=8, top=32, channels=32, steps=(4000, 1500, 800), batch=64),
    "small": dict(
        images=20000, base=16, top=128, channels=64, steps=(40000, 20000, 10000), batch=64
    ),
}


def arguments(arg):
    args = common.parse_arg(arg, stage="pretrain", resolution=0, size="quick", smoke=False, seed=0)
    if args.size not in SIZES:
        raise ValueError(f"size {args.size!r} is unknown: choose one of {', '.join(SIZES)}")
    return args, SIZES[args.size]


def stages(arg: str = "") -> list[str]:
    """The pipeline's stages in order, as argument strings."""
    _, size = arguments(arg)
    doubled = [size["base"] * 2**i for i in range(1, 5) if size["base"] * 2**i <= size["top"]]
    return common.stages(size["base"], doubled)


def get_config(arg: str = ""):
    args, size = arguments(arg)
    config = common.base_config(args.stage)
    base, (pretrain, distill, grow) = size["base"], size["steps"]
    config.seed = args.seed
    config.batch_size = size["batch"]
    config.data.resolution = args.resolution or base
    config.data.options = {"size": size["images"]}
    if args.stage == "pretrain":
        config.total_steps = pretrain
        config.optim = common.optimiser("adam", 1e-3, warmup_steps=200, clip_norm=1.0)
        config.model = common.tiny_unet(base, size["channels"], num_classes=8)
    if args.stage == "invert":
        config.batch_size = 256
    if args.stage == "distill":
        config.total_steps = distill
        config.optim = common.optimiser("radam", 3e-4)
    if args.stage == "grow":
        config.total_steps = grow
        config.optim = common.optimiser("radam", 3e-4)
        config.grow.widths = (size["channels"],)
    config.eval_every = config.save_every = max(config.total_steps // 2, 1)
    return common.smoke(config) if args.smoke else config
