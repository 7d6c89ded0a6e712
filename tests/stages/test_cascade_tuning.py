"""Tuned self-cascade: the must-not-get-wrong list of spec 7.1 and the unit tests of 7.2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion import denoiser, process, solvers
from cheapscale.diffusion.pivot import block_mean, restart_sigma
from cheapscale.models import upsampler
from cheapscale.models.lora import adapted, init_lora
from cheapscale.models.unet import unet
from cheapscale.stages import cascade, tuned
from cheapscale.stages.cascade_sampler import cascade_plan, cascade_sampler, frozen_teacher
from cheapscale.stages.networks import fingerprint
from cheapscale.training.sharding import make_mesh
from cheapscale.training.stage import denoise_step, noise_bins
from cheapscale.training.state import Optimiser, create_state
from tests.stages.tuned_runs import EDM, UNET, VP, settings, teacher, tuned_run, weights


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


@pytest.fixture
def pivots():
    return np.asarray(0.4 * jax.random.normal(jax.random.key(5), (2, 8, 8, 3)))


@pytest.mark.parametrize("mode", ["S", "M"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_a_closed_gate_is_the_tuning_free_cascade_bit_for_bit(mode, cfg_scale, pivots):
    """Points 6, 9, 10, 11: within one program, with and without guidance; open, it is not."""
    closed = tuned_run(mode=mode)
    config = upsampler.from_fields(closed.meta["networks"]["upsampler"])
    places = dict.fromkeys(tuned.inject_at(config, mode).values(), mode)
    assert len(places) == 4
    grid = np.array([2.0, 0.5, 0.0])
    make = tuned.stage_denoiser(closed, teacher().meta, 0, (16, 16), cfg_scale)
    free = frozen_teacher(UNET, EDM, cfg_scale)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    label = jnp.array([0, 2])

    @jax.jit
    def both(params, pivot):
        ((T, _),) = make(params, pivot, label, grid)
        ((TF, _),) = free(params["teacher"], pivot, label, grid)
        return T(x, 1.3), TF(x, 1.3)

    params = {"teacher": weights(), "tuned": [closed.params]}
    with_phi, without = both(params, pivots)
    np.testing.assert_array_equal(with_phi, without)
    opened = params | {"tuned": [tuned_run(seed=3, mode=mode).params]}
    assert np.abs(both(opened, pivots)[0] - without).max() > 1e-2
    assert np.abs(both(opened, pivots)[0] - both(opened, -pivots)[0]).max() > 1e-3


def test_the_two_modes_differ_and_the_skip_alone_leaves_the_encoder_alone(pivots):
    """S adds to what the decoder receives; M changes everything downstream (point 10)."""
    net, x = unet(**UNET), jnp.asarray(pivots)
    u = 0.5 * jnp.ones((2, 8, 8, 8))

    def taps(**inject):
        out = net.apply(
            {"params": weights()}, x, jnp.zeros(2), jnp.zeros(2, int),
            inject={name.replace("__", "/"): value for name, value in inject.items()},
            taps=("enc_8_block0", "enc_4_block0", "dec_8_block0"),
        )  # fmt: skip
        return {"out": out[0], **out[1]}

    plain, skip = taps(), taps(enc_8_block0__skip=u)
    stream, block = taps(enc_8_block0__stream=u), taps(enc_8_block0=u)
    np.testing.assert_array_equal(skip["enc_4_block0"], plain["enc_4_block0"])
    assert np.abs(skip["dec_8_block0"] - plain["dec_8_block0"]).max() > 1e-3
    np.testing.assert_array_equal(stream["enc_4_block0"], block["enc_4_block0"])
    assert np.abs(stream["enc_4_block0"] - plain["enc_4_block0"]).max() > 1e-3
    both = taps(enc_8_block0__stream=u, enc_8_block0__skip=u)
    np.testing.assert_array_equal(both["out"], block["out"])
    assert np.abs(stream["out"] - block["out"]).max() > 1e-3  # the code's: the skip stays


def test_pivot_features_are_those_of_step_0_read_once_outside_the_loop(pivots):
    """Point 6, and the number of encoder evaluations a stage makes: one, whatever the steps."""
    run = tuned_run("gain", seed=1)
    config = upsampler.from_fields(run.meta["networks"]["upsampler"])
    label = jnp.array([0, 2])
    read = tuned.reader(UNET, EDM, config)
    features = read(weights(), pivots, EDM["sigma_min"], label)
    assert [features[name].shape[-1] for name, _ in config.channels] == [8, 8, 16, 16]
    # again by hand, from the network itself
    scale = 1 / np.sqrt(EDM["sigma_min"] ** 2 + 0.25)
    noise = jnp.full(2, process.noise_feature("openai", jnp.float32(EDM["sigma_min"])))
    _, taps = unet(**UNET).apply(
        {"params": weights()}, scale * pivots, noise, label, taps=tuple(features)
    )
    for name in features:
        np.testing.assert_allclose(features[name], taps[name], rtol=2e-5, atol=2e-5)

    make = tuned.stage_denoiser(run, teacher().meta, 0, (16, 16))
    grid = np.array([2.0, 1.0, 0.5, 0.2, 0.0])
    params = {"teacher": weights(), "tuned": [run.params]}

    def stage(params, x, pivot):
        return solvers.solve(make(params, pivot, label, grid), x, method="euler")

    shapes = lambda side: jax.ShapeDtypeStruct((2, side, side, 3), np.float32)  # noqa: E731
    jaxpr = jax.make_jaxpr(stage)(params, shapes(16), shapes(8)).jaxpr
    (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]

    def canvases(eqns):  # sides of the convolutions' inputs
        found = [e.invars[0].aval.shape[1] for e in eqns if "conv_general" in e.primitive.name]
        return set(found)

    # outside, the network once on the pivot's canvas of 8 (and 4); inside, on that of 16, and on
    # one of the stride for the embedding alone
    assert canvases(jaxpr.eqns) == {8, 4}
    assert canvases(loop.params["jaxpr"].jaxpr.eqns) == {16, 8, 2, 1}


def test_the_embedding_alone_costs_no_convolution():
    embed = tuned.embedder(UNET, EDM)
    sigma, label = jnp.array([0.3, 2.0]), jnp.array([0, 2])
    compiled = jax.jit(embed).lower(weights(), sigma, label).compile()
    lines = compiled.as_text().splitlines()
    assert not [line for line in lines if " convolution(" in line or "__conv" in line]
    assert compiled(weights(), sigma, label).shape == (2, 32)


def tuning_state(tune, tx, **changes):
    chosen = settings(tune, **changes)
    net = cascade.NETS[tune]
    if net == "upsampler":
        params = tuned_run(tune, **changes).params
    elif net == "lora":
        params = cascade.init_lora(weights(), chosen["lora_rank"], jax.random.key(0))
    else:
        params = weights()
    optimiser = Optimiser(tx)
    state = create_state({net: params}, {net: noise_bins()}, {net: optimiser}, [net])
    return chosen, net, optimiser, state


def batch_of(side, n=4):
    image = np.random.default_rng(0).uniform(-1, 1, (n, side, side, 3)).astype(np.float32)
    return {"image": image, "label": np.arange(n, dtype=np.int32) % 3}


@pytest.mark.parametrize("tune", ["gain", "lora"])
def test_only_phi_trains_and_only_phi_has_an_optimiser(tune):
    """Point 5: theta is bit for bit what it was, and its gradient is never asked for."""
    import optax

    chosen, net, optimiser, state = tuning_state(tune, optax.adam(1e-2))
    size = lambda tree: sum(np.size(leaf) for leaf in jax.tree.leaves(tree))  # noqa: E731
    phi = size(state.params[net])
    assert size(state.opt_state[net]) == 2 * phi + 1
    loss = functools.partial(
        cascade.tuning_loss, settings=chosen, fields=cascade.network_fields(chosen, UNET),
        model=UNET, diffusion=EDM, sizes=(16,),
    )  # fmt: skip
    frozen = {"teacher": weights()}
    before = fingerprint(frozen["teacher"])
    step = jax.jit(
        functools.partial(denoise_step, loss_fn=loss, optimiser=optimiser, ema_decay=0.9, net=net)
    )
    new = state
    for i in range(3):
        new, metrics = step(new, frozen, batch_of(16), jax.random.key(i))
    assert set(new.params) == set(new.ema_params) == {net}
    assert fingerprint(frozen["teacher"]) == before
    pairs = zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params))
    moved = [np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs]
    assert all(moved)
    assert metrics["loss"] > 0

    def of_theta(theta):
        return loss(state.params[net], {"teacher": theta}, batch_of(16), jax.random.key(0))[0].sum()

    grads = jax.tree.leaves(jax.grad(of_theta)(frozen["teacher"]))
    assert not any(np.any(g) for g in grads)


class Spy:
    """Records what the loss hands on, in place of the injected denoiser."""

    def __init__(self):
        self.seen = {}

    def injected(self, theta, phi, pivot, *rest):
        self.seen["pivot"] = pivot

        def D(x, sigma, label):
            self.seen |= {"x": x, "sigma": sigma, "label": label}
            return jnp.zeros_like(x)

        return D


@pytest.mark.parametrize("diffusion", [EDM, VP])
def test_the_pivot_is_the_image_downsampled_and_t_is_at_most_K(diffusion, monkeypatch):
    """Points 7 and 8; the levels up to K are the teacher's own."""
    spy = Spy()
    monkeypatch.setattr(cascade, "injected", spy.injected)
    batch = batch_of(16, 512)

    def loss(**changes):
        chosen = settings("gain", **changes)
        return cascade.tuning_loss(
            {}, {"teacher": {}}, batch, jax.random.key(0), settings=chosen, fields={}, model=UNET,
            diffusion=diffusion, sizes=(16,),
        )  # fmt: skip

    value, sigma = loss()
    np.testing.assert_allclose(spy.seen["pivot"], block_mean(batch["image"], (8, 8)), atol=1e-6)
    noise = (spy.seen["x"] - batch["image"]) / process.over_pixels(sigma, spy.seen["x"])
    assert abs(float(noise.std()) - 1) < 0.01
    sigma_K = restart_sigma("t0.7", area_ratio=4, sigma_data=0.5)
    assert sigma.max() <= sigma_K * (1 + 1e-6) and sigma.max() > 0.7 * sigma_K
    everything = loss(times="all")[1]
    assert (everything > sigma_K).mean() > 0.001
    if diffusion is VP:  # t uniform on 1 .. K: the same share in each quarter of the table
        table = process.vp_schedule("linear").sigmas
        table = table[table <= sigma_K * (1 + 1e-9)]
        quarter = np.searchsorted(table, np.asarray(sigma) * (1 - 1e-6)) * 4 // len(table)
        assert np.abs(np.bincount(quarter, minlength=4) / 512 - 0.25).max() < 0.08
        np.testing.assert_allclose(value, np.mean(batch["image"] ** 2, (1, 2, 3)) / sigma**2, 1e-4)
    else:  # the teacher's weight and its own density, cut
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        np.testing.assert_allclose(value, weight * np.mean(batch["image"] ** 2, (1, 2, 3)), 1e-4)
        inside = everything[everything <= sigma_K]
        assert abs(float(jnp.log(sigma).mean() - jnp.log(inside).mean())) < 0.2


