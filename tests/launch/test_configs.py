"""Every stage of every config file: complete, of plain values, and refused if it is invalid."""

import importlib
import json
import pathlib

import pytest

from cheapscale.models.unet import unet
from configs import common, data_sets, fields
from configs.sweeps import SWEEPS, sweep
from launch.pipeline import stage_configs
from launch.train import STAGES

FILES = ("scenes", "cifar10", "clothing", "emoji", "imagenet")


def module(name):
    return importlib.import_module(f"configs.{name}")


@pytest.mark.parametrize("name", FILES)
def test_every_stage_of_every_file_is_plain_values_and_names_a_module(name):
    file = module(name)
    regress = ["stage=regress"] if name == "scenes" else []
    begin = ["stage=pretrain", "stage=invert", *regress, "stage=distill"]
    assert file.stages()[: len(begin)] == begin
    for arg in file.stages():
        for prefix in ("", "smoke,"):
            config = file.get_config(prefix + arg)
            json.dumps(config.to_dict())
            fields.check(config)
            assert config.stage in STAGES
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


def test_the_rate_of_an_expert_falls_to_zero_over_its_updates():
    file = module("scenes")
    optim = file.get_config("stage=prune").optim
    assert (optim.decay_steps, optim.warmup_steps) == (200, 20)
    optim = file.get_config("stage=prune,total_steps=50").optim
    assert (optim.decay_steps, optim.warmup_steps) == (50, 10)
    assert file.get_config("stage=prune,optim.decay_steps=0").optim.decay_steps == 0


def test_a_pipeline_sets_a_field_in_every_stage_that_has_it():
    file = module("scenes")
    words = "invert.nodes=9,grow.widths=(16,),features.paths.x=FILE,optim.lr=1e-5,seed=3"
    configs = {arg: file.get_config(f"{words},{arg}") for arg in file.stages(words)}
    assert [config.seed for config in configs.values()] == [3] * 8
    assert configs["stage=invert"].invert.nodes == 9
    for stage in ("regress", "grow"):
        assert configs[f"stage={stage},resolution=32"].grow.widths == (16,)
    assert configs["stage=distill"].features.paths.x == "FILE"
    assert configs["stage=pretrain"].optim.lr == 1e-5


def test_a_field_of_one_stage_leaves_the_others_alone():
    words = "total_steps=7,pretrain.total_steps=5,grow32.batch_size=3,pretrain.augment=0.1,base=8"
    planned = stage_configs("configs/scenes.py", words, "runs")
    found = {pathlib.Path(place).name: config for place, config in planned}
    assert [config.total_steps for config in found.values()] == [5, *[7] * 7]
    assert found["grow32"].batch_size == 3 != found["grow16"].batch_size
    assert found["pretrain"].pretrain.augment == 0.1  # a field of its own section
    for wrong in ("grow64.batch_size=3", "distill.augment=0.1", "prune.k=0.3"):
        with pytest.raises(ValueError, match=f"{wrong.partition('=')[0]}"):
            stage_configs("configs/scenes.py", wrong, "runs")


def test_a_size_may_set_one_resolution_of_a_stage_apart():
    clothing = module("clothing")
    for side, word, weight in ((32, "", 0.2), (64, "", 0.6), (64, ",grow.adversarial_weight=1", 1)):
        config = clothing.get_config(f"size=gallery,stage=grow,resolution={side}{word}")
        assert config.grow.adversarial_weight == weight and config.grow.adaptive


def test_a_size_may_begin_at_several_resolutions():
    file = module("scenes")
    assert file.get_config("size=ablation,base=32").model.channel_mult == (1, 2, 2)
    assert file.stages("size=ablation,base=32,top=32")[-1] == "stage=distill"
    with pytest.raises(ValueError, match="base=64: this size starts at 8 or 16 or 32 px"):
        file.get_config("size=ablation,base=64")


