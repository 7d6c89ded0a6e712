"""Sweeps: which runs there are, what each changes, and that each is a run of its own."""

import pytest

from configs import cifar10, scenes
from launch import sweep
from tests.launch.shell import command


def test_every_run_is_the_config_with_its_changes_alone():
    config = cifar10.get_config("stage=distill")
    runs = sweep.planned("configs/cifar10.py", config)
    assert [name for name, _, _ in runs[:2]] == [
        "00-seed=0,data_proportion=1.0", "01-seed=0,data_proportion=0.1",
    ]  # fmt: skip
    assert len(runs) == 12 and len({name for name, _, _ in runs}) == 12
    before = config.to_dict()
    for _, changes, one in runs:
        assert one.seed == changes["seed"]
        distance = changes.get("distill.distance", before["distill"]["distance"])
        assert one.distill.distance == distance
        one.seed, one.distill = before["seed"], config.distill
        assert one.to_dict() == before
    assert config.to_dict() == before


def test_a_stage_without_a_sweep_and_unknown_fields_and_numbers_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="of configs/scenes.py names no run of stage invert"):
        sweep.planned("configs/scenes.py", scenes.get_config("stage=invert"))
    grow = scenes.get_config("stage=grow,resolution=16")
    with pytest.raises(ValueError, match="the sweep changes grow.weight, which a config of this"):
        sweep.changed(grow, {"grow.weight": 1.0})
    with pytest.raises(ValueError, match="--index=6: the sweep's runs are 0 ... 5"):
        sweep.sweep("configs/scenes.py", grow, "nowhere", [6])


def test_runs_go_to_folders_of_their_own(monkeypatch, tmp_path):
    seen = []

    def run(config, workdir):
        seen.append((config.seed, config.grow.reconstruction_weight, workdir))
        return {"step": 3}

    monkeypatch.setattr(sweep, "run", run)
    grow = scenes.get_config("stage=grow,resolution=16")
    rows = sweep.sweep("configs/scenes.py", grow, str(tmp_path), [3, 4])
    assert seen == [
        (1, 0.0, tmp_path / "03-seed=1,reconstruction_weight=0.0"),
        (2, 1.0, tmp_path / "04-seed=2,reconstruction_weight=1.0"),
    ]
    assert rows[0] == {
        "folder": "03-seed=1,reconstruction_weight=0.0",
        "changes": {"seed": 1, "grow.reconstruction_weight": 0.0},
        "step": 3,
    }


def test_the_list_has_a_line_for_each_run():
    lines, _, _ = command("launch.sweep", "--config=configs/scenes.py:stage=prune", "--list")
    assert len(lines) == 9
    assert lines[1] == "01-seed=0,distil=0.5 {'seed': 0, 'prune.distil': 0.5}"
