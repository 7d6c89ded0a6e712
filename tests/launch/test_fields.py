"""The table of fields: complete defaults, refusals in one sentence, and the printed description."""

import pytest

from configs import fields


@pytest.mark.parametrize("stage", fields.STAGES)
def test_the_defaults_of_every_stage_pass_their_own_check_and_every_field_is_described(stage):
    config = fields.defaults(stage)
    fields.check(config)
    text = fields.describe(config)
    for name, field in fields.fields(stage).items():
        assert field.meaning and (name == "stage" or f"--config.{name}=" in text)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("optim.name", "adm", r"config.optim.name is 'adm', not one of 'adam', .*: give .*=radam"),
        ("optim.lr", -1.0, "config.optim.lr is -1.0, not at least 0: .* --config.optim.lr=8e-06"),
        ("data.flip", 1, "config.data.flip is 1, not of type bool"),
        ("batch_size", True, "config.batch_size is True, not of type int"),
        ("grow.widths", (0,), r"config.grow.widths is \(0,\), not at least 1: .*=\"\(32,\)\""),
        ("distill.data_proportion", 1.5, "no field of stage grow: .* did you mean"),
        ("grow.data_proportion", 1.5, "not from 1e-06 to 1"),
        ("data.options.skip_corupt", True, "did you mean --config.data.options.skip_corrupt"),
        ("data.options.skip_corrupt", "maybe", "config.data.options.skip_corrupt is 'maybe', not"),
        ("features.sha256.any", 12345, "config.features.sha256.any is 12345, not of type str"),
        ("data.options.foo", 1, "data.options takes cache, unlabelled, size"),
        ("optim.rate", 1.0, "--config.optim.rate is no field of stage grow: leave it out"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_to_type(name, value, said):
    config = fields.defaults("grow")
    *sections, last = name.split(".")
    place = config
    for section in sections:
        if section not in place:
            place[section] = type(config)()
        place = place[section]
    with place.ignore_type():
        place[last] = value
    with pytest.raises(ValueError, match=said):
        fields.check(config)


def test_a_missing_field_and_a_config_without_a_stage_are_refused():
    config = fields.defaults("pretrain")
    del config.optim.b2
    with pytest.raises(ValueError, match="the config has no optim.b2: give it, as --config.optim"):
        fields.check(config)
    with pytest.raises(ValueError, match="the config has no stage"):
        fields.check(type(config)())


def test_open_dictionaries_take_any_key_and_whole_numbers_pass_for_real_ones():
    config = fields.defaults("distill")
    config.features.paths.any_network = "file"
    with config.optim.ignore_type():
        config.optim.lr = 1
    fields.check(config)
