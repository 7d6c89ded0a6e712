"""Tuned self-cascade: features read and added, and the agreement of training and sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cheapscale.cascade import tune, tuned
from cheapscale.cascade.lora import adapted
from cheapscale.cascade.pivot import block_mean
from cheapscale.cascade.plan import cascade_plan, restart_sigma
from cheapscale.cascade.sample import cascade, make_cascade, tuning_free
from cheapscale.cascade.tuned import Beside, tuned_denoiser, tuned_denoisers
from cheapscale.cascade.upsampler import Upsamplers
from cheapscale.diffusion import samplers as solvers
from cheapscale.diffusion.denoiser import preconditioning
from cheapscale.diffusion.noise import noise_feature, vp_schedule
from cheapscale.training.mesh import make_mesh
from cheapscale.training.stage import denoise_step, noise_bins
from cheapscale.training.state import Optimiser, create_state
from tests.cascade.toys import EDM, SMALL, VP, places, settings, teacher, tuned_run, weights


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


@pytest.fixture
def pivots():
    return np.asarray(0.4 * jax.random.normal(jax.random.key(5), (2, 8, 8, 3)))


LABEL = jnp.array([0, 2])
X = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
GRID = np.array([2.0, 0.5, 0.0])


def stage_estimate(model, pivot, label=LABEL, *, sigma=1.3, run=0, cfg_scale=1.0):
    """D(X, sigma) of a stage from 8 to 16 px."""
    ((D, _),) = tuned_denoiser(
        model, pivot, label, GRID, run=run, size=(16, 16), cfg_scale=cfg_scale
    )
    return D(X, sigma)


@pytest.mark.parametrize("mode, cfg_scale", [("S", 1.0), ("M", 2.5)])
def test_a_closed_gate_is_the_tuning_free_cascade_bit_for_bit(mode, cfg_scale, pivots):
    """With a closed gate, the tuned stage equals the tuning-free one, with and without guidance."""
    closed = tuned_run(mode=mode)

    @jax.jit
    def both(model, pivot):
        ((free, _),) = tuning_free(model.teacher, None, LABEL, GRID, cfg_scale=cfg_scale)
        return stage_estimate(model, pivot, cfg_scale=cfg_scale), free(X, 1.3)

    model = Beside(teacher(), (closed,))
    with_phi, without = both(model, pivots)
    np.testing.assert_array_equal(with_phi, without)
    noisy = closed.replace(params=tuned_run(seed=3, mode=mode).params)
    opened = model._replace(runs=(noisy,))
    assert np.abs(both(opened, pivots)[0] - without).max() > 1e-2
    assert np.abs(both(opened, pivots)[0] - both(opened, -pivots)[0]).max() > 1e-3


def test_the_two_modes_differ_and_the_skip_alone_leaves_the_encoder_alone(pivots):
    """Mode S adds to the skip connection; mode M changes all later blocks."""
    model, u = teacher(), 0.5 * jnp.ones((2, 8, 8, 8))
    names = ("enc_8_block0", "enc_4_block0", "dec_8_block0")

    @jax.jit
    def taps(x):
        def run(*ends):
            inject = {f"enc_8_block0{end}": u for end in ends}
            out, taps = model.network(x, jnp.zeros(2), label=LABEL, inject=inject, taps=names)
            return {"out": out, **taps}

        return run(), run("/skip"), run("/stream"), run(""), run("/stream", "/skip")

    plain, skip, stream, block, both = taps(pivots)
    np.testing.assert_array_equal(skip["enc_4_block0"], plain["enc_4_block0"])
    assert np.abs(skip["dec_8_block0"] - plain["dec_8_block0"]).max() > 1e-3
    np.testing.assert_array_equal(stream["enc_4_block0"], block["enc_4_block0"])
    assert np.abs(stream["enc_4_block0"] - plain["enc_4_block0"]).max() > 1e-3
    np.testing.assert_allclose(both["out"], block["out"], rtol=1e-6, atol=1e-6)
    assert np.abs(stream["out"] - block["out"]).max() > 1e-3  # the released code's: the skip stays


def test_pivot_features_are_read_once_outside_the_loop():
    """A stage evaluates the pivot's encoder once for any number of steps."""
    model = Beside(teacher(), (tuned_run("gain", seed=1),))
    grid = np.array([2.0, 1.0, 0.5, 0.2, 0.0])

    def stage(model, x, pivot):
        segments = tuned_denoiser(model, pivot, LABEL, grid, run=0, size=(16, 16))
        return solvers.solve(segments, x, method="euler")

    shapes = lambda side: jax.ShapeDtypeStruct((2, side, side, 3), np.float32)  # noqa: E731
    jaxpr = jax.make_jaxpr(stage)(model, shapes(16), shapes(8)).jaxpr
    (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]

    def canvases(eqns):  # sides of the convolutions' inputs
        return {e.invars[0].aval.shape[1] for e in eqns if "conv_general" in e.primitive.name}

    # outside the loop, the network runs once on the pivot (8 and 4 px); inside, on 16 px, and on a
    # canvas of the stride for the embedding
    assert canvases(jaxpr.eqns) == {8, 4}
    assert canvases(loop.params["jaxpr"].jaxpr.eqns) == {16, 8, 2, 1}


