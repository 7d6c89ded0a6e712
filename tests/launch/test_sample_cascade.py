"""`launch.sample --cascade` as a user runs it, on a teacher that was saved untrained."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from cheapscale.models import upsampler
from cheapscale.models.unet import unet
from cheapscale.stages import cascade
from cheapscale.stages.networks import complete, fingerprint
from cheapscale.training.checkpoint import Checkpoints, load_network
from cheapscale.training.state import create_state
from configs import common
from tests.launch.shell import command

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = {"resolution": 4, "channels": 8, "channel_mult": (1,), "groups": 2, "num_classes": 2,
         "num_blocks": 2}  # fmt: skip

DIFFUSION = {"process": "edm", "prediction": "x0", "sigma_min": 0.002, "sigma_max": 80.0,
             "rho": 7.0, "sigma_data": 0.5}  # fmt: skip


def sample(*words):
    return command("launch.sample", *words, check=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    net, rng = unet(**MODEL), np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda key: net.init(key, jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), label=jnp.zeros(1, int)),
        jax.random.key(0),
    )
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype("f"), shapes["params"])
    meta = {
        "stage": "pretrain", "networks": {"net": complete(MODEL)}, "diffusion": DIFFUSION,
        "config": {"pretrain": {"label_dropout": 0.0}},
    }  # fmt: skip
    workdir = tmp_path_factory.mktemp("teacher")
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(0, create_state({"net": params}, {}, {}, ["net"]), meta)
        checkpoints.wait()
    return workdir


def test_a_cascade_leaves_its_images_their_base_and_a_preview(teacher, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    lines, errors, status = sample(
        f"--model={teacher}", f"--out={first}", "--cascade=2x,4x", "--num=3", "--steps=4",
        "--start=6", "--labels=1,0", "--coupled", "--direct", "--preview=2",
    )  # fmt: skip
    assert status == 0, errors[-3000:]
    summary = json.loads(lines[-1])
    assert summary["sizes"] == ["4x4", "8x8", "16x16"] and summary["resolution"] == 16
    assert summary["nfe"][0] == summary["nfe_direct"] == 7 and 0 < summary["nfe"][1] < 7
    assert max(summary["restart_sigmas"]) <= 3.33
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
    # its base, given back as the pivot of one more run, with its labels and numbers
    lines, errors, status = sample(
        f"--model={teacher}", f"--out={second}", "--cascade=8x8", "--num=2", "--steps=4",
        "--start=7", f"--pivot={first / 'base.npz'}", "--cascade_k=sigma0", "--preview=0",
    )  # fmt: skip
    assert status == 0, errors[-3000:]
    assert json.loads(lines[-1])["nfe"] == [0, 0]
    np.testing.assert_array_equal(np.load(second / "samples.npz")["labels"], [0, 1])
    np.testing.assert_array_equal(
        np.load(second / "base.npz")["images"], held["base"]["images"][1:]
    )
    assert not (second / "preview.png").exists()


def test_every_flag_reaches_the_plan_or_the_sampler(teacher, tmp_path, monkeypatch):
    """In this process, stopped before anything is sampled."""
    from launch import sample as program  # defines flags: not while other programs are imported

    seen = {}

    class Enough(Exception):
        pass

    def stop(loaded, plan, **options):
        seen.update(options, sizes=plan.sizes, restarts=[grid[0] for grid in plan.restarts])
        raise Enough

    monkeypatch.setattr(program.cascade, "cascade_sampler", stop)
    words = ("--cascade=2x,4x", "--cascade_k=sigma3,sigma2", "--steps=60", "--stage_seeds=5,6",
             "--resize_kernel=bicubic", "--resize_space=image", "--coupled", "--owner=snr",
             "--seed=4", "--cfg_scale=2", "--method=euler", "--batch_size=3")  # fmt: skip
    with flagsaver.flagsaver():
        program.FLAGS(["sample", f"--model={teacher}", f"--out={tmp_path}", *words])
        with pytest.raises(Enough):
            program.run()
    assert seen["sizes"] == ((4, 4), (8, 8), (16, 16))
    assert 2.5 < seen["restarts"][0] <= 3 and 1.6 < seen["restarts"][1] <= 2
    expected = {"stage_seeds": [5, 6], "kernel": "bicubic", "space": "image", "coupled": True,
                "owner": "snr", "seed": 4, "cfg_scale": 2.0, "method": "euler",
                "batch_size": 3}  # fmt: skip
    assert {name: seen[name] for name in expected} == expected


def test_cascade_flags_without_a_cascade_are_refused():
    _, errors, status = sample("--model=nowhere", "--coupled", "--pivot=x.png")
    assert status == 1
    assert errors.strip().splitlines()[-1] == (
        "error: --coupled, --pivot say how to cascade: give --cascade=2x,4x as well"
    )


@pytest.fixture(scope="module")
def tuned(teacher, tmp_path_factory):
    """Upsamplers of that teacher, saved untrained with gains that do something."""
    workdir = tmp_path_factory.mktemp("tuned")
    resolved = {"sizes": (8,), "times": "to_k", "label_dropout": 0.0}
    settings = common.cascade("gain").to_dict() | resolved
    fields = cascade.network_fields(settings, complete(MODEL))
    params = upsampler.init_upsamplers(upsampler.from_fields(fields), jax.random.key(0))
    params = jax.tree.map(lambda p: np.full(p.shape, 0.5, "f"), params)
    meta = {
        "stage": "cascade", "networks": {"upsampler": fields}, "cascade": settings,
        "diffusion": DIFFUSION,
        "teacher": fingerprint(load_network(teacher).params),
    }  # fmt: skip
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(7, create_state({"upsampler": params}, {}, {}, ["upsampler"]), meta)
        checkpoints.wait()
    return workdir


def test_tuned_weights_join_their_teacher_and_the_preview_compares(teacher, tuned, tmp_path):
    common_words = (f"--model={teacher}", "--cascade=2x", "--num=2", "--steps=8", "--preview=2")
    lines, errors, status = sample(*common_words, f"--out={tmp_path / 'a'}", f"--tuned={tuned}")
    assert status == 0, errors[-3000:]
    lines, errors, status = sample(*common_words, f"--out={tmp_path / 'b'}")
    assert status == 0, errors[-3000:]
    held = {name: np.load(tmp_path / name / "samples.npz")["images"] for name in "ab"}
    assert np.abs(held["a"].astype(int) - held["b"]).max() > 3
    rows = ["base", "direct", "tuning-free", "tuned"]
    assert json.loads((tmp_path / "a" / "sample.json").read_text())["preview_rows"] == rows
    preview = np.asarray(Image.open(tmp_path / "a" / "preview.png"))
    factor = preview.shape[0] // (4 * 10 + 2)
    sheet = preview[::factor, ::factor]
    assert sheet.shape == (4 * 10 + 2, 2 * 10 + 2, 3)
    np.testing.assert_array_equal(sheet[32:40, 2:10], held["a"][0])
    np.testing.assert_allclose(sheet[22:30, 2:10].astype(int), held["b"][0], atol=1)


def test_a_baseline_runs_on_every_larger_canvas(teacher, tmp_path):
    words = (f"--model={teacher}", "--cascade=2x", "--num=2", "--steps=4", "--preview=0")
    lines, errors, status = sample(*words, f"--out={tmp_path}", "--baseline=windows", "--direct")
    assert status == 0, errors[-3000:]
    summary = json.loads(lines[-1])
    assert np.load(tmp_path / "direct.npz")["images"].shape == (2, 8, 8, 3)
    # nine windows of 4 px on a canvas of 8: as many calls for an estimate
    assert summary["nfe"][0] == 7 and summary["nfe_direct"] == 9 * 7
    assert summary["nfe"][1] % 9 == 0
    _, errors, status = sample(*words, "--baseline=shifted", "--tuned=x")
    assert status == 1 and "two methods for the same canvas" in errors.splitlines()[-1]
