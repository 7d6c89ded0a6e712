"""PaGoDA on photographs of clothes: base 16 px, grown to 32, 64 and 128 px.

Data: the prepared TFDS set "clothing" (3,068 photographs with true detail at 128 px); the set is
small, so read the distance to the nearest training image beside any quality number.
Hardware: size=cpu (1,227 images) about 40 minutes on 2 cores; size=gallery (all images, 16 to
64 px) about 3 hours on 2 cores; size=gpu about 10 minutes on one H100 or H200.

    python -m launch.pipeline --config=configs/clothing.py --arg=data_dir=DIR --workdir=runs/photos

size=latents: a model on the latents of an autoencoder at 128 px, here of TAESD's two files. One of
these pictures alone: stage=autoencode, then its work directory as encode.autoencoder.

    python -m launch.train --config=configs/clothing.py:size=latents,stage=encode,data_dir=DIR \\
        --config.encode.autoencoder=taesd_encoder.safetensors+taesd_decoder.safetensors \\
        --config.encode.folder=runs/latents/data --workdir=runs/latents/encode
    python -m launch.pipeline --config=configs/clothing.py --workdir=runs/latents \\
        --arg=size=latents,base=8,data_dir=runs/latents/data
"""

import functools

from configs import common
from configs.data_sets import DATA_SETS
from configs.sweeps import sweep  # noqa: F401  launch.sweep reads it here

SIZES = {
    "cpu": common.CPU | {"model": "tiny16", "split": "train[:40%]"},
    # At 64 px the discriminator wins against lambda 0.2, and pictures come out smooth.
    "gallery": common.CPU
    | common.gallery()
    | {"grow64": common.decayed(900, 5e-4, 16, {"grow.adversarial_weight": 0.6})},
    "gpu": common.GPU | {"model": "wide16"},
    # 128 px as 16 x 16 latents of an autoencoder by 8, such as TAESD; PaGoDA grows 8 (64 px) to 16.
    "latents": common.CPU
    | {
        "model": {16: "tiny16", 8: "tiny8"},
        "top": 16,
        "latents": 8,
        "autoencode": common.decayed(4000, 1e-3, 8, {"features.input_size": 128}),
        "encode": {"batch_size": 16, "encode.per_shard": 512},
        "pretrain": common.decayed(3000, 2e-3, 64, {"ema.decay": 0.9995}),
        "invert": {"batch_size": 125, "invert.nodes": 18, "invert.noise": 0.05},
        "regress": common.decayed(1000, 2e-3, 32),
        "regress_grown": common.decayed(500, 2e-3, 16),
    },
}

get_config = functools.partial(common.image_config, sizes=SIZES, data=DATA_SETS["clothing"])
stages = functools.partial(common.image_stages, sizes=SIZES, data=DATA_SETS["clothing"])