def test_the_embedding_alone_costs_no_convolution():
    sigma = jnp.array([0.3, 2.0])
    model = teacher()
    compiled = jax.jit(tuned.embedding).lower(model, sigma, LABEL).compile()
    lines = compiled.as_text().splitlines()
    assert not [line for line in lines if " convolution(" in line or "__conv" in line]
    assert compiled(model, sigma, LABEL).shape == (2, 32)


@pytest.mark.parametrize("fields, mode", [(EDM, "S"), (VP, "M")])
def test_training_and_sampling_inject_the_same_and_it_is_the_papers(fields, mode):
    """The stage's D on the pivot, the loss's D on the image that it is the block mean of, and one
    composed by hand from the network itself: features of the clean pivot at step 0, the step's own
    embedding, four sums."""
    model, run = teacher(diffusion=fields), tuned_run("neck", seed=4, mode=mode)
    image = np.asarray(0.4 * jax.random.normal(jax.random.key(5), (2, 16, 16, 3)))
    sigma, phi = 1.3, Upsamplers(run.config)

    def inputs(x, sigma):
        if fields is EDM:
            return x / np.sqrt(sigma**2 + 0.25), noise_feature("openai", jnp.full(2, sigma))
        time = vp_schedule("linear").time_of_sigma(jnp.full(2, sigma))
        return x / np.sqrt(1 + sigma**2), time

    @jax.jit
    def all_three(model, run, image):
        pivot = block_mean(image, (8, 8))
        stage = stage_estimate(Beside(model, (run,)), pivot, sigma=sigma)
        loss = tune.tuning_denoiser(model, run, image, LABEL, None)(X, jnp.full(2, sigma))

        net = functools.partial(model.net.apply, {"params": model.params}, label=LABEL)
        f = net(*inputs(pivot, fields["sigma_min"]), taps=places(run))[1]
        x_in, c_noise = inputs(X, sigma)
        emb = net(x_in, c_noise, taps=("emb",))[1]["emb"]
        once = phi.apply({"params": run.params}, f, (2.0, 2.0), method=Upsamplers.lift)
        u = phi.apply({"params": run.params}, once, emb, jnp.full(2, sigma, jnp.float32))
        end = {"S": "skip", "M": "stream"}[mode]
        inject = {(n if n.startswith("dec") else f"{n}/{end}"): v for n, v in u.items()}
        F = net(x_in, c_noise, inject=inject)
        c_skip, c_out, _ = preconditioning(sigma, 0.5)
        by_hand = c_skip * X + c_out * F if fields is EDM else X - sigma * F
        return stage, loss, by_hand

    stage, loss, by_hand = all_three(model, run, image)
    np.testing.assert_allclose(stage, loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stage, by_hand, rtol=1e-3, atol=1e-4)


