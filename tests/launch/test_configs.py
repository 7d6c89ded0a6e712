"""Every config file, every stage: complete, plain, and refused where it makes no sense."""

import importlib
import json
import pathlib

import pytest

from cheapscale.models.unet import unet
from cheapscale.stages.assess import OF_TRAINING
from configs import common

FILES = ("scenes", "cifar10", "clothing", "emoji", "imagenet")


def module(name):
    return importlib.import_module(f"configs.{name}")


@pytest.mark.parametrize("name", FILES)
def test_every_stage_of_every_file_is_plain_values_and_names_a_module(name):
    file = module(name)
    assert file.stages()[:3] == ["stage=pretrain", "stage=invert", "stage=distill"]
    for arg in file.stages():
        for prefix in ("", "smoke,"):
            config = file.get_config(prefix + arg)
            json.dumps(config.to_dict())
            importlib.import_module(f"cheapscale.stages.{config.stage}")
            if config.stage == "pretrain":
                assert unet(**config.model.to_dict()).config.resolution == config.data.resolution


@pytest.mark.parametrize("name", FILES)
def test_a_growth_stage_has_one_width_for_each_doubling(name):
    file = module(name)
    base = file.get_config("stage=pretrain").data.resolution
    grown = [arg for arg in file.stages() if "grow" in arg]
    for arg in grown:
        assert len(file.get_config(arg).grow.widths) == 1
    top = file.get_config(grown[-1]).data.resolution
    jump = file.get_config(f"stage=grow,jump,resolution={top}")
    assert base * 2 ** len(jump.grow.widths) == top


def test_stage_prune_has_the_fields_that_an_assessment_does_not_depend_on():
    assert set(common.prune("prune")) == set(OF_TRAINING)


def test_levels_leaves_out_the_lowest_of_the_u_net_s():
    model = module("imagenet").get_config("stage=pretrain,levels=2").model
    assert (model.channel_mult, model.attention) == ((1, 2), (32,))
    assert unet(**model.to_dict()).config.stride == 2
    assert module("scenes").get_config("stage=pretrain,smoke,levels=1").model.channel_mult == (1,)


def test_the_papers_values_bind_imagenet():
    """Spec sections 1.3, 3.3-3.5, 4.1, 4.4 and 12.13-12.16."""
    file = module("imagenet")
    pretrain = file.get_config("stage=pretrain")
    assert pretrain.pretrain.label_dropout == 0 and pretrain.pretrain.augment == 0
    assert pretrain.model.num_classes == 1000 and pretrain.batch_size == 4096
    assert pretrain.optim.name == "radam" and pretrain.optim.lr == 1e-4
    assert pretrain.total_steps == 600_000 and pretrain.ema.decay == 0.9999
    assert pretrain.model.dropout == 0.1
    diffusion = pretrain.diffusion
    assert (diffusion.sigma_min, diffusion.sigma_max, diffusion.rho) == (0.002, 80.0, 7.0)
    assert (diffusion.P_mean, diffusion.P_std, diffusion.sigma_data) == (-1.2, 1.2, 0.5)
    invert = file.get_config("stage=invert")
    assert invert.invert.nodes == 40 and invert.invert.clip and invert.invert.cfg_scale == 1
    assert invert.compute.dtype == "float16" and invert.invert.dtype == "float32"
    steps = {"stage=distill": 210_000, "stage=grow,resolution=128": 120_000,
             "stage=grow,resolution=256": 120_000, "stage=grow,resolution=512": 35_000}  # fmt: skip
    assert {arg: file.get_config(arg).total_steps for arg in steps} == steps
    for arg in ("stage=distill", "stage=grow,resolution=128", "stage=grow,resolution=512"):
        config = file.get_config(arg)
        assert config.optim.name == "radam" and config.optim.lr == 8e-6
        assert config.optim_discriminator.lr == 2e-3 and config.ema.decay == 0.999
        for optim in (config.optim, config.optim_discriminator):
            assert (optim.name, optim.b1, optim.b2, optim.eps) == ("radam", 0.9, 0.999, 1e-8)
        assert (config.discriminator.width, config.discriminator.embedding_dim) == (64, 320)
        assert config.batch_size == 256 and config.optim.clip_norm == 0
        assert config.features.names == ("deit_base_distilled", "efficientnet_lite0")
        loss = config[config.stage]
        growing = config.stage == "grow"
        assert (loss.adversarial_weight, loss.adaptive) == (
            (1.0, False) if growing else (0.2, True)
        )
        assert loss.distance == "feature" and loss.gan_loss == "hinge"
    assert file.get_config("stage=grow,resolution=512").grow.widths == (96,)
    assert file.get_config("stage=grow,resolution=256").grow.widths == (192,)
    assert file.get_config("size=base32,stage=pretrain").model.resolution == 32
    top = file.get_config("size=base32,stage=grow,jump,resolution=512")
    assert len(top.grow.widths) == 4
    for size in ("size=base64", "size=base32"):  # small photographs are enlarged
        for arg in file.stages(size):
            assert file.get_config(f"{size},{arg}").data.options.allow_upscale


@pytest.mark.parametrize("name", FILES)
def test_every_file_tunes_a_cascade_at_twice_its_base(name):
    file = module(name)
    base = file.get_config("stage=pretrain").data.resolution
    for tune in ("none", "neck", "gain", "2k", "full", "lora", "ft"):
        config = file.get_config(f"stage=cascade,tune={tune}")
        json.dumps(config.to_dict())
        assert config.data.resolution == 2 * base and config.cascade.tune == tune
        # the paper's choices
        chosen = config.cascade
        assert (chosen.k, chosen.mode, chosen.pivot, chosen.features) == (
            "t0.7", "S", "aligned", "clean",
        )  # fmt: skip
    assert file.get_config("stage=cascade,resolution=128").data.resolution == 128
    with pytest.raises(ValueError, match="tune 'wide' is unknown"):
        file.get_config("stage=cascade,tune=wide")


def test_words_that_no_file_knows_are_refused_with_those_it_knows():
    file = module("scenes")
    with pytest.raises(ValueError, match="'sise' is unknown: this file takes stage, resolution"):
        file.get_config("sise=quick")
    with pytest.raises(ValueError, match="size 'huge' is unknown: choose one of quick"):
        file.get_config("size=huge")
    with pytest.raises(ValueError, match="stage 'shrink' is unknown"):
        file.get_config("stage=shrink")
    with pytest.raises(ValueError, match="stage=grow takes resolution=16, 32, not 24"):
        file.get_config("stage=grow,resolution=24,jump")
    with pytest.raises(ValueError, match="not 8"):  # the base resolution, where none is given
        file.get_config("stage=grow")


def test_unlabelled_data_makes_an_unconditional_model():
    config = module("cifar10").get_config("stage=pretrain,unlabelled")
    assert config.model.num_classes == 0 and config.data.options.unlabelled


def test_every_config_that_a_script_or_the_readme_names_exists():
    root = pathlib.Path(__file__).resolve().parents[2]
    texts = [root / "README.md", *(root / "launch").glob("*.sh"), *(root / "configs").glob("*.py")]
    for text in texts:
        for word in text.read_text().replace("=", " ").replace(":", " ").split():
            if word.startswith("configs/") and word.endswith(".py"):
                assert (root / word).is_file(), f"{text.name} names {word}"
