"""The tensors of diffusers' U-Nets and of CLIP's text towers, as a correspondence with our leaves.

A U-Net is walked by its plan. diffusers counts the blocks of each level; latent diffusion's own
code, from which the single files of Stable Diffusion come, has guided-diffusion's numbers
(`unet_weights`). Inside a block both have the same layers.
"""

from collections.abc import Iterator

from cheapscale.interop.pytorch import Entry
from cheapscale.interop.unet_weights import pair, transformer
from cheapscale.models.plan import Block, UNetConfig, plan
from cheapscale.models.text import TextConfig

RESNET = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2",
          "conv1": "conv2", "skip": "conv_shortcut"}  # fmt: skip
MAPS = {"map_layer0": "time_embedding.linear_1", "map_layer1": "time_embedding.linear_2",
        "map_added0": "add_embedding.linear_1", "map_added1": "add_embedding.linear_2"}  # fmt: skip
# Names of plain attention in diffusers, and in its files before version 0.18.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
OLD_ATTENTION = ("query", "key", "value", "proj_attn")


def unet_entries(config: UNetConfig, old: bool = False) -> Iterator[Entry]:
    """The entries of UNet2DConditionModel and UNet2DModel. old: names before diffusers 0.18."""
    for block in plan(config):
        place = _place(block, config)
        if block.name == "map_augment":
            yield Entry("map_augment/kernel", "", "dense")  # diffusers has none
        elif block.name == "map_label":
            yield Entry("map_label/kernel", "class_embedding.weight", "plain")
        elif block.kind == "map":
            yield from pair(block.name, MAPS[block.name], "dense")
        elif block.kind == "head":
            yield from pair("head/norm", "conv_norm_out", "plain")
            yield from pair("head/conv", "conv_out", "conv")
        elif block.kind == "conv_in":
            yield from pair(block.name, "conv_in", "conv")
        elif block.kind == "resample":
            yield from pair(block.name, f"{place}.conv", "conv")
        else:
            yield from _resnet(block, place)
            if block.depth:
                yield from transformer(block, place.replace("resnets", "attentions"))
            elif block.heads:
                yield from _attention(block, place.replace("resnets", "attentions"), old)


def _place(block: Block, config: UNetConfig) -> str:
    """Where diffusers has the block: "down_blocks.0.resnets.1"."""
    part, _, rest = block.name.partition("_")
    side, _, what = rest.partition("_")
    if part not in ("enc", "dec") or what == "conv":
        return ""
    level = [config.resolution >> n for n in range(len(config.channel_mult))].index(int(side))
    last = len(config.channel_mult) - 1
    if what.startswith("in"):
        return f"mid_block.resnets.{what[2:]}"
    if what in ("down", "up"):  # belongs to the level that it leaves
        return {
            "down": f"down_blocks.{level - 1}.downsamplers.0",
            "up": f"up_blocks.{last - level - 1}.upsamplers.0",
        }[what]
    way = f"down_blocks.{level}" if part == "enc" else f"up_blocks.{last - level}"
    return f"{way}.resnets.{what.removeprefix('block')}"


def _resnet(block: Block, place: str) -> Iterator[Entry]:
    for layer, name in RESNET.items():
        kind = "conv" if "conv" in layer else "plain" if "norm" in layer else "dense"
        if layer != "skip" or block.shortcut:
            yield from pair(f"{block.name}/{layer}", f"{place}.{name}", kind)


def _attention(block: Block, place: str, old: bool) -> Iterator[Entry]:
    q, k, v, out = (f"{place}.{name}" for name in (OLD_ATTENTION if old else ATTENTION))
    yield from pair(f"{block.name}/norm2", f"{place}.group_norm", "plain")
    yield Entry(f"{block.name}/qkv/kernel", f"{q}.weight+{k}.weight+{v}.weight", "dense")
    yield Entry(f"{block.name}/qkv/bias", f"{q}.bias+{k}.bias+{v}.bias", "plain")
    yield from pair(f"{block.name}/proj", out, "dense")


def clip_entries(config: TextConfig, names: str = "transformers") -> Iterator[Entry]:
    """The entries of one text tower.

    names: "transformers", or "openai" as in OpenCLIP's files.
    """
    theirs = TOWERS[names]
    yield Entry("embedding/embedding", theirs["token"], "plain")
    yield Entry("position", theirs["position"], "plain")
    yield from pair("norm", theirs["norm"], "plain")
    if config.projection:
        kind = "dense" if names == "transformers" else "plain"
        yield Entry("projection/kernel", theirs["projection"], kind)
    for i in range(config.depth):
        block, layer = f"block{i}/", theirs["block"].format(i)
        if names == "transformers":
            for leaf, ending in (("kernel", "weight"), ("bias", "bias")):
                joined = "+".join(f"{layer}self_attn.{c}_proj.{ending}" for c in "qkv")
                kind = "dense" if leaf == "kernel" else "plain"
                yield Entry(f"{block}qkv/{leaf}", joined, kind)
        else:
            yield Entry(f"{block}qkv/kernel", f"{layer}attn.in_proj_weight", "dense")
            yield Entry(f"{block}qkv/bias", f"{layer}attn.in_proj_bias", "plain")
        for name, (name_there, kind) in theirs["layers"].items():
            yield from pair(block + name, layer + name_there, kind)


TOWERS: dict[str, dict] = {
    "transformers": {
        "token": "embeddings.token_embedding.weight",
        "position": "embeddings.position_embedding.weight",
        "norm": "final_layer_norm",
        "projection": "text_projection.weight",
        "block": "encoder.layers.{}.",
        "layers": {
            "proj": ("self_attn.out_proj", "dense"), "fc0": ("mlp.fc1", "dense"),
            "fc1": ("mlp.fc2", "dense"), "norm0": ("layer_norm1", "plain"),
            "norm1": ("layer_norm2", "plain"),
        },
    },
    "openai": {
        "token": "token_embedding.weight",
        "position": "positional_embedding",
        "norm": "ln_final",
        "projection": "text_projection",
        "block": "transformer.resblocks.{}.",
        "layers": {
            "proj": ("attn.out_proj", "dense"), "fc0": ("mlp.c_fc", "dense"),
            "fc1": ("mlp.c_proj", "dense"), "norm0": ("ln_1", "plain"), "norm1": ("ln_2", "plain"),
        },
    },
}  # fmt: skip