def test_guidance_weighs_two_branches_with_features_of_their_own(pivots):
    """D_u + w (D_c - D_u) of two unguided denoisers."""

    @jax.jit
    def four(model, pivot):
        null = jnp.full(2, 3)
        estimate = functools.partial(stage_estimate, model, pivot)
        return estimate(cfg_scale=2.5), estimate(), estimate(null), estimate(cfg_scale=0.0)

    model = Beside(teacher(), (tuned_run("gain", seed=3),))
    guided, conditional, null, at_zero = four(model, pivots)
    np.testing.assert_allclose(guided, null + 2.5 * (conditional - null), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(at_zero, null, rtol=1e-5, atol=1e-6)
    assert np.abs(conditional - null).max() > 1e-2


def test_adapters_of_a_stage_are_its_own_merged_into_the_teacher():
    small = teacher(**SMALL)
    ours = tuned_run("lora", seed=7, model=small)
    zero = ours.replace(params=jax.tree.map(np.zeros_like, ours.params))

    @jax.jit
    def three(model):
        theta = model.teacher
        merged = theta.replace(params=adapted(theta.params, model.runs[1].params))
        found = stage_estimate(model, None, run=1)
        return found, merged.denoise(X, 1.3, LABEL), theta.denoise(X, 1.3, LABEL)

    found, merged, plain = three(Beside(small, (zero, ours)))
    np.testing.assert_allclose(found, merged, rtol=1e-5, atol=1e-6)
    assert np.abs(found - plain).max() > 1e-2


def test_upsamplers_follow_canvases_that_are_not_square():
    model, size = Beside(teacher(), (tuned_run("neck", seed=1),)), (16, 24)

    def D(pivot, x):
        ((denoise, _),) = tuned_denoiser(model, pivot, LABEL[:1], GRID, run=0, size=size)
        return denoise(x, 1.3)

    shapes = [jax.ShapeDtypeStruct((1, *side, 3), np.float32) for side in ((8, 12), size)]
    assert jax.eval_shape(D, *shapes).shape == (1, 16, 24, 3)


def test_fine_tuned_weights_also_sample_directly_and_upsamplers_leave_that_to_the_teacher():
    model = teacher(**SMALL)
    other, options = weights(1, **SMALL), {"steps": 3, "method": "euler"}
    run = tuned_run("ft", model=model).replace(params=other)
    tuned, free = make_cascade(model, "2x", tuned=[run], **options), teacher(other, **SMALL)
    ids, labels = np.arange(2), np.array([0, 2])
    direct, expected = (
        c.direct(ids, labels)[0] for c in (tuned, make_cascade(free, "2x", **options))
    )
    np.testing.assert_allclose(direct, expected, atol=1e-5)
    plan = cascade_plan(teacher(), "2x")
    _, denoisers, alone = tuned_denoisers(teacher(), [tuned_run("gain")], plan)
    assert [each.keywords["run"] for each in (*denoisers, alone)] == [None, 0, None]


def test_one_run_serves_all_stages_or_each_its_own():
    model = teacher(**SMALL)
    whole = tuned_run("lora", model=model)
    broken = whole.replace(params=jax.tree.map(lambda p: p * np.nan, whole.params))

    # NaN weights reveal the first stage that they are used in.
    for runs, size in (([whole, broken], "32x32"), ([broken], "16x16")):
        with pytest.raises(ValueError, match=f"image 0 of 2 samples of {size} px holds a NaN"):
            cascade(model, "2x,4x", num=2, steps=3, method="euler", tuned=runs)
    with pytest.raises(ValueError, match="3 tuned runs for 2 stages"):
        cascade(model, "2x,4x", tuned=[whole] * 3)


@pytest.mark.parametrize(
    "sizes, k, message",
    [
        ("4x", "t0.7", "cannot go from 8x8 to 32x32: choose scales such as 2x,4x"),
        ("2x", "t0.9", "restarts at sigma .* tuned up to K t0.7"),
    ],
)
def test_stages_that_upsamplers_were_not_tuned_for_are_refused(sizes, k, message):
    model = teacher()
    plan = cascade_plan(model, sizes, k=k, steps=20)
    with pytest.raises(ValueError, match=message):
        tuned_denoisers(model, [tuned_run("gain")], plan)
    tuned_denoisers(model, [tuned_run("lora")], plan)  # at all levels and sizes


def test_the_places_of_both_modes_are_the_networks_own_keys():
    """Three encoder blocks and the bottleneck, which has no skip connection."""
    encoder = ("enc_8_block0", "enc_4_down", "enc_4_block0")
    for mode, end in (("S", "/skip"), ("M", "/stream")):
        expected = {name: name + end for name in encoder} | {"dec_4_in1": "dec_4_in1"}
        assert tuned.inject_at(places(tuned_run()), mode) == expected


# Training


def batch_of(side, n=4):
    image = np.random.default_rng(0).uniform(-1, 1, (n, side, side, 3)).astype(np.float32)
    return {"image": image, "label": np.arange(n, dtype=np.int32) % 3}


def loss_of(model, run, label_dropout=0.0):
    return functools.partial(
        tune.tuning_loss, teacher=model, tuned=run, label_dropout=label_dropout
    )


@pytest.mark.parametrize("design, fields", [("gain", {}), ("lora", SMALL), ("ft", SMALL)])
def test_only_phi_trains_and_only_phi_has_an_optimiser(design, fields):
    """The gradient with respect to theta is zero, and every part of phi moves."""
    model, net = teacher(**fields), tune.NETS[design]
    run = tuned_run(design, model=model)
    optimiser = Optimiser(optax.adam(1e-2))
    state = create_state({net: run.params}, {net: noise_bins()}, {net: optimiser}, [net])
    size = lambda tree: sum(np.size(leaf) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(state.opt_state[net]) == 2 * size(run.params) + 1
    loss = loss_of(model, run)

    @jax.jit
    def step(state, theta, key):
        frozen = {"teacher": theta}
        new, metrics = denoise_step(
            state, frozen, batch_of(16), key, loss_fn=loss, optimiser=optimiser, ema_decay=0.9,
            net=net,
        )  # fmt: skip
        return new, metrics["loss"]

    new = state
    for i in range(3):
        new, value = step(new, model.params, jax.random.key(i))
    assert set(new.params) == set(new.ema_params) == {net} and value > 0
    pairs = zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params))
    assert all(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs)

    def of_theta(theta):
        return loss(run.params, {"teacher": theta}, batch_of(16), jax.random.key(0))[0].sum()

    assert not any(np.any(g) for g in jax.tree.leaves(jax.jit(jax.grad(of_theta))(model.params)))


