"""The four stages on 24 tiny scenes, held to the specification's must-not-get-wrong list (12).

One smoke pipeline (8 -> 16 -> 32 px, 3 steps a stage) runs once; the tests read what it left.
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.data.augment import flip
from cheapscale.data.latents import LatentStore, PairSource
from cheapscale.models.generator import trainable
from cheapscale.models.unet import unet
from cheapscale.stages import data, invert, run
from cheapscale.stages.networks import load_teacher, make_denoiser, make_generator
from cheapscale.stages.sampling import sample, teacher_map
from cheapscale.training import checkpoint, jobs, loop
from cheapscale.training.state import split
from configs.scenes import get_config


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    runs, base = {}, ""
    for arg in ("pretrain", "invert", "distill", "grow,resolution=16", "grow,resolution=32"):
        config = get_config(f"smoke,stage={arg}")
        if "teacher" in config:
            config.teacher = str(root / "pretrain")
        if "latents" in config:
            config.latents = str(root / "latents")
        name = config.stage
        if config.stage == "grow":
            config.base, name = base, f"grow{config.data.resolution}"
        workdir = str(root / name)
        summary = run.run(config, workdir)
        base = workdir if config.stage in ("distill", "grow") else base
        runs[name] = types.SimpleNamespace(config=config, workdir=workdir, summary=summary)
    runs["store"] = LatentStore.open(root / "latents")
    return runs


def weights(run, ema=True):
    return checkpoint.load_network(run.workdir, ema=ema).params


def full_state(finished):
    """The final state of a run."""
    abstract = loop.abstract_state(run.build(finished.config), loop.sharding.make_mesh(), 0)
    with checkpoint.Checkpoints(finished.workdir) as checkpoints:
        return checkpoints.restore(abstract)


@pytest.fixture(scope="module")
def wilful_teacher(pipeline):
    """The smoke teacher with 0.05 added to every weight: three steps leave what ends a block at
    zero, and such a network hardly hears its label."""
    loaded = checkpoint.load_network(pipeline["pretrain"].workdir)
    return loaded._replace(params=jax.tree.map(lambda w: w + 0.05, loaded.params))


def test_1_2_3_latents_are_the_forward_ode_of_each_image_and_of_its_mirror_image(
    pipeline, wilful_teacher, tmp_path, monkeypatch
):
    """An independent float64 Heun on the 3-node grid, no noise added, no step from 0; each mirror
    image is inverted by itself; the true label goes in, and another moves the latent."""
    monkeypatch.setattr(invert, "load_teacher", lambda *args, **options: wilful_teacher)
    config = pipeline["invert"].config.copy_and_resolve_references()
    config.latents = str(tmp_path / "latents")
    jobs.run(invert.build(config), str(tmp_path / "run"), config.to_dict(), name="invert")
    store = LatentStore.open(config.latents)
    meta = wilful_teacher.meta
    D = make_denoiser(meta["networks"]["net"], meta["diffusion"])(wilful_teacher.params)
    source = data.open_data(config.data)
    ramp = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), config.invert.nodes) ** 7
    items = [source[i] for i in range(4)]
    images = np.stack([item["image"] for item in items for _ in (0, 1)]).astype(np.float64)
    images[1::2] = images[1::2, :, ::-1]
    labels = np.repeat([int(item["label"]) for item in items], 2)
    denoise = jax.jit(lambda x, sigma, label: D(x, sigma, label=label))

    def latents(x, labels):
        def slope(x, sigma):
            denoised = denoise(jnp.asarray(x, jnp.float32), np.float32(sigma), labels)
            return (x - np.asarray(denoised)) / sigma

        for s, t in zip(ramp, ramp[1:]):
            d = slope(x, s)
            x = x + (t - s) * (d + slope(x + (t - s) * d, t)) / 2
        return x

    stored = np.stack([store.latent(i, f) for i in range(4) for f in (0, 1)])
    np.testing.assert_allclose(stored, latents(images, labels), rtol=1e-3, atol=1e-2)
    for wrong in (latents(images, (labels + 1) % 8), latents(images[:, :, ::-1], labels)):
        assert np.abs(stored - wrong).max() > 0.1


def test_2_the_clamp_and_the_precision_of_inversion_reach_the_solver(
    pipeline, wilful_teacher, monkeypatch
):
    asked = {}

    def load(workdir, *, dtype):
        asked["dtype"] = dtype
        return wilful_teacher

    def solver(model, diffusion, **options):
        asked.update(options)
        return teacher_map(model, diffusion, **options)

    monkeypatch.setattr(invert, "load_teacher", load)
    monkeypatch.setattr(invert, "teacher_map", solver)
    for clip, dtype in ((True, "float16"), (False, "")):
        config = pipeline["invert"].config.copy_and_resolve_references()
        config.latents, config.invert.clip, config.compute.dtype = "unused", clip, dtype
        invert.build(config)
        assert asked["clip"] is clip and asked["dtype"] == dtype and asked["steps"] == 3
    half = load_teacher(pipeline["pretrain"].workdir, dtype="float16")
    assert half.meta["networks"]["net"]["dtype"] == "float16"


def test_4_latents_of_images_made_in_another_way_are_refused(pipeline, wilful_teacher):
    source = data.open_data(pipeline["invert"].config.data)
    meta = wilful_teacher.meta
    other = wilful_teacher._replace(meta=meta | {"data": meta["data"] | {"resize": "bicubic"}})
    with pytest.raises(ValueError, match="trained on images made by bicubic"):
        data.check_teacher(other, source)
    store = LatentStore.open(pipeline["store"].folder)
    store.manifest = store.manifest | {"source": store.manifest["source"] | {"resize": "bicubic"}}
    with pytest.raises(ValueError, match="resize"):
        PairSource(source, store)


def test_3_each_mirror_image_has_its_own_latent_and_pairs_match_the_flag(pipeline):
    store = pipeline["store"]
    source = data.open_data(pipeline["distill"].config.data)
    pairs = PairSource(source, store)
    plain, mirrored = pairs[0], pairs[1]
    np.testing.assert_array_equal(mirrored["image"], flip(plain["image"]))
    np.testing.assert_array_equal(mirrored["z"], store.latent(0, 1))
    assert not np.allclose(mirrored["z"], flip(plain["z"]), atol=1e-3)


def test_4_11_the_growth_target_is_the_full_image_and_the_latent_stays_small(pipeline):
    stage = run.build(pipeline["grow32"].config)
    pair = next(stage.batches(0))["pair"]
    assert pair["image"].shape[1:] == (32, 32, 3) and pair["z"].shape[1:] == (8, 8, 3)
    small = data.open_data(pipeline["distill"].config.data)
    large = data.open_data(pipeline["grow32"].config.data)
    for i in range(4):
        shrunk = large[i]["image"].reshape(8, 4, 8, 4, 3).mean((1, 3))
        np.testing.assert_allclose(small[i]["image"], shrunk, atol=1e-6)


def test_5_the_generator_is_the_raw_network_at_a_constant_sigma(pipeline, key):
    loaded = checkpoint.load_network(pipeline["distill"].workdir)
    (model,) = loaded.meta["networks"].values()
    z = 80 * jax.random.normal(key, (8, 8, 8, 3))
    label = jnp.arange(8)
    net = unet(**model)
    feature = {"openai": 250 * np.log(80.0), "edm": np.log(80.0) / 4}[net.config.noise_feature]
    raw = net.apply(
        {"params": loaded.params}, z / np.sqrt(80**2 + 0.25), jnp.full(8, feature), label=label
    )
    image = make_generator(model, loaded.meta["diffusion"])(loaded.params, z, label)
    np.testing.assert_allclose(image, raw, rtol=1e-5, atol=1e-5)


def test_7_the_ratio_of_latents_to_the_prior_is_logged_and_they_are_stored_raw(pipeline):
    store, summary = pipeline["store"], pipeline["invert"].summary
    z = np.stack([store.latent(i, f) for i in range(24) for f in (0, 1)])
    np.testing.assert_allclose(summary["rms"], np.sqrt(np.mean(z**2)) / 80, rtol=1e-4)
    rows = open(pipeline["invert"].workdir + "/metrics.jsonl").read().splitlines()
    assert all("rms" in json.loads(row) for row in rows)


def test_8_the_generator_starts_as_the_teachers_ema(pipeline):
    stage = run.build(pipeline["distill"].config)
    start = loop.fresh_state(stage, loop.sharding.make_mesh(), 0)
    teacher = weights(pipeline["pretrain"])
    jax.tree.map(np.testing.assert_array_equal, start.params["generator"], teacher)
    jax.tree.map(np.testing.assert_array_equal, start.ema_params["generator"], teacher)


@pytest.mark.parametrize("small, large", [("distill", "grow16"), ("grow16", "grow32")])
def test_9_frozen_weights_stay_bit_for_bit_and_have_no_optimiser_state(pipeline, small, large):
    base, run_ = weights(pipeline[small]), pipeline[large]
    (model,) = checkpoint.read_meta(run_.workdir)[1]["networks"].values()
    keep = trainable(unet(**model).config)
    for ema in (True, False):
        moved, frozen = split(weights(run_, ema), keep)
        jax.tree.map(np.testing.assert_array_equal, frozen, split(base, keep)[1])
    assert "dec_8_block0" in moved and "grow_16_up" in moved and "head" in moved
    assert not any(name.startswith(("enc_", "map_")) for name in moved)
    moments = jax.tree.leaves(full_state(run_).opt_state["generator"])
    # RAdam keeps two moments of each trainable leaf, and a step counter
    assert sum(m.size for m in moments if m.ndim) == 2 * sum(m.size for m in jax.tree.leaves(moved))
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), split(weights(run_, False), keep)[0]["dec_8_block0"],
        base["dec_8_block0"],
    )  # fmt: skip
    assert any(jax.tree.leaves(changed))


def test_12_the_discriminator_is_fresh_at_each_resolution(pipeline):
    """The same seed gives the same start whatever the smaller run's discriminator became."""
    stage = run.build(pipeline["grow16"].config)
    start = loop.fresh_state(stage, loop.sharding.make_mesh(), 0)
    fresh = stage.init_params(loop.stream_key(0, "init", 0))[0]["discriminator"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        start.params["discriminator"], fresh,
    )  # fmt: skip


