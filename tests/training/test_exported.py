"""Exported models: one file is the whole model, and shipped files are those of their cards."""

import hashlib
import json

import jax
import numpy as np
import pytest

from cheapscale.teacher import load
from cheapscale.training import exported
from cheapscale.training.checkpoint import load_network, read_meta
from tests.teacher.toy_teacher import base_meta, toy_teacher


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "toy.safetensors"
    teacher = toy_teacher()
    sha256 = exported.write_model(path, teacher.params, base_meta(), 7)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return path, teacher


def test_a_file_loads_as_a_work_directory_does(file):
    path, teacher = file
    found = load(path)
    assert (found.step, found.workdir, found.fields) == (7, str(path), teacher.fields)
    assert read_meta(path)[1]["diffusion"] == base_meta()["diffusion"]
    for ours, theirs in zip(
        jax.tree.leaves(found.params), jax.tree.leaves(teacher.params), strict=True
    ):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, np.asarray(theirs, np.float16).astype(np.float32))


def test_what_a_file_does_not_hold_is_refused(file, tmp_path):
    path, teacher = file
    with pytest.raises(ValueError, match="averaged weights only"):
        load_network(path, ema=False)
    with pytest.raises(FileNotFoundError, match="holds step 7 alone"):
        load_network(path, step=3)
    with pytest.raises(FileNotFoundError, match="launch.export"):
        load(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no exported model"):
        load(path)
    huge = jax.tree.map(lambda leaf: leaf + 1e6, teacher.params)
    with pytest.raises(ValueError, match="does not fit float16"):
        exported.write_model(path, huge, base_meta(), 0)


def test_a_shipped_model_has_the_hash_of_its_card(file, tmp_path, monkeypatch):
    path, _ = file
    monkeypatch.setattr(exported, "FOLDER", tmp_path)
    card = path.with_suffix(".json")
    told = {"model": "teacher", "resolution": 8, "data": {"name": "scenes"}, "bytes": 5}
    card.write_text(json.dumps(told | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    assert load("pretrained:toy").step == 7
    with pytest.raises(exported.NoModel, match="pretrained:toy"):
        load("pretrained:boy")
    card.write_text(json.dumps(told | {"sha256": "0"}))
    with pytest.raises(ValueError, match="not the file of its card"):
        load("pretrained:toy")
