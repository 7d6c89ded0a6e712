"""The four stages on 24 tiny scenes, 8 px grown to 16, tested for what an implementation of PaGoDA
must not get wrong. The pipeline runs once for the whole suite; the tests read what it left.
"""

import itertools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cheapscale.data.augment import flip
from cheapscale.data.files import read_json
from cheapscale.data.pairs import InvertedPairs, PairStore, SampledPairs
from cheapscale.data.sources import open_data
from cheapscale.models.growth import trainable
from cheapscale.models.unet import unet
from cheapscale.pagoda import invert
from cheapscale.teacher.data import check_teacher
from cheapscale.teacher.load import load, load_teacher
from cheapscale.teacher.sampling import sample
from cheapscale.teacher.teacher import Generator, Origin
from cheapscale.training import checkpoint, exported, jobs, loop
from cheapscale.training.state import split
from configs import fields, scenes
from launch import export
from launch import train as run
from launch.pipeline import stage_configs


@pytest.fixture(scope="module")
def runs(pipeline):
    """{stage: (config, workdir, meta of its checkpoint)}, and the store of latents."""
    workdir, _ = pipeline
    found = {"store": PairStore.open(workdir / "latents")}
    for folder, config in stage_configs(scenes.__file__, "smoke,levels=1,top=16", workdir):
        meta = None if config.stage == "invert" else checkpoint.read_meta(folder)[1]
        found[pathlib.Path(folder).name] = types.SimpleNamespace(
            config=config, workdir=folder, meta=meta
        )
    return found


def get_config(arg):
    return scenes.get_config(f"smoke,levels=1,{arg}")


def weights(run, ema=True):
    return checkpoint.load_network(run.workdir, ema=ema).params


def full_state(finished):
    """The final state of a run."""
    abstract = loop.abstract_state(run.build(finished.config), loop.sharding.make_mesh(), 0)
    with checkpoint.Checkpoints(finished.workdir) as checkpoints:
        return checkpoints.restore(abstract)


@pytest.fixture(scope="module")
def wilful_teacher(runs):
    """The smoke teacher with 0.05 added to every weight. Three training steps leave the last layer
    of each block near zero, so that the label would hardly change the output."""
    teacher = load(runs["pretrain"].workdir)
    return teacher.replace(params=jax.tree.map(lambda w: w + 0.05, teacher.params))


def test_1_2_3_latents_are_the_forward_ode_of_each_image_and_of_its_mirror_image(
    runs, wilful_teacher, tmp_path, monkeypatch
):
    """Latents equal those of an independent float64 Heun solver on the 3-node grid, with no added
    noise and no step from 0. Each mirror image is inverted separately, with the image's own label;
    another label changes the latent."""
    monkeypatch.setattr(invert, "load_teacher", lambda *args, **options: wilful_teacher)
    config = runs["invert"].config.copy_and_resolve_references()
    config.invert.noise = 0.0
    config.latents = str(tmp_path / "latents")
    jobs.run(invert.build(config), str(tmp_path / "run"), config.to_dict(), name="invert")
    store = PairStore.open(config.latents)
    source = open_data(config.data)
    ramp = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), config.invert.nodes) ** 7
    items = [source[i] for i in range(4)]
    images = np.stack([item["image"] for item in items for _ in (0, 1)]).astype(np.float64)
    images[1::2] = images[1::2, :, ::-1]
    labels = np.repeat([int(item["label"]) for item in items], 2)
    denoise = jax.jit(wilful_teacher.denoise)

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


