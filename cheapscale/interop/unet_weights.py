"""U-Net weights under EDM's names or guided-diffusion's (ADM, consistency models, PaGoDA, and the
single files of Stable Diffusion).

Both have the same blocks, which are visited in the order of the plan. EDM names them by side and
number; guided-diffusion numbers them: `input_blocks.i`, `middle_block`, `output_blocks.i`. There, a
level's up-block is the last module of the output block before it, and grown blocks count as output
blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.interop.pytorch import Entry, check_shapes, convert
from cheapscale.models.plan import Block, UNetConfig, plan
from cheapscale.models.unet import UNet

PyTree = Any


# The weights of the classes, and the axis of the tensor that counts them.
CLASSES = {"edm": ("map_label.weight", 1), "guided_diffusion": ("label_emb.weight", 0)}


def qkv_layout_of(form: str, config: UNetConfig, given: str = "") -> str:
    """The key of QKV_LAYOUTS for weights of a format: `given`, or what the format says.

    Raises ValueError where the weights do not say it: guided-diffusion's with several heads.
    """
    if given or form == "edm":
        return given or "head_dim_three"
    if any(block.heads > 1 for block in plan(config)):
        raise ValueError(
            "guided-diffusion's names do not tell the order of q, k and v: give "
            "--qkv_layout=head_three_dim for OpenAI's guided-diffusion and improved-diffusion, or "
            "--qkv_layout=three_head_dim for consistency models, PaGoDA and nets with "
            "use_new_attention_order"
        )
    return "three_head_dim"


def has_learned_variance(state: Mapping[str, np.ndarray], form: str, config: UNetConfig) -> bool:
    """Whether the network of `state`, names without a prefix, returns a variance beside the mean:
    twice the channels of the config's."""
    (head,) = [e.name for e in entries_of(form, config) if e.path == "head/conv/bias"]
    return head in state and len(np.atleast_1d(state[head])) == 2 * config.out_channels


def to_params(
    state: Mapping[str, np.ndarray], config: UNetConfig, form: str, *, qkv_layout: str = ""
) -> PyTree:
    """Parameters from a state dict: of EDM's DhariwalUNet or SongUNet (form "edm"), or of a U-Net
    of guided-diffusion, grown or not. Names have no prefix. A learned variance is left out.

    Raises ValueError where names, shapes or classes do not fit `config`, listing them.
    """
    layout, entries = qkv_layout_of(form, config, qkv_layout), entries_of(form, config)
    _check_classes(state, form, config)
    if has_learned_variance(state, form, config):
        heads = {e.name for e in entries if e.path.startswith("head/conv/")}
        state = {n: a[: config.out_channels] if n in heads else a for n, a in state.items()}
    params = convert(state, entries, qkv_layout=layout, ignore=("resample_filter",))
    side = config.resolution
    x = jnp.zeros((1, side, side, config.in_channels))
    shapes = jax.eval_shape(UNet(config).init, jax.random.key(0), x, jnp.zeros(1))["params"]
    check_shapes(params, shapes)
    return params


def entries_of(form: str, config: UNetConfig) -> list[Entry]:
    """The correspondence of a format's tensors with our parameters."""
    if form == "edm":
        return [entry for block in plan(config) for entry in _edm(block, config)]
    if config.family not in ("adm", "latent"):
        raise ValueError(
            f"guided-diffusion weights are of the family 'adm', not {config.family!r}: "
            "give --config.model.family=adm"
        )
    return list(_guided_diffusion(config))


def _check_classes(state: Mapping[str, np.ndarray], form: str, config: UNetConfig) -> None:
    name, axis = CLASSES[form]
    found = state[name].shape[axis] if name in state and state[name].ndim == 2 else 0
    if found != config.num_classes:
        raise ValueError(
            f"these weights have {found or 'no'} classes, but model.num_classes is "
            f"{config.num_classes}: give --config.model.num_classes={found}"
            + (f" and images of {found} classes" if found else "")
        )


def pair(path: str, name: str, kind: str, heads: int = 0) -> list[Entry]:
    """The entries of one layer: its kernel (or scale) and its bias."""
    leaf = "scale" if kind == "plain" else "kernel"
    bias = "qkv" if kind == "qkv" else "plain"
    return [
        Entry(f"{path}/{leaf}", f"{name}.weight", kind, heads),
        Entry(f"{path}/bias", f"{name}.bias", bias, heads),
    ]


def _res(block: Block, name: Callable[[str], str]) -> Iterator[Entry]:
    """Entries of a residual block; `name` maps our name of a layer to the state dict's."""
    kinds = {"norm0": "plain", "conv0": "conv", "affine": "dense"}
    kinds |= {"norm1": "plain", "conv1": "conv"}
    if block.shortcut:
        kinds["skip"] = "dense"
    if block.heads and not block.depth:
        kinds |= {"norm2": "plain", "qkv": "qkv", "proj": "dense"}
    for layer, kind in kinds.items():
        yield from pair(f"{block.name}/{layer}", name(layer), kind, block.heads)


