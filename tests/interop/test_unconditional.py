"""UNet2DModel both ways against diffusers: networks, and pictures of whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cheapscale
from cheapscale.interop.unconditional import (
    FAMILIES,
    block_types,
    is_unconditional,
    read_unconditional,
    write_unconditional,
)
from cheapscale.models.unet import init_params
from cheapscale.teacher.sampling import levels, ode_map
from cheapscale.teacher.teacher import make_teacher
from launch import export
from tests.cascade import toys
from tests.interop.tiny_pipelines import randomise

EDM = {"process": "edm", "sigma_min": 0.01, "sigma_max": 20.0, "rho": 5.0, "sigma_data": 0.4,
       "P_mean": -1.2, "P_std": 1.2}  # fmt: skip
LINEAR = {"process": "linear", "prediction": "eps", "sigma_min": 0.05, "sigma_max": 80.0,
          "rho": 7.0, "sigma_data": 0.5, "num_steps": 100}  # fmt: skip


@pytest.fixture(scope="module")
def diffusers(torchvision):
    pytest.importorskip("transformers", reason="install transformers (extra: test)")
    return pytest.importorskip("diffusers", reason="install diffusers (extra: test)")


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("family", ["ddpm", "latent"])
def test_the_published_networks_come_in(family, diffusers, tmp_path):
    """google's DDPMs, in their flat folder, and those of diffusers' own training example."""
    import torch

    down, up = block_types(family, [False, True])
    theirs = randomise(
        diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=down, up_block_types=up, **FAMILIES[family],
            attention_head_dim=None if family == "ddpm" else 8,
        ), 0,
    )  # fmt: skip
    flat = family == "ddpm"
    theirs.save_pretrained(tmp_path if flat else tmp_path / "unet")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)
    scheduler.save_pretrained(tmp_path if flat else tmp_path / "scheduler")
    assert is_unconditional(tmp_path)
    teacher = read_unconditional(tmp_path)
    assert teacher.process.schedule.num_steps == 100 and teacher.net.config.family == family
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("f")
    times = np.array([3.0, 99.0], "f")
    with torch.no_grad():
        expected = nhwc(theirs(torch.tensor(x), torch.tensor(times)).sample)
    ours = jax.jit(teacher.net.apply)({"params": teacher.params}, x.transpose(0, 2, 3, 1), times)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def toy(diffusion, seed=0, **fields):
    """A teacher of ours with random weights."""
    fields = {"resolution": 8, "channels": 16, "channel_mult": (1, 2), "num_blocks": 1,
              "groups": 4, "family": "adm", "attention": (4,), "head_dim": 0} | fields  # fmt: skip
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: init_params(fields, key), jax.random.key(0))
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype("f"), shapes)
    meta = {"stage": "pretrain", "networks": {"net": fields}, "diffusion": diffusion, "data": {},
            "config": {"pretrain": {"label_dropout": 0.1}}}  # fmt: skip
    return make_teacher(params, meta, workdir="runs/toy")


@pytest.mark.parametrize(
    "diffusion, fields, spacing",
    [
        (EDM, {"noise_feature": "edm", "num_classes": 3, "augment_dim": 9}, "karras"),
        (LINEAR, {"family": "latent", "head_dim": 8}, "own"),
    ],
)
def test_our_teachers_draw_the_same_pictures_in_diffusers(
    diffusion, fields, spacing, diffusers, tmp_path
):
    import torch

    teacher = toy(diffusion, **fields)
    write_unconditional(tmp_path, teacher)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    kind = diffusers.EDMEulerScheduler if diffusion is EDM else diffusers.DDIMScheduler
    scheduler = kind.from_pretrained(tmp_path / "scheduler")
    labels = np.array([1, 3])  # 3 means no class
    given = {"class_labels": torch.tensor(labels)} if "num_classes" in fields else {}
    grid = levels(teacher.process, 10, "sample", spacing)
    noise = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype("f")

    scheduler.set_timesteps(10)
    x = torch.tensor(noise) * (float(grid[0]) if diffusion is EDM else 1.0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(x, t)
            x = scheduler.step(theirs(x_in, t, **given).sample, t, x).prev_sample

    z = jnp.asarray(noise.transpose(0, 2, 3, 1)) * teacher.process.start(grid, spacing)
    run = jax.jit(lambda m, z, y: ode_map(m, z, y, steps=10, method="euler", spacing=spacing))
    ours = run(teacher, z, labels if given else np.zeros(2, "i4"))
    assert np.abs(nhwc(x)).max() > 0.1
    np.testing.assert_allclose(ours, nhwc(x), atol=1e-3 * np.abs(nhwc(x)).max())

    again = read_unconditional(tmp_path) if diffusion is LINEAR else None
    if again is not None:  # out and in again
        jax.tree.map(np.testing.assert_array_equal, again.params, teacher.params)
        assert again.net.config.channel_mult == teacher.net.config.channel_mult
        np.testing.assert_allclose(again.process.schedule.sigmas, teacher.process.schedule.sigmas)


@pytest.mark.parametrize(
    "diffusion, fields, said",
    [
        (EDM, {}, "conditioned on 250 ln sigma, for which diffusers has no scheduler"),
        (EDM, {"family": "ddpmpp"}, "is of the family 'ddpmpp', .* --config.model.family=latent"),
        (LINEAR, {"groups": 32}, "norms of 4 and 8 .*groups.*--config.model.groups=4"),
        (LINEAR, {"growth": (8,)}, "has model.growth"),
    ],
)
def test_what_diffusers_does_not_have_is_one_sentence(diffusion, fields, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        write_unconditional(tmp_path, toy(diffusion, **fields))
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


def test_the_command_exports_a_folder_that_every_command_takes(tmp_path):
    model = toy(LINEAR, family="latent", head_dim=8)
    run, out = toys.save(tmp_path / "run", "net", model.params, model.meta), tmp_path / "out"
    words = [f"--model={run}", "--format=diffusers", f"--out={out}"]
    assert export.main(words)["folder"] == str(out)
    again = cheapscale.load(out)
    assert again.resolution == 8 and not again.captioned
    jax.tree.map(np.testing.assert_array_equal, again.network.params, model.params)
    half = cheapscale.load(out, dtype="float16").network
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"float16"}
    with pytest.raises(SystemExit, match="exists and is not empty: name a new folder"):
        export.main(words)
    with pytest.raises(ValueError, match="knows no captions, so that a negative prompt"):
        again.avoiding("blurry")