def test_13_14_lambda_is_adaptive_at_the_base_and_one_when_growing(pipeline):
    for name in ("distill", "grow16", "grow32"):
        config, metrics = pipeline[name].config, pipeline[name].summary["metrics"]
        if name == "distill":
            assert config.distill.adversarial_weight == 0.2 and config.distill.adaptive
            assert 0.2 * 0.01 <= metrics["lambda"] <= 0.2 * 10
        else:
            assert metrics["lambda"] == 1.0
        # no gradient penalty, no path length, no other term
        assert {m for m in metrics if m.startswith("loss")} == {"loss_rec", "loss_adv", "loss_disc"}


def test_15_the_ema_is_what_is_sampled_and_differs_from_the_raw_weights(pipeline):
    for name in ("pretrain", "distill", "grow16"):
        ema, raw = weights(pipeline[name]), weights(pipeline[name], ema=False)
        assert not np.array_equal(ema["head"]["conv"]["kernel"], raw["head"]["conv"]["kernel"])
        assert pipeline[name].config.ema.decay == 0.999


def test_samples_do_not_depend_on_the_batch_or_on_how_many_there_are(pipeline):
    loaded = checkpoint.load_network(pipeline["grow16"].workdir)
    many, labels = sample(loaded, np.arange(12), seed=3, batch_size=8)
    few, few_labels = sample(loaded, np.arange(5, 9), seed=3, batch_size=8)
    np.testing.assert_array_equal(labels[5:9], few_labels)
    np.testing.assert_allclose(many[5:9], few, rtol=1e-5, atol=1e-5)
    assert many.shape == (12, 16, 16, 3) and np.abs(many).max() <= 1


