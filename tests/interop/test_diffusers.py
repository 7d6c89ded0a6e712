"""Pipelines of Stable Diffusion against diffusers and transformers, on tiny random networks."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from cheapscale.diffusion.denoiser import VP
from cheapscale.interop.diffusers import (
    TOWERS,
    parameter_shapes,
    process_fields,
    read_pipeline,
    unet_fields,
)
from cheapscale.interop.diffusers_names import clip_entries, unet_entries
from cheapscale.interop.pytorch import Entry
from cheapscale.interop.tensors import Tensors, place
from cheapscale.interop.unet_weights import entries_of
from cheapscale.models.text import TextFeatures
from cheapscale.models.unet import unet
from cheapscale.teacher.codec import codec_of
from cheapscale.teacher.sampling import levels, ode_map
from cheapscale.teacher.text import tokenise
from cheapscale.training.cost import param_count
from cheapscale.training.mesh import make_mesh
from tests.interop import tiny_pipelines as tiny


@pytest.fixture(scope="module")
def saved(torchvision, tmp_path_factory):
    """saved(kind) -> (folder, torch networks, scheduler, our teacher), made once."""
    for name in ("transformers", "diffusers"):
        pytest.importorskip(name, reason=f"install {name} (extra: test)")

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("pipelines") / kind
        return folder, *tiny.save(kind, folder), read_pipeline(folder)

    return make


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_network_equals_diffusers_on_any_canvas(kind, saved):
    import torch

    _, parts, _, teacher = saved(kind)
    rng = np.random.default_rng(0)
    x, times = rng.normal(size=(2, 4, 8, 12)).astype("f"), np.array([7.0, 500.0], "f")
    tokens = rng.normal(size=(2, tiny.LENGTH, teacher.net.config.text.token_width)).astype("f")
    pooled = rng.normal(size=(2, 20)).astype("f")
    added = {}
    if kind == "sdxl":
        sizes = np.tile([16, 24, 0, 0, 16, 24], (2, 1))
        given = {"text_embeds": torch.tensor(pooled), "time_ids": torch.tensor(sizes)}
        added = {"added_cond_kwargs": given}
    args = (torch.tensor(a) for a in (x, times, tokens))
    with torch.no_grad():
        theirs = nhwc(parts["unet"](*args, **added).sample)
    text = TextFeatures(jnp.asarray(tokens), jnp.ones(tokens.shape[:2], bool), jnp.asarray(pooled))
    ours = jax.jit(teacher.net.apply)(
        {"params": teacher.params}, x.transpose(0, 2, 3, 1), times, text
    )
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_whole_ddim_run_from_prompts_equals_diffusers(kind, saved):
    """Vocabularies, encoders, guidance, null and negative prompts, table and grid."""
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    folder, parts, scheduler, teacher = saved(kind)
    names = [path.name for path in folder.glob("tokenizer*")]
    vocabularies = {name: CLIPTokenizer.from_pretrained(folder / name) for name in names}
    if kind == "sdxl":
        pipeline = StableDiffusionXLPipeline(**parts, **vocabularies, scheduler=scheduler)
    else:
        absent = {"safety_checker": None, "feature_extractor": None}
        pipeline = StableDiffusionPipeline(**parts, **vocabularies, scheduler=scheduler, **absent)
    pipeline.set_progress_bar_config(disable=True)
    prompts, noise = ["a red dog", ""], np.random.default_rng(3).normal(size=(2, 4, 8, 8))
    run = functools.partial(ode_map, steps=5, method="euler", spacing="own", cfg_scale=5.0)
    run, text = jax.jit(run), teacher.net.config.text
    grid = levels(teacher.process, 5, "sample", "own")
    z = teacher.process.start(grid, "own") * noise.transpose(0, 2, 3, 1)
    for negative in (None, "blue dog, red"):
        theirs = pipeline(
            prompts, negative_prompt=negative and [negative] * 2, height=16, width=16,
            num_inference_steps=5, guidance_scale=5.0, output_type="latent",
            latents=torch.tensor(noise, dtype=torch.float32),
        ).images  # fmt: skip
        tokens = tokenise(text, [negative])[0] if negative else np.full(tiny.LENGTH, -1)
        guided = teacher.replace(negative=jnp.asarray(tokens, jnp.int32))
        ours = run(guided, z.astype("f"), tokenise(text, prompts))
        # zero terminal SNR is 2^-24 here
        tolerance = 1e-3 if teacher.process.zero_snr else 2e-5
        np.testing.assert_allclose(
            ours, nhwc(theirs), rtol=0, atol=tolerance * np.abs(nhwc(theirs)).max()
        )


@pytest.mark.parametrize("changes", [
    {}, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    {"timestep_spacing": "linspace", "prediction_type": "sample"},
    {"beta_schedule": "squaredcos_cap_v2", "steps_offset": 1, "set_alpha_to_one": False},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
])  # fmt: skip
def test_table_and_grid_equal_those_of_the_scheduler(changes, torchvision, tmp_path):
    DDIMScheduler = pytest.importorskip("diffusers", reason="install diffusers").DDIMScheduler
    theirs = DDIMScheduler(**changes)
    theirs.save_pretrained(tmp_path)
    process = VP(**process_fields(tmp_path / "scheduler_config.json"))
    bar = theirs.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(process.schedule.alpha_bar, bar, rtol=2e-3, atol=1e-7)
    theirs.set_timesteps(20)
    levels_there = process.schedule.sigmas[theirs.timesteps.numpy()]
    last = float(process.schedule.sigmas[0]) if changes.get("set_alpha_to_one") is False else 0.0
    np.testing.assert_allclose(process.grid(20, "own"), np.append(levels_there, last))


SD1 = dict(
    _class_name="UNet2DConditionModel", sample_size=64, in_channels=4, out_channels=4,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], layers_per_block=2,
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, attention_head_dim=8,
    block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=768, norm_num_groups=32,
)  # fmt: skip
SDXL = SD1 | dict(
    down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, sample_size=128,
    up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], attention_head_dim=[5, 10, 20],
    block_out_channels=[320, 640, 1280], cross_attention_dim=2048, addition_time_embed_dim=256,
    transformer_layers_per_block=[1, 2, 10], addition_embed_type="text_time",
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip


def tower(kind, width, depth, **more):
    return {"kind": kind, "vocab": 49408, "length": 77, "width": width, "depth": depth,
            "heads": width // 64, "mlp": 4 * width, "pad": 0} | more  # fmt: skip


@pytest.mark.parametrize(
    "config, text, millions, text_millions",
    [
        (SD1, tower("clip", 768, 12), 859.5, 123.1),
        (SDXL, tower("clip", 768, 12, beside=tower("openclip", 1280, 32, projection=1280)),
         2567.5, 123.1 + 694.7),
    ],
)  # fmt: skip
def test_the_full_networks_have_the_published_numbers_of_parameters(
    config, text, millions, text_millions
):
    shapes = parameter_shapes(unet(**unet_fields(config, pathlib.Path("unet"), text, 8)))
    assert param_count(shapes.pop("text")) / 1e6 == pytest.approx(text_millions, abs=0.1)
    assert param_count(shapes) / 1e6 == pytest.approx(millions, abs=0.06)


def inverse(entry: Entry, tensors, names: list[str]) -> dict:
    """Another code's tensors of an entry, given diffusers': the same numbers, or them joined."""
    arrays = [tensors[name] for name in entry.names]
    if len(arrays) != len(names):
        return {names[0]: np.concatenate(arrays)}
    return dict(zip(names, arrays))


def single_file(kind, saved, path):
    """The pipeline's networks as one file with latent diffusion's names."""
    folder, _, _, teacher = saved(kind)
    config = teacher.net.config
    weights = Tensors([folder / "unet" / "diffusion_pytorch_model.safetensors"])
    state = {}
    theirs = {e.path: e for e in entries_of("guided_diffusion", config)}
    for entry in unet_entries(config):
        names = [f"model.diffusion_model.{name}" for name in theirs[entry.path].names]
        state |= inverse(entry, weights, names)
    prefixes = [*TOWERS][2:] if kind == "sdxl" else [[*TOWERS][kind == "sd2"]]
    for prefix, tower_config, part in zip(
        prefixes, (config.text, config.text.beside), ("text_encoder", "text_encoder_2")
    ):
        weights = Tensors([folder / part / "model.safetensors"], "text_model.", others=True)
        theirs = {e.path: e for e in clip_entries(tower_config, TOWERS[prefix])}
        for entry in clip_entries(tower_config):
            names = [prefix + name for name in theirs[entry.path].names]
            state |= inverse(entry, weights, names)
        if f"{prefix}text_projection" in state:
            state[f"{prefix}text_projection"] = state[f"{prefix}text_projection"].T.copy()
    vae = Tensors([folder / "vae" / "diffusion_pytorch_model.safetensors"])
    state |= {f"first_stage_model.{name}": array for name, array in vae.items()}
    save_file({name: np.ascontiguousarray(a) for name, a in state.items()}, path)
    return state


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_single_file_has_the_names_that_diffusers_reads_and_gives_the_same_teacher(
    kind, saved, tmp_path
):
    import torch
    from diffusers.loaders import single_file_utils as theirs

    folder, parts, _, teacher = saved(kind)
    state = single_file(kind, saved, tmp_path / "all.safetensors")
    # diffusers' own converter finds every weight of the U-Net where it expects it
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    read = theirs.convert_ldm_unet_checkpoint(dict(tensors), dict(parts["unet"].config))
    wanted = parts["unet"].state_dict()
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(read[name].reshape(tensor.shape), tensor), name

    shutil.copytree(folder, tmp_path / "all", ignore=shutil.ignore_patterns("*.safetensors"))
    single = read_pipeline(tmp_path / "all.safetensors")
    assert single.net == teacher.net and single.process == teacher.process
    jax.tree.map(np.testing.assert_array_equal, single.params, teacher.params)
    codecs = [codec_of(model.meta) for model in (single, teacher)]
    assert codecs[0].factor == 2 and codecs[0].scale == codecs[1].scale == (0.18215,) * 4
    jax.tree.map(np.testing.assert_array_equal, *(codec.params for codec in codecs))


def test_weights_may_be_read_in_half_precision(saved):
    folder, *_, teacher = saved("sd1")
    half = read_pipeline(folder, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    assert half.net.config.dtype == "bfloat16"
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b),
        teacher.params, half.params,
    )  # fmt: skip
    x, label = np.zeros((1, 8, 8, 4), "f"), tokenise(teacher.net.config.text, ["a red dog"])

    def network(params):
        return half.net.apply({"params": params}, x, np.ones(1, "f"), label, taps=("dec_4_in1",))

    out, inner = jax.eval_shape(network, half.params)
    assert inner["dec_4_in1"].dtype == jnp.bfloat16 and out.dtype == jnp.float32


def test_large_tensors_arrive_with_their_sharding(tmp_path, eight_devices):
    big = (np.arange(2**20) % 999).reshape(2048, 512).astype(np.float16)
    save_file({"w": big}, tmp_path / "w.safetensors")
    shapes = {"dense": {"kernel": jax.ShapeDtypeStruct((512, 2048), np.float32)}}
    with jax.set_mesh(make_mesh(data=2, fsdp=4, devices=eight_devices)):
        found = place(
            Tensors([tmp_path / "w.safetensors"]), [Entry("dense/kernel", "w", "dense")], shapes
        )["dense"]["kernel"]
    assert found.sharding.spec == P(None, "fsdp") and found.dtype == np.float16
    assert found.addressable_shards[0].data.shape == (512, 512)
    np.testing.assert_array_equal(found, big.T)


def edited(folder, name, **changes):
    path = folder / name
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: shutil.rmtree(f / "vae"), "lacks vae/config.json: download the pipeline's vae"),
        (lambda f: (f / "unet" / "config.json").unlink(), "lacks unet/config.json"),
        (lambda f: (f / "tokenizer" / "merges.txt").unlink(), "lacks vocab.json or merges.txt"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"), "is no JSON"),
        (lambda f: [p.unlink() for p in (f / "unet").glob("*.safetensors")],
         "unet has no diffusion_pytorch_model.safetensors: fetch it as well"),
        (lambda f: edited(f, "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline"),
        (lambda f: edited(f, "unet/config.json", _class_name="UNet3DConditionModel"),
         "is a UNet3DConditionModel, no UNet2DConditionModel"),
        (lambda f: edited(f, "unet/config.json", in_channels=9), "takes 9 channels and gives 4"),
        (lambda f: edited(f, "unet/config.json", class_embed_type="timestep"),
         "has class_embed_type 'timestep', which is not built here"),
        (lambda f: edited(f, "unet/config.json", down_block_types=["AttnDownBlock2D"] * 2),
         "down_block_types .* is not built here"),
        (lambda f: edited(f, "unet/config.json", cross_attention_dim=32),
         "tokens of width 32, but the text encoders give 24"),
        (lambda f: edited(f, "unet/config.json", layers_per_block=2), "missing .*unused nothing"),
        (lambda f: edited(f, "scheduler/scheduler_config.json",
                          _class_name="FlowMatchEulerDiscreteScheduler"),
         "is of FlowMatchEulerDiscreteScheduler, which is not built here"),
        (lambda f: edited(f, "text_encoder/config.json", architectures=["T5EncoderModel"]),
         "is a T5EncoderModel, no CLIPTextModel"),
    ],
)  # fmt: skip
def test_bad_folders_are_one_sentence(spoil, said, saved, tmp_path):
    folder = tmp_path / "spoilt"
    shutil.copytree(saved("sd1")[0], folder)
    spoil(folder)
    with pytest.raises(ValueError, match=said) as error:
        read_pipeline(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_sdxl_alone_its_refiner_and_unknown_embeddings_are_one_sentence(saved, tmp_path):
    path = tmp_path / "xl.safetensors"
    single_file("sdxl", saved, path)
    with pytest.raises(ValueError, match=r"weights of SDXL alone: put .*model_index.json.* into"):
        read_pipeline(path)
    folder, *_, teacher = saved("sdxl")
    shutil.copytree(folder, tmp_path / "refiner")
    edited(tmp_path / "refiner", "unet/config.json", projection_class_embeddings_input_dim=50)
    with pytest.raises(ValueError, match="as SDXL's refiner does: give the base network"):
        read_pipeline(tmp_path / "refiner")
    with pytest.raises(ValueError, match="names the embedding <cat-toy>, which .* lacks"):
        tokenise(teacher.net.config.text, ["a <cat-toy> dog"])
