"""PaGoDA on emoji: base 16 px, grown to 32, 64 and 128 px.

Data: the prepared TFDS set "noto_emoji" (3,063 drawings on white, the default skin tone alone).
Hardware: size=cpu about 40 minutes on 2 cores.

    python -m launch.pipeline --config=configs/emoji.py --arg=data_dir=DIR --workdir=runs/emoji
"""

import functools

from configs import common
from configs.data_sets import DATA_SETS
from configs.sweeps import sweep  # noqa: F401  launch.sweep reads it here

SIZES = {"cpu": common.CPU | {"model": "tiny16", "split": "train[:60%]"}}

get_config = functools.partial(common.image_config, sizes=SIZES, data=DATA_SETS["emoji"])
stages = functools.partial(common.image_stages, sizes=SIZES, data=DATA_SETS["emoji"])
