"""Preconditioning, losses, the one-step map and guidance on closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion import denoiser, guidance, noise
from cheapscale.diffusion.denoiser import EDM, VP


def test_preconditioning_gives_unit_variance_to_input_and_target(key):
    """Karras et al. 2022, appendix B.6: what F sees and should return both have variance 1."""
    sigma_data, x0 = 0.5, 0.5 * jax.random.normal(key, (200_000,))
    eps = jax.random.normal(jax.random.key(1), x0.shape)
    for sigma in (0.01, 0.5, 3.0, 80.0):
        c = denoiser.preconditioning(sigma, sigma_data)
        noisy = x0 + sigma * eps
        assert float(jnp.std(c.c_in * noisy)) == pytest.approx(1, abs=0.01)
        assert float(jnp.std((x0 - c.c_skip * noisy) / c.c_out)) == pytest.approx(1, abs=0.01)


def test_an_edm_network_of_zero_is_the_gaussian_denoiser(key):
    x = jax.random.normal(key, (3, 2, 2, 1))
    sigma = jnp.array([0.1, 1.0, 40.0])
    D = functools.partial(EDM().denoise, lambda x_in, c_noise: jnp.zeros_like(x_in))
    expected = x * noise.over_pixels(0.25 / (0.25 + sigma**2), x)
    np.testing.assert_allclose(D(x, sigma), expected, rtol=1e-6)


def test_loss_on_gaussian_data_has_its_closed_form(key):
    """Data N(0, s^2), F = 0: E[loss | sigma] = weight (c_skip^2 sigma^2 + (1 - c_skip)^2 s^2)."""
    s, sigma_data = 0.3, 0.5
    D = functools.partial(EDM().denoise, lambda x_in, c_noise: jnp.zeros_like(x_in))
    x = s * jax.random.normal(key, (4000, 16, 16, 1))
    sigma = EDM().draw_sigma(jax.random.key(3), len(x))
    loss = denoiser.denoising_loss(D, EDM(), x, sigma, jax.random.key(2))
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    expected = weight * (c_skip**2 * sigma**2 + (1 - c_skip) ** 2 * s**2)
    assert loss.shape == sigma.shape == (4000,)
    # 256 pixels: each sample's ratio has relative deviation sqrt(2 / 256); 4000 samples average it
    ratio = np.asarray(loss / expected)
    assert ratio.mean() == pytest.approx(1, abs=0.006)
    assert ratio.std() == pytest.approx(np.sqrt(2 / 256), rel=0.1)
    matched = denoiser.denoising_loss(D, EDM(), x * sigma_data / s, sigma, jax.random.key(2))
    assert float(matched.mean()) == pytest.approx(1, abs=0.006)  # F = 0 is optimal: loss 1


def test_vp_loss_is_the_eps_error(key):
    process = VP("cosine", "eps", sigma_max=400.0)
    x = jax.random.normal(key, (512, 8, 8, 1))
    D = functools.partial(process.denoise, lambda x_in, t: jnp.zeros_like(x_in))
    sigma = process.draw_sigma(key, len(x), high=process.schedule.sigmas[699])
    loss = denoiser.denoising_loss(D, process, x, sigma, jax.random.key(1))
    # predicting eps = 0 costs E[eps^2] = 1; float32 limits D - x0 at the smallest sigma
    assert float(loss.mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_vp_predictions_agree_on_the_exact_denoiser(prediction, key):
    """All three parameterisations of the Gaussian's exact network give the same D."""
    s, schedule = 0.5, noise.vp_schedule("linear")
    sigma = jnp.asarray(schedule.sigmas[[5, 300, 900]], jnp.float32)
    x = jax.random.normal(key, (3, 4, 4, 1)) * noise.over_pixels(
        jnp.sqrt(s**2 + sigma**2), jnp.ones((3, 4, 4, 1))
    )  # noqa: E501

    def F(x_in, t):
        np.testing.assert_allclose(t, [5, 300, 900], atol=1e-2)
        level = noise.over_pixels(schedule.sigma(t), x_in)
        x0 = x_in * jnp.sqrt(1 + level**2) * s**2 / (s**2 + level**2)
        alpha = 1 / jnp.sqrt(1 + level**2)
        eps = (x_in - alpha * x0) / (alpha * level)
        return {"x0": x0, "eps": eps, "v": alpha * eps - alpha * level * x0}[prediction]

    D = functools.partial(VP("linear", prediction).denoise, F)
    expected = x * noise.over_pixels(s**2 / (s**2 + sigma**2), x)
    np.testing.assert_allclose(D(x, sigma), expected, rtol=2e-4, atol=2e-4)


