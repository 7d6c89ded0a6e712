"""PaGoDA on emoji: base 16 px, grown to 32, 64 and 128 px.

Data: the prepared TFDS set "noto_emoji" (3,063 drawings on white). Skin-tone variants are nearly
the same picture; only the default tone is kept, so that the test split is not a copy of training.
Flips are off: letters and flags have a right way round.
Hardware: size=cpu about 40 minutes on 2 cores.

    python -m launch.pipeline --config=configs/emoji.py --arg=data_dir=DIR --workdir=runs/emoji
"""

from configs import common
from configs.models import preset

SIZES = {
    "cpu": {
        "base": 16,
        "top": 128,
        "split": "train[:60%]",
        "options": {"where": {"skin_tone": False}},
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
}


def get_config(arg: str = ""):
    return common.image_config(arg, SIZES, name="noto_emoji", num_classes=10, flip=False)


def stages(arg: str = "") -> list[str]:
    """The pipeline's stages in order, as argument strings."""
    return common.image_stages(arg, SIZES)
