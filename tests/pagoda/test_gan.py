"""The GAN step against closed forms: a Dirac-GAN (PaGoDA, arXiv 2405.14822, Theorem 3.2), lambda,
and the order of updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cheapscale.pagoda.gan import Game, adaptive_weight, gan_step
from cheapscale.training.state import Optimiser, create_state


def as_they_are(frozen, views):
    """In place of the frozen networks: the images themselves."""
    return {name: view.images for name, view in views.items()}


def dirac(eta, *, gan_loss="logistic", rate=0.1, adversarial_weight=1.0, **options):
    """The Dirac-GAN G = theta, D = psi x with data at 0, to which L_rec = eta theta^2 is added."""
    optimisers = {n: Optimiser(optax.sgd(rate)) for n in ("generator", "discriminator")}
    params = {"generator": {"theta": jnp.ones(())}, "discriminator": {"psi": jnp.full((), 0.5)}}
    state = create_state(params, {"discriminator": {}}, optimisers, ["generator"])
    game = Game(
        generate=lambda p, z, c: jnp.zeros_like(z) + p["theta"],
        see=as_they_are,
        discriminate=lambda p, s, x, c: (p["psi"] * x, s),
        distance=lambda frozen, f, g, x, y: {"pixel": eta * ((x - y) ** 2).mean(-1)},
        optimisers=optimisers,
        sigma_max=1.0,
        ema_decay=0.999,
        adversarial_weight=adversarial_weight,
        reconstruct=bool(eta),
        gan_loss=gan_loss,
        **options,
    )
    step = functools.partial(gan_step, game=game)
    zeros = jnp.zeros((4, 1))
    labels = jnp.zeros(4, jnp.int32)
    batch = {
        "pair": {"image": zeros, "z": zeros, "label": labels},
        "real": {"image": zeros, "label": labels},
    }
    return state, step, batch


def recursion(eta, discriminator_first, steps=400, h=0.1):
    """The distance from the equilibrium (0, 0) after the same updates, written out in float64."""
    theta, psi = 1.0, 0.5
    for _ in range(steps):
        for player in (1, 0) if discriminator_first else (0, 1):
            slope = 1 / (1 + np.exp(-psi * theta))  # f'(-t) of f = log sigmoid
            if player:
                psi -= h * theta * slope
            else:
                theta -= h * (2 * eta * theta - psi * slope)
    return np.hypot(theta, psi)


@pytest.mark.parametrize("eta, radius", [(0.0, 1.122), (0.01, 0.755), (0.1, 0.017), (1.0, 0.0014)])
def test_dirac_gan_circles_without_reconstruction_and_contracts_with_it(eta, radius, key):
    """Theorem 3.2: L_rec (eta > 0) makes the equilibrium stable. The radii were computed with the
    generator moving first; `gan_step` moves the discriminator first."""
    np.testing.assert_allclose(recursion(eta, False), radius, rtol=0.04)
    state, step, batch = dirac(eta)
    run = jax.jit(lambda s: jax.lax.fori_loop(0, 400, lambda i, s: step(s, {}, batch, key)[0], s))
    state = run(state)
    norm = np.hypot(state.params["generator"]["theta"], state.params["discriminator"]["psi"])
    np.testing.assert_allclose(norm, recursion(eta, True), rtol=1e-3)


def test_the_discriminator_is_updated_before_the_generator_uses_it(key):
    state, step, batch = dirac(0.0, gan_loss="hinge")
    new, metrics = step(state, {}, batch, key)
    # the hinge loss with logits inside (-1, 1): d/dpsi [1 - 0 + 1 + psi theta] = theta = 1
    np.testing.assert_allclose(new.params["discriminator"]["psi"], 0.4, rtol=1e-6)
    # -D(G) = -psi theta with the *new* psi
    np.testing.assert_allclose(new.params["generator"]["theta"], 1 + 0.1 * 0.4, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_disc"], 2.5, rtol=1e-6)


def test_without_an_adversarial_weight_the_discriminator_stays_as_it_is(key):
    state, step, batch = dirac(1.0, adversarial_weight=0.0)
    new, metrics = step(state, {}, batch, key)
    assert new.params["discriminator"] is state.params["discriminator"]
    assert set(metrics) == {"loss", "loss_rec", "loss_rec_pixel", "grad_norm"}
    np.testing.assert_allclose(new.params["generator"]["theta"], 0.8, rtol=1e-6)


def test_adaptive_lambda_is_the_clipped_ratio_of_unsquared_norms():
    rec, adv = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
    np.testing.assert_allclose(adaptive_weight(rec, adv), 5 / 2.0001, rtol=1e-6)
    np.testing.assert_allclose(adaptive_weight(rec, adv, squared=True), 25 / 4.0001, rtol=1e-6)
    np.testing.assert_allclose(adaptive_weight(rec, 0 * adv), 10.0)
    np.testing.assert_allclose(adaptive_weight(0 * rec, adv), 0.01)


def test_adaptive_lambda_multiplies_the_constant_factor(key):
    state, step, batch = dirac(
        1.0, gan_loss="hinge", adaptive_layer="theta", adversarial_weight=0.2
    )
    new, metrics = step(state, {}, batch, key)
    # |grad L_rec| = 2 theta = 2, |grad L_adv| = psi = 0.4 after the discriminator's step
    expected = 0.2 * 2 / (0.4 + 1e-4)
    np.testing.assert_allclose(metrics["lambda"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        new.params["generator"]["theta"], 1 - 0.1 * (2 - expected * 0.4), rtol=1e-5
    )


def test_fakes_are_fresh_prior_noise_and_reconstruction_uses_only_inverted_latents(key):
    """G is the identity, so the discriminator and the distance see the noise and latents of G.
    Pairs have label 1, real images label 2; each pass increments the spectral state."""
    seen = {}

    def generate(params, z, c):
        return z * params["scale"]

    def see(frozen, views):
        for name, view in views.items():
            drawn = tuple(jax.random.key_data(view.key).tolist())
            seen.setdefault("views", []).append((name, view.reader, drawn))
        return as_they_are(frozen, views)

    def discriminate(params, s, x, c):
        seen.setdefault("D", []).append((primal(x), primal(c["label"]), primal(s["passes"])))
        return x * params["psi"], {"passes": s["passes"] + 1}

    def distance(frozen, f, g, x, y):
        seen["reconstructed"] = x
        return {"pixel": ((x - y) ** 2).mean(-1)}

    optimisers = {n: Optimiser(optax.sgd(0.0)) for n in ("generator", "discriminator")}
    params = {"generator": {"scale": jnp.ones(())}, "discriminator": {"psi": jnp.ones(())}}
    extra = {"discriminator": {"passes": jnp.zeros(())}}
    state = create_state(params, extra, optimisers, ["generator"])
    z = jnp.full((65536, 1), 7.0)
    labels = jnp.ones(65536, jnp.int32)
    real = jnp.full((65536, 1), -3.0)
    batch = {
        "pair": {"image": z, "z": z, "label": labels},
        "real": {"image": real, "label": labels + 1},
    }
    game = Game(
        generate, see, discriminate, distance, optimisers, sigma_max=80.0, ema_decay=0.9,
        adversarial_weight=1.0,
    )  # fmt: skip
    with jax.disable_jit():
        new, _ = gan_step(state, {}, batch, key, game=game)
    (on_real, fake_d, fake_g), given, passes = zip(*seen["D"])
    np.testing.assert_array_equal(on_real, real)
    for fake in (fake_d, fake_g):  # the prior's std is exactly 80, up to sampling error
        assert abs(fake.std() / 80 - 1) < 0.01 and abs(fake.mean()) < 1.5
    assert not np.array_equal(fake_d, fake_g)
    # In D's loss fakes have the labels of the real images, in G's loss those of the pairs.
    for label, expected in zip(given, (2, 2, 1)):
        np.testing.assert_array_equal(label, expected * labels)
    # Real and fake images are two passes; each continues from the state of the pass before.
    np.testing.assert_array_equal(passes, [0, 1, 2])
    np.testing.assert_array_equal(new.extra["discriminator"]["passes"], 3)
    # Real and fake images of D share one augmentation, and so do both images of L_rec; G's fakes
    # have another draw.
    names, readers, drawn = zip(*seen["views"])
    assert names == ("rec target", "real", "fake", "rec", "fake")
    assert readers == tuple("distance" if "rec" in n else "discriminator" for n in names)
    assert drawn[0] == drawn[3] and drawn[1] == drawn[2] and len(set(drawn)) == 3
    np.testing.assert_array_equal(primal(seen["reconstructed"]), z)


def primal(x):
    """The value under a gradient tracer."""
    return np.asarray(getattr(x, "primal", x))
