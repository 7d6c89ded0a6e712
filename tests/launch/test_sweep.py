"""Sweeps: their list of runs, each an ordinary run in its own folder."""

import shlex

import pytest

from configs import common, sweeps
from launch import sweep

SCENES = "--config=configs/scenes.py"


def test_runs_are_named_by_their_number_and_words():
    runs = sweep.planned("configs/scenes.py", "pairs", "size=quick")
    assert len(runs) == 9 and len(dict(runs)) == 9
    assert runs[1] == (
        "01-stage=distill_data_proportion=0.1_seed=0",
        "size=quick,stage=distill,distill.data_proportion=0.1,seed=0",
    )


def test_unknown_sweeps_files_and_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sweep 'everything' is unknown: choose one of losses"):
        sweeps.sweep("everything")
    with pytest.raises(ValueError, match="has no sweep.name."):
        sweep.planned("configs/models.py", "pairs", "")
    with pytest.raises(SystemExit, match="--index=9: the sweep's runs are 0 ... 8"):
        sweep.main([SCENES, "--sweep=pairs", "--index=9", f"--workdir={tmp_path}"])


def test_the_list_has_a_command_for_each_run(capsys):
    sweep.main([SCENES, "--sweep=orders", "--arg=size=experts", "--list", "--workdir=runs"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[1] == (
        "python -m launch.pipeline --config=configs/scenes.py --arg=size=experts,pipeline=experts,"
        "prune.mean=0.8,prune.order=snr_down,seed=0 "
        "--workdir=runs/01-pipeline=experts_mean=0.8_order=snr_down_seed=0"
    )
    words = [SCENES, "--sweep=pairs", "--arg=teacher='a b,c'", "--list", "--index=1"]
    sweep.main(words)
    _, _, command, config, arg, place = shlex.split(capsys.readouterr().out)
    assert (command, config) == ("launch.train", SCENES) and "," not in place
    assert common.parse(arg.removeprefix("--arg="))[1] == {
        "teacher": "'a b,c'", "distill.data_proportion": "0.1", "seed": "0",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="--index=9: the sweep's runs are 0 ... 8"):
        sweep.main([*words, "--index=9"])


def test_one_run_of_a_sweep_goes_to_its_own_folder(tmp_path):
    words = [SCENES, "--sweep=cascade_k", "--arg=smoke", f"--workdir={tmp_path}", "--index=2"]
    with pytest.raises(SystemExit, match="teacher is empty: give --config.teacher=DIR"):
        sweep.main(words)