def test_2_the_clamp_the_noise_and_the_precision_of_inversion_reach_the_solver(
    runs, wilful_teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(invert, "load_teacher", lambda *args, **options: wilful_teacher)
    found = {}
    for words in ({"clip": True}, {}, *({"noise": 0.01, "seed": seed} for seed in range(3))):
        config = runs["invert"].config.copy_and_resolve_references()
        config.invert.noise = 0.0
        config.latents, config.seed = str(tmp_path / f"latents{len(found)}"), words.pop("seed", 0)
        config.invert.update(words)
        jobs.run(invert.build(config), f"{config.latents}-run", config.to_dict(), name="i")
        store = PairStore.open(config.latents)
        found[len(found)] = np.stack([store.latent(i, f) for i in range(8) for f in (0, 1)])
    clipped, plain, *noisy = found.values()
    assert np.abs(clipped - plain).max() > 0.1
    # independent noise: every pair of seeds differs about as much
    effects = [np.mean((a - b) ** 2) for a, b in itertools.combinations(noisy, 2)]
    assert min(effects) > max(1, 0.3 * max(effects))
    half = load_teacher(runs["pretrain"].workdir, dtype="float16")
    assert half.net.config.dtype == half.meta["networks"]["net"]["dtype"] == "float16"


def test_4_latents_of_images_made_in_another_way_are_refused(runs, wilful_teacher):
    source = open_data(runs["invert"].config.data)
    meta = wilful_teacher.meta
    other = Origin(meta | {"data": meta["data"] | {"resize": "bicubic"}})
    with pytest.raises(ValueError, match="trained on images made by bicubic"):
        check_teacher(wilful_teacher.replace(origin=other), source)
    store = PairStore.open(runs["store"].folder)
    store.manifest = store.manifest | {"source": store.manifest["source"] | {"resize": "bicubic"}}
    with pytest.raises(ValueError, match="resize"):
        InvertedPairs(source, store)


def test_3_each_mirror_image_has_its_own_latent_and_pairs_match_the_flag(runs):
    store = runs["store"]
    source = open_data(runs["distill"].config.data)
    pairs = InvertedPairs(source, store)
    plain, mirrored = pairs[0], pairs[1]
    np.testing.assert_array_equal(mirrored["image"], flip(plain["image"]))
    np.testing.assert_array_equal(mirrored["z"], store.latent(0, 1))
    assert not np.allclose(mirrored["z"], flip(plain["z"]), atol=1e-3)


def test_4_11_the_growth_target_is_the_full_image_and_the_latent_stays_small(runs):
    stage = run.build(runs["grow16"].config)
    pair = next(stage.batches(0))["pair"]
    assert pair["image"].shape[1:] == (16, 16, 3) and pair["z"].shape[1:] == (8, 8, 3)
    small = open_data(runs["distill"].config.data)
    large = open_data(runs["grow16"].config.data)
    for i in range(4):
        shrunk = large[i]["image"].reshape(8, 2, 8, 2, 3).mean((1, 3))
        np.testing.assert_allclose(small[i]["image"], shrunk, atol=1e-6)


def test_5_the_generator_is_the_raw_network_at_a_constant_sigma(runs, key):
    generator = load(runs["distill"].workdir)
    z = 80 * jax.random.normal(key, (8, 8, 8, 3))
    label = jnp.arange(8)
    net = generator.net
    feature = {"openai": 250 * np.log(80.0), "edm": np.log(80.0) / 4}[net.config.noise_feature]
    raw = jax.jit(net.apply)(
        {"params": generator.params}, z / np.sqrt(80**2 + 0.25), jnp.full(8, feature), label=label
    )
    np.testing.assert_allclose(jax.jit(generator.__call__)(z, label), raw, rtol=1e-5, atol=1e-5)


def test_7_the_ratio_of_latents_to_the_prior_is_logged_and_they_are_stored_raw(runs):
    store, log = runs["store"], pathlib.Path(runs["invert"].workdir, "metrics.jsonl")
    logged = [json.loads(row)["rms"] for row in log.read_text().splitlines()]
    for row, rms in enumerate(logged):  # a shard holds 8 images and their mirror images
        z = np.stack([store.latent(8 * row + i, f) for i in range(8) for f in (0, 1)])
        np.testing.assert_allclose(rms, np.sqrt(np.mean(z**2)) / 80, rtol=1e-4)
    assert len(logged) == 3


def test_8_the_generator_starts_as_the_teachers_ema(runs):
    stage = run.build(runs["distill"].config)
    start = loop.fresh_state(stage, loop.sharding.make_mesh(), 0)
    teacher = weights(runs["pretrain"])
    jax.tree.map(np.testing.assert_array_equal, start.params["generator"], teacher)
    jax.tree.map(np.testing.assert_array_equal, start.ema_params["generator"], teacher)


def test_9_frozen_weights_stay_bit_for_bit_and_have_no_optimiser_state(runs):
    base, run_ = weights(runs["distill"]), runs["grow16"]
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


@pytest.mark.parametrize("freeze", [True, False])
def test_9_an_update_moves_the_end_of_the_decoder_or_without_freezing_all(runs, freeze):
    config = runs["grow16"].config.copy_and_resolve_references()
    config.grow.freeze = freeze
    stage = run.build(config)
    optimiser, params = stage.optimisers["generator"], weights(runs["grow16"], ema=False)
    ones = jax.tree.map(np.ones_like, params)
    with jax.disable_jit():
        moved, moments = optimiser.apply(ones, optimiser.init(params), params)
    pairs = flatten_dict(jax.tree.map(lambda a, b: [a, b], moved, params), sep="/")
    network = unet(**stage.meta["networks"]["generator"]).config
    every, ends = set(pairs), set(filter(trainable(network), pairs))
    assert {p for p, (a, b) in pairs.items() if np.all(a != b)} == (ends if freeze else every)
    still = {p for p, (a, b) in pairs.items() if np.all(a == b)}
    assert still == (every - ends if freeze else set())
    assert 0 < len(ends) < len(every)


def test_12_the_discriminator_is_fresh_at_each_resolution(runs):
    """The same seed gives the same initial weights for any discriminator of the smaller run."""
    stage = run.build(runs["grow16"].config)
    start = loop.fresh_state(stage, loop.sharding.make_mesh(), 0)
    fresh = jax.jit(stage.init_params)(loop.stream_key(0, "init", 0))[0]["discriminator"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        start.params["discriminator"], fresh,
    )  # fmt: skip


def test_13_14_lambda_is_adaptive_at_the_base_and_by_default_one_when_growing(runs):
    growing = fields.defaults("grow").grow
    assert (growing.adversarial_weight, growing.adaptive) == (1.0, False)
    for name, stage, factor in (("distill", "distill", 0.2), ("grow16", "grow", 0.6)):
        config, metrics = runs[name].config[stage], runs[name].meta["metrics"]
        assert config.adversarial_weight == factor and config.adaptive
        assert factor * 0.01 <= metrics["lambda"] <= factor * 10
        # no gradient penalty, no path length, no other term
        assert {m for m in metrics if m.startswith("loss")} == {
            "loss",
            "loss_rec",
            "loss_rec_feature",
            "loss_rec_pixel",
            "loss_adv",
            "loss_disc",
        }


def test_15_the_ema_is_what_is_sampled_and_differs_from_the_raw_weights(runs):
    for name in ("pretrain", "distill", "grow16"):
        ema, raw = weights(runs[name]), weights(runs[name], ema=False)
        assert not np.array_equal(ema["head"]["conv"]["kernel"], raw["head"]["conv"]["kernel"])
        assert runs[name].config.ema.decay == 0.999


def test_samples_do_not_depend_on_the_batch_or_on_how_many_there_are(runs):
    loaded = load(runs["grow16"].workdir)
    many, labels = sample(loaded, np.arange(12), seed=3, batch_size=8)
    few, few_labels = sample(loaded, np.arange(5, 9), seed=3, batch_size=8)
    np.testing.assert_array_equal(labels[5:9], few_labels)
    np.testing.assert_allclose(many[5:9], few, rtol=1e-5, atol=1e-5)
    assert many.shape == (12, 16, 16, 3) and np.abs(many).max() <= 1


def test_samples_of_an_unknown_class_are_refused(runs):
    loaded = load(runs["grow16"].workdir)
    with pytest.raises(ValueError, match="label 8 is out of range: the model has classes 0 ... 7"):
        sample(loaded, np.arange(2), labels=np.array([0, 8]))


def test_the_ledger_counts_every_stage_once(runs):
    names = ("pretrain", "distill", "grow16")
    flops = [runs[name].meta["ledger"]["flops"] for name in names]
    made = runs["store"].cost()
    calls = 2 * (runs["invert"].config.invert.nodes - 1)
    assert made["flops"] > 0 and made["flops"] % (calls * len(runs["store"])) == 0
    # distillation starts from the cost of the teacher and of the latents
    assert flops[1] > flops[0] + made["flops"]
    again = run.build(runs["distill"].config).meta["ledger"]
    assert again["flops"] == flops[0] + made["flops"]
    grown = run.build(runs["grow16"].config).meta["ledger"]
    assert grown["flops"] == flops[1]


def test_running_a_finished_stage_again_does_nothing(runs):
    for name in ("invert", "distill"):
        before = weights(runs["distill"])
        summary = run.run(runs[name].config, runs[name].workdir)
        assert summary["stage"] == name
        jax.tree.map(np.testing.assert_array_equal, before, weights(runs["distill"]))


def test_latents_of_another_teacher_are_refused(runs, tmp_path):
    config = get_config("stage=pretrain,seed=1")
    config.total_steps = 1
    run.run(config, str(tmp_path / "other"))
    config = get_config("stage=invert")
    config.teacher = str(tmp_path / "other")
    config.latents = str(runs["store"].folder)
    with pytest.raises(ValueError, match="teacher: stored"):
        run.run(config, str(tmp_path / "invert"))
    config = get_config("stage=distill")
    config.teacher, config.latents = str(tmp_path / "other"), str(runs["store"].folder)
    with pytest.raises(ValueError, match="teacher: stored"):
        run.run(config, str(tmp_path / "distill"))


def test_stages_refuse_what_does_not_fit_before_anything_compiles(runs, tmp_path):
    config = get_config("stage=grow,resolution=32")
    config.base = runs["distill"].workdir  # one doubling reaches 16, not 32
    config.latents = str(runs["store"].folder)
    with pytest.raises(ValueError, match="reaches 16 px, but data.resolution is 32"):
        run.build(config)
    config.base = runs["pretrain"].workdir
    with pytest.raises(ValueError, match="not a generator"):
        run.build(config)
    config = get_config("stage=distill")
    config.teacher, config.latents = runs["pretrain"].workdir, str(runs["store"].folder)
    config.teacher = runs["distill"].workdir
    with pytest.raises(ValueError, match="is the work directory of stage distill, not a teacher"):
        run.build(config)
    config.teacher = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="train that stage first"):
        run.build(config)
    config = get_config("stage=pretrain")
    config.model.num_classes = 5
    with pytest.raises(ValueError, match="scenes has 8 classes"):
        run.build(config)


