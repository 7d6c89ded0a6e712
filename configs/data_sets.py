"""The data sets of the configs, with their number of classes and default resolutions.

Scenes are generated. cifar10, clothing and noto_emoji are prepared TFDS sets in ArrayRecord files,
in the folder data_dir. ImageNet is a folder of images.
"""

import os
from typing import NamedTuple


class DataSet(NamedTuple):
    """A data set. name: that of `cheapscale.data.sources`. num_classes: -1 for as many as the
    images have. base, top: resolutions at which its pipelines begin and end. flip: whether mirror
    images are valid. options: of the source. origin, licence: of the images, for the card of an
    exported model; "" where nobody has looked."""

    name: str
    num_classes: int
    base: int
    top: int
    flip: bool = True
    eval_split: str = "test"
    options: dict = {}
    origin: str = ""
    licence: str = ""


DATA_SETS = {
    "scenes": DataSet(
        "scenes", 8, base=8, top=32,
        origin="drawn by cheapscale.data.scenes", licence="Apache-2.0",
    ),
    "cifar10": DataSet("cifar10", 10, base=16, top=32),
    "clothing": DataSet(
        "clothing", 10, base=16, top=128,
        origin="https://github.com/alexeygrigorev/clothing-dataset-small", licence="CC0-1.0",
    ),
    # Mirrored letters and flags are wrong. Skin-tone variants of an emoji are nearly equal; keeping
    # only the default tone avoids near-copies of training images in the test split.
    "emoji": DataSet(
        "noto_emoji", 10, base=16, top=128, flip=False, options={"where": {"skin_tone": False}},
        origin="https://github.com/googlefonts/noto-emoji", licence="Apache-2.0",
    ),
    # allow_upscale: small photographs are enlarged, as in the published preparation. probe: reading
    # a million headers would take minutes.
    "imagenet": DataSet(
        "folder", 1000, base=64, top=512, eval_split="val",
        options={"allow_upscale": True, "probe": False},
    ),
}  # fmt: skip


def folder(data_dir: str) -> tuple[str, str]:
    """(training split, evaluation split) of a folder of images.

    The layout is DIR/train/<class>/*.png with DIR/val or DIR/test; or DIR/<class>/*.png or
    DIR/*.png, where the last tenth of the images is used for evaluation. Sub-folders are classes.
    Without a name the latter, so that the fields can be printed.
    """
    if not data_dir:
        return "all[:90%]", "all[90%:]"
    if os.path.isfile(data_dir):
        raise ValueError(
            f"{data_dir!r} is a file: unpack it, and give --arg=data_dir=DIR, its folder"
        )
    if not os.path.isdir(data_dir):
        raise ValueError(f"there is no folder {data_dir!r}: give --arg=data_dir=DIR, your images")
    found = {entry.name for entry in os.scandir(data_dir) if entry.is_dir()}
    if "train" in found:
        held = [split for split in ("val", "test", "validation") if split in found]
        return ("train", held[0]) if held else ("train[:90%]", "train[90%:]")
    return "all[:90%]", "all[90%:]"
