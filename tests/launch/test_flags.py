"""Flags of commands: errors for wrong ones, and the fields that valid ones set."""

import pytest
from absl import flags

from launch import train
from launch.command import start

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
        ((f"{SCENES}pretrain", "--config.optm.lr=1"), "--config.optm.lr: no stage has this field"),
        ((f"{SCENES}prune", "--config.optim.lr=low"), "could not convert string to float: 'low'"),
        ((f"{SCENES}shrink",), "stage 'shrink' is unknown: choose one of pretrain, invert"),
        ((f"{SCENES}assess,levels=one",), "config argument levels=one: 'one' is no int: give"),
        (("--config=nowhere.py",), "No such file or directory: 'nowhere.py'"),
        (("--confg=3",), "Unknown command line flag 'confg'. Did you mean: config ?"),
        ((f"{SCENES}invert", "more"), "more: every argument has to be a flag"),
    ],
)
def test_what_cannot_be_read_ends_in_one_sentence(words, said):
    with pytest.raises(SystemExit) as stop:
        config(*words)
    message = str(stop.value.code)
    assert message.startswith("error: ") and said in message and "\n" not in message
    assert "config" not in flags.FLAGS  # another command may define it


def test_fields_of_a_config_and_keys_of_open_dictionaries_are_set_by_name():
    read = config(
        f"{SCENES}distill", "--config.optim.lr=1", "--config.features.paths.inception_v3=a/b.npz",
        "--config.data.options.skip_corrupt=True", "--config.features.names=('inception_v3',)",
    )  # fmt: skip
    assert read.optim.lr == 1.0 and read.features.names == ("inception_v3",)
    assert read.features.paths.to_dict() == {"inception_v3": "a/b.npz"}
    assert read.data.options.skip_corrupt is True and read.data.options.size == 1500
    read = config(f"{SCENES}pretrain", "--config.model.dropout=0.1")
    assert read.model.dropout == 0.1
