"""PaGoDA on photographs of clothes: base 16 px, grown to 32, 64 and 128 px.

Data: the prepared TFDS set "clothing" (3,068 photographs with true detail at 128 px); the set is
small, so read the distance to the nearest training image beside any quality number.
Hardware: size=cpu (1,227 images) about 40 minutes on 2 cores;
size=gpu about 10 minutes on one H100 or H200.

    python -m launch.pipeline --config=configs/clothing.py --arg=data_dir=DIR --workdir=runs/photos
"""

from configs import common
from configs.models import preset

SIZES = {
    "cpu": {
        "base": 16,
        "top": 128,
        "split": "train[:40%]",
        "model": preset("tiny16"),
        "widths": {32: 32, 64: 32, 128: 16},
        "pretrain": (1500, 2e-3, 64),
        "distill": (500, 1e-3, 32),
        "grow": (150, 1e-3, 8),
        "cascade": (300, 1e-3, 16),
        "prune": (200, 1e-3, 64),
        "b2": 0.99,
        "per_shard": 250,
        "invert_batch": 125,
        "discriminator_width": 16,
    },
    "gpu": {
        "base": 16,
        "top": 128,
        "model": preset("tiny16", channels=96, num_blocks=2),
        "widths": {32: 96, 64: 96, 128: 48},
        "pretrain": (15000, 5e-4, 256),
        "distill": (5000, 1e-4, 64),
        "grow": (3000, 1e-4, 64),
        "cascade": (4000, 5e-4, 64),
        "prune": (2500, 2e-4, 256),
        "invert_batch": 2048,
        "discriminator_width": 32,
    },
}


def get_config(arg: str = ""):
    return common.image_config(arg, SIZES, name="clothing", num_classes=10)


def stages(arg: str = "") -> list[str]:
    """The pipeline's stages in order, as argument strings."""
    return common.image_stages(arg, SIZES)
