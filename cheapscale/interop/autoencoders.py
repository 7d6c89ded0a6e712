"""Autoencoders in other people's files: diffusers' folders, one file of latent diffusion, and
TAESD's two files.

Our layers have diffusers' names, so that other names are first turned into those.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from cheapscale.data.files import damaged
from cheapscale.features.weights import Weights, check_finite, read_weights
from cheapscale.interop.pytorch import Entry, check_shapes, convert
from cheapscale.models.autoencoder import (
    Autoencoder,
    Config,
    KLConfig,
    TinyConfig,
    init_autoencoder,
)
from cheapscale.teacher.codec import is_codec, read_codec, trained

PyTree = Any

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
         "diffusion_pytorch_model.bin")  # fmt: skip
SCALES = {"cond_stage_model.": 0.18215, "conditioner.": 0.13025}  # in files of SD 1, 2 and of SDXL
# What stands before the autoencoder's names in a file of a whole model.
PREFIX = re.compile(r"^(first_stage_model|vae)\.")
RENAMED = (  # latent diffusion's names, and those of diffusers before 0.18
    (r"^(en|de)coder\.mid\.block_1\.", r"\1coder.mid_block.resnets.0."),
    (r"^(en|de)coder\.mid\.block_2\.", r"\1coder.mid_block.resnets.1."),
    (r"^(en|de)coder\.mid\.attn_1\.", r"\1coder.mid_block.attentions.0."),
    (r"^(en|de)coder\.norm_out\.", r"\1coder.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.0)\.(q|query)\.", r"\1.to_q."),
    (r"(\.attentions\.0)\.(k|key)\.", r"\1.to_k."),
    (r"(\.attentions\.0)\.(v|value)\.", r"\1.to_v."),
    (r"(\.attentions\.0)\.(proj_out|proj_attn)\.", r"\1.to_out.0."),
)


def read_autoencoder(path: str | os.PathLike, *, scale: float | None = None) -> Autoencoder:
    """The autoencoder of a diffusers folder (of a whole pipeline, or its "vae"), of one file, of
    TAESD's two files ENCODER+DECODER, of a work directory of stage autoencode, or of a latent data
    set of ours (autoencoder.safetensors).

    scale: of the latents, instead of the one that the folder or file says; a run's is 1. Raises
    ValueError where a file does not say it, and for folders and files that are no autoencoder.
    """
    folder = pathlib.Path(path)
    if is_codec(folder):
        return read_codec(folder)
    if (folder / "checkpoints").is_dir():
        return trained(folder, scale or 1.0)
    if folder.is_dir():
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        config, fields = read_config(folder)
        file = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if file is None:
            raise ValueError(f"{folder} has no {FILES[0]}: download it into the folder")
        weights = read_weights(file)
        state = in_our_names(weights.arrays)
    else:
        weights = read_weights(str(path), every=True)
        check_finite(weights.arrays, weights.path)
        state = in_our_names(weights.arrays)
        config, fields = config_of(state, weights.path), {"scaling_factor": _scale_in(weights)}
    if scale is not None:
        fields = fields | {"scaling_factor": scale}
    if fields["scaling_factor"] is None:
        raise ValueError(
            f"{weights.path} does not say the scale of its latents: give one, 0.18215 for Stable "
            "Diffusion 1 and 2, 0.13025 for SDXL (--config.encode.scale)"
        )
    return Autoencoder(to_params(state, config), config, *affine(config, fields))


def read_config(folder: pathlib.Path) -> tuple[Config, dict]:
    """(sizes, all fields) of the config.json of a diffusers folder; ValueError for a network that
    is not built here."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"there is no file {file}: give the folder of an autoencoder")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        kind = fields["_class_name"]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{file} is no diffusers config ({error}): download it again") from error
    makers: dict[str, Callable[..., Config]]
    makers = {"AutoencoderKL": _kl_config, "AutoencoderTiny": _tiny_config}
    if kind not in makers:
        raise ValueError(
            f"{file} is of {kind!r}: give the folder of an AutoencoderKL or AutoencoderTiny"
        )
    with damaged(file):
        return makers[kind](fields, file), {"scaling_factor": None} | fields


def _kl_config(fields: Mapping[str, Any], file: pathlib.Path) -> KLConfig:
    blocks = {*fields["down_block_types"], *fields["up_block_types"]}
    _refuse(file, "down_block_types", blocks - {"DownEncoderBlock2D", "UpDecoderBlock2D"})
    _refuse(file, "act_fn", {fields["act_fn"]} - {"silu", "swish"})
    return KLConfig(
        channels=tuple(fields["block_out_channels"]),
        blocks=fields["layers_per_block"],
        groups=fields["norm_num_groups"],
        latent_channels=fields["latent_channels"],
        image_channels=fields["in_channels"],
        attention=fields.get("mid_block_add_attention", True),
        quant=fields.get("use_quant_conv", True),
        post_quant=fields.get("use_post_quant_conv", True),
    )


def _tiny_config(fields: Mapping[str, Any], file: pathlib.Path) -> TinyConfig:
    widths = {*fields["encoder_block_out_channels"], *fields["decoder_block_out_channels"]}
    _refuse(file, "block_out_channels", widths if len(widths) > 1 else set())
    _refuse(file, "act_fn", {fields["act_fn"]} - {"relu"})
    _refuse(file, "upsample_fn", {fields.get("upsample_fn", "nearest")} - {"nearest"})
    _refuse(file, "upsampling_scaling_factor", {fields["upsampling_scaling_factor"]} - {2})
    return TinyConfig(
        channels=widths.pop(),
        encoder_blocks=tuple(fields["num_encoder_blocks"]),
        decoder_blocks=tuple(fields["num_decoder_blocks"]),
        latent_channels=fields["latent_channels"],
        image_channels=fields["in_channels"],
    )