def test_samples_of_an_unknown_class_are_refused(pipeline):
    loaded = checkpoint.load_network(pipeline["grow16"].workdir)
    with pytest.raises(ValueError, match="label 8 is out of range: the model has classes 0 ... 7"):
        sample(loaded, np.arange(2), labels=np.array([0, 8]))


def test_the_ledger_pays_for_every_stage_once(pipeline):
    names = ("pretrain", "distill", "grow16", "grow32")
    flops = [pipeline[name].summary["ledger"]["flops"] for name in names]
    made = pipeline["store"].cost()
    calls = 2 * (pipeline["invert"].config.invert.nodes - 1)
    assert made["flops"] > 0 and made["flops"] % (calls * len(pipeline["store"])) == 0
    # what distillation starts from is the teacher's own bill and the latents'
    assert flops[1] > flops[0] + made["flops"]
    again = run.build(pipeline["distill"].config).meta["ledger"]
    assert again["flops"] == flops[0] + made["flops"]
    grown = run.build(pipeline["grow16"].config).meta["ledger"]
    assert grown["flops"] == flops[1]


def test_running_a_finished_stage_again_does_nothing(pipeline):
    for name in ("invert", "distill"):
        before = weights(pipeline["distill"])
        summary = run.run(pipeline[name].config, pipeline[name].workdir)
        assert summary["stage"] == name
        jax.tree.map(np.testing.assert_array_equal, before, weights(pipeline["distill"]))


def test_latents_of_another_teacher_are_refused(pipeline, tmp_path):
    config = get_config("smoke,stage=pretrain,seed=1")
    config.total_steps = 1
    run.run(config, str(tmp_path / "other"))
    config = get_config("smoke,stage=invert")
    config.teacher = str(tmp_path / "other")
    config.latents = str(pipeline["store"].folder)
    with pytest.raises(ValueError, match="teacher: stored"):
        run.run(config, str(tmp_path / "invert"))
    config = get_config("smoke,stage=distill")
    config.teacher, config.latents = str(tmp_path / "other"), str(pipeline["store"].folder)
    with pytest.raises(ValueError, match="teacher: stored"):
        run.run(config, str(tmp_path / "distill"))


