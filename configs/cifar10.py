"""PaGoDA on CIFAR-10: base 16 px, grown to 32 px.

Data: the prepared TFDS set "cifar10" (ArrayRecord); its folder is data_dir (see the README).
Hardware: size=cpu about 20 minutes on 2 cores; size=gpu one H100 or H200.

    python -m launch.pipeline --config=configs/cifar10.py --arg=size=cpu,data_dir=DIR --workdir=runs/cifar10
"""  # noqa: E501

from configs import common

SIZES = {
    # channels, blocks, steps of pretrain / distill / growth, batch, latents of so many images
    "cpu": dict(channels=32, blocks=1, steps=(6000, 2000, 1000), batch=64, split="train[:10%]"),
    "gpu": dict(channels=96, blocks=2, steps=(30000, 12000, 8000), batch=256, split="train"),
}


def get_config(arg: str = ""):
    return common.image_config(arg, SIZES, name="cifar10", num_classes=10, base=16, top=32)


def stages(arg: str = "") -> list[str]:
    """The pipeline's stages in order, as argument strings."""
    return common.stages(16, (32,))
