"""Folders of diffusers as teachers: Stable Diffusion 1, 2 and XL.

A folder of a pipeline has model_index.json, which names its parts, and a folder for each of them:

    unet                            UNet2DConditionModel: one plan of ours (`unet_fields`)
    scheduler                       its table, prediction and grid: a VP process (`process_fields`)
    text_encoder, text_encoder_2    CLIP's towers; tokenizer, tokenizer_2: their vocabulary
    vae                             the autoencoder of the latents

A single .safetensors of the same network (latent diffusion's names) holds the weights alone: the
rest is read from the folder FILE without its suffix, or from the folder in which it lies.
"""

import contextlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.data.files import cache_folder, damaged
from cheapscale.diffusion.noise import vp_schedule
from cheapscale.features.tokenizer import END, START, read_vocabulary
from cheapscale.interop.autoencoders import affine, in_our_names, read_autoencoder, to_params
from cheapscale.interop.autoencoders import read_config as read_vae_config
from cheapscale.interop.diffusers_names import clip_entries, unet_entries
from cheapscale.interop.tensors import Tensors, place, weight_files
from cheapscale.interop.unet_weights import entries_of
from cheapscale.models.autoencoder import Autoencoder
from cheapscale.models.unet import UNet, unet
from cheapscale.teacher.codec import write_codec
from cheapscale.teacher.teacher import Teacher, fingerprint, make_teacher
from cheapscale.training.exported import sha256_of

PyTree = Any
INDEX = "model_index.json"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# What U-Nets of this family have; another value is a network that is not built here.
FIXED = {
    "center_input_sample": False, "only_cross_attention": False, "dual_cross_attention": False,
    "class_embed_type": None, "num_class_embeds": None, "time_embedding_type": "positional",
    "resnet_time_scale_shift": "default", "act_fn": "silu", "encoder_hid_dim": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "attention_type": "default", "conv_in_kernel": 3,
    "conv_out_kernel": 3, "freq_shift": 0, "flip_sin_to_cos": True, "time_cond_proj_dim": None,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "cross_attention_norm": None,
    "reverse_transformer_layers_per_block": None, "norm_eps": 1e-5, "timestep_post_act": None,
    "time_embedding_dim": None, "resnet_skip_time_act": False,
}  # fmt: skip
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# {scheduler: spacing that it has if its file says none}
SPACING = {
    "DDIMScheduler": "leading", "PNDMScheduler": "leading", "DDPMScheduler": "leading",
    "LMSDiscreteScheduler": "linspace", "EulerDiscreteScheduler": "linspace",
    "EulerAncestralDiscreteScheduler": "linspace", "HeunDiscreteScheduler": "linspace",
    "DPMSolverMultistepScheduler": "linspace", "DPMSolverSinglestepScheduler": "linspace",
    "UniPCMultistepScheduler": "linspace",
}  # fmt: skip
ACTIVATIONS = {"quick_gelu": "clip", "gelu": "openclip"}
SCALE = 0.18215  # of latents where the autoencoder's config says none
SINGLE = "model.diffusion_model."  # the prefix of the U-Net in a single file
# {prefix in a single file: kind of names} of the text encoders of SD 1, of SD 2, and of SDXL
TOWERS = {
    "cond_stage_model.transformer.text_model.": "transformers",
    "cond_stage_model.model.": "openai",
    "conditioner.embedders.0.transformer.text_model.": "transformers",
    "conditioner.embedders.1.model.": "openai",
}


def is_pipeline(path: str | pathlib.Path) -> bool:
    """Whether a folder has a model_index.json, or a file has the names of latent diffusion."""
    found = pathlib.Path(path)
    if found.suffix == ".safetensors" and found.is_file():
        with contextlib.suppress(ValueError):  # a damaged file, of which the others' readers tell
            return len(Tensors([found], SINGLE)) > 0
    return (found / INDEX).is_file()


def read_pipeline(path: str | pathlib.Path, *, dtype: str = "") -> Teacher:
    """The teacher of a folder, or of a single file with its folder of configs.

    dtype: of the computation and of the weights; "" computes in float32 and keeps the weights as
    they are stored. Raises ValueError for a folder that lacks a part or holds another network.
    """
    given = pathlib.Path(path)
    folder = config_folder(given)
    index = read_config(folder, INDEX)
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(
            f"{folder} is a {index.get('_class_name')}: give a folder of a {' or '.join(PIPELINES)}"
        )
    codec = read_codec(given, folder)
    text, where = text_fields(folder, index), folder / "unet"
    fields = unet_fields(read_config(folder, "unet/config.json"), where, text, codec.factor)
    if (channels := codec.config.latent_channels) != fields["in_channels"]:
        raise ValueError(
            f"{folder} has an autoencoder of {channels} channels, but a U-Net of "
            f"{fields['in_channels']}: put the vae of this U-Net into the folder"
        )
    fields |= {"dtype": dtype or "float32"}
    params = read_weights(given, folder, unet(**fields), dtype)
    process = process_fields(folder / "scheduler" / "scheduler_config.json")
    # Latents are scaled to unit deviation, and captions were dropped to train for guidance.
    data = {"name": given.name, "std": 1.0, "codec": codec_entry(codec)}
    meta = foreign_meta(fields, process, data, label_dropout=0.1)
    return make_teacher(params, meta, workdir=str(path))