def _refuse(file: pathlib.Path, name: str, others: set) -> None:
    if others:
        raise ValueError(
            f"{file} has {name} {sorted(map(str, others))}, which are not built here: give another "
            "autoencoder"
        )


def affine(config: Config, fields: Mapping[str, Any]) -> tuple[tuple[float, ...], ...]:
    """(scale, shift) for each channel: l = (z - shift) scale / std of scaling_factor, shift_factor
    or latents_mean, and latents_std."""
    count, scale = config.latent_channels, float(fields["scaling_factor"])
    std = fields.get("latents_std") or [1.0] * count
    mean = fields.get("latents_mean") or [fields.get("shift_factor") or 0.0] * count
    return tuple(scale / float(s) for s in std), tuple(map(float, mean))


def in_our_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of an autoencoder under diffusers' names, without those of other networks."""
    if any(map(PREFIX.match, arrays)):
        arrays = {PREFIX.sub("", n): a for n, a in arrays.items() if PREFIX.match(n)}
    arrays = {_taesd(name): array for name, array in arrays.items()}
    found = {n: a for n, a in arrays.items() if re.match(r"(en|de)coder\.|(post_)?quant_conv\.", n)}
    levels = [int(m[1]) for name in found if (m := re.match(r"decoder\.up\.(\d+)\.", name))]
    return {_diffusers(name, max(levels, default=0)): array for name, array in found.items()}


def _taesd(name: str) -> str:
    """A name of TAESD's two files, whose decoder counts the saturation as a layer."""
    match = re.fullmatch(r".*?(en|de)coder\w*\.(\d+)\.((?:conv\.\d\.)?(?:weight|bias))", name)
    if not match:
        return name
    number = int(match[2]) - (match[1] == "de")
    return f"{match[1]}coder.layers.{number}.{match[3]}"


def _diffusers(name: str, last: int) -> str:
    """Latent diffusion's name as diffusers', which counts the decoder's levels the other way."""
    if match := re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.", name):
        kind = {"block": "resnets", "upsample": "upsamplers.0"}[match[2]]
        name = f"decoder.up_blocks.{last - int(match[1])}.{kind}.{name[match.end() :]}"
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def config_of(state: Mapping[str, np.ndarray], path: str) -> Config:
    """The sizes that the shapes of a file's tensors say. AutoencoderKL's norms have 32 groups."""

    def count(pattern: str) -> int:
        return len({m[0] for name in state if (m := re.match(pattern, name))})

    def width(name: str, axis: int) -> int:
        return state[name].shape[axis]

    try:
        if "encoder.conv_in.weight" in state:
            levels = count(r"encoder\.down_blocks\.\d+\.resnets\.0\.conv1\.weight")
            return KLConfig(
                channels=tuple(
                    width(f"encoder.down_blocks.{n}.resnets.0.conv1.weight", 0)
                    for n in range(levels)
                ),
                blocks=count(r"encoder\.down_blocks\.0\.resnets\.\d+\."),
                latent_channels=width("decoder.conv_in.weight", 1),
                image_channels=width("encoder.conv_in.weight", 1),
                attention="encoder.mid_block.attentions.0.to_q.weight" in state,
                quant="quant_conv.weight" in state,
                post_quant="post_quant_conv.weight" in state,
            )
        return TinyConfig(
            width("encoder.layers.0.weight", 0),
            _tiny_blocks(state, "encoder"),
            _tiny_blocks(state, "decoder"),
            latent_channels=width("decoder.layers.0.weight", 1),
            image_channels=width("encoder.layers.0.weight", 1),
        )
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"{path} has no encoder and decoder of an autoencoder: give the file of a VAE, or both "
            'files of TAESD joined by "+"'
        ) from error


def _tiny_blocks(state: Mapping[str, np.ndarray], part: str) -> tuple[int, ...]:
    """The number of residual blocks after each plain convolution of TAESD's encoder or decoder but
    the last."""
    names = [
        m for name in state if (m := re.match(rf"{part}\.layers\.(\d+)\.(conv\.|weight)", name))
    ]
    kinds = {int(m[1]): m[2] == "weight" for m in names}
    runs = "".join("c" if kinds[n] else "b" for n in sorted(kinds)).split("c")[1:-1]
    return tuple(map(len, runs))


def _scale_in(weights: Weights) -> float | None:
    """The scale of the latents by the text encoders of a whole model; 1 of TAESD, whose latents are
    scaled already; None where the file does not say it."""
    names = weights.arrays
    if not any(re.search(r"(^|\.)encoder\.(conv_in|down)", name) for name in names):
        return 1.0
    return next((s for p, s in SCALES.items() if any(n.startswith(p) for n in names)), None)


def to_params(state: Mapping[str, np.ndarray], config: Config) -> PyTree:
    """Parameters from tensors with diffusers' names; ValueError where they do not fit, listing
    them."""
    expected = jax.eval_shape(lambda key: init_autoencoder(config, key), jax.random.key(0))
    flat = flatten_dict(expected, sep="/")
    params = convert(state, [_entry(path, leaf.ndim) for path, leaf in flat.items()], qkv_layout="")
    check_shapes(params, expected)
    return jax.tree.map(jnp.asarray, params)


def _entry(path: str, rank: int) -> Entry:
    """The tensor of a parameter: a convolution, a linear layer, or a norm."""
    *layer, leaf = path.split("/")
    kind = {4: "conv", 2: "dense", 1: "plain"}[rank]
    return Entry(path, ".".join((*layer, "bias" if leaf == "bias" else "weight")), kind)
