"""The training loop: exact resuming, meshes, signals and divergence, tested on small MLPs."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.pagoda.gan import Game, gan_step
from cheapscale.training import checkpoint, loop
from cheapscale.training.optim import make_optimiser
from cheapscale.training.stage import Stage, denoise_step, noise_bins
from cheapscale.training.state import Optimiser, averaged

DIM, BATCH = 4, 16


def mlp(key, sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"dense{i}": {"kernel": jax.random.normal(k, (m, n)) / m**0.5, "bias": jnp.zeros(n)}
        for i, (k, m, n) in enumerate(zip(keys, sizes, sizes[1:]))
    }


def apply_mlp(params, x):
    for i, (_, layer) in enumerate(sorted(params.items())):
        x = (jax.nn.silu(x) if i else x) @ layer["kernel"] + layer["bias"][None]
    return x


def rows(step, shift=0):
    return np.random.default_rng((step, shift)).normal(size=(BATCH, DIM)).astype(np.float32)


def denoise_stage(rate=1e-2, poison_at=None):
    """A loss that regresses x from x + sigma eps; the frozen scale is an argument of the step."""
    optimiser = Optimiser(make_optimiser("adam", rate))

    def loss_fn(params, frozen, batch, key):
        k_sigma, k_eps = jax.random.split(key)
        sigma = jnp.exp(jax.random.normal(k_sigma, (BATCH,)))
        noise = sigma[:, None] * jax.random.normal(k_eps, batch["x"].shape)
        error = apply_mlp(params, batch["x"] + noise) - frozen["scale"] * batch["x"]
        return (error**2).mean(-1), sigma

    def batches(start):
        for step in range(start, 10**6):
            yield {"x": rows(step) * (np.nan if step == poison_at else 1.0)}

    return Stage(
        init_params=lambda key: (
            {"net": mlp(key, (DIM, 64, DIM))}, {"net": noise_bins()}
        ),
        optimisers={"net": optimiser},
        step=functools.partial(
            denoise_step, loss_fn=loss_fn, optimiser=optimiser, ema_decay=0.99
        ),
        batches=batches,
        load_frozen=lambda: ({"scale": np.float32(2.0)}, {"scale": "abc"}),
        frozen_shapes=lambda: {"scale": jax.ShapeDtypeStruct((), np.float32)},
        warm_start=lambda params: params,
        evals={},
        meta={"networks": {"net": {"sizes": [DIM, 64, DIM]}}},
        batch_size=BATCH,
        fits={},
    )  # fmt: skip


def gan_stage():
    optimisers = {
        "generator": Optimiser(make_optimiser("radam", 1e-2), lambda path: "dense1" in path),
        "discriminator": Optimiser(make_optimiser("radam", 1e-2)),
    }

    def init_params(key):
        k_gen, k_disc = jax.random.split(key)
        params = {
            "generator": mlp(k_gen, (DIM, 64, DIM)), "discriminator": mlp(k_disc, (DIM, 64, 1))
        }  # fmt: skip
        return params, {"discriminator": {"calls": jnp.zeros(())}}

    def batches(start):
        labels = np.zeros(BATCH, np.int32)
        for step in range(start, 10**6):
            yield {
                "pair": {"image": rows(step), "z": rows(step, 1), "label": labels},
                "real": {"image": rows(step, 2), "label": labels},
            }

    return Stage(
        init_params=init_params,
        optimisers=optimisers,
        step=functools.partial(gan_step, game=Game(
            generate=lambda params, z, c: apply_mlp(params, z),
            see=lambda frozen, views: {name: view.images for name, view in views.items()},
            discriminate=lambda params, s, x, c: (
                apply_mlp(params, x), {"calls": s["calls"] + 1}
            ),
            distance=lambda frozen, f, g, x, y: {"pixel": ((x - y) ** 2).mean(-1)},
            optimisers=optimisers,
            sigma_max=80.0,
            ema_decay=0.99,
            adversarial_weight=0.2,
            adaptive_layer="dense1/kernel",
        )),
        batches=batches,
        load_frozen=lambda: ({}, {}),
        frozen_shapes=dict,
        warm_start=lambda params: params,
        evals={},
        meta={"networks": {"generator": {}}},
        batch_size=BATCH,
        fits={},
    )  # fmt: skip


def train(stage, workdir, total_steps, config=None, **options):
    settings = {"name": "test", "seed": 0, "log_every": 1, "save_every": 100} | options
    return loop.train(stage, str(workdir), config or {"lr": 1}, total_steps=total_steps, **settings)


def state_of(stage, workdir, **mesh):
    with checkpoint.Checkpoints(workdir) as checkpoints:
        abstract = loop.abstract_state(stage, loop.sharding.make_mesh(**mesh), 0)
        return checkpoints.restore(abstract), checkpoints.meta()[1]


def assert_equal(a, b, rtol=0.0, atol=0.0):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=atol),
        a, b,
    )  # fmt: skip


@pytest.mark.parametrize("make", [denoise_stage, gan_stage])
def test_a_run_resumed_after_two_steps_equals_four_steps_bit_for_bit(make, tmp_path):
    train(make(), tmp_path / "whole", 4)
    train(make(), tmp_path / "halves", 2)
    summary = train(make(), tmp_path / "halves", 4)
    whole, halves = state_of(make(), tmp_path / "whole"), state_of(make(), tmp_path / "halves")
    assert summary["step"] == int(halves[0].step) == 4
    assert_equal(whole[0], halves[0])
    assert halves[1]["ledger"]["flops"] == whole[1]["ledger"]["flops"] > 0


def test_a_run_ends_at_its_share_of_flops_with_those_of_earlier_stages(tmp_path):
    def after(flops, place, **options):
        stage = denoise_stage()
        stage.meta["ledger"] = {"flops": 500.0, "device_seconds": 0.0}
        return train(stage, tmp_path / place, 1, total_flops=flops, **options)

    each = train(denoise_stage(), tmp_path / "one", 1)["flops_per_step"]
    found = after(500 + 2.5 * each, "whole")
    assert found["step"] == 3 and found["ledger"]["flops"] == 500 + 3 * each
    assert after(500 + 2.5 * each, "whole")["step"] == 3  # finished: nothing is trained
    assert after(500 + 2 * each, "parts")["step"] == 2  # exactly reached
    assert after(500 + 4 * each, "parts")["ledger"]["flops"] == 500 + 4 * each
    with pytest.raises(ValueError, match="earlier stages took 500 FLOPs and total_flops is 400"):
        after(400.0, "little")


@pytest.mark.parametrize("make", [denoise_stage, gan_stage])
def test_one_and_eight_devices_agree(make, tmp_path, monkeypatch, eight_devices):
    monkeypatch.setattr(loop.sharding, "MIN_SHARDED", 1)  # shard even these small kernels
    states = {}
    one, eight = eight_devices[:1], eight_devices
    original = jax.devices
    for name, devices, mesh in (("one", one, {}), ("eight", eight, {"data": 2, "fsdp": 4})):
        monkeypatch.setattr(jax, "devices", lambda *a, d=devices: list(d))
        train(make(), tmp_path / name, 1, mesh=mesh)
        monkeypatch.setattr(jax, "devices", original)
        states[name] = state_of(make(), tmp_path / name)[0]
    assert_equal(states["one"].params, states["eight"].params, rtol=1e-5, atol=1e-6)
    assert_equal(states["one"].ema_params, states["eight"].ema_params, rtol=1e-5, atol=1e-6)


def test_fsdp_splits_large_kernels_and_a_checkpoint_moves_between_meshes(tmp_path, eight_devices):
    stage = denoise_stage()
    train(stage, tmp_path, 1, mesh={"data": 8})
    for mesh in ({"data": 2, "fsdp": 4}, {"data": 1, "fsdp": 8}):
        device_mesh = loop.sharding.make_mesh(**mesh)
        abstract = loop.abstract_state(stage, device_mesh, 0)
        kernel = abstract.params["net"]["dense0"]["kernel"]
        place = loop.sharding.infer_sharding(kernel, device_mesh, min_size=1)
        assert "fsdp" in place.spec and "fsdp" not in kernel.sharding.spec
    train(stage, tmp_path, 2, mesh={"data": 2, "fsdp": 4})
    assert int(state_of(stage, tmp_path)[0].step) == 2


def test_only_the_ema_of_one_network_is_read_back(tmp_path):
    train(gan_stage(), tmp_path, 2)
    state, _ = state_of(gan_stage(), tmp_path)
    loaded = checkpoint.load_network(tmp_path)
    assert loaded.step == 2 and loaded.meta["networks"] == {"generator": {}}
    assert set(state.ema_params["generator"]) == {"dense1"}  # dense0 never trains: stored once
    assert_equal(loaded.params, averaged(state, "generator"))
    raw = checkpoint.load_network(tmp_path, ema=False)
    assert_equal(raw.params, state.params["generator"])
    assert not np.array_equal(raw.params["dense1"]["kernel"], loaded.params["dense1"]["kernel"])
    with pytest.raises(ValueError, match="'discriminator'"):
        checkpoint.load_network(tmp_path, "discriminator")


def test_a_nan_stops_the_run_and_the_last_checkpoint_stays_complete(tmp_path):
    with pytest.raises(loop.Diverged, match=rf"loss is nan at step 3.*resume={tmp_path} and a low"):
        train(denoise_stage(poison_at=2), tmp_path, 6, save_every=2)
    assert (tmp_path / "diverged").is_dir()
    state, _ = state_of(denoise_stage(), tmp_path)
    assert int(state.step) == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_a_folder_of_another_stage_is_refused_by_its_stage_alone_and_many_fields_are_counted():
    old = {"stage": "pretrain", "optim": {"lr": 1}, "a": 1, "b": 1, "c": 1}
    assert checkpoint.differing_keys(old, old | {"stage": "grow", "a": 2}) == [
        "stage: 'pretrain' -> 'grow'"
    ]
    rows = checkpoint.differing_keys(old, old | {"a": 2, "b": 2, "c": 2, "optim": {"lr": 2}})
    assert rows == ["a: 1 -> 2", "b: 1 -> 2", "c: 1 -> 2", "and 1 more"]


def test_the_work_directory_of_a_pipeline_names_its_runs_the_newest_first(tmp_path):
    for age, name in enumerate(("pretrain", "set/group-0", "distill", "grow16")):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        os.utime(tmp_path / name / "checkpoints", (age, age))
    with pytest.raises(FileNotFoundError, match="give .*set or .*grow16 or .*distill or .*pretr"):
        checkpoint.read_meta(tmp_path)


def test_another_config_is_refused_with_the_differing_keys(tmp_path):
    train(denoise_stage(), tmp_path, 1, config={"optim": {"lr": 1}, "total_steps": 1})
    with pytest.raises(ValueError, match="optim.lr: 1 -> 2"):
        train(denoise_stage(), tmp_path, 2, config={"optim": {"lr": 2}, "total_steps": 2})
    train(denoise_stage(), tmp_path, 2, config={"optim": {"lr": 1}, "total_steps": 2})


def test_a_run_without_a_checkpoint_may_start_again_with_another_config(tmp_path):
    def refuse(start):
        raise ValueError("batch_size 16 is more than there is")

    with pytest.raises(ValueError, match="more than there is"):
        train(denoise_stage()._replace(batches=refuse), tmp_path, 1, config={"batch": 16})
    with pytest.raises(loop.Diverged, match="; start again with a lower --config.optim"):
        train(denoise_stage(poison_at=0), tmp_path, 1, config={"batch": 8})
    train(denoise_stage(), tmp_path, 1, config={"batch": 4})
    with pytest.raises(ValueError, match="batch: 4 -> 8"):
        train(denoise_stage(), tmp_path, 2, config={"batch": 8})


def test_a_run_resumes_only_with_its_own_teacher_data_and_networks(tmp_path):
    def stage(teacher="a", images="b", scale="c", classes=("x",)):
        base = denoise_stage()
        data = {"fingerprint": images, "name": "x", "class_names": list(classes)}
        meta = base.meta | {"teacher": teacher, "data": data}
        return base._replace(meta=meta, load_frozen=lambda: (base.load_frozen()[0], {"s": scale}))

    train(stage(), tmp_path, 1)
    for other, message in (
        ({"teacher": "z"}, "another teacher .a -> z.: undo the change"),
        ({"images": "z"}, "another data .b -> z.: undo .*--config.accept_other_data=True"),
        ({"classes": ["y"]}, "another class_names"),
        ({"scale": "z"}, "another frozen_networks"),
    ):
        with pytest.raises(ValueError, match=message):
            train(stage(**other), tmp_path, 2)
    assert train(stage(), tmp_path, 2)["step"] == 2
    accept = {"lr": 1, "accept_other_data": True, "data": {"options": {"skip_corrupt": True}}}
    with pytest.raises(ValueError, match="another class_names"):
        train(stage(images="z", classes=["y"]), tmp_path, 3, config=accept)
    assert train(stage(images="z"), tmp_path, 3, config=accept)["step"] == 3
    assert train(stage(images="z"), tmp_path, 4)["step"] == 4  # they are the run's data now


def test_a_state_is_saved_before_its_preview_is_drawn_and_0_draws_none(tmp_path):
    def fail(state, frozen):
        raise RuntimeError("no picture")

    with pytest.raises(RuntimeError, match="no picture"):
        train(denoise_stage()._replace(evals={"grid": (2, fail)}), tmp_path, 4, save_every=2)
    assert int(state_of(denoise_stage(), tmp_path)[0].step) == 2
    summary = train(denoise_stage()._replace(evals={"grid": (0, fail)}), tmp_path, 4)
    again = train(denoise_stage(), tmp_path, 4)
    assert summary["step"] == 4 and summary["metrics"]["loss"] > 0
    assert again == summary  # a finished run returns the same summary


def test_a_state_whose_preview_is_refused_is_kept(tmp_path):
    def refuse(state, frozen):
        raise ValueError("image 0 holds a NaN")

    with pytest.raises(loop.Diverged, match="grid: image 0 holds a NaN; the state is saved in"):
        train(denoise_stage()._replace(evals={"grid": (1, refuse)}), tmp_path, 4, save_every=2)
    assert (tmp_path / "diverged" / "1").is_dir()


def test_bad_meshes_and_batches_are_refused_before_anything_compiles(tmp_path, eight_devices):
    with pytest.raises(ValueError, match="does not cover 8 devices"):
        train(denoise_stage(), tmp_path, 1, mesh={"data": 3})
    with pytest.raises(ValueError, match="batch_size 12 is not divisible"):
        train(denoise_stage()._replace(batch_size=12), tmp_path, 1)


def test_resume_continues_another_run_in_a_new_work_directory(tmp_path):
    train(denoise_stage(), tmp_path / "old", 2)
    train(denoise_stage(), tmp_path / "new", 4, resume=str(tmp_path / "old"))
    with pytest.raises(ValueError, match="old begins at step 2 .*: give a larger --config.total_"):
        train(denoise_stage(), tmp_path / "newer", 2, resume=str(tmp_path / "old"))
    train(denoise_stage(), tmp_path / "old", 4)
    assert_equal(
        state_of(denoise_stage(), tmp_path / "old")[0],
        state_of(denoise_stage(), tmp_path / "new")[0],
    )


def test_the_log_has_every_step_and_the_loss_per_noise_bin_is_kept(tmp_path):
    train(denoise_stage(), tmp_path, 5)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5]
    bins = state_of(denoise_stage(), tmp_path)[0].extra["net"]
    assert float(bins["count"].sum()) == 5 * BATCH


def test_sigterm_saves_the_state_and_the_next_run_resumes(tmp_path):
    """A child process gets a real signal."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_loop as t\n"
        "try: t.train(t.denoise_stage(), sys.argv[2], 10**6)\n"
        "except t.loop.Preempted as stop: print(stop); sys.exit(143)\n"
    )
    here = str(pathlib.Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", code, here, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    log = tmp_path / "metrics.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and output.startswith("pre-empted at step ")
    step = int(output.split()[-1])
    assert int(state_of(denoise_stage(), tmp_path)[0].step) == step > 3
    assert train(denoise_stage(), tmp_path, step + 1)["step"] == step + 1
