"""launch.export: files, cards and the page; the shipped models are what their cards say."""

import json
import shutil

import numpy as np
import pytest
from setuptools import Distribution
from setuptools.command.build_py import build_py

import cheapscale
from cheapscale.data.files import read_json
from cheapscale.teacher import load
from cheapscale.teacher.experts import join
from cheapscale.teacher.teacher import Origin
from cheapscale.training import checkpoint, exported, loop
from cheapscale.training.cost import param_count
from launch import card, export, sample
from tests.launch.shell import ROOT
from tests.teacher.toy_teacher import base_meta, weights

SHIPPED = exported.pretrained()
MOST_BYTES = 12_000_000


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """The package's folder of models, empty and elsewhere."""
    folder = tmp_path / "pretrained"
    folder.mkdir()
    monkeypatch.setattr(exported, "FOLDER", folder)
    return folder


@pytest.fixture
def run(tmp_path):
    """The work directory of a toy teacher whose checkpoint has the meta of a training run."""
    from configs import scenes

    config = scenes.get_config("stage=pretrain,smoke").to_dict()
    meta = base_meta() | {
        "config": config | {"pretrain": {"label_dropout": 0.0, "augment": 0.0}},
        "provenance": {"commit": "abc1234", "device": "1 x cpu"},
    }
    meta["config"]["resume"] = str(tmp_path / "elsewhere")
    with checkpoint.Checkpoints(tmp_path / "run") as saved:
        saved.save(0, loop.create_state({"net": weights()}, {}, {}, ["net"]), meta)
        saved.wait()
    return tmp_path / "run"


def test_a_file_keeps_the_teachers_identity_and_no_path_of_the_machine(run, tmp_path):
    file, again = tmp_path / "toy.safetensors", tmp_path / "again.safetensors"
    first = export.main([f"--model={run}", f"--out={file}", "--num=0"])
    assert first == read_json(tmp_path / "toy.json")
    assert first["sha256"] == exported.sha256_of(file) and first["bytes"] == file.stat().st_size
    # Latents and experts of the run are those of its file.
    assert load(file).fingerprint == load(run).fingerprint
    assert load(file).replace(params=weights(1)).fingerprint != load(run).fingerprint
    assert str(tmp_path) not in file.read_bytes().decode("latin-1")
    assert (
        export.main([f"--model={file}", f"--out={again}", "--num=0"])["sha256"] == first["sha256"]
    )
    with pytest.raises(SystemExit, match="give --out=.*model.safetensors"):
        export.main([f"--model={run}", f"--out={tmp_path / 'model'}"])


def test_a_shipped_model_has_a_complete_card_and_a_page(run, shelf, tmp_path, monkeypatch, capsys):
    out = f"--out={shelf / 'toy.safetensors'}"
    with pytest.raises(SystemExit, match="lacks picture, figures, samples.num"):
        export.main([f"--model={run}", out, "--num=0"])
    results = tmp_path / "eval" / "evaluate.json"
    results.parent.mkdir()
    measured = {"kid_resnet": 0.25, "provenance": {"files": {"model": "another"}}}
    results.write_text(json.dumps(measured))
    words = [f"--model={run}", out, "--num=2", f"--figures={results}"]
    with pytest.raises(SystemExit, match="does not measure this file"):
        export.main(words)
    measured["provenance"]["files"]["model"] = exported.sha256_of(shelf / "toy.safetensors")
    results.write_text(json.dumps(measured))
    made = export.main(words)
    assert made["figures"] == {"eval": {"kid_resnet": 0.25}} and not card.missing(made)
    assert (made["training"]["commit"], made["data"]["licence"]) == ("abc1234", "Apache-2.0")
    assert made["samples"]["float16_psnr"] > 40 and (shelf / "toy.png").is_file()
    assert (shelf / "README.md").read_text() == card.page({"toy": made})
    # Drawn by its name: into a folder of its own, with the file's hash in the summary.
    monkeypatch.chdir(tmp_path)
    drawn = sample.main(["--model=pretrained:toy", "--num=2", "--steps=3"])
    assert drawn["files"] == {"model": made["sha256"]}
    assert (tmp_path / "runs/toy/samples/samples.png").is_file()
    for name in ("pretrained:", "pretrained:boy"):
        with pytest.raises(
            SystemExit, match=r"(?m)^  pretrained:toy +teacher, 8 px, scenes, 0.\d MB$"
        ):
            sample.main([f"--model={name}"])