def test_growing_by_four_in_one_jump(runs):
    config = get_config("stage=grow,resolution=32,jump")
    config.base, config.latents = runs["distill"].workdir, str(runs["store"].folder)
    assert len(config.grow.widths) == 2
    stage = run.build(config)
    state = loop.abstract_state(stage, loop.sharding.make_mesh(), 0)
    assert {"grow_16_up", "grow_32_up"} <= set(state.params["generator"])
    pair = next(stage.batches(0))["pair"]
    assert pair["image"].shape[1:] == (32, 32, 3) and pair["z"].shape[1:] == (8, 8, 3)


def test_growth_continues_the_weights_of_its_regression(runs, tmp_path):
    config, latents = get_config("stage=regress,resolution=16"), str(runs["store"].folder)
    config.base, config.latents, config.total_steps = runs["distill"].workdir, latents, 1
    run.run(config, tmp_path)
    regressed = checkpoint.load_network(tmp_path, "generator").params
    kept = weights(runs["distill"])["enc_8_conv"]["kernel"]  # frozen
    np.testing.assert_array_equal(regressed["enc_8_conv"]["kernel"], kept)

    config = get_config("stage=grow,resolution=16")
    config.base, config.latents, config.start = runs["distill"].workdir, latents, str(tmp_path)
    stage = run.build(config)
    fresh = jax.tree.map(np.zeros_like, full_state(runs["grow16"]).params)
    jax.tree.map(np.testing.assert_array_equal, stage.warm_start(fresh)["generator"], regressed)
    cost = {name: checkpoint.read_meta(place)[1]["ledger"]["flops"]
            for name, place in (("base", config.base), ("start", tmp_path))}  # fmt: skip
    assert stage.meta["ledger"]["flops"] == cost["start"] > cost["base"]
    config.start = runs["distill"].workdir
    with pytest.raises(ValueError, match="is no growth of .* to 16 px: give --config.start=DIR"):
        run.build(config)