def foreign_meta(fields: dict, process: dict, data: dict, *, label_dropout: float) -> dict:
    """The meta of a teacher that was not trained here, with the fields of its U-Net and process."""
    return {
        "stage": "pretrain",
        "networks": {"net": json.loads(json.dumps(fields))},  # tuples become lists
        "diffusion": process,
        "data": data,
        "config": {"pretrain": {"label_dropout": label_dropout}},
        "ledger": {"flops": 0.0, "device_seconds": 0.0},
    }


def read_codec(given: pathlib.Path, folder: pathlib.Path) -> Autoencoder:
    """The autoencoder in the single file, if it has one, or in the folder."""
    said = read_config(folder, "vae/config.json").get("scaling_factor")
    inside = Tensors([given], "first_stage_model.") if given.is_file() else Tensors([])
    if not len(inside):
        return read_autoencoder(folder, scale=said or SCALE)
    config, fields = read_vae_config(folder / "vae")
    params = to_params(in_our_names(inside), config)
    return Autoencoder(params, config, *affine(config, fields | {"scaling_factor": said or SCALE}))


def codec_entry(codec: Autoencoder) -> dict[str, Any]:
    """The entry data.codec of a model with this autoencoder, which is kept in the cache's folder,
    as other processes need it too: those that read a run tuned beside the model."""
    name = f"{fingerprint((codec.params, codec.scale, codec.shift))}.safetensors"
    path = cache_folder() / "autoencoders" / name
    sha256 = sha256_of(path) if path.is_file() else write_codec(path, codec)
    return {"path": str(path), "sha256": sha256, "factor": codec.factor}


def config_folder(given: pathlib.Path) -> pathlib.Path:
    """The folder with model_index.json of a folder or a single file; ValueError without one."""
    places = [given] if given.is_dir() else [given.with_suffix(""), given.parent]
    for folder in places:
        if (folder / INDEX).is_file():
            return folder
    names = Tensors([given], SINGLE) if given.is_file() else ()
    kind = "SDXL" if "label_emb.0.0.weight" in names else "Stable Diffusion"
    raise ValueError(
        f"{given} holds the weights of {kind} alone: put the rest of its pipeline, {INDEX} "
        f"and the folders of all parts (without weights), into {places[0]}"
    )


