"""Named U-Nets as plain values, for `unet(**preset("cifar10_ddpmpp"))` or a config's `model`.

The comments give parameter counts in millions (M), which the tests assert.
"""

PRESETS: dict[str, dict] = {
    # 0.83 M: train in minutes on two CPU cores
    "tiny8": dict(resolution=8, channels=32, channel_mult=(1, 2), attention=(4,), num_blocks=1),
    "tiny16": dict(resolution=16, channels=32, channel_mult=(1, 2), attention=(8,), num_blocks=1),
    "tiny32": dict(
        resolution=32, channels=32, channel_mult=(1, 2, 2), attention=(8,), num_blocks=1
    ),
    # teacher of the self-cascade study: three levels, for sampling at up to 64 px
    "deep16": dict(
        resolution=16, channels=32, channel_mult=(1, 2, 2), attention=(4,), num_blocks=1
    ),
    # one small accelerator
    "small16": dict(
        resolution=16, channels=64, channel_mult=(1, 2, 2), attention=(8, 4), num_blocks=2
    ),
    "wide16": dict(resolution=16, channels=96, channel_mult=(1, 2), attention=(8,), num_blocks=2),
    "small32": dict(
        resolution=32, channels=96, channel_mult=(1, 2, 2), attention=(16, 8), num_blocks=2
    ),
    # Karras et al. 2022 (arXiv 2206.00364), Table 7: 55.7 M
    "cifar10_ddpmpp": dict(
        family="ddpmpp", resolution=32, channels=128, channel_mult=(2, 2, 2), attention=(16,),
        num_blocks=4, head_dim=0, dropout=0.13, num_classes=10, augment_dim=9,
    ),
    "cifar10_ncsnpp": dict(
        family="ncsnpp", resolution=32, channels=128, channel_mult=(2, 2, 2), attention=(16,),
        num_blocks=4, head_dim=0, dropout=0.13, num_classes=10, augment_dim=9,
    ),
    # Dhariwal & Nichol 2021 (arXiv 2105.05233), as in consistency models: 295.9 M. group_size 3
    # gives every norm 32 groups, also in the grown blocks of 96 channels.
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

# Widths of the grown blocks: entry n is the width at 2 ** (n + 1) times the preset's resolution.
# Those of ImageNet are from PaGoDA's published scripts.
GROWTH: dict[str, tuple[int, ...]] = {
    "tiny8": (32, 32),
    "tiny16": (32, 32, 16),
    "tiny32": (32, 16),
    "deep16": (32, 32),
    "small16": (64, 64, 32),
    "wide16": (96, 96, 48),
    "small32": (96, 96, 48),
    "imagenet64_adm": (192, 192, 96),
    "imagenet32_adm": (256, 256, 256, 128),
}


def preset(name: str, **changes) -> dict:
    """The fields of the named U-Net, updated by `changes`; ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"model preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return PRESETS[name] | changes


def growth_widths(name: str, top: int) -> dict[int, int]:
    """{resolution: width of its grown blocks} for all doublings of a preset up to `top`.

    Beyond the table, doublings repeat its last width.
    """
    widths, side, grown = list(GROWTH[name]), PRESETS[name]["resolution"], {}
    while (side := 2 * side) <= top:
        grown[side] = widths.pop(0) if len(widths) > 1 else widths[0]
    return grown
