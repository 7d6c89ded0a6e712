"""UNet2DModel, diffusers' U-Net without text, both ways: folders as teachers, teachers as folders.

A folder has unet/config.json with its weights and scheduler/scheduler_config.json, or all of these
without sub-folders, as the first published DDPMs. Its scheduler gives a VP process
(`diffusers.process_fields`); the estimates of x0 are not clipped here, whatever it says.

A teacher is written with a scheduler that takes the steps of ours from the same noise:

    VP                      DDIMScheduler, the steps of launch.sample --sampler=ddim
    EDM, ln(sigma) / 4      EDMEulerScheduler, those of --method=euler
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from cheapscale.data.files import atomic_write, damaged, write_json
from cheapscale.diffusion.denoiser import EDM, VP
from cheapscale.diffusion.noise import beta_ends
from cheapscale.interop.diffusers import (
    PREDICTIONS,
    SCHEDULES,
    foreign_meta,
    parameter_shapes,
    process_fields,
    read_config,
    refuse,
)
from cheapscale.interop.diffusers_names import unet_entries
from cheapscale.interop.pytorch import tensors_of
from cheapscale.interop.tensors import Tensors, place, weight_files
from cheapscale.models.plan import UNetConfig, plan
from cheapscale.models.unet import unet
from cheapscale.teacher.teacher import Teacher, make_teacher

KIND = "UNet2DModel"
# What stands in UNet2DModel's config for each of our families.
FAMILIES = {
    "latent": {"flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1,
               "resnet_time_scale_shift": "default", "downsample_type": "conv",
               "upsample_type": "conv"},
    "ddpm": {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0,
             "resnet_time_scale_shift": "default", "downsample_type": "conv",
             "upsample_type": "conv"},
    "adm": {"flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1,
            "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet",
            "upsample_type": "resnet"},
}  # fmt: skip
# {family: (down, up) block without attention}; with it all are AttnDownBlock2D and AttnUpBlock2D.
PLAIN = {"latent": ("DownBlock2D", "UpBlock2D"), "ddpm": ("DownBlock2D", "UpBlock2D"),
         "adm": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}  # fmt: skip
FIXED = {
    "center_input_sample": False, "time_embedding_type": "positional", "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "act_fn": "silu",
    "add_attention": True, "class_embed_type": None,
}  # fmt: skip


def is_unconditional(path: str | pathlib.Path) -> bool:
    """Whether a folder holds a UNet2DModel."""
    file = unet_folder(pathlib.Path(path)) / "config.json"
    return file.is_file() and f'"{KIND}"' in file.read_text(encoding="utf-8", errors="replace")


def unet_folder(folder: pathlib.Path) -> pathlib.Path:
    """The folder of the U-Net: "unet", or the whole."""
    return folder / "unet" if (folder / "unet").is_dir() else folder


def read_unconditional(path: str | pathlib.Path, *, dtype: str = "") -> Teacher:
    """The teacher of a folder. dtype: see `diffusers.read_pipeline`. Raises ValueError for a folder
    that lacks a part or holds another network."""
    folder = pathlib.Path(path)
    where = unet_folder(folder)
    config = read_config(where, "config.json")
    fields = unet_fields(config, where)
    fields["dtype"] = dtype or "float32"
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    process = process_fields(scheduler / "scheduler_config.json", latent=False)
    net = unet(**fields)
    tensors = Tensors(weight_files(where, "diffusion_pytorch_model"))
    old = any(name.endswith(".query.weight") for name in tensors)
    params = place(tensors, unet_entries(net.config, old), parameter_shapes(net), dtype)
    meta = foreign_meta(fields, process, {"name": folder.name}, label_dropout=0.0)
    return make_teacher(params, meta, workdir=str(path))


def unet_fields(config: dict, where: pathlib.Path) -> dict[str, Any]:
    """The fields of our U-Net; ValueError for a network that is not built here."""
    refuse(config, FIXED, where)
    default = FAMILIES["latent"]
    found = {name: config.get(name, value) for name, value in default.items()}
    family = next((name for name, wanted in FAMILIES.items() if wanted == found), "")
    if not family:
        raise ValueError(
            f"{where} combines {', '.join(f'{k} {v!r}' for k, v in found.items())}: only the "
            "combinations of DDPM, of latent diffusion and of ADM are built here"
        )
    with damaged(where / "config.json"):
        channels, down = config["block_out_channels"], config["down_block_types"]
        attends = [kind == "AttnDownBlock2D" for kind in down]
        side, head = config["sample_size"], config.get("attention_head_dim", 8)
        up, blocks = config["up_block_types"], config["layers_per_block"]
        ends = config["in_channels"], config["out_channels"]
        groups = config.get("norm_num_groups", 32)
    names = block_types(family, attends)
    if [list(down), list(up)] != names or config.get("attn_norm_num_groups") not in (None, groups):
        raise ValueError(f"{where} has the blocks {down} and {up}, not {names[0]} and {names[1]}: "
                         "other blocks are not built here")  # fmt: skip
    if not isinstance(side, int) or any(width % channels[0] for width in channels):
        raise ValueError(
            f"{where} has sample_size {side!r} and block_out_channels {channels}: only squares and "
            "multiples of the first width are built here"
        )
    return {
        "resolution": side, "channels": channels[0], "family": family, "num_blocks": blocks,
        "channel_mult": [width // channels[0] for width in channels], "group_size": 1,
        "attention": [side >> n for n, given in enumerate(attends) if given],
        "in_channels": ends[0], "out_channels": ends[1], "groups": groups,
        "head_dim": head or 0, "num_classes": config.get("num_class_embeds") or 0,
    }  # fmt: skip


def block_types(family: str, attends: list[bool]) -> list[list[str]]:
    """[down_block_types, up_block_types] of levels that attend or not."""
    down, up = PLAIN[family]
    return [
        ["AttnDownBlock2D" if given else down for given in attends],
        ["AttnUpBlock2D" if given else up for given in attends[::-1]],
    ]


def write_unconditional(folder: str | pathlib.Path, teacher: Teacher) -> None:
    """Write a teacher as a folder of diffusers, in float32. Raises ValueError, before anything is
    written, for a network or a process that diffusers does not have."""
    folder, config = pathlib.Path(folder), teacher.net.config
    scheduler, fields = scheduler_of(teacher), config_of(teacher)
    state = tensors_of(_with_null(teacher), list(_entries(config)))
    with atomic_write(folder / "unet" / "diffusion_pytorch_model.safetensors") as temporary:
        temporary.write_bytes(safetensors.numpy.save(state, {"format": "pt"}))
    write_json(folder / "unet" / "config.json", fields)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    # DDIMPipeline does not scale its input, as EDM's networks need; they have no pipeline.
    if scheduler["_class_name"] == "DDIMScheduler" and not config.num_classes:
        parts = {"unet": ["diffusers", KIND], "scheduler": ["diffusers", "DDIMScheduler"]}
        write_json(folder / "model_index.json", {"_class_name": "DDIMPipeline"} | parts)


def config_of(teacher: Teacher) -> dict[str, Any]:
    """The config.json of UNet2DModel; ValueError where it cannot describe the network."""
    config, where = teacher.net.config, teacher.workdir

    def cannot(what: str, remedy: str) -> ValueError:
        return ValueError(
            f"the network of {where} {what}, which diffusers' {KIND} has not: {remedy}, or export "
            f"it as --out=NAME.safetensors"
        )

    if config.family not in FAMILIES:
        raise cannot(f"is of the family {config.family!r}", "train --config.model.family=latent")
    for name in ("growth", "overrides", "text", "caption_dim", "extra_conditions", "encoder"):
        if getattr(config, name):
            raise cannot(f"has model.{name}", "give a teacher of pictures without it")
    blocks = [block for block in plan(config) if block.kind in ("res", "head")]
    counts = {n for b in blocks for n in (b.groups0, b.groups1, b.groups2) if n}
    if len(counts) > 1:
        raise cannot(
            f"has norms of {' and '.join(map(str, sorted(counts)))} groups",
            f"train with --config.model.groups={min(counts)}",
        )
    heads = [(block.heads, block.out_channels // block.heads) for block in blocks if block.heads]
    widths = {width for _, width in heads}
    if len(widths) > 1 and any(count > 1 for count, _ in heads):
        raise cannot("has heads of several widths", "train with --config.model.head_dim=0")
    sides = [config.resolution >> level for level in range(len(config.channel_mult))]
    down, up = block_types(config.family, [side in config.attention for side in sides])
    groups = counts.pop()
    return FIXED | FAMILIES[config.family] | {
        "_class_name": KIND, "sample_size": config.resolution, "in_channels": config.in_channels,
        "out_channels": config.out_channels, "layers_per_block": config.num_blocks,
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "down_block_types": down, "up_block_types": up, "dropout": config.dropout,
        "attention_head_dim": widths.pop() if len(widths) == 1 else None,
        "norm_num_groups": groups, "attn_norm_num_groups": groups,
        # one row more: zeros, for no class
        "num_class_embeds": config.num_classes + 1 if config.num_classes else None,
    }  # fmt: skip


def scheduler_of(teacher: Teacher) -> dict[str, Any]:
    """The scheduler_config.json; ValueError for a process without one in diffusers."""
    process = teacher.process
    if isinstance(process, VP):
        names = {ours: theirs for theirs, ours in (SCHEDULES | PREDICTIONS).items()}
        ends = process.betas or beta_ends(process.process, process.num_steps)
        return dict(zip(("beta_start", "beta_end"), ends)) | {
            "_class_name": "DDIMScheduler", "num_train_timesteps": process.num_steps,
            "beta_schedule": names[process.process],
            "prediction_type": names[process.prediction],
            "clip_sample": False, "set_alpha_to_one": process.end == 0,
            "steps_offset": process.offset, "timestep_spacing": process.spacing,
            "rescale_betas_zero_snr": process.zero_snr,
        }  # fmt: skip
    assert isinstance(process, EDM)
    if teacher.net.config.noise_feature != "edm":
        raise ValueError(
            f"{teacher.workdir} is conditioned on 250 ln sigma, for which diffusers has no "
            "scheduler: train with --config.model.noise_feature=edm or "
            "--config.diffusion.process=linear, or export it as --out=NAME.safetensors"
        )
    return {
        "_class_name": "EDMEulerScheduler", "sigma_min": process.sigma_min, "rho": process.rho,
        "sigma_max": process.sigma_max, "sigma_data": process.sigma_data,
        "sigma_schedule": "karras", "prediction_type": "epsilon", "final_sigmas_type": "zero",
    }  # fmt: skip


def _entries(config: UNetConfig) -> Iterator:
    """The entries without the augmentation's, which counts as zero when sampling."""
    return (entry for entry in unet_entries(config) if not entry.path.startswith("map_augment/"))


def _with_null(teacher: Teacher) -> dict[str, np.ndarray]:
    """{path: leaf}; the table of classes ends in a row of zeros."""
    flat = {k: np.asarray(v, np.float32) for k, v in flatten_dict(teacher.params, sep="/").items()}
    if "map_label/kernel" in flat:
        flat["map_label/kernel"] = np.pad(flat["map_label/kernel"], ((0, 1), (0, 0)))
    return flat
