"""Checkpoints: none is lost in silence, and a damaged one is named with the older good one."""

import json
import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.training import checkpoint
from cheapscale.training.checkpoint import Checkpoints, load_network

PARAMS = {"net": {"kernel": jnp.arange(60_000.0).reshape(200, 300), "bias": jnp.ones(3)}}
STATE = {"params": PARAMS, "ema_params": PARAMS}
META = {"networks": {"net": {}}}


def save(workdir, steps, keep=2):
    with Checkpoints(workdir, keep=keep) as saved:
        for step in steps:
            saved.save(step, STATE, META)
        saved.wait()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A work directory with the checkpoints 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    save(folder, (1, 2, 3), keep=3)
    return folder


@pytest.mark.parametrize(
    "name", ["run[1]", "a*b", "a?", "[!x]", "a b", "ü-日本", "50%20#{}", "a:b", "x/../y", "n" * 200]
)
def test_every_name_of_a_folder_serves_checkpoints(name, tmp_path):
    save(tmp_path / name, (1, 2), keep=1)
    folder = (tmp_path / name).resolve() / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["2"]
    loaded = load_network(tmp_path / name)
    np.testing.assert_array_equal(loaded.params["kernel"], PARAMS["net"]["kernel"])
    with Checkpoints(tmp_path / name) as saved:
        assert checkpoint.shapes(saved.restore(STATE)) == checkpoint.shapes(STATE)


def test_a_pattern_in_a_name_does_not_reach_into_other_folders(tmp_path):
    save(tmp_path / "ab", (1,))
    save(tmp_path / "a*", (1,))
    assert load_network(tmp_path / "ab").step == load_network(tmp_path / "a*").step == 1


@pytest.mark.parametrize("name", ["gs://bucket/run", "s3:/bucket", "~/runs", "a\\b", "a\udcff"])
def test_what_cannot_serve_checkpoints_is_refused_before_a_folder_is_made(name, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(ValueError, match="name|mount|write the whole path"):
            Checkpoints(name)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, -1])
def test_keep_below_one_is_refused(keep, tmp_path):
    with pytest.raises(ValueError, match="give 1 or more"):
        Checkpoints(tmp_path, keep=keep)


def test_no_older_checkpoint_is_deleted_before_the_new_one_was_read_back(tmp_path, monkeypatch):
    save(tmp_path, (1,), keep=1)
    listed = checkpoint.array_metadata

    def incomplete(path):
        tree = listed(path)
        del tree["params"]["net"]["bias"]
        return tree

    monkeypatch.setattr(checkpoint, "array_metadata", incomplete)
    with pytest.raises(
        OSError, match="checkpoint 2 .* cannot be read back: the older ones are kep"
    ):
        save(tmp_path, (2,), keep=1)
    monkeypatch.undo()
    assert load_network(tmp_path).step == 1
    save(tmp_path, (2,), keep=1)
    assert load_network(tmp_path).step == 2


def cut(path):
    os.truncate(path, min(path.stat().st_size // 2, 64))


def emptied(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [cut, emptied, pathlib.Path.unlink])
@pytest.mark.parametrize(
    "files", ["state/manifest.ocdbt", "state/ocdbt.process_0/d/*", "state/_METADATA",
              "meta/metadata"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_with_the_older_good_one(files, damage, three, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(three, workdir)
    for step in (2, 3):  # the second is damaged too, so the first is the good one
        for path in (workdir / "checkpoints" / str(step)).glob(files):
            damage(path)
    said = f"checkpoint 3 of .*damaged.*: step 1 is not.*rm -r '{workdir / 'checkpoints' / '3'}'"
    with pytest.raises(ValueError, match=said):
        load_network(workdir)
    if (damage, files) != (pathlib.Path.unlink, "state/_METADATA"):  # resuming does not need it
        with pytest.raises(ValueError, match=said), Checkpoints(workdir) as saved:
            saved.meta()
            saved.restore(STATE)
    for step in ("3", "2"):  # the remedy
        shutil.rmtree(workdir / "checkpoints" / step)
    assert load_network(workdir).step == 1


def test_folders_that_are_no_checkpoints_are_passed_over(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for name in ("notes", "3 (copy)", "4.orbax-checkpoint-tmp"):
        (folder / name).mkdir()
    (folder / "5").write_text("a file")
    assert load_network(tmp_path / "run").step == 3
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4: it has \[1, 2, 3\]"):
        load_network(tmp_path / "run", step=4)


def test_a_state_of_another_network_is_told_from_a_damaged_one(three):
    other = STATE | {"params": {"net": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}}
    with pytest.raises(ValueError, match=r"params.net.kernel is \(200, 300\) there and \(2, 3\) h"):
        with Checkpoints(three) as saved:
            saved.restore(other)


@pytest.mark.parametrize("content", ["", "{", "\udcff", "[" * 100_000, "[]", "null", "3"])
def test_a_damaged_config_of_a_run_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"{path} is damaged.*delete it"):
        checkpoint.claim_workdir(tmp_path, {"lr": 1})
    path.unlink()  # the remedy
    checkpoint.claim_workdir(tmp_path, {"lr": 1})


def run_folder(place, config, step=3):
    """The work directory `place` of a run, with as much as tells it from others."""
    meta = place / "checkpoints" / str(step) / "meta" / "metadata"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"networks": {}, "config": config}))
    return place


def test_without_its_config_file_a_run_is_compared_with_its_checkpoint(tmp_path):
    run_folder(tmp_path, {"lr": 1})
    with pytest.raises(ValueError, match="lr: 1 -> 2"):
        checkpoint.claim_workdir(tmp_path, {"lr": 2})
    checkpoint.claim_workdir(tmp_path, {"lr": 1})
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 1}


def test_a_place_may_be_spelled_in_another_way_moved_or_copied(tmp_path, monkeypatch):
    old = run_folder(tmp_path / "a" / "pre", {"lr": 1})
    monkeypatch.chdir(tmp_path)

    def differ(new, name="teacher", old="a/pre"):
        return bool(checkpoint.differing_keys({name: old}, {name: str(new)}))

    assert not differ(old) and not differ("a/../a/pre") and differ("") and differ(old, "name")
    shutil.copytree(old, "b/pre")
    assert not differ("b/pre")
    run_folder(tmp_path / "c" / "pre", {"lr": 2})
    assert differ("c/pre") and differ("c/pre", "cascade")
    os.rename("a", "d")
    assert not differ("d/pre") and differ("d/other")


def test_links_and_copies_among_the_checkpoints_are_named(tmp_path):
    run_folder(tmp_path / "a", {}, "3_best")
    with pytest.raises(ValueError, match="3_best is no checkpoint"):
        checkpoint.claim_workdir(tmp_path / "a", {})
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        load_network(tmp_path / "a")
    run_folder(tmp_path / "a", {})
    checkpoint.claim_workdir(tmp_path / "a", {})
    (tmp_path / "a" / "checkpoints" / "4").symlink_to(tmp_path / "a" / "checkpoints" / "3")
    with pytest.raises(ValueError, match="4 is no checkpoint but a link.*move it away"):
        checkpoint.claim_workdir(tmp_path / "a", {})