def test_pipelines_name_their_stages_in_order():
    file = module("scenes")
    assert file.stages("pipeline=one_step,smoke") == [
        "stage=pretrain", "stage=invert", "stage=distill",
    ]  # fmt: skip
    assert file.stages("pipeline=cascade,teacher=T,top=32") == [
        "stage=cascade,resolution=16", "stage=cascade,resolution=32",
    ]  # fmt: skip
    assert file.stages("pipeline=experts,prune.groups=2") == [
        "stage=pretrain", "stage=assess", "stage=prune,prune.group=0", "stage=prune,prune.group=1",
    ]  # fmt: skip


def test_the_stages_of_a_pipeline_find_each_others_folders():
    def paths(words, name):
        planned = stage_configs("configs/scenes.py", words, "runs")
        return [(folder, config.get(name, "-")) for folder, config in planned]

    assert paths("top=16", "latents") == [
        ("runs/pretrain", "-"), ("runs/invert", "runs/latents"), ("runs/regress", "runs/latents"),
        ("runs/distill", "runs/latents"), ("runs/regress16", "runs/latents"),
        ("runs/grow16", "runs/latents"),
    ]  # fmt: skip
    assert dict(paths("", "base"))["runs/grow32"] == "runs/grow16"
    assert paths("pipeline=experts,prune.groups=1,teacher=T", "teacher") == [
        ("runs/set/assess", "T"), ("runs/set/group-0", "T")
    ]  # fmt: skip
    assert paths("guided,size=experts", "latents")[1:] == [
        ("runs/invert", "runs/latents"), ("runs/sample", "runs/samples"),
        ("runs/distill", "runs/latents"),
    ]  # fmt: skip
    assert paths("guided,size=experts", "samples")[3] == ("runs/distill", "runs/samples")
    assert paths("size=experts", "samples")[2] == ("runs/distill", "")
    tuned = dict(paths("pipeline=cascade,top=32", "cascade"))
    assert tuned["runs/cascade16"].init_from == ""
    assert tuned["runs/cascade32"].init_from == "runs/cascade16"


def test_images_are_enlarged_for_efficientnet_by_their_resolution():
    file = module("clothing")
    stages = {"distill": 64, "grow,resolution=32": 64, "grow,resolution=64": 96}
    for stage, size in (stages | {"grow,resolution=128": 0}).items():
        found = file.get_config(f"stage={stage}").features
        assert (found.names, found.input_size) == (("efficientnet_lite0",), size)
    other = file.get_config("stage=grow,resolution=32,features=vgg16_lpips=F").features
    assert (other.names, other.input_size) == (("vgg16_lpips",), 0)
    assert file.get_config("smoke,stage=distill").features.names == ("classifier",)


def test_controls_begin_as_their_stage_does_and_differ_in_one_part_of_the_loss():
    configs = dict(stage_configs("configs/scenes.py", "size=quick,controls", "runs"))
    stages = ("distill", "grow16", "grow32")
    begin = ("pretrain", "invert", "regress", "regress16", "regress32")
    assert set(configs) == {
        *(f"runs/{name}" for name in (*begin, *stages)),
        *(f"runs/{name}-{control}" for name in stages for control in ("no_rec", "no_adv")),
        "runs/invert-dstl", "runs/distill-dstl",
    }  # fmt: skip
    for name in stages:
        itself, no_rec, no_adv = (
            fields.flat(configs[f"runs/{name}{end}"], fields.fields(name.rstrip("0123456789")))
            for end in ("", "-no_rec", "-no_adv")
        )
        stage = itself["stage"]
        changed = {field for field in itself if no_rec[field] != itself[field]}
        terms = {f"{stage}.{term}_weight" for term in ("feature", "pixel", "lpips")}
        # the regression has seen the pairs
        assert changed == {term for term in terms if itself[term]} | {"start"}
        assert not any(no_rec[term] for term in terms)
        changed = {field for field in itself if no_adv[field] != itself[field]}
        assert changed == {f"{stage}.adversarial_weight"}
    sampled, dstl = configs["runs/invert-dstl"], configs["runs/distill-dstl"]
    assert (sampled.invert.direction, dstl.distill.pairs) == ("sample", "teacher")
    assert sampled.latents == dstl.latents == "runs/latents-dstl"
    assert dstl.teacher == sampled.teacher == configs["runs/distill"].teacher == "runs/pretrain"
    assert list(configs)[:8] == [
        f"runs/{name}"
        for name in (*begin[:3], "distill", "regress16", "grow16", *begin[4:], "grow32")
    ]
    with pytest.raises(ValueError, match="control 'x' is unknown: choose one of , no_rec"):
        module("scenes").get_config("control=x")


