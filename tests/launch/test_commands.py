"""The commands as a user runs them: a pipeline from the shell, sampling, the plan, the errors."""

import json
import types

import jax
import numpy as np
import pytest

from cheapscale.data.pairs import InvertedPairs, PairStore
from cheapscale.data.pixels import to_uint8
from cheapscale.data.sources import open_data
from cheapscale.evaluation.image_sets import choice
from cheapscale.teacher.load import load
from cheapscale.training import checkpoint
from launch import evaluate
from launch import pipeline as whole
from launch import sample as sampling
from tests.launch.shell import command


def test_the_pipeline_ends_with_a_table_pictures_and_one_json_line(pipeline):
    workdir, lines = pipeline
    summary = json.loads(lines[-1])
    assert summary == json.loads((workdir / "pipeline.json").read_text())
    enlarged = ["data8-bicubic16", "distill-nearest16", "distill-bicubic16"]
    rows = ["data8", "teacher", "distill", "data16", *enlarged, "grow16-step0", "grow16"]
    assert list(summary["stages"]) == rows
    assert lines[0].startswith("| network | px | 1000 pkid_detail | spectrum | recall_pixels_k3 |")
    names = ("data", "teacher", "round_trip", "one_step", "growth", "reconstruction")
    assert {f"{name}.png" for name in names} | {"report.md"} <= {
        path.name for path in workdir.iterdir()
    }
    assert {key: len(curve["held out"]) for key, curve in summary["spectra"].items()} == {
        "8 px": 5, "16 px": 9,
    }  # fmt: skip
    # a classifier for each resolution, since smoke runs name it
    assert set(summary["frozen_networks"]) == {"loss_classifier_8px", "loss_classifier_16px"}
    assert summary["training_flops"] > 0 and summary["stages"]["grow16"]["drift_rms"] > 0
    assert summary["stages"]["distill-nearest16"]["drift_rms"] == 0
    assert all(0 <= found["nearest"] < 10 for name, found in summary["stages"].items()
               if not name.startswith("data"))  # fmt: skip


def test_sample_writes_images_and_each_depends_on_its_number_alone(pipeline, tmp_path):
    workdir, _ = pipeline
    words = [f"--model={workdir / 'grow16'}", "--labels=1,2"]
    lines, _, _ = command("launch.sample", *words, "--num=6", f"--out={tmp_path / 'a'}")
    assert json.loads(lines[-1])["resolution"] == 16
    sampling.main([*words, "--num=2", "--start=4", f"--out={tmp_path / 'b'}"])
    a, b = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    np.testing.assert_array_equal(a["labels"], [1, 2, 1, 2, 1, 2])
    assert np.abs(a["images"][4:].astype(int) - b["images"]).max() <= 1
    assert (tmp_path / "a" / "samples.png").is_file()
    with pytest.raises(SystemExit, match="--steps: only for a teacher's ODE"):
        sampling.main([*words, "--steps=5"])
    with pytest.raises(
        SystemExit, match="'circle' is no class: give a number or a name; the classes are 0 d"
    ):
        sampling.main([*words[:1], "--labels=circle"])


def test_an_error_is_one_sentence_and_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    _, stderr, status = command(
        "launch.train", "--config=configs/cifar10.py:stage=pretrain", f"--workdir={tmp_path}",
        check=False,
    )  # fmt: skip
    assert status == 1 and "cifar10" in stderr and "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("error: ")
    # the traceback is kept in the run's folder
    (kept,) = tmp_path.rglob("*.traceback.txt")
    assert kept.read_text().startswith("Traceback") and "cifar10" in kept.read_text()
    with pytest.raises(SystemExit, match="^error: no checkpoint in 'nowhere'"):
        sampling.main(["--model=nowhere"])
    with pytest.raises(SystemExit, match="^error: 'configs/none.py' is no config file"):
        whole.main(["--config=configs/none.py", f"--workdir={tmp_path}"])


def test_the_log_shows_lines_of_this_project_and_not_of_libraries():
    import grain

    from cheapscale.training import loop
    from launch import command as shell

    def said(path):
        return shell.ours(types.SimpleNamespace(pathname=str(path)))

    assert said(loop.__file__) and said(shell.__file__) and said("/home/me/my_study.py")
    assert not said(grain.__file__) and not said(jax.__file__)


def test_evaluate_scores_a_checkpoint_and_its_cost(pipeline, tmp_path):
    workdir, _ = pipeline
    summary = evaluate.main([
        f"--model={workdir / 'grow16'}", "--num=24", "--per_shard=16", "--num_reference=32",
        "--metrics=fd,kid,memorisation,floor", f"--workdir={tmp_path / 'a'}",
    ])  # fmt: skip
    meta = checkpoint.read_meta(workdir / "grow16")[1]
    assert summary["cost"]["nfe"] == 1 and summary["cost"]["flops_per_image"] > 0
    assert summary["cost"]["training_flops"] == meta["ledger"]["flops"]
    assert summary["num"] == 24 and "no feature network was given" in summary["warnings"][0]
    assert (tmp_path / "a" / "samples.png").is_file()
    assert (tmp_path / "a" / "report.md").read_text().startswith("| images | num | fd_classifier")

    shards = sorted((tmp_path / "a" / "shards").glob("generated-*.npz"))
    assert [len(np.load(path)["ids"]) for path in shards] == [16, 8]


def test_evaluate_measures_reconstructions_of_models_and_of_files(pipeline, tmp_path):
    workdir, _ = pipeline
    found = evaluate.main([
        f"--model={workdir / 'grow16'}", "--num=20", "--nocost", "--metrics=reconstruction",
        f"--latents={workdir / 'latents'}", f"--workdir={tmp_path / 'grown'}",
    ])  # fmt: skip
    generator = load(workdir / "grow16")
    source = open_data(generator.meta["config"]["data"])
    pairs = InvertedPairs(source, PairStore.open(workdir / "latents"))
    items = [pairs[int(i)] for i in choice(len(pairs), 20)]
    z, targets = (np.stack([item[key] for item in items]) for key in ("z", "image"))
    images = jax.jit(generator.__call__)(z, np.asarray([item["label"] for item in items]))
    squares = np.mean((np.clip(images, -1, 1) - targets) ** 2, axis=(1, 2, 3), dtype=np.float64)
    expected = np.mean(10 * np.log10(4 / squares))
    assert found["reconstruction_psnr"] == pytest.approx(expected, rel=1e-4)
    assert (tmp_path / "grown" / "reconstructions.png").is_file()

    for name, values in (("a", images), ("b", targets)):
        np.savez(tmp_path / f"{name}.npz", images=to_uint8(np.asarray(values)))
    lines, _, _ = command(
        "launch.evaluate", f"--images={tmp_path / 'a.npz'}", f"--targets={tmp_path / 'b.npz'}",
        "--metrics=reconstruction", f"--workdir={tmp_path / 'files'}",
    )  # fmt: skip
    # eight bits cost little where the images are far apart
    assert json.loads(lines[-1])["reconstruction_psnr"] == pytest.approx(expected, rel=1e-2)
    with pytest.raises(SystemExit, match="error: --steps is for a teacher only: leave it out"):
        evaluate.main([
            f"--images={tmp_path / 'a.npz'}", "--metrics=reconstruction", "--steps=18",
            f"--workdir={tmp_path / 'x'}",
        ])  # fmt: skip
