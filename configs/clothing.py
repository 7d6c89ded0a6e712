"""PaGoDA on photographs of clothes: base 16 px, grown to 32, 64 and 128 px.

Data: the prepared TFDS set "clothing" (3,068 photographs with true detail at 128 px); the set is
small, so read the distance to the nearest training image beside any quality number.
Hardware: size=cpu (1,227 images) about 40 minutes on 2 cores; size=gallery (all images, 16 to
64 px) about 3 hours on 2 cores; size=gpu about 10 minutes on one H100 or H200.

    python -m launch.pipeline --config=configs/clothing.py --arg=data_dir=DIR --workdir=runs/photos
"""

import functools

from configs import common
from configs.data_sets import DATA_SETS
from configs.sweeps import sweep  # noqa: F401  launch.sweep reads it here

SIZES = {
    "cpu": common.CPU | {"model": "tiny16", "split": "train[:40%]"},
    "gallery": common.CPU | common.gallery(),
    "gpu": common.GPU | {"model": "wide16"},
}

get_config = functools.partial(common.image_config, sizes=SIZES, data=DATA_SETS["clothing"])
stages = functools.partial(common.image_stages, sizes=SIZES, data=DATA_SETS["clothing"])
