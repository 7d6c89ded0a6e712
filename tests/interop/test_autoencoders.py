"""Autoencoders against diffusers' PyTorch ones, on random weights and on TAESD's own."""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from cheapscale.data.pixels import psnr
from cheapscale.data.scenes import draw, scene
from cheapscale.interop.autoencoders import read_autoencoder
from cheapscale.models.autoencoder import Autoencoder, KLConfig, TinyConfig, decode_tiled

KL = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 3,
}  # fmt: skip
TINY = {
    "encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3,
    "num_encoder_blocks": (1, 2, 1), "num_decoder_blocks": (2, 1, 1), "latent_channels": 5,
}  # fmt: skip
encode, decode = jax.jit(Autoencoder.encode), jax.jit(Autoencoder.decode)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="install torch (extra: test) to compare")


@pytest.fixture(scope="module")
def diffusers(torch, torchvision):
    return pytest.importorskip("diffusers", reason="install diffusers (extra: bench) to compare")


def pictures(*shape):
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def chosen(theirs, torch):
    """Random weights that make every part matter."""
    generator = torch.Generator().manual_seed(0)
    for value in theirs.state_dict().values():
        draw = torch.randn(value.shape, generator=generator)
        value.copy_(draw * value[0].numel() ** -0.5 if value.ndim > 1 else value + 0.3 * draw)
    return theirs.eval()


def agree(ours, theirs, torch, x):
    """The latents of both, and the pictures of the same latents, to 1e-4 of their deviation."""
    pixels = torch.tensor(x).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = theirs.encode(pixels)
        z = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        scale, shift = theirs.config.scaling_factor, theirs.config.get("shift_factor") or 0.0
        latents, back = (z - shift) * scale, theirs.decode(z).sample
    latents, back = (array.permute(0, 2, 3, 1).numpy() for array in (latents, back))
    close(encode(ours, x), latents)
    close(decode(ours, latents), back)


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.std())


def test_kl_equals_diffusers(diffusers, torch, tmp_path):
    theirs = diffusers.AutoencoderKL(**KL, scaling_factor=0.3, shift_factor=0.1)
    chosen(theirs, torch).save_pretrained(tmp_path / "vae")
    agree(read_autoencoder(tmp_path), theirs, torch, pictures(2, 12, 8, 3))


def test_kl_without_its_optional_parts(diffusers, torch, tmp_path):
    more = {"use_quant_conv": False, "use_post_quant_conv": False}
    more |= {"mid_block_add_attention": False, "latents_mean": [0.1, 0.2, 0.3]}
    more |= {"latents_std": [1.0, 2.0, 4.0], "scaling_factor": 0.5}
    theirs = chosen(diffusers.AutoencoderKL(**KL | more), torch)
    theirs.save_pretrained(tmp_path)
    ours = read_autoencoder(tmp_path)
    assert ours.scale == (0.5, 0.25, 0.125) and ours.shift == (0.1, 0.2, 0.3)
    plain = ours.replace(scale=(0.5,) * 3, shift=(0.0,) * 3)
    agree(plain, theirs, torch, pictures(2, 8, 8, 3))


def test_tiny_equals_diffusers(diffusers, torch, tmp_path):
    theirs = chosen(diffusers.AutoencoderTiny(**TINY, scaling_factor=0.7), torch)
    theirs.save_pretrained(tmp_path)
    agree(read_autoencoder(tmp_path), theirs, torch, pictures(2, 16, 8, 3))


@pytest.mark.parametrize("name", ["taesd", "taesd3"])
def test_taesd_equals_diffusers(name, diffusers, torch, shared):
    folder = shared / "data" / "nets" / "taesd"
    files = [folder / f"{name}_{part}.safetensors" for part in ("encoder", "decoder")]
    ours = read_autoencoder("+".join(map(str, files)))
    theirs = diffusers.AutoencoderTiny(latent_channels=ours.config.latent_channels)
    for part, file, first in zip((theirs.encoder, theirs.decoder), files, (0, 1)):
        state = safetensors.numpy.load_file(file)
        numbered = (re.match(r"(\d+)(.*)", key).groups() + (array,) for key, array in state.items())
        part.load_state_dict(
            {f"layers.{int(n) - first}{rest}": torch.tensor(a.astype(np.float32))
             for n, rest, a in numbered}
        )  # fmt: skip
    agree(ours, theirs.eval(), torch, pictures(1, 32, 32, 3))


