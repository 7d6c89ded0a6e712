"""`launch.sample --cascade` as a user runs it, on a teacher that was saved untrained."""

import jax
import numpy as np
import pytest
from PIL import Image

from cheapscale.training.mesh import make_mesh
from launch import sample
from tests.cascade import toys

FIELDS = {"resolution": 4, "channel_mult": (1,), "groups": 2, "num_classes": 2, "num_blocks": 2}


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def toy():
    return toys.teacher(toys.weights(**FIELDS), label_dropout=0.0, std=0.5, **FIELDS)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    model = toy()
    return toys.save(tmp_path_factory.mktemp("teacher"), "net", model.params, model.meta)


def test_a_cascade_leaves_its_images_their_base_and_a_preview(teacher, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    summary = sample.main([
        f"--model={teacher}", f"--out={first}", "--cascade=2x,4x", "--num=3", "--steps=4",
        "--start=6", "--labels=1,0", "--coupled", "--direct", "--preview=2",
    ])  # fmt: skip
    assert summary["sizes"] == ["4x4", "8x8", "16x16"] and summary["resolution"] == 16
    assert summary["nfe"][0] == summary["nfe_direct"] == 7 and 0 < summary["nfe"][1] < 7
    assert max(summary["restart_sigmas"]) <= 0.5 * 3.33
    held = {name: np.load(first / f"{name}.npz") for name in ("base", "samples", "direct")}
    for name, side in (("base", 4), ("samples", 16), ("direct", 16)):
        assert held[name]["images"].shape == (3, side, side, 3)
        np.testing.assert_array_equal(held[name]["ids"], [6, 7, 8])
        np.testing.assert_array_equal(held[name]["labels"], [1, 0, 1])
    # rows: base enlarged, direct, cascade; two columns, each picture with a margin of two pixels
    preview = np.asarray(Image.open(first / "preview.png"))
    factor = preview.shape[0] // (3 * 18 + 2)
    sheet = preview[::factor, ::factor]
    assert sheet.shape == (3 * 18 + 2, 2 * 18 + 2, 3)
    rows = [np.kron(held["base"]["images"][1], np.ones((4, 4, 1))), held["direct"]["images"][1],
            held["samples"]["images"][1]]  # fmt: skip
    for row, picture in enumerate(rows):
        top = 2 + 18 * row
        np.testing.assert_array_equal(sheet[top : top + 16, 20:36], picture)
    # another run with the first run's base as the pivot, with its labels and ids
    summary = sample.main([
        f"--model={teacher}", f"--out={second}", "--cascade=8x8", "--num=2", "--steps=4",
        "--start=7", f"--pivot={first / 'base.npz'}", "--cascade_k=sigma0", "--preview=0",
    ])  # fmt: skip
    assert summary["nfe"] == [0, 0]
    np.testing.assert_array_equal(np.load(second / "samples.npz")["labels"], [0, 1])
    np.testing.assert_array_equal(
        np.load(second / "base.npz")["images"], held["base"]["images"][1:]
    )
    assert not (second / "preview.png").exists()


def test_every_flag_reaches_the_plan_or_the_sampler(teacher, tmp_path, monkeypatch):
    seen = {}

    class Enough(ValueError):
        pass

    def stop(model, sizes, **options):
        seen.update(options, sizes=sizes)
        raise Enough

    monkeypatch.setattr(sample, "make_cascade", stop)
    words = ("--cascade=2x,4x", "--cascade_k=sigma3,sigma2", "--steps=60",
             "--resize_kernel=bicubic", "--coupled", "--expert_rule=snr",
             "--seed=4", "--cfg_scale=2", "--method=euler", "--batch_size=3")  # fmt: skip
    with pytest.raises(SystemExit):
        sample.main([f"--model={teacher}", f"--out={tmp_path}", *words])
    expected = {"sizes": "2x,4x", "k": ["sigma3", "sigma2"], "steps": 60, "spacing": "karras",
                "kernel": "bicubic", "coupled": True, "expert_rule": "snr", "seed": 4,
                "cfg_scale": 2.0, "method": "euler", "batch_size": 3, "pivot_size": None,
                "tuned": [], "baseline": ""}  # fmt: skip
    assert seen == expected


def test_cascade_flags_without_a_cascade_are_refused():
    with pytest.raises(SystemExit, match="--coupled, --pivot: only for a cascade: give --cascade"):
        sample.main(["--model=nowhere", "--coupled", "--pivot=x.png"])


@pytest.fixture(scope="module")
def tuned(teacher, tmp_path_factory):
    """A run with untrained upsamplers of that teacher, whose gains are not zero."""
    model = toy()
    run = toys.tuned_run("gain", model=model, sizes=(8,))
    params = jax.tree.map(lambda p: np.full(p.shape, 0.5, "f"), run.params)
    meta = run.origin.meta | {"stage": "cascade", "teacher": model.fingerprint}
    return toys.save(tmp_path_factory.mktemp("tuned"), "upsampler", params, meta)


def test_tuned_weights_join_their_teacher_and_the_preview_compares(teacher, tuned, tmp_path):
    summary = sample.main([
        f"--model={teacher}", f"--out={tmp_path}", "--cascade=2x", "--num=2", "--steps=8",
        "--preview=2", f"--tuned={tuned}",
    ])  # fmt: skip
    images = np.load(tmp_path / "samples.npz")["images"].astype(int)
    assert summary["preview_rows"] == ["base", "direct", "tuning-free", "tuned"]
    preview = np.asarray(Image.open(tmp_path / "preview.png"))
    factor = preview.shape[0] // (4 * 10 + 2)
    sheet = preview[::factor, ::factor].astype(int)
    assert sheet.shape == (4 * 10 + 2, 2 * 10 + 2, 3)
    np.testing.assert_array_equal(sheet[32:40, 2:10], images[0])
    assert np.abs(sheet[22:30, 2:10] - images[0]).max() > 3


def test_a_baseline_runs_on_every_larger_canvas(teacher, tmp_path):
    words = [f"--model={teacher}", "--cascade=2x", "--num=2", "--steps=4", "--preview=0"]
    summary = sample.main([*words, f"--out={tmp_path}", "--baseline=windows", "--direct"])
    assert np.load(tmp_path / "direct.npz")["images"].shape == (2, 8, 8, 3)
    # nine windows of 4 px on a canvas of 8: as many calls for an estimate
    assert summary["nfe"][0] == 7 and summary["nfe_direct"] == 9 * 7
    assert summary["nfe"][1] % 9 == 0
    with pytest.raises(SystemExit, match="two methods for the same canvas"):
        sample.main([*words, "--baseline=shifted", "--tuned=x"])
