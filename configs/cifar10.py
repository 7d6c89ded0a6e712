"""PaGoDA on CIFAR-10: base 16 px, grown to 32 px.

Data: the prepared TFDS set "cifar10" (ArrayRecord); data_dir is the folder that holds it.
Hardware: size=cpu (1,500 images) about half an hour on 2 cores;
size=gpu about 5 minutes on one H100 or H200.

    python -m launch.pipeline --config=configs/cifar10.py --arg=data_dir=DIR --workdir=runs/cifar10
"""

import functools

from configs import common
from configs.data_sets import DATA_SETS
from configs.sweeps import sweep  # noqa: F401  launch.sweep reads it here

SIZES = {
    "cpu": common.CPU
    | {
        "model": "tiny16",
        "split": "train[:3%]",
        "grow": common.train(300, 1e-3, 16, common.SHORT_GAN),
    },
    "gpu": common.GPU
    | {
        "model": "wide16",
        "pretrain": common.train(20000, 5e-4, 256),
        "distill": common.train(6000, 1e-4, 128, {"discriminator.width": 32}),
        "grow": common.train(4000, 1e-4, 128, {"discriminator.width": 32}),
        "cascade": common.train(4000, 5e-4, 128),
        "prune": common.train(3000, 2e-4, 256),
    },
}

get_config = functools.partial(common.image_config, sizes=SIZES, data=DATA_SETS["cifar10"])
stages = functools.partial(common.image_stages, sizes=SIZES, data=DATA_SETS["cifar10"])
