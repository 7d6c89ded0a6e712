"""PaGoDA on procedural scenes: the embedded default, no files needed.

Paper: Kim et al. 2024 (arXiv 2405.14822), the pipeline of Figure 2 at toy scale: base 8 px, grown
to 16 and 32 (size=quick), or base 16 grown to 128 (size=small).
Hardware: 2 CPU cores, about 13 minutes (quick).

    python -m launch.pipeline --config=configs/scenes.py --arg=size=quick --workdir=runs/quick
    python -m launch.train --config=configs/scenes.py:stage=pretrain --workdir=runs/teacher
"""

from configs import common
from configs.models import preset

SIZES = {
    "quick": {
        "base": 8,
        "top": 32,
        "options": {"size": 1500},
        "model": preset("tiny8"),
        "widths": {16: 32, 32: 32},
        # steps, learning rate, batch
        "pretrain": (1200, 2e-3, 64),
        "distill": (500, 1e-3, 32),
        "grow": (200, 1e-3, 12),
        "cascade": (300, 1e-3, 16),
        "prune": (200, 1e-3, 64),
        "b2": 0.99,  # RAdam warms up for some 2 / (1 - b2) updates: 0.999 is for longer runs
        "per_shard": 600,
        "invert_batch": 200,
        "discriminator_width": 16,
    },
    # the teacher of the self-cascade study: one object a picture, whose repetition is easily seen
    "cascade": {
        "base": 16,
        "top": 64,
        "options": {"size": 4000, "single": True},
        "model": preset("tiny16", channel_mult=(1, 2, 2), attention=(4,)),
        "widths": {32: 32, 64: 32},
        "pretrain": (2000, 2e-3, 48),
        "distill": (500, 1e-3, 32),
        "grow": (300, 1e-3, 16),
        "cascade": (400, 1e-3, 16),
        "prune": (300, 1e-3, 48),
        "b2": 0.99,
        "per_shard": 1000,
        "invert_batch": 200,
        "discriminator_width": 16,
    },
    # the teacher of the step-adaptive study
    "specialists": {
        "base": 8,
        "top": 8,
        "options": {"size": 4000},
        "model": preset("tiny8"),
        "widths": {},
        "pretrain": (2400, 2e-3, 64),
        "distill": (500, 1e-3, 32),
        "prune": (320, 1e-3, 64),
        "b2": 0.99,
        "invert_batch": 200,
        "discriminator_width": 16,
    },
    "small": {
        "base": 16,
        "top": 128,
        "options": {"size": 20000},
        "model": preset("small"),
        "widths": {32: 64, 64: 64, 128: 32},
        "pretrain": (40000, 5e-4, 128),
        "distill": (20000, 1e-4, 64),
        "grow": (10000, 1e-4, 64),
        "cascade": (4000, 1e-4, 64),
        "prune": (5000, 2e-4, 128),
        "invert_batch": 512,
        "discriminator_width": 32,
    },
}


def get_config(arg: str = ""):
    return common.image_config(arg, SIZES, name="scenes", num_classes=8)


def stages(arg: str = "") -> list[str]:
    """The pipeline's stages in order, as argument strings."""
    return common.image_stages(arg, SIZES)


def sweep(stage: str):
    """Three seeds: drift, grown with and without L_rec; a specialist's targets and start."""
    for seed in (0, 1, 2):
        if stage == "grow":
            for weight in (1.0, 0.0):
                yield {"seed": seed, "grow.reconstruction_weight": weight}
        if stage == "prune":
            yield {"seed": seed}
            yield {"seed": seed, "prune.distil": 0.5}
            yield {"seed": seed, "prune.start": "scratch"}