def test_the_baseline_regresses_the_teachers_samples(runs, tmp_path):
    """The same stage trains on L_dstl (PaGoDA, arXiv 2405.14822, Eq. 1)."""
    config = get_config("stage=invert")
    config.invert.direction = "sample"
    config.teacher, config.latents = runs["pretrain"].workdir, str(tmp_path / "pairs")
    run.run(config, str(tmp_path / "sample"))
    store = PairStore.open(tmp_path / "pairs", expect={"direction": "sample"})
    pair = SampledPairs(store)[5]
    np.testing.assert_allclose(pair["z"].std(), 80, rtol=0.2)
    assert pair["label"] == 5
    levels = (pair["image"] + 1) * 127.5  # stored as eight-bit images
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
    assert 0 <= levels.min() and levels.max() <= 255.001
    config = get_config("stage=distill")
    config.teacher, config.latents = runs["pretrain"].workdir, str(tmp_path / "pairs")
    with pytest.raises(ValueError, match="direction: stored 'sample', wanted 'invert'"):
        run.run(config, str(tmp_path / "wrong"))
    config.distill.pairs = "teacher"
    assert run.run(config, str(tmp_path / "distill"))["step"] == 3
    config.distill.data_proportion = 0.5
    with pytest.raises(ValueError, match="data_proportion is 0.5"):
        run.build(config)