def test_one_step_is_the_raw_network_and_starts_at_twice_the_teachers_mean(key):
    z = 80 * jax.random.normal(key, (2, 4, 4, 3))
    seen = {}

    def F(x_in, c_noise, label):
        seen.update(x_in=x_in, noise=c_noise, label=label)
        return jnp.sin(3 * x_in)

    image = EDM().one_step(F, z, feature="openai", label=jnp.array([1, 2]))
    np.testing.assert_allclose(seen["x_in"], z / np.sqrt(6400.25), rtol=1e-6)
    np.testing.assert_allclose(seen["noise"], [1095.5066, 1095.5066], rtol=1e-6)
    np.testing.assert_array_equal(seen["label"], [1, 2])
    np.testing.assert_allclose(image, jnp.sin(3 * seen["x_in"]), rtol=1e-6)
    c = denoiser.preconditioning(80.0, 0.5)
    assert round(c.c_out, 5) == 0.49999 and round(c.c_skip * 80, 3) == 0.003
    D = EDM().denoise(F, z, 80.0, feature="openai", label=jnp.array([1, 2]))
    np.testing.assert_allclose(image, 2 * D, atol=0.02)


def test_unknown_choices_and_levels_outside_the_schedule_are_refused():
    with pytest.raises(ValueError, match="unknown noise feature"):
        EDM().denoise(None, jnp.ones((1, 2)), 1.0, feature="fourier")
    with pytest.raises(ValueError, match="unknown prediction"):
        VP("linear", "score")
    with pytest.raises(ValueError, match="leave the linear schedule"):
        VP("linear", sigma_min=0.002)
    with pytest.raises(ValueError, match="process is edm"):
        EDM().grid(50, "leading")


def test_each_spacing_is_its_own_grid():
    table = VP().schedule.sigmas
    leading = VP().grid(50, "leading")
    assert len(leading) == 51 and leading[0] == table[981] and leading[-2] == table[1]
    assert VP().grid(50, "trailing")[0] == table[999]
    quadratic = VP().grid(100, "quadratic")
    assert quadratic[0] == table[800] and np.all(np.diff(quadratic) < 0)
    assert VP().grid(50)[0] == 80.0


def test_guidance_extrapolates_and_w1_is_the_conditional_model(key):
    calls = []

    def denoise(x, sigma, label, size):
        calls.append(x.shape[0])
        return x * 0.1 + noise.over_pixels(label.astype(x.dtype) + size, x)

    x, cond = jax.random.normal(key, (3, 2)), {"label": jnp.arange(3), "size": jnp.ones(3)}
    conditional = denoise(x, 1.0, **cond)
    dropped = denoise(x, 1.0, label=jnp.full(3, 7), size=jnp.ones(3))
    calls.clear()
    guided = {w: guidance.guided(denoise, w, {"label": 7})(x, 1.0, **cond) for w in (0, 1.0, 2.5)}
    assert calls == [3, 3, 6]  # 0 and 1 call the network once
    np.testing.assert_array_equal(guided[1.0], conditional)
    np.testing.assert_array_equal(guided[0], dropped)
    np.testing.assert_allclose(
        guided[2.5], dropped + 2.5 * (conditional - dropped), rtol=1e-5, atol=1e-5
    )
    each = guidance.guided(denoise, jnp.array([0.0, 1.0, 2.5]), {"label": 7})(x, 1.0, **cond)
    for i, w in enumerate((0, 1.0, 2.5)):
        np.testing.assert_allclose(each[i], guided[w][i], rtol=1e-5, atol=1e-5)


def test_guidance_refuses_what_it_cannot_drop():
    with pytest.raises(ValueError, match="null value"):
        guidance.guided(None, 2.0, {})
    with pytest.raises(ValueError, match="guidance drops"):
        guidance.guided(None, 2.0, {"caption": 0.0})(jnp.ones((1, 2)), 1.0, label=jnp.zeros(1))
