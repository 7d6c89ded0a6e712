"""PaGoDA on ImageNet, the paper's setting: base 64 px grown to 512 px, or base 32 px to 512 px.

Paper: Kim et al. 2024 (arXiv 2405.14822), section 5 and Table 1: FID 1.21 / 1.48 / 1.56 / 1.80 at 64
/ 128 / 256 / 512 px in one step. Not run here: the paper used one node of 8 H100 up to 256 px and
64 A100 for 512 px; for the 64-px teacher it took EDM's, 32 A100 at batch 4096.

Data: an image folder, DIR/train/<class>/*.JPEG and DIR/val/<class>/*.JPEG; one that does not have
1,000 classes needs --config.model.num_classes=-1, as many as it has. Feature networks: weight
files of DeiT-B distilled and EfficientNet-lite0 (timm's names, see the README).

    python -m launch.train --config=configs/imagenet.py:stage=pretrain,data_dir=DIR --workdir=teacher
    python -m launch.train --config=configs/imagenet.py:stage=grow,resolution=256,jump,data_dir=DIR \\
        --workdir=grow256 --config.base=distill --config.latents=latents \\
        --config.features.paths.deit_base_distilled=FILE \\
        --config.features.paths.efficientnet_lite0=FILE

The discriminator's class embeddings have the published size (320). The published scripts initialise
them from EfficientNet-lite0; give that table as `discriminator.class_table`, or they start at
random. As published, there is no guidance, no label dropout and no EDM augmentation. Where the
paper and its scripts differ, a field selects the other choice: feature_weight or lpips_weight,
gan_loss (hinge | logistic), squared_norms, adaptive. From 256 px on the scripts update G on L_rec and on
L_adv in separate steps; here every step is on their sum.
"""  # noqa: E501

from configs import common
from configs.data_sets import DATA_SETS
from configs.sweeps import sweep  # noqa: F401  launch.sweep reads it here

ADVERSARY = {
    "discriminator.width": 64,
    "discriminator.embedding_dim": 320,
    "features.names": ("deit_base_distilled", "efficientnet_lite0"),
    "features.input_size": 0,
    "data.num_threads": 16,
}
# Numbers of generator updates: half of the published iterations, which count the updates of
# generator and discriminator together.
ROW = {
    "pretrain": common.train(
        600_000, 1e-4, 4096,
        {
            "optim.name": "radam", "optim.warmup_steps": 0, "ema.decay": 0.9999,
            "model.dtype": "bfloat16", "data.num_threads": 16,
        },
    ),
    # As published: the network runs in half precision, the solver in single precision, and the
    # denoiser's output is clamped. The rounding of bfloat16 would exceed the error of Heun's method
    # several times in smooth regions.
    "invert": {
        "batch_size": 1024, "invert.per_shard": 8192, "invert.clip": True,
        "compute.dtype": "float16", "data.num_threads": 16,
    },
    "distill": common.train(210_000, 8e-6, 256, ADVERSARY | {"distill.pixel_weight": 0.0}),
    # The number of steps for 128 px is not published; this is the number for 256 px.
    "grow": common.train(120_000, 8e-6, 256, ADVERSARY | {"grow.pixel_weight": 0.0}),
    "prune": common.train(60_000, 1e-4, 1024, {"data.num_threads": 16}),
    # Steps and learning rate of self-cascade (arXiv 2402.10491); its batch size is not published.
    "cascade": common.train(10_000, 5e-5, 64, {"data.num_threads": 16}),
}  # fmt: skip
SIZES = {
    "base64": ROW | {"model": "imagenet64_adm"},
    "base32": ROW | {"model": "imagenet32_adm"},
}


def get_config(arg: str = ""):
    """The config of one stage; words of `arg`: configs/common.py, ARGUMENTS, and any field."""
    config = common.image_config(arg, sizes=SIZES, data=DATA_SETS["imagenet"])
    args, changes = common.parse(arg)
    if config.stage == "grow" and args.resolution == 512 and not args.smoke:
        config.total_steps = int(changes.get("total_steps", 35_000))
    return config


def stages(arg: str = "") -> list[str]:
    """The pipeline's stages in order, as argument strings."""
    return common.image_stages(arg, sizes=SIZES, data=DATA_SETS["imagenet"])