def test_a_set_of_experts_is_one_file(run, tmp_path):
    first, second = (load(run).replace(params=weights(seed)) for seed in (0, 1))
    own = {"expert": {"group": 1, "trained": [0.5, 80.0], "steps": 3}}
    second = second.replace(origin=Origin(second.meta | own, 5, "elsewhere"))
    members = join(first.meta, first.fingerprint, [1.0], [first, second])
    file, again = tmp_path / "set.safetensors", tmp_path / "again.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "is_set", lambda place: True)
        patch.setattr(export, "load", lambda place, step: members)
        made = export.main([f"--model={run}", f"--out={file}", "--num=0"])
    assert made["model"] == "set of experts" and made["weights"] == 2 * param_count(first.params)
    found = load(file)
    assert found.fingerprint == members.fingerprint and found.boundaries == (1.0,)
    assert found.meta["experts"]["base"] == first.fingerprint
    assert [member.step for member in found.members] == [0, 5]
    assert found.members[1].meta["expert"] == own["expert"]
    x, label = np.ones((1, 8, 8, 3), np.float32), np.zeros(1, np.int32)
    for level in (0.5, 2.0):  # an expert each
        wanted = members.denoise(x, level, label)
        np.testing.assert_allclose(found.denoise(x, level, label), wanted, atol=5e-3)
    words = [f"--model={file}", f"--out={again}", "--num=0"]
    assert export.main(words)["sha256"] == made["sha256"]
    with pytest.raises(ValueError, match="averaged weights only"):
        load(file, ema=False)


def test_a_file_is_no_work_directory(run, tmp_path):
    file = tmp_path / "toy.safetensors"
    export.main([f"--model={run}", f"--out={file}", "--num=0"])
    with pytest.raises(ValueError, match="optimiser's state"):
        loop.starting_point(None, _Fresh, tmp_path / "new", {}, str(file), 9)
    with pytest.raises(SystemExit, match="name a folder"):
        export.main([f"--model={run}", "--out=pretrained:toy/a.safetensors", "--num=0"])
    # Two files of one name are one place only if they are equal.
    other = tmp_path / "other" / "toy.safetensors"
    other.parent.mkdir()
    shutil.copy(file, other)
    assert checkpoint.same_place(str(file), str(other))
    exported.write_model(other, weights(1), base_meta(), 0)
    assert not checkpoint.same_place(str(file), str(other))


class _Fresh:
    latest_step = staticmethod(lambda: None)


def test_the_package_contains_the_models(tmp_path, monkeypatch):
    for name in ("cheapscale/__init__.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "cheapscale/pretrained").mkdir()
    for name in ("toy.safetensors", "toy.json", "toy.png"):
        (tmp_path / "cheapscale/pretrained" / name).write_bytes(b"{}")
    monkeypatch.chdir(tmp_path)
    package = Distribution({"src_root": str(tmp_path)})
    package.parse_config_files()
    builder = build_py(package)
    builder.ensure_finalized()
    found = {file for *_, files in builder.data_files for file in files}
    assert found == {"pretrained/toy.safetensors", "pretrained/toy.json"}


def test_the_page_is_that_of_the_cards():
    assert (exported.FOLDER / "README.md").read_text() == card.page(SHIPPED)
    assert {path.stem for path in exported.FOLDER.glob("*.safetensors")} == set(SHIPPED)
    assert sum(path.stat().st_size for path in exported.FOLDER.glob("*.safetensors")) <= MOST_BYTES


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_draws_images_like_its_data(name):
    told = SHIPPED[name]
    assert not card.missing(told)
    model = cheapscale.load(exported.PREFIX + name)  # compares the SHA-256 too
    options = {"steps": 8} if told["model"] == "teacher" else {}
    images, _ = model.sample(32, **options)
    assert np.isfinite(images).all() and images.shape[1] == told["resolution"]
    error = images.mean((1, 2, 3)).std() / len(images) ** 0.5  # most of an image is its ground
    assert abs(images.mean() - told["data"]["mean"]) < 4 * error < 0.5
    assert 0.7 < images.std() / told["data"]["std"] < 1.3