def test_levels_leaves_out_the_lowest_of_the_u_net_s():
    model = module("imagenet").get_config("stage=pretrain,levels=2").model
    assert (model.channel_mult, model.attention) == ((1, 2), (32,))
    assert unet(**model.to_dict()).config.stride == 2
    assert module("scenes").get_config("stage=pretrain,smoke,levels=1").model.channel_mult == (1,)


def test_the_papers_values_bind_imagenet():
    """The settings of PaGoDA (arXiv 2405.14822) and of its published scripts."""
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
            assert (optim.name, optim.b2) == ("radam", 0.999)
        assert (config.discriminator.width, config.discriminator.embedding_dim) == (64, 320)
        assert config.batch_size == 256
        assert config.features.names == ("deit_base_distilled", "efficientnet_lite0")
        loss = config[config.stage]
        growing = config.stage == "grow"
        assert (loss.adversarial_weight, loss.adaptive) == (
            (1.0, False) if growing else (0.2, True)
        )
        assert loss.gan_loss == "hinge"
        assert (loss.feature_weight, loss.pixel_weight, loss.lpips_weight) == (1.0, 0.0, 0.0)
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
    for tune in ("neck", "gain", "2k", "full", "lora", "ft"):
        config = file.get_config(f"stage=cascade,tune={tune}")
        json.dumps(config.to_dict())
        assert config.data.resolution == 2 * base and config.cascade.tune == tune
        # the paper's choices
        chosen = config.cascade
        assert (chosen.k, chosen.mode, chosen.init) == ("t0.7", "S", "zero")
    assert file.get_config("stage=cascade,resolution=128").data.resolution == 128
    with pytest.raises(ValueError, match="config.cascade.tune is 'wide', not one of"):
        fields.check(file.get_config("stage=cascade,tune=wide"))


@pytest.mark.parametrize(
    "arg, said",
    [
        ("sise=quick", "'sise' is unknown: did you mean size"),
        ("size=huge", "size 'huge' is unknown: choose one of quick"),
        ("stage=shrink", "stage 'shrink' is unknown"),
        ("pipeline=all", "pipeline 'all' is unknown: choose one of pagoda"),
        ("stage=grow,resolution=24,jump", "stage=grow takes resolution=16, 32, not 24"),
        ("stage=grow", "not 8"),  # the base resolution, where none is given
        ("stage=distill,distill.pixel_wait=1", "did you mean distill.pixel_weight"),
        ("stage=prune,prune.k=much", "prune.k=much: 'much' is not a number"),
        ("size=gallery,base=32", "this size starts at 16 px"),
        ("data_dir=/tmp/a,b", "'b' is unknown: .* A comma ends a word, except in quotes"),
    ],
)
def test_unknown_arguments_are_refused_with_the_known_ones(arg, said):
    with pytest.raises(ValueError, match=said):
        module("scenes").get_config(
            arg if "prune.k" not in arg else arg.replace("prune,", "assess,")
        )


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


@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_a_sweep_is_a_config_that_passes_the_check(name):
    file, seeds = module("scenes"), set()
    size = "size=ablation," if "top=32" in sweep(name)[0] else ""  # it begins at 8, 16 or 32 px
    for words in sweep(name):
        words = size + words + ",resolution=16" * ("stage=" in words)
        stages = [""] if "stage=" in words else file.stages(words)
        for stage in stages:
            config = file.get_config(f"{words},{stage}")
            fields.check(config)
            seeds.add(config.seed)
    assert seeds == {0, 1, 2}