def transformer(block: Block, place: str) -> Iterator[Entry]:
    """The entries of a block's transformer layers, which latent diffusion and diffusers name alike;
    `place` is their name of the whole."""
    path = f"{block.name}/transformer"
    yield from pair(f"{path}/norm2", f"{place}.norm", "plain")
    for name in ("proj_in", "proj_out"):
        yield from pair(f"{path}/{name}", f"{place}.{name}", "dense")
    for i in range(block.depth):
        ours, theirs = f"{path}/layer{i}", f"{place}.transformer_blocks.{i}"
        joined = {
            "qkv": [f"attn1.to_{c}" for c in "qkv"],
            "text_q": ["attn2.to_q"],
            "text_kv": [f"attn2.to_{c}" for c in "kv"],
        }
        for name, parts in joined.items():
            kernels = "+".join(f"{theirs}.{part}.weight" for part in parts)
            yield Entry(f"{ours}/{name}/kernel", kernels, "dense")
        for name, part in LAYERS.items():
            kind = "plain" if name.startswith("norm") else "dense"
            yield from pair(f"{ours}/{name}", f"{theirs}.{part}", kind)


LAYERS = {"norm0": "norm1", "norm1": "norm2", "norm2": "norm3", "proj": "attn1.to_out.0",
          "text_proj": "attn2.to_out.0", "fc0": "ff.net.0.proj", "fc1": "ff.net.2"}  # fmt: skip


def _edm(block: Block, config: UNetConfig) -> list[Entry]:
    if block.name == "map_noise":
        return [Entry("map_noise/freqs", "map_noise.freqs", "plain")]
    if block.kind == "map":
        bias = block.name != "map_augment" and not (
            block.name == "map_label" and config.family == "adm"
        )
        return pair(block.name, block.name, "dense")[: 1 + bias]
    if block.kind == "head":
        side = config.resolution
        norm, conv = "out_norm", "out_conv"
        if config.family != "adm":
            norm, conv = (f"dec.{side}x{side}_aux_{part}" for part in ("norm", "conv"))
        return [*pair("head/norm", norm, "plain"), *pair("head/conv", conv, "conv")]
    part, side, rest = block.name.split("_")
    theirs = f"{part}.{side}x{side}_{'aux_residual' if rest == 'aux' else rest}"
    if block.kind in ("conv_in", "aux"):
        return pair(block.name, theirs, "conv")
    return list(_res(block, lambda layer: f"{theirs}.{layer}"))


GUIDED_DIFFUSION_LAYERS = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
    "norm2": "norm",
    "qkv": "qkv",
    "proj": "proj_out",
}
ATTENTION = ("norm2", "qkv", "proj")


def _guided_diffusion(config: UNetConfig) -> Iterator[Entry]:
    encoder, decoder, module = -1, -1, 0
    for block in plan(config):
        if block.name in ("map_layer0", "map_layer1"):
            yield from pair(block.name, f"time_embed.{2 * int(block.name[-1])}", "dense")
        elif block.name in ("map_added0", "map_added1"):
            yield from pair(block.name, f"label_emb.0.{2 * int(block.name[-1])}", "dense")
        elif block.name == "map_label":
            yield Entry("map_label/kernel", "label_emb.weight", "plain")
        elif block.kind == "map":
            raise ValueError(
                f"guided-diffusion weights have no {block.name}: leave out the condition from the "
                "model config, and copy the weights by name into the larger network"
            )
        elif block.kind == "head":
            yield from pair("head/norm", "out.0", "plain")
            yield from pair("head/conv", "out.2", "conv")
        elif block.kind == "conv_in":
            encoder += 1
            yield from pair(block.name, f"input_blocks.{encoder}.0", "conv")
        else:
            if block.name.startswith("enc"):
                encoder, module = encoder + 1, 0
                place = f"input_blocks.{encoder}"
            elif block.name.endswith(("_in0", "_in1")):
                module = 0 if block.name.endswith("_in0") else 2
                place = "middle_block"
            elif block.resample and not block.name.startswith("grow"):
                place = f"output_blocks.{decoder}"  # after the modules of that block
            else:
                decoder, module = decoder + 1, 0
                place = f"output_blocks.{decoder}"
            if block.kind == "resample":
                layer = "op" if block.resample == "down" else "conv"
                yield from pair(block.name, f"{place}.{module}.{layer}", "conv")
                continue
            yield from _res(block, _guided_diffusion_name(place, module))
            if block.depth:
                yield from transformer(block, f"{place}.{module + 1}")
            module += 2 if block.heads else 1


def _guided_diffusion_name(place: str, module: int) -> Callable[[str], str]:
    def name(layer: str) -> str:
        index = module + 1 if layer in ATTENTION else module
        return f"{place}.{index}.{GUIDED_DIFFUSION_LAYERS[layer]}"

    return name