@pytest.mark.parametrize("fields", [EDM, VP])
def test_levels_of_training_are_the_teachers_own_up_to_K(fields):
    model = teacher(diffusion=fields, std=0.5)
    batch, key = batch_of(16, 512), jax.random.key(0)

    def levels(design):  # levels do not depend on the network, so it is never compiled
        run = tuned_run(design, model=model)
        loss = loss_of(model, run)
        return np.asarray(
            jax.jit(lambda: loss(run.params, {"teacher": model.params}, batch, key)[1])()
        )

    sigma, everything = levels("gain"), levels("lora")
    sigma_K = restart_sigma("t0.7", model)
    assert sigma_K == pytest.approx(0.5 * 3.32, rel=1e-3)
    assert sigma.max() <= sigma_K * (1 + 1e-6) and sigma.max() > 0.7 * sigma_K
    assert (everything > sigma_K).mean() > 0.01
    if fields is VP:  # t uniform on 1 .. K: the same share in each quarter of the table
        table = vp_schedule("linear").sigmas
        table = table[table <= sigma_K * (1 + 1e-9)]
        quarter = np.searchsorted(table, sigma * (1 - 1e-6)) * 4 // len(table)
        assert np.abs(np.bincount(quarter, minlength=4) / 512 - 0.25).max() < 0.08
    else:  # the teacher's density, truncated at K
        inside = everything[everything <= sigma_K]
        assert abs(np.log(sigma).mean() - np.log(inside).mean()) < 0.2


def test_a_batch_trains_every_size_and_dropped_labels_are_no_class():
    model, key = teacher(**SMALL), jax.random.key(0)
    run, batch = tuned_run("lora", model=model, sizes=(16, 32)), batch_of(32, 2)

    @jax.jit
    def losses(batch):
        def loss(dropout, label):
            frozen, changed = {"teacher": model.params}, batch | {"label": label}
            return loss_of(model, run, dropout)(run.params, frozen, changed, key)

        null = jnp.full(2, 3)
        return loss(0.0, batch["label"]), loss(1.0, batch["label"]), loss(0.0, null)

    (kept, sigma), (dropped, _), (null, _) = losses(batch)
    assert kept.shape == sigma.shape == (4,) and len(np.unique(sigma)) == 4
    np.testing.assert_allclose(dropped, null, rtol=1e-5)
    assert np.abs(kept - null).max() > 1e-4


@pytest.mark.parametrize("sizes, resolution", [((8,), 16), ((24,), 48), ((32,), 48)])
def test_sizes_without_a_pivot_are_refused(sizes, resolution):
    chosen = settings("gain") | {"sizes": sizes}
    with pytest.raises(ValueError, match=f"cascade.sizes has {sizes[0]} px: .* powers of 2"):
        tune.resolve_settings(chosen, teacher(), resolution)