@pytest.mark.parametrize("top, given", [(0, [16, 32]), (8, []), (32, [16, 32])])
def test_a_pipeline_grows_to_its_top(top, given):
    stages = module("scenes").stages(f"top={top}")
    assert [word for word in stages if "grow" in word] == [
        f"stage=grow,resolution={side}" for side in given
    ]
    with pytest.raises(ValueError, match="top=7 is no doubling of the base 8: give --arg=top=16"):
        module("scenes").stages("top=7")


@pytest.mark.parametrize(
    "arg, words",
    [
        ("a='x,y',b", ["a='x,y'", "b"]),
        ('a="x,\'y",b=1', ['a="x,\'y"', "b=1"]),
        ("a=it's,b='", ["a=it's", "b='"]),
        ("a=(1,2),b=(3,c", ["a=(1,2)", "b=(3", "c"]),
        (",a,,b", ["a", "b"]),
        (None, []),
    ],
)
def test_a_comma_in_quotes_or_brackets_ends_no_word(arg, words):
    assert common.split(arg) == words


@pytest.mark.parametrize("text", ["a", "a,b", "'a,b'", "it's", "it's,b", "it',b", "(a)", "a (1,2"])
def test_a_path_that_a_command_line_gives_is_one_word(text):
    word = common.word(("teacher", text))
    _, given = common.parse(f"{word},seed=1,grow.widths=(8,4)")
    assert given["seed"] == "1"
    assert common.typed("teacher", given["teacher"], "") == text.strip("'")


def images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_of_ones_own_says_its_splits(tmp_path):
    file = module("folder")
    flat, classes = (
        images(tmp_path / "a", "1.png", "2.png"),
        images(tmp_path / "b", "x/1.png", "y/1.png"),
    )
    split = images(tmp_path / "c", "train/x/1.png", "train/y/1.png", "train/z/1.png", "val/x/2.png")
    for folder, splits in (
        (flat, ("all[:90%]", "all[90%:]")),
        (classes, ("all[:90%]", "all[90%:]")),
        (split, ("train", "val")),
    ):
        arg = f"data_dir={folder},base=8,top=32"
        config = file.get_config(arg)
        fields.check(config)
        assert config.model.num_classes == -1 and config.model.resolution == 8
        assert (config.data.split, config.data.eval_split) == splits
        assert file.stages(arg)[3:] == ["stage=grow,resolution=16", "stage=grow,resolution=32"]
    big = file.get_config(f"data_dir={split},base=64,size=gpu")
    assert big.model.channels == 192
    with pytest.raises(ValueError, match="base=12 has no preset: choose 8, 16, 32 or 64"):
        file.get_config(f"data_dir={split},base=12")
    with pytest.raises(ValueError, match="there is no folder 'nowhere': give --arg=data_dir=DIR"):
        data_sets.folder("nowhere")


def test_distillation_starts_from_the_regression_but_controls_without_it_from_the_teacher(tmp_path):
    planned = dict(stage_configs(module("scenes").__file__, "size=quick,top=16,controls", tmp_path))
    start = {pathlib.Path(folder).name: c.get("start") for folder, c in planned.items()}
    regress = str(tmp_path / "regress")
    assert start["distill"] == start["distill-no_adv"] == regress
    assert start["distill-no_rec"] == start["distill-dstl"] == ""
    assert planned[regress].regress.adversarial_weight == 0
    grown = f"{regress}16"
    assert (
        planned[grown].base == str(tmp_path / "distill") == planned[str(tmp_path / "grow16")].base
    )
    assert start["grow16"] == start["grow16-no_adv"] == grown
    assert start["grow16-no_rec"] == ""


def test_base_is_a_resolution_or_the_smaller_generators_folder():
    config = module("scenes").get_config("stage=grow,size=ablation,base=16,resolution=32")
    assert config.base == "" and config.grow.widths == (32,)
    config = module("scenes").get_config("stage=grow,resolution=16,base=runs/distill")
    assert config.base == "runs/distill"
