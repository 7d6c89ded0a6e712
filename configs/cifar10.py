"""PaGoDA on CIFAR-10: base 16 px, grown to 32 px.

Data: the prepared TFDS set "cifar10" (ArrayRecord); data_dir is the folder that holds it.
Hardware: size=cpu (1,500 images) about half an hour on 2 cores;
size=gpu about 5 minutes on one H100 or H200.

    python -m launch.pipeline --config=configs/cifar10.py --arg=data_dir=DIR --workdir=runs/cifar10
"""

from configs import common
from configs.models import preset

SIZES = {
    "cpu": {
        "base": 16,
        "top": 32,
        "split": "train[:3%]",
        "model": preset("tiny16"),
        "widths": {32: 32},
        "pretrain": (1500, 2e-3, 64),
        "distill": (500, 1e-3, 32),
        "grow": (300, 1e-3, 16),
        "cascade": (300, 1e-3, 16),
        "prune": (200, 1e-3, 64),
        "b2": 0.99,
        "per_shard": 250,
        "invert_batch": 125,
        "discriminator_width": 16,
    },
    "gpu": {
        "base": 16,
        "top": 32,
        "split": "train",
        "model": preset("tiny16", channels=96, num_blocks=2),
        "widths": {32: 96},
        "pretrain": (20000, 5e-4, 256),
        "distill": (6000, 1e-4, 128),
        "grow": (4000, 1e-4, 128),
        "cascade": (4000, 5e-4, 128),
        "prune": (3000, 2e-4, 256),
        "invert_batch": 2048,
        "discriminator_width": 32,
    },
}


def get_config(arg: str = ""):
    return common.image_config(arg, SIZES, name="cifar10", num_classes=10)


def stages(arg: str = "") -> list[str]:
    """The pipeline's stages in order, as argument strings."""
    return common.image_stages(arg, SIZES)


def sweep(stage: str):
    """L_rec from few pairs (section 3.3) and the two distances, three seeds."""
    for seed in (0, 1, 2) if stage == "distill" else ():
        for proportion in (1.0, 0.1, 0.01):
            yield {"seed": seed, "distill.data_proportion": proportion}
        yield {"seed": seed, "distill.distance": "pixel"}