def test_shared_weights_train_at_several_sizes_each_with_its_own_pivot(monkeypatch):
    spy, pivots = Spy(), []
    monkeypatch.setattr(
        cascade, "injected", lambda *args: (pivots.append(args[2].shape), spy.injected(*args))[1]
    )
    chosen = settings("gain", sizes=(16, 32))
    loss, sigma = cascade.tuning_loss(
        {}, {"teacher": {}}, batch_of(32, 4), jax.random.key(0), settings=chosen, fields={},
        model=UNET, diffusion=EDM, sizes=(16, 32),
    )  # fmt: skip
    assert pivots == [(4, 8, 8, 3), (4, 16, 16, 3)]
    assert loss.shape == sigma.shape == (8,) and len(np.unique(sigma)) == 8


def test_labels_are_dropped_where_guidance_will_need_it(monkeypatch):
    spy = Spy()
    monkeypatch.setattr(cascade, "injected", spy.injected)
    cascade.tuning_loss(
        {}, {"teacher": {}}, batch_of(16, 256), jax.random.key(0),
        settings=settings("gain", label_dropout=0.5), fields={}, model=UNET, diffusion=EDM,
        sizes=(16,),
    )  # fmt: skip
    assert 0.35 < float((spy.seen["label"] == 3).mean()) < 0.65


