"""Noise grids, schedules and units against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion import noise
from cheapscale.diffusion.denoiser import EDM, VP


def test_karras_grid_follows_its_formula_and_hits_its_ends():
    grid = noise.karras_grid(40)
    assert grid.dtype == np.float64 and grid[0] == 80.0 and grid[-1] == 0.002
    i = 17
    formula = (80 ** (1 / 7) + i / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(grid[i], formula, rtol=1e-13)
    np.testing.assert_array_equal(EDM().grid(40), np.append(grid, 0))
    np.testing.assert_array_equal(EDM().inversion_grid(40), grid[::-1])


def test_bad_grids_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        noise.karras_grid(1)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        noise.karras_grid(4, 1.0, 0.5)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_vp_time_and_sigma_are_inverse_on_the_host_and_traced(name):
    schedule = noise.vp_schedule(name)
    t = np.array([0.0, 0.4, 17.3, 500.0, 998.5, 999.0])
    np.testing.assert_allclose(schedule.time_of_sigma(schedule.sigma(t)), t, atol=1e-9)
    np.testing.assert_allclose(schedule.sigma(np.arange(1000)), schedule.sigmas, rtol=1e-12)
    traced = jax.jit(lambda t: schedule.time_of_sigma(schedule.sigma(t)))(jnp.asarray(t))
    np.testing.assert_allclose(traced, t, atol=0.02)  # float32 ln sigma, flat at the low end
    assert schedule.time_of_sigma(0.0) == 0 and schedule.time_of_sigma(1e9) == 999


def test_snr_at_the_cascades_restart_matches_the_published_numbers():
    """Self-cascade restarts at step K = 700 of T = 1000, index 699 (arXiv 2402.10491)."""
    snr = {
        name: noise.vp_schedule(name).sigma(699) ** -2
        for name in ("linear", "scaled_linear", "cosine")
    }
    assert round(snr["scaled_linear"], 4) == 0.0907
    assert round(snr["linear"], 4) == 0.0070
    assert round(snr["cosine"], 3) == 0.255
    schedule = noise.vp_schedule("scaled_linear")
    assert round(float(schedule.sigma(699)), 2) == 3.32
    assert round(schedule.alpha_bar[699], 3) == 0.083
    # 2x2 block means have four times the SNR, which the base model sees at time 508
    assert round(schedule.time_of_sigma(schedule.sigma(699) / 2)) == 508
    # the same SNR has index 493 in the linear schedule and 811 in the cosine schedule
    assert round(noise.vp_schedule("linear").time_of_sigma(schedule.sigma(699))) == 493
    assert round(noise.vp_schedule("cosine").time_of_sigma(schedule.sigma(699))) == 811


def test_the_tail_of_a_ddim_grid_is_the_full_grid_cut():
    schedule = noise.vp_schedule("scaled_linear")
    full, tail = schedule.grid(50), schedule.grid(50, last=699)
    assert len(full) == 51 and len(tail) == 36  # 35 of 50 steps and the final 0
    np.testing.assert_array_equal(tail, full[-36:])
    assert tail[0] == schedule.sigmas[681]
    assert schedule.grid(10, spacing="trailing")[0] == schedule.sigmas[999]
    with pytest.raises(ValueError, match="spacing"):
        schedule.grid(10, spacing="even")


def test_decibels_and_noise_features_have_their_closed_forms():
    assert noise.decibels(1.0) == 0 and noise.decibels(0.1) == pytest.approx(20)
    assert round(float(noise.noise_feature("openai", 80.0)), 2) == 1095.51
    assert float(noise.noise_feature("edm", 80.0)) == pytest.approx(np.log(80) / 4)
    at_zero = noise.noise_feature("openai", jnp.zeros(2))
    assert np.all(np.isfinite(at_zero)) and float(at_zero[0]) == pytest.approx(-25328.4, rel=1e-5)
    with pytest.raises(ValueError, match="unknown noise feature"):
        noise.noise_feature("fourier", 1.0)


def test_edm_draws_are_lognormal_and_truncation_renormalises(key):
    log_sigma = np.log(EDM().draw_sigma(key, 20_000))
    assert abs(log_sigma.mean() + 1.2) < 0.03 and abs(log_sigma.std() - 1.2) < 0.03
    low, high = 0.1, 1.0
    cut = EDM().draw_sigma(key, 20_000, low, high)
    assert low <= cut.min() * (1 + 1e-5) and cut.max() <= high * (1 + 1e-5)
    kept = np.exp(log_sigma[(log_sigma > np.log(low)) & (log_sigma < np.log(high))])
    np.testing.assert_allclose(np.log(cut).mean(), np.log(kept).mean(), atol=0.03)
    tail = EDM().draw_sigma(
        key, 2_000, 30.0, np.inf
    )  # in float32 the lower tail has no such values
    assert 30 * (1 - 1e-4) <= tail.min() and len(np.unique(tail)) > 1_900
    with pytest.raises(ValueError, match="low < high"):
        EDM().draw_sigma(key, 2, 1.0, 0.1)


def test_vp_draws_are_uniform_over_the_times_of_the_interval(key):
    table = VP().schedule.sigmas
    t = np.searchsorted(
        table, np.asarray(VP().draw_sigma(key, 20_000, table[99], table[299])) * 0.9999
    )
    assert t.min() == 100 and t.max() == 299
    np.testing.assert_allclose(np.bincount((t - 100) // 50, minlength=4) / 20_000, 0.25, atol=0.02)


@pytest.mark.parametrize("process", [EDM(), VP()])
def test_antithetic_draws_are_mirrored_in_their_interval(process, key):
    sigma = np.asarray(process.draw_sigma(key, 8, antithetic=True))
    if isinstance(process, EDM):
        np.testing.assert_allclose(np.log(sigma[:4]) + np.log(sigma[4:]), -2.4, rtol=1e-3)
    else:
        t = np.searchsorted(process.schedule.sigmas, sigma * (1 - 1e-5))
        np.testing.assert_array_equal(t[:4] + t[4:], 999)


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="unknown VP schedule"):
        noise.vp_schedule("sigmoid")
    with pytest.raises(ValueError, match="zero-SNR"):
        noise.VPSchedule("zero", np.array([0.9, 0.5, 0.0]))
    with pytest.raises(ValueError, match="decreasing"):
        noise.VPSchedule("up", np.array([0.1, 0.5]))