@pytest.mark.parametrize("process, prediction", [("cosine", "v")])
def test_a_vp_teacher_goes_through_the_same_stages(process, prediction, tmp_path):
    """The generator reads only the variance-preserving input and the last time."""
    config = get_config("stage=pretrain")
    config.diffusion.process, config.diffusion.prediction = process, "noise"
    with pytest.raises(ValueError, match="config.diffusion.prediction is 'noise'"):
        run.build(config)
    config.diffusion.prediction = prediction
    with pytest.raises(ValueError, match="leave the"):
        run.build(config)
    config.diffusion.sigma_min, config.diffusion.sigma_max = 0.02, 50.0
    config.total_steps = 1
    run.run(config, str(tmp_path / "teacher"))
    teacher = load(tmp_path / "teacher")
    params = jax.tree.map(lambda p: p + 0.05, teacher.params)  # nothing stays zero
    generator = Generator(params, teacher.net, teacher.process, teacher.origin)
    z = 50 * jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    label = jnp.zeros(8, jnp.int32)
    image = jax.jit(generator.__call__)(z, label)
    time = np.interp(np.log(50), *log_sigma_table(process))
    raw = jax.jit(teacher.net.apply)(
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


def test_every_stage_takes_exported_models_in_place_of_runs(runs, tmp_path):
    """Files of launch.export fit the latents of the runs that they were written from."""
    files = {}
    for name in ("pretrain", "distill"):
        files[name] = str(tmp_path / f"{name}.safetensors")
        export.main([f"--model={runs[name].workdir}", f"--out={files[name]}", "--num=0"])
    teacher = runs["distill"].meta["teacher"]
    for stage, place in (("distill", "teacher"), ("grow16", "base")):
        config = runs[stage].config.copy_and_resolve_references()
        config[place] = files["pretrain" if place == "teacher" else "distill"]
        built = run.build(config)
        assert built.meta["teacher"] == teacher
        assert loop.provenance(config.to_dict())["files"] == {
            place: exported.sha256_of(config[place])
        }
    # The grown generator starts from the file's weights.
    config = runs["grow16"].config.copy_and_resolve_references()
    config.base = files["distill"]
    fresh = jax.tree.map(np.zeros_like, full_state(runs["grow16"]).params)
    grown = run.build(config).warm_start(fresh)["generator"]
    kept, wanted = grown["enc_8_conv"]["kernel"], weights(runs["distill"])["enc_8_conv"]["kernel"]
    np.testing.assert_array_equal(kept, np.asarray(wanted, np.float16))
    # New latents record the file that made them.
    config = runs["invert"].config.copy_and_resolve_references()
    config.teacher, config.latents = files["pretrain"], str(tmp_path / "latents")
    run.build(config).prepare()
    manifest = read_json(tmp_path / "latents" / "manifest.json")
    assert manifest["teacher"] == teacher
    assert manifest["teacher_file"] == exported.sha256_of(files["pretrain"])
