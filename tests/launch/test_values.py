"""Numbers out of range, for every flag of every command and for every field: one sentence each."""

import importlib
import math

import pytest
from absl import flags

from cheapscale.diffusion.denoiser import EDM
from cheapscale.models.unet import unet
from configs import common, fields, scenes
from launch.command import start

SCENES, STAGE = "--config=configs/scenes.py", "--config=configs/scenes.py:stage=pretrain"
COMMANDS = {
    "sample": ["--model=nowhere"],
    "edit": ["--model=nowhere", "--task=superres"],
    "evaluate": ["--workdir=nowhere"],
    "train": [STAGE, "--workdir=nowhere"],
    "pipeline": [SCENES, "--workdir=nowhere"],
    "sweep": [SCENES, "--sweep=losses", "--workdir=nowhere"],
    "import": [STAGE, "--weights=nothing", "--workdir=nowhere"],
    "export": ["--model=nowhere", "--out=nothing.safetensors"],
    "bench.__main__": ["--workdir=nowhere"],
}
WHOLE = ("-1", "1.5", "nan", "many", "4294967301", str(2**63), str(10**30))
NUMBERS = {
    "sample": 9, "edit": 10, "evaluate": 12, "train": 0, "pipeline": 2, "sweep": 2, "import": 0,
    "export": 2, "bench.__main__": 4,
}  # fmt: skip


def parse(name, *words):
    """{flag: what reads its text}, after a command's flags are read from these words."""
    module = importlib.import_module(f"launch.{name}")
    define = getattr(module, "define", None) or module.define_flags

    def body(given):
        own = given.flags_by_module_dict()[module.__name__]
        return {flag.name: flag.parser for flag in own}

    return start(define, body, [*COMMANDS[name], *words])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_among_the_flags_is_refused_out_of_its_range(name):
    parsers = parse(name)
    wholes = [flag for flag, parser in parsers.items() if isinstance(parser, flags.IntegerParser)]
    wrong = {flag: WHOLE for flag in wholes}
    wrong |= {f: ("-0.5", "much") for f, p in parsers.items() if isinstance(p, flags.FloatParser)}
    assert len(wrong) == NUMBERS[name]
    for flag, values in wrong.items():
        for value in values:
            with pytest.raises(SystemExit) as stop:
                parse(name, f"--{flag}={value}")
            said = str(stop.value.code)
            assert said.startswith("error: ") and f"--{flag}={value}" in said and "\n" not in said


def test_seeds_and_numbers_of_images_reach_to_32_bits():
    parse("sample", "--seed=4294967295", "--start=4294967295", "--num=1")


def wrong_values(field):
    """Values of other types, and just outside of the field's range."""
    kind = type(field.default)
    if kind in (int, float):
        yield from (True, "3", None, [3], math.nan, math.inf, -math.inf, 10**400)
        yield from (bound for bound in (field.low - 1, field.high + 1) if math.isfinite(bound))
        if kind is int:
            yield from (1.0, -1, 2**32, 2**63)
    elif kind is bool:
        yield from (0, 1, "True", None)
    elif kind is str:
        yield from (3, None, True)
        yield from ["no such choice"] if field.choices else []
    elif kind is tuple:
        yield from (3, "text", (None,), (True,), (1.5,), (math.nan,))


@pytest.mark.parametrize("stage", fields.STAGES)
def test_every_field_refuses_other_types_and_numbers_out_of_its_range(stage):
    for name, field in fields.fields(stage).items():
        assert not fields.fault(field.default, field), name
        for value in wrong_values(field):
            assert fields.fault(value, field), (name, value)


@pytest.mark.parametrize("low, high", [(90.0, 80.0), (0.0, 80.0), (1.0, 1.0), (1.0, math.nan)])
def test_levels_in_the_wrong_order_are_refused_before_the_first_preview(low, high):
    with pytest.raises(ValueError, match="need 0 < sigma_min < sigma_max"):
        EDM(sigma_min=low, sigma_max=high)


@pytest.mark.parametrize("word", ["base=-8", "top=-1", "levels=-1", "levels=9", f"top={2**40}"])
def test_numbers_among_the_words_of_a_config_are_refused(word):
    with pytest.raises(ValueError, match=f"{word}"):
        scenes.get_config(f"stage=pretrain,{word}")
    with pytest.raises(ValueError, match="not finite: give another"):
        fields.check(common.change(scenes.get_config("stage=pretrain"), {"optim.lr": "1e400"}))


@pytest.mark.parametrize(
    "name, value",
    [
        ("channels", 0), ("channels", 2.5), ("channels", True), ("num_blocks", -1), ("groups", 0),
        ("channel_mult", ()), ("channel_mult", (1, 0)), ("attention", ("8",)), ("dropout", 1.5),
        ("dropout", math.nan), ("family", "adn"), ("dtype", "float8"), ("num_classes", -1),
        ("resolution", 2**40), ("noise_feature", "log"), ("channel_mult", 3), ("dropout", "0.1"),
    ],
)  # fmt: skip
def test_fields_of_the_network_are_refused_before_it_is_planned(name, value):
    with pytest.raises(ValueError, match=f"model.{name} "):
        unet(**{"resolution": 8, "channels": 8} | {name: value})