def test_adapters_of_a_stage_are_its_own_merged_into_the_teacher_with_their_scale(pivots):
    chosen = settings("lora", lora_scale=0.5)
    fields, rng = cascade.network_fields(chosen, UNET), np.random.default_rng(7)
    meta = {"networks": {"lora": fields}, "cascade": chosen, "diffusion": EDM}
    drawn = init_lora(weights(), chosen["lora_rank"], jax.random.key(0))
    ours = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), drawn)
    zero = jax.tree.map(np.zeros_like, ours)
    run = tuned.Tuned(ours, meta, "lora")
    x, label = jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), jnp.array([0, 2])
    grid = np.array([2.0, 0.0])

    @jax.jit
    def three(params):
        free = frozen_teacher(UNET, EDM, 1.0)
        ((D, _),) = tuned.stage_denoiser(run, teacher().meta, 1, (16, 16))(
            params, None, label, grid
        )
        ((merged, _),) = free(adapted(params["teacher"], ours, 0.5), None, label, grid)
        ((plain, _),) = free(params["teacher"], None, label, grid)
        return D(x, 1.3), merged(x, 1.3), plain(x, 1.3)

    found, merged, plain = three({"teacher": weights(), "tuned": [zero, ours]})
    np.testing.assert_allclose(found, merged, rtol=1e-5, atol=1e-6)
    assert np.abs(found - plain).max() > 1e-2


