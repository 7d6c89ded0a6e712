"""The ODE against distributions whose flow is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from cheapscale.diffusion import denoiser, process, solvers


def gaussian(s):
    """Exact denoiser of data N(0, s^2)."""
    return lambda x, sigma: x * s**2 / (s**2 + sigma**2)


# Data N(0, s^2), x = 0.7: spec 2.3 prints z, the exact latent, its relative error (%), and what the
# generated image reads. The printed percentages carry two digits.
TABLE = [
    (0.5, 10, "98.3549", "112.0013", 12, "0.7497"),
    (0.5, 20, "108.2077", "112.0013", 3.4, "0.7058"),
    (0.5, 40, "111.0267", "112.0013", 0.87, "0.7007"),
    (0.5, 80, "111.7557", "112.0013", 0.22, "0.7001"),
    (0.1, 40, "552.3122", "559.8885", 1.35, "0.7014"),
    (1.0, 40, "55.6019", "56.0043", 0.72, "0.7005"),
]


@pytest.mark.parametrize("s, n, latent, exact, error, back", TABLE)
def test_gaussian_inversion_table(s, n, latent, exact, error, back):
    def round_trip(x):
        up = process.inversion_grid(n)
        z = solvers.solve([(gaussian(s), up)], x)
        return z, solvers.solve([(gaussian(s), up[::-1])], z)

    with jax.enable_x64(True):
        z, x = (float(v[0]) for v in round_trip(jnp.array([0.7], jnp.float64)))
    closed_form = 0.7 * np.sqrt((s**2 + 80**2) / (s**2 + 0.002**2))
    assert f"{z:.4f}" == latent
    assert f"{closed_form:.4f}" == exact
    assert 100 * (1 - z / closed_form) == pytest.approx(error, rel=0.03)
    assert f"{x:.4f}" == back
    z32, x32 = round_trip(jnp.array([0.7], jnp.float32))
    assert z32.dtype == jnp.float32
    np.testing.assert_allclose([z32[0], x32[0]], [z, x], rtol=1e-6)


def test_error_is_of_second_order_for_heun_and_first_for_euler():
    with jax.enable_x64(True):
        x = jnp.array([0.7], jnp.float64)
        exact = 0.7 * np.sqrt((0.25 + 6400) / (0.25 + 4e-6))
        for method, order in (("heun", 2), ("euler", 1)):
            error = [
                abs(float(solvers.solve([(gaussian(0.5), process.inversion_grid(n))], x,
                                        method=method)[0]) - exact)
                for n in (321, 641)
            ]  # fmt: skip
            assert np.log2(error[0] / error[1]) == pytest.approx(order, abs=0.06)


def test_mixture_flow_transports_quantiles():
    """In one dimension the flow is monotone: the mixture's CDF is constant along a trajectory."""
    means, stds, weights = (
        jnp.array(v) for v in ([-0.6, 0.1, 0.7], [0.1, 0.05, 0.2], [0.3, 0.3, 0.4])
    )

    def components(x, sigma):  # [b, 3]
        return (x - means[None]) / jnp.sqrt(stds**2 + sigma**2)[None]

    def denoise(x, sigma):  # posterior mean: responsibilities times each Gaussian's shrinkage
        var = (stds**2 + sigma**2)[None]
        log_r = jnp.log(weights)[None] + norm.logpdf(components(x, sigma)) - 0.5 * jnp.log(var)
        r = jax.nn.softmax(log_r, axis=1)
        mean = (stds**2)[None] / var * (x - means[None]) + means[None]
        return jnp.sum(r * mean, axis=1, keepdims=True)

    def cdf(x, sigma):
        return jnp.sum(weights[None] * norm.cdf(components(x, sigma)), axis=1)

    with jax.enable_x64(True):
        x = jnp.linspace(-0.9, 1.2, 23, dtype=jnp.float64)[:, None]
        up = process.inversion_grid(1500)
        z = solvers.solve([(denoise, up)], x)
        np.testing.assert_allclose(cdf(z, 80.0), cdf(x, 0.002), atol=2e-5)
        np.testing.assert_allclose(solvers.solve([(denoise, up[::-1])], z), x, atol=2e-5)


def test_euler_is_ddim(key):
    """DDIM's eps-form update on x_vp, step by step, against the Euler solver in sigma."""
    schedule = process.vp_schedule("linear")
    weight = np.random.default_rng(0).normal(size=(6, 6)) / 3

    def F(x_in, t):
        return jnp.tanh(x_in @ weight + jnp.sin(t / 100)[:, None])

    with jax.enable_x64(True):
        D = denoiser.vp_denoiser(F, schedule, "eps")
        x_vp = jax.random.normal(key, (4, 6), jnp.float64)
        times = np.arange(990, -1, -90)
        sigmas = schedule.sigmas[times]
        result = solvers.solve([(D, sigmas)], process.from_vp(x_vp, sigmas[0]), method="euler")
        for t, s in zip(times, times[1:]):
            a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
            eps = F(x_vp, jnp.full(4, float(t)))
            x0 = (x_vp - np.sqrt(1 - a_t) * eps) / np.sqrt(a_t)
            x_vp = np.sqrt(a_s) * x0 + np.sqrt(1 - a_s) * eps
        np.testing.assert_allclose(process.to_vp(result, sigmas[-1]), x_vp, rtol=1e-10, atol=1e-10)


def unit_noise(seed, shape):
    return lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)