LATENT_DIFFUSION = (  # ours -> the names in one file of Stable Diffusion
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{1 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{1 + int(m[1])}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_(q|k|v)", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
)  # fmt: skip


def test_one_file_of_a_whole_model(diffusers, torch, tmp_path):
    config = KL | {"norm_num_groups": 32, "block_out_channels": (32, 64)}
    theirs = chosen(diffusers.AutoencoderKL(**config), torch)
    state = {"cond_stage_model.transformer.weight": np.ones((2, 2), np.float32)}
    for name, value in theirs.state_dict().items():
        array = value.numpy()
        if re.search(r"attentions\.0\.to_.*weight", name):
            array = array[:, :, None, None]  # 1x1 convolutions there
        for pattern, replacement in LATENT_DIFFUSION:
            name = re.sub(pattern, replacement, name)
        state[f"first_stage_model.{name}"] = array
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    ours = read_autoencoder(tmp_path / "model.safetensors")
    assert ours.config == KLConfig((32, 64), 1, 32, 3) and set(ours.scale) == {0.18215}
    agree(ours, theirs, torch, pictures(1, 8, 8, 3))
    # Without the text encoder, nothing says the scale.
    del state["cond_stage_model.transformer.weight"]
    safetensors.numpy.save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="does not say the scale of its latents"):
        read_autoencoder(tmp_path / "vae.safetensors")
    assert set(read_autoencoder(tmp_path / "vae.safetensors", scale=0.5).scale) == {0.5}


def test_taesds_files_say_their_sizes(shared):
    folder = shared / "data" / "nets" / "taesd"
    both = f"{folder / 'taesd_encoder.safetensors'}+{folder / 'taesd_decoder.safetensors'}"
    assert read_autoencoder(both).config == TinyConfig()
    with pytest.raises(
        ValueError, match="taesd_encoder.safetensors has no encoder and decoder.*joined by"
    ):
        read_autoencoder(folder / "taesd_encoder.safetensors")


def seam(x, whole, columns):
    """The mean jump across pixel columns at which tiles begin or end, over the whole picture's."""
    jumps = [np.abs(np.diff(np.asarray(image), axis=2)) for image in (x, whole)]
    return np.divide(*(jump[:, :, [column - 1 for column in columns]].mean() for jump in jumps))


def test_overlap_removes_the_seams_of_tiles(shared):
    folder = shared / "data" / "nets" / "taesd"
    both = f"{folder / 'taesd_encoder.safetensors'}+{folder / 'taesd_decoder.safetensors'}"
    ours = read_autoencoder(both)
    x = draw(scene(0, "test", 0), 128)[None]
    z = np.asarray(encode(ours, x))
    whole = decode(ours, z)
    assert psnr(whole, x).mean() > 22
    butted, blended = (decode_tiled(ours, z, tile=8, overlap=overlap) for overlap in (0, 4))
    assert seam(butted, whole, [64]) > 1.3
    assert seam(blended, whole, [32, 64, 96]) < 1.02
    assert psnr(blended, whole).mean() > psnr(butted, whole).mean() + 6


def test_folders_that_are_no_autoencoder(tmp_path):
    with pytest.raises(ValueError, match="no file .*config.json: give the folder of an auto"):
        read_autoencoder(tmp_path)
    config = {"_class_name": "AutoencoderDC"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is of 'AutoencoderDC': give the folder of an"):
        read_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match="config.json is no diffusers config"):
        read_autoencoder(tmp_path)
