"""Folders of tiny random pipelines, as diffusers saves them: Stable Diffusion 1, 2 and XL."""

import json
import pathlib

KINDS = ("sd1", "sd2", "sdxl")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = ["r e", "re d</w>", "d o", "do g</w>", "b l", "bl u", "blu e</w>", "a </w>"]
WORDS = ("a red dog", "blue dog, red", "dog")


def vocabulary() -> dict[str, int]:
    """A vocabulary of CLIP's form: bytes, the same at the end of a word, eight merges, marks."""
    from cheapscale.features.tokenizer import BYTES, END, LAST, START

    merged = ["".join(merge.split()) for merge in MERGES[:-1]] + ["re" + LAST]
    return {t: i for i, t in enumerate([*BYTES, *(c + LAST for c in BYTES), *merged, START, END])}


def save_tokenizer(folder: pathlib.Path, pad: str) -> None:
    folder.mkdir(parents=True)
    merges = [*MERGES[:-1], "r e</w>"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH}))


LENGTH = 9
UNET = dict(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
    block_out_channels=(16, 32),
)  # fmt: skip


def unet_config(kind: str) -> dict:
    down = ("CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D")
    if kind == "sd1":
        return UNET | dict(
            down_block_types=down, up_block_types=up, attention_head_dim=4, cross_attention_dim=24
        )
    if kind == "sd2":
        return UNET | dict(
            down_block_types=down[:1], up_block_types=up[1:], attention_head_dim=[4],
            cross_attention_dim=24, use_linear_projection=True, block_out_channels=(32,),
        )  # fmt: skip
    return UNET | dict(
        down_block_types=down[::-1], up_block_types=up[::-1], attention_head_dim=(2, 4),
        cross_attention_dim=24 + 40, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
        addition_time_embed_dim=6, projection_class_embeddings_input_dim=20 + 36,
    )  # fmt: skip


def text_config(kind: str, second: bool = False):
    from transformers import CLIPTextConfig

    size = len(vocabulary())
    width = 40 if second else 24
    return CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=20,
        hidden_act="quick_gelu" if kind == "sd1" or (kind == "sdxl" and not second) else "gelu",
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=0,
    )  # fmt: skip


SCHEDULERS = {
    "sd1": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                set_alpha_to_one=False, steps_offset=1, clip_sample=False),
    "sd2": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                set_alpha_to_one=False, clip_sample=False, prediction_type="v_prediction",
                timestep_spacing="trailing", rescale_betas_zero_snr=True),
    "sdxl": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                 timestep_spacing="leading", steps_offset=1, clip_sample=False),
}  # fmt: skip


def randomise(network, seed: int):
    """Weights without zeros, in place."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * noise
    return network.eval()


def save(kind: str, folder: pathlib.Path):
    """(torch networks by part, scheduler) of a pipeline that is saved in `folder`."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    xl = kind == "sdxl"
    parts = {
        "unet": UNet2DConditionModel(**unet_config(kind)),
        "text_encoder": CLIPTextModel(text_config(kind)),
        "vae": AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, sample_size=16,
            scaling_factor=0.18215,
        ),
    }  # fmt: skip
    if xl:
        parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(kind, second=True))
    for seed, (name, part) in enumerate(sorted(parts.items())):
        randomise(part, seed).save_pretrained(folder / name)
    scheduler = DDIMScheduler(**SCHEDULERS[kind])
    scheduler.save_pretrained(folder / "scheduler")
    save_tokenizer(folder / "tokenizer", "!" if kind == "sd2" else "<|endoftext|>")
    if xl:
        save_tokenizer(folder / "tokenizer_2", "!")
    name = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    index = {"_class_name": name, "force_zeros_for_empty_prompt": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    return parts, scheduler
