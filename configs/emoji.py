"""PaGoDA on emoji: base 16 px, grown to 32, 64 and 128 px.

Data: the prepared TFDS set "noto_emoji" (3,063 drawings on white, the default skin tone alone).
Hardware: size=cpu about 40 minutes on 2 cores.

    python -m launch.pipeline --config=configs/emoji.py --arg=data_dir=DIR --workdir=runs/emoji
"""

from configs import common
from configs.data_sets import DATA_SETS
from configs.sweeps import sweep  # noqa: F401  launch.sweep reads it here

SIZES = {"cpu": common.CPU | {"model": "tiny16", "split": "train[:60%]"}}


def get_config(arg: str = ""):
    """The config of one stage; words of `arg`: configs/common.py, ARGUMENTS, and any field."""
    return common.image_config(arg, SIZES, DATA_SETS["emoji"])


def stages(arg: str = "") -> list[str]:
    """The pipeline's stages in order, as argument strings."""
    return common.image_stages(arg, SIZES, DATA_SETS["emoji"], get_config)
