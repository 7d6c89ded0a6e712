"""What a command says of flags that it cannot read: one sentence, no traceback."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from launch.command import read_flags

SCENES = "--config=configs/scenes.py:stage="


def read(monkeypatch, *words):
    values, argv = flags.FlagValues(), ["train", *words]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for --config.FIELD
    return read_flags(argv), values


@pytest.mark.parametrize(
    "words, said",
    [
        # settings of the assessment are the set's: stage=prune has no others to ask for
        (
            (f"{SCENES}prune", "--config.prune.k=0.3"),
            "--config.prune.k: the config has no field 'k' at this stage: leave it out, or name ",
        ),
        (
            (f"{SCENES}pretrain", "--config.seed=1", "--config.optm.lr=1"),
            "--config.optm.lr: the config has no field 'optm' at this stage",
        ),
        ((f"{SCENES}prune", "--config.optim.lr=low"), "could not convert string to float: 'low'"),
        ((f"{SCENES}shrink",), "stage 'shrink' is unknown: choose one of pretrain, invert"),
        ((f"{SCENES}assess,levels=one",), "config argument 'levels=one': 'one' is no int: give"),
        (("--config=nowhere.py",), "No such file or directory: 'nowhere.py'"),
        (("--confg=3",), "Unknown command line flag 'confg'. Did you mean: config ?"),
    ],
)
def test_what_cannot_be_read_ends_in_one_sentence(monkeypatch, words, said):
    with pytest.raises(SystemExit) as stop:
        read(monkeypatch, *words)
    message = str(stop.value.code)
    assert message.startswith("error: ") and said in message and "\n" not in message


def test_what_can_be_read_is_the_config_s(monkeypatch):
    left, values = read(monkeypatch, f"{SCENES}assess", "--config.prune.k=0.3", "more")
    assert left == ["train", "more"] and values.config.prune.k == 0.3
