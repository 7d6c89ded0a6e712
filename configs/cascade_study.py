"""Self-cascade, measured: composition, the choice of K, tuning against fine-tuning, cost.

Paper: Guo et al. 2024 (arXiv 2402.10491), tables 1 and 2 at toy scale: a teacher of scenes at
16 px, canvases of 32 and 64; E10 and E13 on photographs of clothing.
Hardware: 2 CPU cores, some hours in all, cell by cell; `smoke` proves nothing.

    python -m launch.cascade_study --config=configs/cascade_study.py:data_dir=DIR \\
        --workdir=runs/cascade --record=notebooks/results/cascade.json
    python -m launch.cascade_study --config=... --workdir=... --only=E1,"E6 edm seed 1"

DIR holds TFDS's clothing photographs, for E10 and E13.
"""

from ml_collections import ConfigDict

from configs import common

# name -> argument string of stage=cascade, changes of config.cascade, learning rate (0: default),
# optimiser steps. The controls have a second rate, so that they are not judged by an unlucky one,
# and more steps: fine-tuning five times as many as an upsampler, the paper's claim.
TUNINGS = {
    "full": ("tune=full", {}, 0.0, 400),
    "full identity": ("tune=full", {"init": "identity"}, 0.0, 400),
    "neck": ("tune=neck", {}, 0.0, 400),
    "neck M": ("tune=neck", {"mode": "M"}, 0.0, 400),
    "gain": ("tune=gain", {}, 0.0, 400),
    "2k": ("tune=2k", {}, 0.0, 400),
    "lora4": ("tune=lora", {"lora_rank": 4}, 1e-3, 800),
    "lora4 fast": ("tune=lora", {"lora_rank": 4}, 4e-3, 800),
    "lora32": ("tune=lora", {"lora_rank": 32}, 1e-3, 800),
    "ft": ("tune=ft", {}, 1e-3, 2000),
    "ft slow": ("tune=ft", {}, 3e-4, 800),
}
# whose weights are also measured as they start; the other starts are the tuning-free cascade
AS_THEY_START = ("full identity",)
# whose programs are those of another: not timed
SAME_PROGRAMS = ("full identity", "lora4 fast", "ft slow")
# E11: what the released code does, one switch at a time, of the full modules with identity start
# (the last row); on a VP teacher, for which "all times" is a third more of them
VARIANTS = {
    "code: pivot read at step t": {"features": "step"},
    "code: unaligned pivot": {"pivot": "sampled"},
    "code: all times": {"times": "all"},
    "code: off at the end": {"off_below": "t0.1"},
    "code: decaying pivot": {"features": "step", "pivot_decay": 0.13025},
    "code: main stream": {"mode": "M"},
    "zero gate": {"init": "zero"},
    "identity start": {},
}


def get_config(arg: str = ""):
    args = common.parse_arg(arg, smoke=False, data_dir="")
    config = ConfigDict()
    config.seeds = (0, 1, 2)  # of E2, E6, E7; the rest takes the first
    config.scenes = "size=cascade"
    config.photographs = "size=cpu"
    config.data_dir = args.data_dir  # of the photographs
    config.vp = ("linear", "cosine")  # E4's other teachers
    config.num = 256  # images of a cell
    config.num_real = 2000
    config.num_base = 1024  # base samples that FD_b compares with
    config.steps, config.method = 40, "euler"
    config.ks = ("t0.05", *(f"t{k / 10:g}" for k in range(1, 10)))
    config.k = "t0.7"
    config.crop = 16
    config.bootstrap = 100
    config.eval_steps = (50, 150, 400, 800, 2000)  # a run's weights are measured after these
    config.repeated = ("full", "2k", "ft")  # with the further seeds, for E6 and E7
    config.variant_steps = 400  # of E10 and E11
    config.batch_size = 16
    config.tunings = ConfigDict({name: list(value) for name, value in TUNINGS.items()})
    config.as_they_start = AS_THEY_START
    config.same_programs = SAME_PROGRAMS
    config.variants = ConfigDict(VARIANTS)
    config.few = (16, 64, 256)  # E10's numbers of high-resolution images
    config.timing = ConfigDict({"batch": 16, "rounds": 7})
    config.smoke = False
    return smoke(config) if args.smoke else config


def smoke(config: ConfigDict) -> ConfigDict:
    """The same study on teachers of three steps."""
    config.smoke = True
    config.seeds = (0,)
    config.scenes = config.photographs = "smoke"
    config.vp = ("linear",)
    config.num, config.num_real, config.num_base = 12, 24, 24
    config.steps = 6
    config.ks = ("t0.7",)
    config.crop = 8
    config.bootstrap = 3
    config.eval_steps, config.variant_steps = (1, 2), 2
    config.batch_size = 8
    config.tunings = ConfigDict({name: [*TUNINGS[name][:3], 2] for name in ("gain", "ft")})
    config.as_they_start = ("gain",)
    config.variants = ConfigDict({"zero gate": VARIANTS["zero gate"]})
    config.few = (8,)
    config.timing = ConfigDict({"batch": 8, "rounds": 2})
    return config
