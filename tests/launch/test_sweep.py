"""Sweeps: their list of runs, each an ordinary run in its own folder."""

import json
import pathlib
import shlex

import pytest

from configs import common, scenes, sweeps
from launch import sweep

SCENES = "--config=configs/scenes.py"


def test_runs_are_named_by_their_number_and_words():
    runs = sweep.planned("configs/scenes.py", "pairs", "size=quick")
    assert len(runs) == 9 and len(dict(runs)) == 9
    assert runs[1] == (
        "01-pipeline=one_step_size=3000_data_proportion=0.1_data_proportion=0.1_seed=0",
        "size=quick,pipeline=one_step,data.options.size=3000,regress.data_proportion=0.1,"
        "distill.data_proportion=0.1,seed=0",
    )


def test_unknown_sweeps_files_and_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sweep 'everything' is unknown: choose one of inversion"):
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
    words = [SCENES, "--sweep=cascade_k", "--arg=teacher='a b,c'", "--list", "--index=1"]
    sweep.main(words)
    _, _, command, config, arg, place = shlex.split(capsys.readouterr().out)
    assert (command, config) == ("launch.train", SCENES) and "," not in place
    assert common.parse(arg.removeprefix("--arg="))[1] == {
        "teacher": "'a b,c'", "cascade.k": "t0.3", "seed": "0",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="--index=99: the sweep's runs are 0 ... 14"):
        sweep.main([*words, "--index=99"])


def test_one_run_of_a_sweep_goes_to_its_own_folder(tmp_path):
    words = [SCENES, "--sweep=cascade_k", "--arg=smoke", f"--workdir={tmp_path}", "--index=2"]
    with pytest.raises(SystemExit, match="teacher is empty: give --config.teacher=DIR"):
        sweep.main(words)


def places(arg, root):
    root = pathlib.Path(root)
    return [place for place, _ in sweep.chain("configs/scenes.py", arg, root, "run")]


def test_runs_share_the_stages_that_they_have_in_common(tmp_path):
    """Teacher and latents do not depend on the share of pairs; another seed's do not serve."""
    words = "size=ablation,pipeline=one_step,seed=0"
    control = sweep.chain("configs/scenes.py", words, tmp_path, "control")
    teacher, latents, start, generator = (place for place, _ in control)
    assert control[3][1].teacher == teacher and control[3][1].latents == f"{latents}/pairs"
    assert control[3][1].start == start
    assert control[1][1].latents == f"{latents}/pairs"
    assert [p.split("-")[0] for p in places(words, "r")] == [
        "r/stages/pretrain8", "r/stages/invert8", "r/stages/regress8", "r/stages/distill8",
    ]  # fmt: skip
    fewer = places(f"{words},distill.data_proportion=0.1", tmp_path)
    assert fewer[:3] == [teacher, latents, start] and fewer[3] != generator
    coarse = places(f"{words},invert.nodes=10", tmp_path)
    assert coarse[0] == teacher and set(coarse[1:]).isdisjoint([latents, start, generator])
    assert set(places(words.replace("seed=0", "seed=1"), tmp_path)).isdisjoint(
        places(words, tmp_path)
    )
    # a moved work directory has the same names
    assert [pathlib.Path(p).name for p in places(words, "other")] == [
        pathlib.Path(p).name for p in (teacher, latents, start, generator)
    ]


def test_experts_share_a_teacher_but_no_set(tmp_path):
    kept, half = (
        places(f"size=experts,pipeline=experts,prune.groups=2{words},seed=0", tmp_path)
        for words in ("", ",prune.base_target=0.5")
    )
    assert kept[0] == half[0]
    runs = [sweep.chain("configs/scenes.py", f"size=experts,pipeline=experts,seed={s}", tmp_path,
                        f"run{s}") for s in (0, 1)]  # fmt: skip
    assert {place for place, _ in runs[0][1:]}.isdisjoint(place for place, _ in runs[1][1:])
    assert all(place.startswith(f"{tmp_path}/run0/set/") for place, _ in runs[0][1:])


def test_the_time_left_counts_shared_stages_once_and_finished_ones_not(tmp_path):
    arms = ["", ",invert.nodes=10", ",distill.total_steps=50"]
    chains = [
        sweep.chain(
            "configs/scenes.py", f"size=ablation,pipeline=one_step{arm},seed=0", tmp_path, "r"
        )
        for arm in arms
    ]
    assert sweep.left(chains, tmp_path) == "an unknown time"
    finished = {chains[0][0][0]: ("pretrain8", 100), chains[0][1][0]: ("invert8", 20)}
    for place, (kind, seconds) in finished.items():
        pathlib.Path(place).mkdir(parents=True)
        record = json.dumps({"kind": kind, "seconds": seconds})
        (pathlib.Path(place) / "stage.json").write_text(record)
    # One inversion is left, and of regressions two and distillations three, none of them finished.
    assert sweep.left(chains, tmp_path) == "about 0:05:20"  # 20 + 5 * (100 + 20) / 2 seconds


def test_results_are_named_by_what_sets_an_arm_apart_and_read_as_far_as_they_are_there(tmp_path):
    arg = "size=ablation,data_dir='a,b'"
    runs = sweep.planned("configs/scenes.py", "pairs", arg)
    for number in (0, 2, 3):
        (tmp_path / runs[number][0]).mkdir()
        figures = {"model": "stages/x", "figures": {"kid": float(number)}}
        (tmp_path / runs[number][0] / "measured.json").write_text(json.dumps(figures))
    found = sweep.results(runs, arg, tmp_path)
    assert [(row["arm"], row["seed"], row["figures"]["kid"]) for row in found] == [
        ("pipeline=one_step,data.options.size=3000", 0, 0.0),
        ("regress.data_proportion=0.02,distill.data_proportion=0.02", 0, 2.0),
        ("pipeline=one_step,data.options.size=3000", 1, 3.0),
    ]  # fmt: skip


def test_a_run_has_the_figures_of_the_pipelines_report(pipeline):
    workdir, printed = pipeline
    reported = json.loads(printed[-1])["stages"]["grow16"]
    config = scenes.get_config("stage=grow,resolution=16,smoke")
    figures = sweep.measured(str(workdir / "grow16"), config, [], 24)
    shown = set(figures) & set(reported)
    assert {"pkid_detail", "recall_pixels_k3", "spectrum_db"} <= shown
    for name in shown:
        assert figures[name] == pytest.approx(reported[name], rel=0.01), name
    assert figures["training_flops"] == json.loads(printed[-1])["training_flops"]
