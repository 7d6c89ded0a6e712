"""`stage=cascade` through the one loop, and what its runs are good for afterwards."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cheapscale.models.unet import unet
from cheapscale.stages import cascade, tuned
from cheapscale.stages.cascade_sampler import cascade_plan, cascade_sampler
from cheapscale.stages.networks import complete, fingerprint, load_teacher
from cheapscale.stages.run import build, run
from cheapscale.training import checkpoint, loop
from configs import scenes

DIFFUSION = {"process": "edm", "prediction": "x0", "sigma_min": 0.002, "sigma_max": 80.0,
             "rho": 7.0, "sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}  # fmt: skip


def save_teacher(workdir, seed, label_dropout=0.0):
    model = scenes.get_config("stage=pretrain,smoke").model.to_dict()
    net, rng = unet(**model), np.random.default_rng(seed)
    shapes = jax.eval_shape(
        lambda key: net.init(key, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), label=jnp.zeros(1, int)),
        jax.random.key(0),
    )
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype("f"), shapes["params"])
    meta = {
        "stage": "pretrain", "networks": {"net": complete(model)}, "diffusion": DIFFUSION,
        "config": {"pretrain": {"label_dropout": label_dropout}},
        "ledger": {"flops": 5.0, "device_seconds": 1.0},
    }  # fmt: skip
    with checkpoint.Checkpoints(workdir) as checkpoints:
        state = loop.create_state({"net": params}, {}, {}, ["net"])
        checkpoints.save(0, state, meta)
        checkpoints.wait()
    return str(workdir)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), 0)


def smoke(teacher, tune, **changes):
    config = scenes.get_config(f"stage=cascade,smoke,tune={tune}")
    config.teacher = teacher
    with config.unlocked():
        config.cascade.update(changes)
    return config


@pytest.mark.parametrize("tune, net", [("gain", "upsampler"), ("ft", "net")])
def test_a_tuned_run_trains_saves_and_samples_with_its_teacher(teacher, tune, net, tmp_path):
    summary = run(smoke(teacher, tune), tmp_path / "tuned")
    assert summary["step"] == 3 and summary["ledger"]["flops"] > 5.0
    picture = np.asarray(Image.open(next((tmp_path / "tuned" / "previews").glob("*cascade_grid*"))))
    assert picture.shape[2] == 3  # rows: base, direct, tuning-free, tuned
    loaded = load_teacher(teacher)
    found = tuned.load_tuned(str(tmp_path / "tuned"), loaded)
    assert found.tune == tune and found.meta["teacher"] == fingerprint(loaded.params)
    assert set(found.meta["networks"]) == {net}
    plan = cascade_plan(loaded.meta, "2x", steps=3)
    subject, options = tuned.tuned_cascade(loaded, [found], plan)
    ids = np.arange(8)
    drawn, labels = cascade_sampler(subject, plan, method="euler", **options).draw(ids)
    free, _ = cascade_sampler(loaded, plan, method="euler").draw(ids, labels)
    np.testing.assert_allclose(drawn[0], free[0], atol=1e-5)  # the base is theta's
    assert drawn[1].shape == (8, 16, 16, 3) and np.abs(drawn[1] - free[1]).max() > 1e-6
    # only fine-tuned weights and adapters can sample without a pivot
    onward = smoke(teacher, tune, init_from=str(tmp_path / "tuned"))  # the next stage starts there
    started = build(onward)
    jax.tree.map(np.testing.assert_array_equal, started.warm_start({net: None})[net], found.params)
    assert started.meta["ledger"]["flops"] == found.meta["ledger"]["flops"] > 5.0
    for changes in ({"mode": "M"}, {"init": "identity"}) if tune == "gain" else ():
        with pytest.raises(ValueError, match="holds other modules than tune="):
            build(smoke(teacher, tune, init_from=str(tmp_path / "tuned"), **changes))
    alone, _ = cascade_sampler(subject, plan, method="euler", **options).direct(ids)
    direct, _ = cascade_sampler(loaded, plan, method="euler").direct(ids)
    assert np.allclose(alone, direct, atol=1e-5) == (tune == "gain")
    other = load_teacher(save_teacher(tmp_path / "other", 1))
    with pytest.raises(ValueError, match="was tuned for the teacher .* holds"):
        tuned.load_tuned(str(tmp_path / "tuned"), other)
    with pytest.raises(ValueError, match="is a pretrain run, nothing tuned"):
        tuned.load_tuned(teacher, loaded)
    with pytest.raises(ValueError, match="holds what was tuned for larger canvases, not a model"):
        load_teacher(tmp_path / "tuned")


def test_tune_none_draws_the_cascade_in_shards_and_resumes(teacher, tmp_path):
    config = smoke(teacher, "none", out=str(tmp_path / "images"), num=6, method="euler")
    summary = run(config, tmp_path / "job")
    assert summary["nfe_direct"] == 2 and summary["num"] == 6
    with pytest.raises(ValueError, match="coupled noise need scales such as 2x,4x"):
        build(smoke(teacher, "none", out="x", scales="1.5x", coupled=True))
    with pytest.raises(ValueError, match="sampled by heun or euler, not by 'ancestral'"):
        build(smoke(teacher, "none", out="x", method="ancestral"))
    shards = [np.load(tmp_path / "images" / f"shard-{i:05d}.npz") for i in range(2)]
    assert [len(shard["ids"]) for shard in shards] == [4, 2]
    assert shards[0]["images"].shape == (4, 16, 16, 3) and shards[0]["base"].shape[1] == 8
    assert (tmp_path / "images" / "preview.png").is_file()
    loaded = load_teacher(teacher)
    plan = cascade_plan(loaded.meta, "2x", steps=2)
    (base, images), labels = cascade_sampler(loaded, plan, method="euler").draw(np.arange(6))
    np.testing.assert_array_equal(labels, np.concatenate([s["labels"] for s in shards]))
    found = np.concatenate([s["images"] for s in shards])
    assert np.abs(found / 127.5 - 1 - images).max() < 1 / 100
    assert all(map(build(config).done, range(2)))
    other = smoke(teacher, "none", out=str(tmp_path / "images"), num=6, method="heun")
    with pytest.raises(ValueError, match="was started with another config .*cascade.method"):
        run(other, tmp_path / "other")


@pytest.mark.parametrize("tune, times", [("gain", "to_k"), ("lora", "all"), ("ft", "all")])
def test_what_a_run_leaves_open_is_the_teachers_or_the_controls(tmp_path, tune, times):
    """Upsamplers train up to K, controls that also sample directly at all levels; labels drop as
    they did for the teacher."""
    place = save_teacher(tmp_path, 0, label_dropout=0.25)
    found = build(smoke(place, tune)).meta["cascade"]
    assert (found["times"], found["label_dropout"]) == (times, 0.25)
    found = build(smoke(place, tune, times="to_k", label_dropout=0.0)).meta["cascade"]
    assert (found["times"], found["label_dropout"]) == ("to_k", 0.0)


def test_the_preview_shows_base_direct_tuning_free_and_tuned_in_this_order(teacher, monkeypatch):
    class Fake:
        def __init__(self, loaded, plan, *, denoisers=None, **_):
            self.grey = -0.5 if denoisers is None else 0.5

        def draw(self, ids, labels, params=None):
            assert (params is None) == (self.grey < 0)
            return [
                np.full((8, side, side, 3), g) for side, g in ((8, -1), (16, self.grey))
            ], labels

        def direct(self, ids, labels):
            return np.full((8, 16, 16, 3), 0.0), labels

    monkeypatch.setattr(cascade, "cascade_sampler", Fake)
    loaded = load_teacher(teacher)
    meta = build(smoke(teacher, "gain")).meta
    show = cascade.preview(loaded, tuned.Tuned({}, meta, "gain"), 4)
    state = SimpleNamespace(ema_params={"upsampler": {}})
    grid = show(state, {"teacher": loaded.params})["grid"]
    rows = [grid[2 + 18 * row + 8, 10, 0] for row in range(4)]
    np.testing.assert_allclose(rows, [0, 127.5, 63.75, 191.25], atol=1)


def test_what_does_not_fit_is_refused_before_anything_runs(teacher, tmp_path):
    with pytest.raises(ValueError, match="tune 'wide' is unknown: choose one of none, neck"):
        scenes.get_config("stage=cascade,tune=wide")
    for changes, message in (
        ({"pivot": "blurred"}, "cascade.pivot is 'blurred'"),
        ({"times": "late"}, "cascade.times 'late'"),
        ({"sizes": (8,)}, "cascade.sizes has 8 px"),
        ({"k": "0.7"}, "K '0.7' is unreadable"),
        ({"k": "sigma0"}, "cascade.k is 'sigma0', below which there is nothing to tune"),
        ({"init_from": teacher}, "nothing tuned"),
    ):
        with pytest.raises(ValueError, match=message):
            build(smoke(teacher, "gain", **changes))
    with pytest.raises(ValueError, match="cascade.out is empty"):
        build(smoke(teacher, "none"))
    with pytest.raises(ValueError, match="cascade.width 14 does not divide into 3 norm groups"):
        build(smoke(teacher, "neck", width=14))