def read_config(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON file of a pipeline; ValueError if it is missing or damaged."""
    path = folder / name
    if not path.is_file():
        part = name.partition("/")[0]
        raise ValueError(f"{folder} lacks {name}: download the pipeline's {part} into it as well")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object: download it again")
    return found


def unet_fields(config: dict, place: pathlib.Path, text: dict, pixels: int) -> dict[str, Any]:
    """The fields of our U-Net for a UNet2DConditionModel.

    text: fields of its TextConfig. pixels: along the side of a latent. Raises ValueError for a
    network of another family.
    """
    if (kind := config.get("_class_name")) != "UNet2DConditionModel":
        raise ValueError(f"{place} is a {kind}, no UNet2DConditionModel: give Stable Diffusion's")
    refuse(config, FIXED, place)
    with damaged(place / "config.json"):
        channels = config["block_out_channels"]
        kinds = [name == "CrossAttnDownBlock2D" for name in config["down_block_types"]]
        types = {"Down": config["down_block_types"], "Up": config["up_block_types"][::-1]}
        expected = {
            way: [f"{'CrossAttn' * attends}{way}Block2D" for attends in kinds] for way in types
        }
        side, layers = (
            config.get("sample_size") or 64,
            config.get("transformer_layers_per_block", 1),
        )
        depths = layers if isinstance(layers, list) else [layers] * len(channels)
        base, blocks = channels[0], config["layers_per_block"]
        in_channels, out_channels = config["in_channels"], config["out_channels"]
        heads = config.get("num_attention_heads") or config["attention_head_dim"]
        context = config["cross_attention_dim"]
        groups = config["norm_num_groups"]
    odd = {
        "down_block_types": types != expected, "layers_per_block": not isinstance(blocks, int),
        "transformer_layers_per_block": not all(isinstance(depth, int) for depth in depths),
        "sample_size": not isinstance(side, int),
        "block_out_channels": any(width % base for width in channels),
    }  # fmt: skip
    refuse(config, {name: None for name, wrong in odd.items() if wrong}, place)
    if in_channels != out_channels:
        raise ValueError(
            f"{place} takes {in_channels} channels and gives {out_channels}, as networks for "
            "inpainting and for edits by text do: give one that makes pictures of text alone"
        )
    fields = {
        "resolution": side, "channels": base, "family": "latent",
        "channel_mult": [width // base for width in channels], "num_blocks": blocks,
        "attention": [side >> level for level, attends in enumerate(kinds) if attends],
        "in_channels": in_channels, "out_channels": out_channels, "groups": groups,
        "group_size": 1, "depths": depths, "text": text, **head_fields(heads, channels, place),
    }  # fmt: skip
    width = unet(**fields).config.text.token_width
    if context != width:
        raise ValueError(
            f"{place} reads tokens of width {context}, but the text encoders give {width}: put the "
            "text encoders of this U-Net into the folder"
        )
    return fields | size_fields(config, place, text, pixels)


def head_fields(heads: int | list[int], channels: list[int], place: pathlib.Path) -> dict[str, int]:
    """Number or width of the heads. diffusers' attention_head_dim is the number of heads of each
    level, whatever its name says."""
    counts = heads if isinstance(heads, list) else [heads] * len(channels)
    if len(set(counts)) == 1:
        return {"heads": counts[0]}
    widths = {width / count for width, count in zip(channels, counts, strict=True)}
    if len(widths) > 1:
        raise ValueError(f"{place} has heads of several widths, {counts} for {channels}: "
                         "give a U-Net of Stable Diffusion")  # fmt: skip
    return {"head_dim": int(widths.pop())}


def size_fields(config: dict, place: pathlib.Path, text: dict, pixels: int) -> dict[str, Any]:
    """{"sizes": ...} of SDXL, {} of the others; ValueError for SDXL's refiner and other kinds."""
    kind = config.get("addition_embed_type")
    if kind is None:
        return {}
    width = config.get("addition_time_embed_dim")
    fields = {"sizes": [width, pixels]}
    pooled = (text.get("beside") or text).get("projection") or 0
    if kind != "text_time" or config.get("projection_class_embeddings_input_dim") != (
        pooled + 6 * (width or 0)
    ):
        raise ValueError(
            f"{place} takes other numbers beside the caption than SDXL's base network "
            f"(addition_embed_type {kind!r}), as SDXL's refiner does: give the base network"
        )
    return fields


def refuse(config: dict, fixed: dict, place: pathlib.Path) -> None:
    """ValueError where a field is given and is not what it has to be; None allows no value."""
    for name, value in fixed.items():
        if name in config and config[name] != value:
            raise ValueError(
                f"{place} has {name} {config[name]!r}, which is not built here: give a U-Net of "
                "Stable Diffusion 1, 2 or XL"
            )


def process_fields(path: pathlib.Path, latent: bool = True) -> dict[str, Any]:
    """The fields of the VP process of a scheduler_config.json; ValueError for another process."""
    config = read_config(path.parent.parent, f"{path.parent.name}/{path.name}")
    kind, schedule = config.get("_class_name"), config.get("beta_schedule", "linear")
    if kind not in SPACING:
        raise ValueError(
            f"{path} is of {kind}, which is not built here: give a scheduler with betas, such as "
            "DDIMScheduler"
        )
    prediction = config.get("prediction_type", "epsilon")
    for name, value, known in (
        ("beta_schedule", schedule, SCHEDULES), ("prediction_type", prediction, PREDICTIONS),
    ):  # fmt: skip
        if value not in known or config.get("trained_betas") is not None:
            raise ValueError(
                f"{path} has {name} {value!r} and trained_betas "
                f"{config.get('trained_betas')!r:.20}: only {', '.join(known)} are built here"
            )
    steps = config.get("num_train_timesteps", 1000)
    betas = [config.get("beta_start", 0.0001), config.get("beta_end", 0.02)]
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    table = vp_schedule(SCHEDULES[schedule], steps, tuple(betas), zero_snr).sigmas
    # DDIM's last step ends at the first level of the table, unless alpha is set to one there.
    stays = kind in ("DDIMScheduler", "PNDMScheduler") and not config.get(
        "set_alpha_to_one", kind == "DDIMScheduler"
    )
    return {
        "process": SCHEDULES[schedule], "prediction": PREDICTIONS[prediction], "num_steps": steps,
        "betas": betas, "zero_snr": zero_snr, "sigma_min": float(table[0]),
        "sigma_max": float(table[-1]), "sigma_data": 1.0 if latent else 0.5,
        "spacing": config.get("timestep_spacing", SPACING[kind]),
        "offset": config.get("steps_offset", 0), "end": float(table[0]) if stays else 0.0,
    }  # fmt: skip


def text_fields(folder: pathlib.Path, index: dict) -> dict[str, Any]:
    """The fields of TextConfig of the pipeline's encoders; the vocabulary is in the first."""
    xl = index["_class_name"] == "StableDiffusionXLPipeline"
    zeros = xl and index.get("force_zeros_for_empty_prompt", True)
    towers = [tower_fields(folder, ending, xl, zeros) for ending in ("", "_2")[: 1 + xl]]
    first, *others = towers
    return first | ({"beside": others[0] | {"tokenizer": ""}} if others else {})


def tower_fields(folder: pathlib.Path, ending: str, xl: bool, zeros: bool) -> dict[str, Any]:
    """The fields of one text encoder, with its vocabulary."""
    part = f"text_encoder{ending}"
    config = read_config(folder, f"{part}/config.json")
    kinds = config.get("architectures") or [None]
    if kinds[0] not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ValueError(f"{folder / part} is a {kinds[0]}, no CLIPTextModel: give Stable "
                         "Diffusion's text encoder")  # fmt: skip
    if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
        raise ValueError(
            f"{folder / part} has hidden_act {config['hidden_act']!r}: {[*ACTIVATIONS]} are built"
        )
    vocabulary, numbers, pad = read_tokenizer(folder / f"tokenizer{ending}")
    with damaged(folder / part / "config.json"):
        return {
            "kind": ACTIVATIONS[config.get("hidden_act", "quick_gelu")],
            "vocab": config["vocab_size"], "length": config["max_position_embeddings"],
            "width": config["hidden_size"], "depth": config["num_hidden_layers"],
            "heads": config["num_attention_heads"], "mlp": config["intermediate_size"],
            "head_dim": config["hidden_size"] // config["num_attention_heads"],
            "tokenizer": vocabulary, "pad": pad, "empty": [] if zeros else numbers,
            "skip": int(xl), "projection": config["projection_dim"] if ending else 0,
        }  # fmt: skip


def read_tokenizer(folder: pathlib.Path) -> tuple[str, list[int], int]:
    """(vocabulary, numbers of the start and end marks, number of the token that pads)."""
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    if not all(file.is_file() for file in files):
        raise ValueError(
            f"{folder} lacks vocab.json or merges.txt: download the pipeline's {folder.name} as "
            "well"
        )
    tokens = read_config(folder, "vocab.json")
    vocabulary = read_vocabulary(files, size=len(tokens))
    pad = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if pad is None and (folder / name).is_file():
            pad = read_config(folder, name).get("pad_token")
    pad = pad["content"] if isinstance(pad, dict) else pad or END
    if pad not in tokens:
        raise ValueError(f"{folder} pads with {pad!r}, which is no token of its vocab.json")
    return vocabulary, [tokens[START], tokens[END]], tokens[pad]


def read_weights(given: pathlib.Path, folder: pathlib.Path, net: UNet, dtype: str) -> PyTree:
    """The parameters of the U-Net and of its text encoders, on the devices."""
    expected = parameter_shapes(net)
    text, first = net.config.text, expected.pop("text")
    assert text is not None  # pipelines have one
    second = first.pop("beside", None)
    if given.is_dir():
        tensors = Tensors(weight_files(folder / "unet", "diffusion_pytorch_model"))
        params = place(tensors, unet_entries(net.config), expected, dtype)
        towers = [
            (Tensors(weight_files(folder / part, "model"), "text_model.", True), "transformers")
            for part in ("text_encoder", "text_encoder_2")[: 1 + (second is not None)]
        ]
    else:
        entries = entries_of("guided_diffusion", net.config)
        params = place(Tensors([given], SINGLE), entries, expected, dtype)
        found = [(Tensors([given], prefix), names) for prefix, names in TOWERS.items()]
        towers = [tower for tower in found if len(tower[0])]
    configs = [text, text.beside] if text.beside else [text]
    if len(towers) != len(configs):
        raise ValueError(
            f"{given} has {len(towers)} text encoders, but {folder} describes {len(configs)}: put "
            "the configs of this file's own pipeline there"
        )
    params["text"], *others = [
        place(tensors, clip_entries(config, names), shapes, dtype, not given.is_dir())
        for (tensors, names), config, shapes in zip(towers, configs, (first, second))
    ]
    if others:
        params["text"]["beside"] = others[0]
    return params


def parameter_shapes(net: UNet) -> PyTree:
    """The shapes of a U-Net's parameters, its text encoders' among them; nothing is allocated."""
    side = net.config.stride
    x = jax.ShapeDtypeStruct((1, side, side, net.config.in_channels), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1))["params"]
