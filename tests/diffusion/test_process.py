"""Grids, schedules and conversions against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion import process


def test_karras_grid_follows_its_formula_and_hits_its_ends():
    grid = process.karras_grid(40)
    assert grid.dtype == np.float64 and grid[0] == 80.0 and grid[-1] == 0.002
    i = 17
    formula = (80 ** (1 / 7) + i / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(grid[i], formula, rtol=1e-13)
    np.testing.assert_array_equal(process.sampling_grid(40), np.append(grid, 0))
    np.testing.assert_array_equal(process.inversion_grid(40), grid[::-1])


def test_bad_grids_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        process.karras_grid(1)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        process.karras_grid(4, 1.0, 0.5)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_vp_time_and_sigma_are_inverse_on_the_host_and_traced(name):
    schedule = process.vp_schedule(name)
    t = np.array([0.0, 0.4, 17.3, 500.0, 998.5, 999.0])
    np.testing.assert_allclose(schedule.time_of_sigma(schedule.sigma(t)), t, atol=1e-9)
    np.testing.assert_allclose(schedule.sigma(np.arange(1000)), schedule.sigmas, rtol=1e-12)
    traced = jax.jit(lambda t: schedule.time_of_sigma(schedule.sigma(t)))(jnp.asarray(t))
    np.testing.assert_allclose(traced, t, atol=0.02)  # float32 ln sigma, flat at the low end
    assert schedule.time_of_sigma(0.0) == 0 and schedule.time_of_sigma(1e9) == 999


def test_snr_at_the_cascades_restart_matches_the_published_numbers():
    """Self-cascade's K = 700 of T = 1000, i.e. index 699 (spec 1.4 and 2.2)."""
    snr = {
        name: np.exp(process.log_snr(process.vp_schedule(name).sigma(699)))
        for name in ("linear", "scaled_linear", "cosine")
    }
    assert round(snr["scaled_linear"], 4) == 0.0907
    assert round(snr["linear"], 4) == 0.0070
    assert round(snr["cosine"], 3) == 0.255
    schedule = process.vp_schedule("scaled_linear")
    assert round(float(schedule.sigma(699)), 2) == 3.32
    assert round(schedule.alpha_bar[699], 3) == 0.083
    # four times the SNR (a 2x2 block mean) is where a base model would be at 508
    assert round(schedule.time_of_sigma(schedule.sigma(699) / 2)) == 508
    # the same SNR by index elsewhere: 493 for linear betas, 811 for cosine
    assert round(process.vp_schedule("linear").time_of_sigma(schedule.sigma(699))) == 493
    assert round(process.vp_schedule("cosine").time_of_sigma(schedule.sigma(699))) == 811


def test_the_tail_of_a_ddim_grid_is_the_full_grid_cut():
    schedule = process.vp_schedule("scaled_linear")
    full, tail = schedule.grid(50), schedule.grid(50, last=699)
    assert len(full) == 51 and len(tail) == 36  # 35 of 50 steps, and the final 0
    np.testing.assert_array_equal(tail, full[-36:])
    assert tail[0] == schedule.sigmas[681]
    assert schedule.grid(10, spacing="trailing")[0] == schedule.sigmas[999]
    with pytest.raises(ValueError, match="spacing"):
        schedule.grid(10, spacing="even")


def test_vp_and_edm_scales_convert_both_ways(key):
    x0 = jax.random.normal(key, (3, 4, 4, 2))
    eps = jax.random.normal(jax.random.key(1), x0.shape)
    schedule = process.vp_schedule("linear")
    t = np.array([3, 400, 990])
    sigma, ab = jnp.asarray(schedule.sigmas[t]), jnp.asarray(schedule.alpha_bar[t], jnp.float32)
    x_edm = x0 + process.over_pixels(sigma, x0) * eps
    x_vp = (
        process.over_pixels(jnp.sqrt(ab), x0) * x0 + process.over_pixels(jnp.sqrt(1 - ab), x0) * eps
    )
    np.testing.assert_allclose(process.to_vp(x_edm, sigma), x_vp, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        process.from_vp(process.to_vp(x_edm, sigma), sigma), x_edm, rtol=1e-5, atol=1e-5
    )


def test_units():
    assert process.decibels(1.0) == 0 and process.decibels(0.1) == pytest.approx(20)
    assert process.log_snr(2.0) == pytest.approx(-2 * np.log(2))
    assert round(float(process.noise_feature("openai", 80.0)), 2) == 1095.51
    assert float(process.noise_feature("edm", 80.0)) == pytest.approx(np.log(80) / 4)
    at_zero = process.noise_feature("openai", jnp.zeros(2))
    assert np.all(np.isfinite(at_zero)) and float(at_zero[0]) == pytest.approx(-25328.4, rel=1e-5)
    with pytest.raises(ValueError, match="unknown noise feature"):
        process.noise_feature("fourier", 1.0)


def test_sigma_draws_are_lognormal_and_truncation_renormalises(key):
    log_sigma = np.log(process.draw_sigma(key, (20_000,)))
    assert abs(log_sigma.mean() + 1.2) < 0.03 and abs(log_sigma.std() - 1.2) < 0.03
    low, high = 0.1, 1.0
    cut = process.draw_sigma(key, (20_000,), sigma_range=(low, high))
    assert low <= cut.min() and cut.max() <= high
    kept = np.exp(log_sigma[(log_sigma > np.log(low)) & (log_sigma < np.log(high))])
    np.testing.assert_allclose(np.log(cut).mean(), np.log(kept).mean(), atol=0.03)
    with pytest.raises(ValueError, match="low < high"):
        process.draw_sigma(key, (2,), sigma_range=(1.0, 0.1))


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="unknown VP schedule"):
        process.vp_schedule("sigmoid")
    with pytest.raises(ValueError, match="zero-SNR"):
        process.VPSchedule("zero", np.array([0.9, 0.5, 0.0]))
    with pytest.raises(ValueError, match="decreasing"):
        process.VPSchedule("up", np.array([0.1, 0.5]))