def test_ancestral_step_is_ddpm_posterior(key):
    """Between any two times: mean and small variance of q(x_s | x_t, x0 = D), Ho et al. Eq. 7."""
    schedule = process.vp_schedule("linear")
    x_vp, x0 = jax.random.normal(key, (2, 3, 4))
    n = unit_noise(5, (3, 4))
    for t, s in ((999, 998), (500, 400), (120, 3)):
        a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
        alpha = a_t / a_s
        mean = np.sqrt(a_s) * (1 - alpha) * x0 + np.sqrt(alpha) * (1 - a_s) * x_vp
        variance = (1 - a_s) / (1 - a_t) * (1 - alpha)
        expected = mean / (1 - a_t) + np.sqrt(variance) * n(0)
        pair = schedule.sigmas[[t, s]]
        found = solvers.solve(
            [(lambda x, sigma: x0, pair)], process.from_vp(x_vp, pair[0]), method="ancestral",
            noise=n,
        )  # fmt: skip
        np.testing.assert_allclose(process.to_vp(found, pair[1]), expected, rtol=2e-4, atol=2e-5)


def test_ancestral_sampling_keeps_a_gaussian(key):
    """With the exact denoiser of N(0, s^2) every state keeps its marginal, s^2 + sigma^2."""
    grid, n = process.sampling_grid(400)[:150], 20000
    x = np.sqrt(0.5**2 + grid[0] ** 2) * jax.random.normal(key, (n,))
    end = solvers.solve([(gaussian(0.5), grid)], x, method="ancestral", noise=unit_noise(1, (n,)))
    assert float(jnp.var(end)) == pytest.approx(0.5**2 + grid[-1] ** 2, rel=0.05)
    # and forgets where it began, which the deterministic solvers never do
    low = solvers.solve(
        [(gaussian(0.5), process.sampling_grid(100))], 80 * jax.random.normal(key, (n,)),
        method="ancestral", noise=unit_noise(2, (n,)),
    )  # fmt: skip
    assert abs(np.corrcoef(low, x)[0, 1]) < 0.05 and float(jnp.std(low)) == pytest.approx(0.5, 0.1)


@pytest.mark.parametrize("method", ["heun", "euler", "ancestral"])
def test_segments_of_one_denoiser_are_one_segment(method, key):
    D, grid = gaussian(0.5), process.sampling_grid(12)
    x = 80 * jax.random.normal(key, (2, 3))
    options = {"method": method}
    if method == "ancestral":
        options["noise"] = unit_noise(0, (2, 3))
    whole = solvers.solve([(D, grid)], x, **options)
    parts = [(D, part) for part in solvers.split_grid(grid, [4, 9])]
    np.testing.assert_array_equal(solvers.solve(parts, x, **options), whole)


def test_steps_own_their_specialist_in_both_directions():
    """The specialists record who was called, and at which level."""
    calls = []

    def specialist(index):
        def record(sigma):
            calls.append((index, float(sigma)))

        def denoise(x, sigma):
            jax.debug.callback(record, sigma, ordered=True)
            return x * 0

        return denoise

    grid = process.karras_grid(7)
    for direction in (grid, grid[::-1]):
        parts = solvers.split_grid(direction, [3])
        calls.clear()
        solvers.solve([(specialist(i), p) for i, p in enumerate(parts)], jnp.ones((1,)))
        jax.effects_barrier()
        expected = [
            (i, s) for i, part in enumerate(parts) for step in zip(part, part[1:]) for s in step
        ]
        np.testing.assert_allclose(calls, expected, rtol=1e-6)


def test_network_calls_are_counted():
    D = gaussian(0.5)
    assert solvers.nfe([(D, process.inversion_grid(40))]) == (78,)
    assert solvers.nfe([(D, process.sampling_grid(40))]) == (79,)
    assert solvers.nfe([(D, process.sampling_grid(40))], "euler") == (40,)
    parts = [(D, p) for p in solvers.split_grid(process.sampling_grid(10), [5])]
    assert solvers.nfe(parts) == (10, 9)


def test_last_step_to_zero_returns_the_estimate_and_clip_bounds_it():
    x = jnp.array([4.0, -0.3])
    D = gaussian(1.0)
    np.testing.assert_allclose(solvers.solve([(D, [0.5, 0.0])], x), D(x, 0.5), rtol=1e-6)
    np.testing.assert_allclose(
        solvers.solve([(D, [0.5, 0.0])], x, clip=True), jnp.clip(D(x, 0.5), -1, 1), rtol=1e-6
    )


@pytest.mark.parametrize(
    "segments, message",
    [
        ([], "nothing to solve"),
        ([(None, [1.0])], "at least two"),
        ([(None, [1.0, 0.0, 0.5])], "only the last"),
        ([(None, [1.0, 0.5, 0.7])], "strictly up or strictly down"),
        ([(None, [2.0, 1.0]), (None, [0.9, 0.0])], "starts at sigma 0.9"),
    ],
)
def test_bad_segments_are_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        solvers.solve(segments, jnp.ones(1))


def test_unknown_method_and_borders_are_refused():
    with pytest.raises(ValueError, match="unknown solver"):
        solvers.solve([(None, [1.0, 0.5])], jnp.ones(1), method="rk4")
    with pytest.raises(ValueError, match="'ancestral' needs `noise`"):
        solvers.solve([(None, [1.0, 0.5])], jnp.ones(1), method="ancestral")
    with pytest.raises(ValueError, match="with no other, not with 'heun'"):
        solvers.solve([(None, [1.0, 0.5])], jnp.ones(1), noise=unit_noise(0, (1,)))
    with pytest.raises(ValueError, match="runs down"):
        solvers.solve([(None, [0.5, 1.0])], jnp.ones(1), method="ancestral", noise=unit_noise)
    with pytest.raises(ValueError, match="borders"):
        solvers.split_grid(process.karras_grid(5), [4])