def test_upsamplers_follow_canvases_that_are_not_square():
    run, size = tuned_run("neck", seed=1), (16, 24)
    make = tuned.stage_denoiser(run, teacher().meta, 0, size)

    def D(pivot, x):
        ((denoise, _),) = make(
            {"teacher": weights(), "tuned": [run.params]}, pivot, jnp.array([0]), np.array([2.0, 0])
        )
        return denoise(x, 1.3)

    shapes = [jax.ShapeDtypeStruct((1, *side, 3), np.float32) for side in ((8, 12), size)]
    assert jax.eval_shape(D, *shapes).shape == (1, 16, 24, 3)


def test_one_run_serves_all_stages_or_each_its_own(pivots):
    loaded = teacher()
    plan = cascade_plan(loaded.meta, "2x,4x", steps=3)
    broken = tuned_run("gain")
    broken = broken._replace(params=jax.tree.map(lambda p: p * np.nan, broken.params))

    def scales(runs):
        subject, denoisers = tuned.tuned_cascade(loaded, runs, plan)
        drawn = cascade_sampler(subject, plan, method="euler", **denoisers).draw(np.arange(2))[0]
        return [bool(np.isfinite(images).all()) for images in drawn]

    assert scales([tuned_run("gain"), broken]) == [True, True, False]  # each its own
    assert scales([broken]) == [True, False, False]  # one for both
    with pytest.raises(ValueError, match="3 tuned runs for 2 stages"):
        tuned.tuned_cascade(loaded, [tuned_run()] * 3, plan)


@pytest.mark.parametrize(
    "cascade_of, k, run, cfg_scale, message",
    [
        ("4x", "t0.7", {}, 1.0, "cannot go from 8x8 to 32x32: choose scales such as 2x,4x"),
        ("2x", "t0.9", {}, 1.0, "restarts at sigma .* tuned up to K t0.7"),
        ("2x", "t0.7", {}, 2.0, "was tuned without label dropout"),
        ("2x", "t0.9", {"times": "all"}, 1.0, None),
        ("2x", "t0.7", {"label_dropout": 0.1}, 2.0, None),
    ],
)
def test_stages_that_a_run_was_not_tuned_for_are_refused(cascade_of, k, run, cfg_scale, message):
    loaded = teacher()
    plan = cascade_plan(loaded.meta, cascade_of, k=(k,), steps=20)
    if message is None:
        tuned.tuned_cascade(loaded, [tuned_run("gain", **run)], plan, cfg_scale)
    else:
        with pytest.raises(ValueError, match=message):
            tuned.tuned_cascade(loaded, [tuned_run("gain", **run)], plan, cfg_scale)


def test_the_places_of_both_modes_are_the_networks_own_keys():
    """Point 10: what is added where; the bottleneck has one stream."""
    config = upsampler.from_fields(tuned_run().meta["networks"]["upsampler"])
    assert tuned.inject_at(config, "S") == {
        "enc_8_block0": "enc_8_block0/skip", "enc_4_down": "enc_4_down/skip",
        "enc_4_block0": "enc_4_block0/skip", "dec_4_in1": "dec_4_in1",
    }  # fmt: skip
    assert tuned.inject_at(config, "M") == {
        "enc_8_block0": "enc_8_block0/stream", "enc_4_down": "enc_4_down/stream",
        "enc_4_block0": "enc_4_block0/stream", "dec_4_in1": "dec_4_in1",
    }  # fmt: skip


