"""The commands as a user runs them: a pipeline from the shell, sampling, the plan, the errors."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def command(*words, check=True):
    """Run `python -m ...` on one device; (stdout lines, stderr, exit status)."""
    flags = "--xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines(), done.stderr, done.returncode


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs")
    lines, _, _ = command(
        "launch.pipeline", "--config=configs/scenes.py", "--arg=smoke,jump",
        f"--workdir={workdir}", "--num_samples=24",
    )  # fmt: skip
    return workdir, lines


def test_the_pipeline_ends_with_a_table_pictures_and_one_json_line(pipeline):
    workdir, lines = pipeline
    summary = json.loads(lines[-1])
    assert summary == json.loads((workdir / "pipeline.json").read_text())
    assert list(summary["stages"]) == ["teacher", "distill", "grow32"]
    assert lines[0].startswith("| network | px | fd_classifier | floor |")
    assert {"data.png", "teacher.png", "round_trip.png", "one_step.png", "report.md"} <= {
        path.name for path in workdir.iterdir()
    }
    assert summary["training_flops"] > 0 and summary["stages"]["grow32"]["drift_rms"] > 0


def test_sample_writes_images_and_each_depends_on_its_number_alone(pipeline, tmp_path):
    workdir, _ = pipeline
    model = f"--model={workdir / 'grow32'}"
    command("launch.sample", model, "--num=6", f"--out={tmp_path / 'a'}", "--labels=1,2")
    lines, _, _ = command(
        "launch.sample", model, "--num=2", "--start=4", f"--out={tmp_path / 'b'}", "--labels=1,2"
    )
    assert json.loads(lines[-1])["resolution"] == 32
    a, b = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    np.testing.assert_array_equal(a["labels"], [1, 2, 1, 2, 1, 2])
    assert np.abs(a["images"][4:].astype(int) - b["images"]).max() <= 1
    assert (tmp_path / "a" / "samples.png").is_file()


def test_the_plan_counts_parameters_and_flops_and_trains_nothing(pipeline, tmp_path):
    workdir, _ = pipeline
    lines, _, _ = command(
        "launch.train", "--config=configs/scenes.py:smoke,stage=distill", "--dry_run",
        f"--workdir={tmp_path / 'plan'}", f"--config.teacher={workdir / 'pretrain'}",
        f"--config.latents={workdir / 'latents'}",
    )  # fmt: skip
    plan = json.loads(lines[-1])
    generator = plan["networks"]["generator"]
    assert generator["parameters"] == generator["trainable"] > 10_000
    assert plan["flops_per_step"] > 1e6 and plan["disk_bytes"] < plan["disk_free_bytes"]
    assert not (tmp_path / "plan" / "checkpoints").exists()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["launch.sample", "--model=nowhere"], "no checkpoint in 'nowhere'"),
        (
            ["launch.pipeline", "--config=configs/none.py", "--workdir=runs/x"],
            "there is no config file 'configs/none.py'",
        ),
        (
            ["launch.train", "--config=configs/cifar10.py:stage=pretrain", "--workdir=runs/x"],
            "cifar10",
        ),
    ],
)
def test_an_error_is_one_sentence_and_no_traceback(words, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    words = [w.replace("runs/x", str(tmp_path)).replace("nowhere", "nowhere") for w in words]
    _, stderr, status = command(*words, check=False)
    assert status == 1 and sentence in stderr and "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("error: ")
