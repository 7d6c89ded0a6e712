"""PaGoDA on procedural scenes, which need no files.

Paper: Kim et al. 2024 (arXiv 2405.14822), the pipeline of Figure 2 at small scale: base 8 px, grown
to 16 and 32 px (size=quick), or base 16 px grown to 128 px (size=small). size=cascade and
size=experts train the teachers of the self-cascade and the step-adaptive experiments.
Hardware: 2 CPU cores, about 14 minutes (quick).

    python -m launch.pipeline --config=configs/scenes.py --arg=size=quick --workdir=runs/quick
    python -m launch.train --config=configs/scenes.py:stage=pretrain --workdir=runs/teacher
"""

import functools

from configs import common
from configs.data_sets import DATA_SETS
from configs.sweeps import sweep  # noqa: F401  launch.sweep reads it here

# A teacher trained for minutes knows its images no better than this noise.
INVERT = {"batch_size": 200, "invert.nodes": 12, "invert.noise": 0.05}
# A mirrored picture would need another caption. The first images suffice for pairs, half an hour.
TEXT = {"data.flip": False, "data.options.size": 4000}
STRONG = {"grow.adversarial_weight": 0.6}  # with 0.2 so few updates leave growth smooth
AS_IS = {"data.flip": False}  # no mirrored pictures: half the pairs to invert
SMALL = {"features.input_size": 32}  # of 64 px EfficientNet would take half of an update
SIZES = {
    "quick": {
        "model": "tiny8",
        "options": {"size": 3000, "single": True},
        "pretrain": common.decayed(4000, 2e-3, 32, common.LEVELS),
        "invert": INVERT | {"invert.per_shard": 600},
        "regress": common.decayed(2000, 2e-3, 32),
        "distill": common.decayed(100, 1e-3, 16, common.SHORT_GAN | SMALL),
        "regress_grown": common.decayed(700, 2e-3, 16),
        "grow": common.decayed(100, 1e-3, 16, common.SHORT_GAN | SMALL | STRONG),
        "cascade": common.train(300, 1e-3, 16),
        "prune": common.train(200, 1e-3, 64),
    },
    # The ablations of configs/sweeps.py: size=quick cut to what differences need to be told.
    "ablation": {
        "model": {8: "tiny8", 16: "tiny16", 32: "tiny32"},
        "options": {"size": 600, "single": True},
        "pretrain": common.decayed(1000, 2e-3, 32, common.LEVELS),
        "invert": INVERT | {"invert.per_shard": 200} | AS_IS,
        "regress": common.decayed(300, 2e-3, 32, AS_IS),
        "distill": common.decayed(100, 1e-3, 16, common.SHORT_GAN | SMALL | AS_IS),
        "regress_grown": common.decayed(300, 2e-3, 16, AS_IS),
        "grow": common.decayed(100, 1e-3, 16, common.SHORT_GAN | SMALL | AS_IS),
    },
    # One object in each picture, 16 to 64 px, with features of a real network: hours.
    "gallery": common.gallery({"data.flip": False})
    | {
        "options": {"size": 20000, "single": True},
        "cascade": common.train(400, 1e-3, 16),
        "prune": common.train(300, 1e-3, 48),
    },
    # Each picture has one object, so that its repetition at larger sizes is easily seen.
    "cascade": {
        "model": "deep16",
        "top": 64,
        "options": {"size": 4000, "single": True},
        "pretrain": common.train(2000, 2e-3, 48),
        "invert": {"batch_size": 200, "invert.per_shard": 1000},
        "distill": common.train(500, 1e-3, 32, common.SHORT_GAN),
        "grow": common.train(300, 1e-3, 16, common.SHORT_GAN),
        "cascade": common.train(400, 1e-3, 16),
        "prune": common.train(300, 1e-3, 48),
    },
    "experts": {
        "model": "tiny8",
        "top": 8,
        "options": {"size": 4000},
        "pretrain": common.train(2400, 2e-3, 64),
        "invert": {"batch_size": 200},
        "distill": common.train(500, 1e-3, 32, common.SHORT_GAN),
        "prune": common.train(320, 1e-3, 64),
    },
    # Captions of one to three objects condition the teacher and the generators, 16 and 32 px. At
    # equal images batches of 32 learn captions several times as fast as batches of 64.
    "text": {
        "model": "tiny16",
        "top": 32,
        "options": {"size": 20000},
        "pretrain": common.decayed(7000, 2e-3, 32, {"data.flip": False, "ema.decay": 0.9995})
        | {"pretrain.label_dropout": 0.1, "text.encoder": "transformer"}
        | common.LEVELS,
        "invert": {"batch_size": 250, "invert.nodes": 18, "invert.noise": 0.05} | TEXT,
        "regress": common.decayed(2000, 2e-3, 32, TEXT),
        "distill": common.decayed(1000, 1e-3, 16, common.SHORT_GAN | TEXT),
        "regress_grown": common.decayed(800, 2e-3, 16, TEXT),
        "grow": common.decayed(500, 1e-3, 16, common.SHORT_GAN | TEXT),
        "cascade": common.train(400, 1e-3, 16, TEXT),
        "prune": common.train(300, 1e-3, 48, TEXT),
    },
    "small": {
        "model": "small16",
        "top": 128,
        "options": {"size": 20000},
        "pretrain": common.train(40000, 5e-4, 128),
        "invert": {"batch_size": 512},
        "distill": common.train(20000, 1e-4, 64, {"discriminator.width": 32}),
        "grow": common.train(10000, 1e-4, 64, {"discriminator.width": 32}),
        "cascade": common.train(4000, 1e-4, 64),
        "prune": common.train(5000, 2e-4, 128),
    },
}

get_config = functools.partial(common.image_config, sizes=SIZES, data=DATA_SETS["scenes"])
stages = functools.partial(common.image_stages, sizes=SIZES, data=DATA_SETS["scenes"])