def test_stages_refuse_what_does_not_fit_before_anything_compiles(pipeline, tmp_path):
    config = get_config("smoke,stage=grow,resolution=32")
    config.base = pipeline["distill"].workdir  # one doubling reaches 16, not 32
    config.latents = str(pipeline["store"].folder)
    with pytest.raises(ValueError, match="reaches 16 px, but data.resolution is 32"):
        run.build(config)
    config.base = pipeline["pretrain"].workdir
    with pytest.raises(ValueError, match="not a generator"):
        run.build(config)
    config = get_config("smoke,stage=distill")
    config.teacher, config.latents = pipeline["pretrain"].workdir, str(pipeline["store"].folder)
    config.distill.gan_loss = "wgan"
    with pytest.raises(ValueError, match="distill.gan_loss is 'wgan': choose one of hinge, logis"):
        run.build(config)
    config.teacher = pipeline["distill"].workdir
    with pytest.raises(ValueError, match="is the work directory of stage distill, not a teacher"):
        run.build(config)
    config.teacher = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="train that stage first"):
        run.build(config)
    config = get_config("smoke,stage=pretrain")
    config.model.num_classes = 5
    with pytest.raises(ValueError, match="scenes has 8 classes"):
        run.build(config)


def test_growing_by_four_in_one_jump(pipeline, tmp_path):
    config = get_config("smoke,stage=grow,resolution=32,jump")
    config.base, config.latents = pipeline["distill"].workdir, str(pipeline["store"].folder)
    assert len(config.grow.widths) == 2
    summary = run.run(config, str(tmp_path / "jump"))
    assert summary["step"] == 3 and np.isfinite(summary["metrics"]["loss_rec"])


def test_the_baseline_regresses_the_teachers_samples(pipeline, tmp_path):
    """L_dstl: noise to the teacher's image of it, through the same stage (section 3.2(d))."""
    config = get_config("smoke,stage=invert")
    config.invert.direction = "sample"
    config.teacher, config.latents = pipeline["pretrain"].workdir, str(tmp_path / "pairs")
    run.run(config, str(tmp_path / "sample"))
    store = LatentStore.open(tmp_path / "pairs", expect={"direction": "sample"})
    pair = data.TeacherPairs(store)[5]
    np.testing.assert_allclose(pair["z"].std(), 80, rtol=0.2)
    assert pair["label"] == 5
    levels = (pair["image"] + 1) * 127.5  # stored as eight bits hold them (section 2.2)
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
    assert 0 <= levels.min() and levels.max() <= 255.001
    config = get_config("smoke,stage=distill")
    config.teacher, config.latents = pipeline["pretrain"].workdir, str(tmp_path / "pairs")
    with pytest.raises(ValueError, match="direction: stored 'sample', wanted 'invert'"):
        run.run(config, str(tmp_path / "wrong"))
    config.distill.pairs = "teacher"
    assert run.run(config, str(tmp_path / "distill"))["step"] == 3
    config.distill.data_proportion = 0.5
    with pytest.raises(ValueError, match="data_proportion is 0.5"):
        run.build(config)


@pytest.mark.parametrize("process, prediction", [("cosine", "v")])
def test_a_vp_teacher_goes_through_the_same_stages(process, prediction, tmp_path):
    """Its generator sees the variance-preserving input and the last time, and nothing else."""
    config = get_config("smoke,stage=pretrain")
    config.diffusion.process, config.diffusion.prediction = process, "noise"
    with pytest.raises(ValueError, match="unknown prediction 'noise'"):
        run.build(config)
    config.diffusion.prediction = prediction
    with pytest.raises(ValueError, match="leave the"):
        run.build(config)
    config.diffusion.sigma_min, config.diffusion.sigma_max = 0.02, 50.0
    config.total_steps = 1
    run.run(config, str(tmp_path / "teacher"))
    loaded = checkpoint.load_network(tmp_path / "teacher")
    (model,) = loaded.meta["networks"].values()
    params = jax.tree.map(lambda p: p + 0.05, loaded.params)  # nothing stays zero
    z = 50 * jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    label = jnp.zeros(8, jnp.int32)
    image = make_generator(model, loaded.meta["diffusion"])(params, z, label)
    time = np.interp(np.log(50), *log_sigma_table(process))
    raw = unet(**model).apply(
        {"params": params}, z / np.sqrt(1 + 50**2), jnp.full(8, time, jnp.float32), label
    )
    assert np.std(raw) > 0.01
    np.testing.assert_allclose(image, raw, rtol=1e-5, atol=1e-6)


def log_sigma_table(name, steps=1000):
    """ln sigma of the schedule's table, and its times, by the textbook formulas."""
    if name == "cosine":
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    else:
        beta = np.linspace(1e-4, 0.02, steps)
    alpha_bar = np.cumprod(1 - beta)
    return np.log(np.sqrt((1 - alpha_bar) / alpha_bar)), np.arange(steps)
