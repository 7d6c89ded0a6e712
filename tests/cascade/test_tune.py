"""`stage=cascade` in the training loop, and sampling with its runs."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cheapscale.cascade import tune
from cheapscale.cascade.sample import cascade, make_cascade
from cheapscale.cascade.tuned import load_tuned
from cheapscale.teacher.load import load_teacher
from cheapscale.training import loop
from cheapscale.training.mesh import make_mesh
from configs import scenes
from tests.cascade import toys


def save_teacher(workdir, seed=0, label_dropout=0.0):
    model = toys.teacher(
        toys.weights(seed, num_classes=8), label_dropout=label_dropout, num_classes=8
    )
    return toys.save(workdir, "net", model.params, model.meta)


@pytest.fixture(autouse=True)
def one_device():
    """Train on all devices and sample on one, for which sampling compiles faster."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def smoke(teacher, design, **changes):
    config = scenes.get_config(f"stage=cascade,smoke,tune={design}")
    config.teacher = teacher
    with config.unlocked():
        config.cascade.update(changes)
    return config


def test_a_tuned_run_trains_saves_and_samples_with_its_teacher(saved, tmp_path):
    place, config = str(tmp_path / "tuned"), smoke(saved, "gain")
    config.eval_every = 0
    summary = loop.train(
        tune.build(config), place, config.to_dict(), name="cascade", seed=0,
        total_steps=config.total_steps, log_every=1, save_every=3,
    )  # fmt: skip
    assert summary["step"] == 3 and summary["ledger"]["flops"] > 5.0
    teacher = load_teacher(saved)
    found = load_tuned(place, teacher)
    meta = found.origin.meta
    assert found.settings["tune"] == "gain" and set(meta["networks"]) == {"upsampler"}
    assert meta["teacher"] == teacher.fingerprint
    options = {"num": 8, "steps": 3, "method": "euler"}
    drawn, untuned = (cascade(teacher, "2x", tuned=t, **options).scales for t in ([place], ()))
    np.testing.assert_allclose(drawn[0], untuned[0], atol=1e-5)  # the base is theta's
    assert drawn[1].shape == (8, 16, 16, 3) and np.abs(drawn[1] - untuned[1]).max() > 1e-6

    started = tune.build(smoke(saved, "gain", init_from=place))  # the next stage starts there
    warm = started.warm_start({"upsampler": None})["upsampler"]
    jax.tree.map(np.testing.assert_array_equal, warm, found.params)
    assert started.meta["ledger"]["flops"] == meta["ledger"]["flops"] > 5.0
    for changes in ({"mode": "M"}, {"init": "identity"}):
        with pytest.raises(ValueError, match="holds other modules than tune="):
            tune.build(smoke(saved, "gain", init_from=place, **changes))
    other = load_teacher(save_teacher(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="was tuned for the teacher .* holds"):
        load_tuned(place, other)
    with pytest.raises(ValueError, match="is a pretrain run, nothing tuned"):
        load_tuned(saved, teacher)


def test_fine_tuning_starts_from_the_teacher(saved):
    stage, teacher = tune.build(smoke(saved, "ft")), load_teacher(saved)
    warm = stage.warm_start({"net": None})["net"]
    jax.tree.map(np.testing.assert_array_equal, warm, teacher.params)


def test_levels_sizes_and_label_dropout_of_a_run(saved):
    """Upsamplers train at levels up to K; adapters and fine-tuning, which also sample directly, at
    all levels."""
    for design, cut in (("gain", True), ("lora", False), ("ft", False)):
        settings = tune.build(smoke(saved, design)).meta["cascade"]
        assert settings["sizes"] == (16,) and (settings["sigma_K"] is not None) == cut


def test_the_preview_shows_base_direct_tuning_free_and_tuned_in_this_order():
    """Fine-tuned weights that are all zero give another picture in the last row."""
    teacher = toys.teacher(**toys.SMALL)
    show = tune.preview(teacher, toys.tuned_run("ft", model=teacher), 16, count=2)
    zero = jax.tree.map(np.zeros_like, teacher.params)
    grid = show(SimpleNamespace(ema_params={"net": zero}), {"teacher": teacher.params})["grid"]
    rows = [grid[2 + 18 * row : 18 + 18 * row, 2:18].astype(int) for row in range(4)]
    labels, options = np.array([0, 1]), {"steps": tune.PREVIEW_STEPS, "method": "euler"}
    free = make_cascade(teacher, "2x", batch_size=2, **options)
    scales, _ = free.draw(np.arange(2), labels)
    base = np.repeat(np.repeat(scales[0][0], 2, 0), 2, 1)
    direct = free.direct(np.arange(2), labels)[0][0]
    for row, image in zip(rows, (base, direct, scales[1][0])):
        assert np.abs(row - (image + 1) * 127.5).max() <= 2
    assert np.abs(rows[3] - rows[2]).mean() > 5


def test_what_does_not_fit_is_refused_before_anything_runs(saved):
    for changes, message in (
        ({"sizes": (8,)}, "cascade.sizes has 8 px"),
        ({"k": "0.7"}, "K '0.7' is unreadable"),
        ({"k": "sigma0"}, "cascade.k is 'sigma0', below which there is nothing to tune"),
        ({"init_from": saved}, "nothing tuned"),
    ):
        with pytest.raises(ValueError, match=message):
            tune.build(smoke(saved, "gain", **changes))
    with pytest.raises(ValueError, match="cascade.width 14 does not divide into 3 norm groups"):
        tune.build(smoke(saved, "neck", width=14))
