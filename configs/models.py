"""Named U-Nets as plain values: `unet(**preset("cifar10_ddpmpp"))`, or a config's `model`.

Parameter counts in millions, asserted by the tests. `GROWTH` gives the published widths of the
doublings by base resolution (PaGoDA, spec 4.1): its first n entries grow by 2 ** n.
"""

PRESETS: dict[str, dict] = {
    # 0.83 M: train in minutes on two CPU cores
    "tiny8": dict(resolution=8, channels=32, channel_mult=(1, 2), attention=(4,), num_blocks=1),
    "tiny16": dict(resolution=16, channels=32, channel_mult=(1, 2), attention=(8,), num_blocks=1),
    # one small accelerator
    "small": dict(
        resolution=16, channels=64, channel_mult=(1, 2, 2), attention=(8, 4), num_blocks=2
    ),
    # Karras et al. 2022, table 7: 55.7 M
    "cifar10_ddpmpp": dict(
        family="ddpmpp", resolution=32, channels=128, channel_mult=(2, 2, 2), attention=(16,),
        num_blocks=4, head_dim=0, dropout=0.13, num_classes=10, augment_dim=9,
    ),
    "cifar10_ncsnpp": dict(
        family="ncsnpp", resolution=32, channels=128, channel_mult=(2, 2, 2), attention=(16,),
        num_blocks=4, head_dim=0, dropout=0.13, num_classes=10, augment_dim=9,
    ),
    # Dhariwal & Nichol 2021, as in consistency models: 295.9 M. group_size 3: 32 groups in every
    # norm, also of the grown blocks of 96 channels
    "imagenet64_adm": dict(
        resolution=64, channels=192, channel_mult=(1, 2, 3, 4), attention=(32, 16, 8),
        num_blocks=3, dropout=0.1, num_classes=1000, group_size=3,
    ),
    # PaGoDA's second base: 370.8 M
    "imagenet32_adm": dict(
        resolution=32, channels=256, channel_mult=(1, 2, 4), attention=(16, 8), num_blocks=3,
        dropout=0.1, num_classes=1000, group_size=3,
    ),
}  # fmt: skip

# base resolution -> widths at twice, four times, ... the base
GROWTH: dict[int, tuple[int, ...]] = {
    64: (192, 192, 96),
    32: (256, 256, 256, 128),
}


def preset(name: str, **changes) -> dict:
    """The named model's fields with `changes`. Raises ValueError on an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"model preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return PRESETS[name] | changes