@pytest.mark.parametrize(
    "diffusion, mode, features", [(EDM, "S", "clean"), (VP, "M", "step"), (EDM, "S", "step")]
)
def test_training_and_sampling_inject_the_same_and_it_is_the_papers(
    diffusion, mode, features, pivots
):
    """The stage's D, the loss's D, and one composed by hand from the network itself: features of
    the clean pivot at step 0, the step's own embedding, four sums (points 6 and 10); the released
    code tells the network the step with the same clean pivot (6.2.1)."""
    run = tuned_run("neck", seed=4, mode=mode, features=features)
    config = upsampler.from_fields(run.meta["networks"]["upsampler"])
    label, fields = jnp.array([0, 2]), run.meta["networks"]["upsampler"]
    x, sigma = jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), 1.3
    meta = teacher(diffusion).meta
    net, phi = unet(**UNET), upsampler.Upsamplers(config)

    def inputs(x, sigma):
        sigma = jnp.full(2, sigma, jnp.float32)
        if diffusion is EDM:
            return denoiser.edm_inputs(x, sigma, 0.5, UNET["noise_feature"])
        return denoiser.vp_inputs(x, sigma, process.vp_schedule("linear"))

    @jax.jit
    def all_three(theta, params, pivot):
        grid = np.array([sigma, 0.0])
        tree = {"teacher": theta, "tuned": [params]}
        make = tuned.stage_denoiser(run, meta, 0, (16, 16))
        ((stage, _),) = make(tree, pivot, label, grid)
        loss = cascade.injected(theta, params, pivot, run.meta["cascade"], fields, UNET, diffusion)
        clean, noise = inputs(pivot, diffusion["sigma_min"])
        noise = inputs(pivot, sigma)[1] if features == "step" else noise
        names = tuple(name for name, _ in config.channels)
        f = net.apply({"params": theta}, clean, noise, label, taps=names)[1]
        x_in, noise = inputs(x, sigma)
        emb = net.apply({"params": theta}, x_in, noise, label, taps=("emb",))[1]["emb"]
        once = phi.apply({"params": params}, f, (2.0, 2.0), method=upsampler.Upsamplers.lift)
        u = phi.apply({"params": params}, once, emb, jnp.full(2, sigma, jnp.float32))
        end = {"S": "skip", "M": "stream"}[mode]
        inject = {(n if n.startswith("dec") else f"{n}/{end}"): v for n, v in u.items()}
        F = net.apply({"params": theta}, x_in, noise, label, inject=inject)
        if diffusion is EDM:
            c_skip, c_out, _ = denoiser.preconditioning(sigma, 0.5)
            by_hand = c_skip * x + c_out * F
        else:
            by_hand = x - sigma * F
        return stage(x, sigma), loss(x, jnp.full(2, sigma), label=label), by_hand

    stage, loss, by_hand = all_three(weights(), run.params, pivots)
    np.testing.assert_allclose(stage, loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stage, by_hand, rtol=1e-3, atol=1e-4)


def test_guidance_weighs_two_branches_with_features_of_their_own(pivots):
    """Point 9, with an open gate: D_u + w (D_c - D_u) of two unguided denoisers."""
    run = tuned_run("gain", seed=3)
    x, label = jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), jnp.array([0, 2])
    params = {"teacher": weights(), "tuned": [run.params]}

    @jax.jit
    def three(params, pivot):
        def D(w, y):
            make = tuned.stage_denoiser(run, teacher().meta, 0, (16, 16), w)
            ((denoise, _),) = make(params, pivot, y, np.array([2.0, 0.0]))
            return denoise(x, 1.3)

        return D(2.5, label), D(1.0, label), D(1.0, jnp.full(2, 3)), D(0.0, label)

    guided, conditional, null, at_zero = three(params, pivots)
    np.testing.assert_allclose(guided, null + 2.5 * (conditional - null), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(at_zero, null, rtol=1e-5, atol=1e-6)
    assert np.abs(conditional - null).max() > 1e-2


@pytest.mark.parametrize(
    "changes, resolution, message",
    [
        ({}, 8, "cascade.sizes has 8 px"),
        ({"sizes": (24,)}, 48, "cascade.sizes has 24 px: .* 8 px times powers of cascade.ratio 2"),
        ({"ratio": 3}, 16, "cascade.sizes has 16 px"),
        ({"ratio": 1}, 16, "cascade.ratio is 1"),
    ],
)
def test_sizes_without_a_pivot_are_refused(changes, resolution, message):
    with pytest.raises(ValueError, match=message):
        cascade.trained_sizes(settings(**changes), resolution, UNET)
