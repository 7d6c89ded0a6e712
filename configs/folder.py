"""PaGoDA, the self-cascade and experts on your own folder of images.

    python -m launch.pipeline --config=configs/folder.py --arg=data_dir=DIR,base=16,top=64 \\
        --workdir=runs/mine

Data: DIR/<class>/*.jpg, or DIR/*.jpg without classes. With DIR/train and DIR/val these are the
splits; otherwise the last tenth of the images is used for evaluation. The shorter side of every
image must have at least `top` pixels (or set --config.data.options.allow_upscale=True);
--config.data.options.skip_corrupt=True leaves out unreadable files.
base: the teacher's resolution: 8, 16 or 32 px (size=cpu), 16, 32 or 64 px (size=gpu).
Hardware: size=cpu with 1,500 images from 16 to 64 px takes about an hour on 2 cores.
"""

from typing import Any

from configs import common, data_sets
from configs.sweeps import sweep  # noqa: F401  launch.sweep reads it here

MODELS = {
    "cpu": {8: "tiny8", 16: "tiny16", 32: "tiny32"},
    "gpu": {16: "wide16", 32: "small32", 64: "imagenet64_adm"},
}
RUNS = {"cpu": common.CPU, "gpu": common.GPU}


def tables(arg: str) -> dict[str, Any]:
    """{"sizes": {size: row}, "data": data set} for the folder and the base resolution in `arg`."""
    args, changes = common.parse(arg)
    data_dir = common.typed("data.data_dir", changes.get("data.data_dir", args.data_dir), "")
    split, eval_split = data_sets.folder(data_dir)
    base = args.base or 16
    rows = {
        size: RUNS[size] | {"model": models[base], "split": split}
        for size, models in MODELS.items()
        if base in models
    }
    if not rows:
        raise ValueError(f"base={base} has no preset: choose 8, 16, 32 or 64")
    data = data_sets.DataSet("folder", -1, base, top=4 * base, eval_split=eval_split)
    return {"sizes": rows, "data": data}


def get_config(arg: str = ""):
    """The config of one stage; words of `arg`: configs/common.py, ARGUMENTS, and any field."""
    return common.image_config(arg, **tables(arg))


def stages(arg: str = "") -> list[str]:
    """The pipeline's stages in order, as argument strings."""
    return common.image_stages(arg, **tables(arg))
