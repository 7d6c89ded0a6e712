"""The ODE solvers on distributions with an exactly known flow, and DDPM's ancestral sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from cheapscale.diffusion import noise, samplers
from cheapscale.diffusion.denoiser import EDM, VP


def gaussian(s):
    """Exact denoiser of data N(0, s^2)."""
    return lambda x, sigma: x * s**2 / (s**2 + sigma**2)


# Data N(0, s^2), x = 0.7. Columns: s, nodes, z, the exact latent, the error of z in percent (two
# digits), and the generated image.
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
        up = EDM().inversion_grid(n)
        z = samplers.solve([(gaussian(s), up)], x)
        return z, samplers.solve([(gaussian(s), up[::-1])], z)

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


def test_the_error_of_heun_is_second_order_and_that_of_euler_first_order():
    with jax.enable_x64(True):
        x = jnp.array([0.7], jnp.float64)
        exact = 0.7 * np.sqrt((0.25 + 6400) / (0.25 + 4e-6))
        for method, order in (("heun", 2), ("euler", 1)):
            error = [
                abs(float(samplers.solve([(gaussian(0.5), EDM().inversion_grid(n))], x,
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
        up = EDM().inversion_grid(1500)
        z = samplers.solve([(denoise, up)], x)
        np.testing.assert_allclose(cdf(z, 80.0), cdf(x, 0.002), atol=2e-5)
        np.testing.assert_allclose(samplers.solve([(denoise, up[::-1])], z), x, atol=2e-5)


def test_euler_is_ddim(key):
    """DDIM's eps-form update on x_vp, step by step, against the Euler solver in sigma."""
    schedule = noise.vp_schedule("linear")
    weight = np.random.default_rng(0).normal(size=(6, 6)) / 3

    def F(x_in, t):
        return jnp.tanh(x_in @ weight + jnp.sin(t / 100)[:, None])

    with jax.enable_x64(True):
        D = functools.partial(VP("linear", "eps").denoise, F)
        x_vp = jax.random.normal(key, (4, 6), jnp.float64)
        times = np.arange(990, -1, -90)
        sigmas = schedule.sigmas[times]
        result = samplers.solve([(D, sigmas)], x_vp * np.sqrt(1 + sigmas[0] ** 2), method="euler")
        for t, s in zip(times, times[1:]):
            a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
            eps = F(x_vp, jnp.full(4, float(t)))
            x0 = (x_vp - np.sqrt(1 - a_t) * eps) / np.sqrt(a_t)
            x_vp = np.sqrt(a_s) * x0 + np.sqrt(1 - a_s) * eps
        result = result / np.sqrt(1 + sigmas[-1] ** 2)
        np.testing.assert_allclose(result, x_vp, rtol=1e-10, atol=1e-10)


def unit_noise(seed, shape):
    return lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)


def test_ancestral_step_is_ddpm_posterior(key):
    """A step between any two times has the mean and variance of q(x_s | x_t, x0 = D) (Ho et al.
    2020, arXiv 2006.11239, Eq. 7)."""
    schedule = noise.vp_schedule("linear")
    x_vp, x0 = jax.random.normal(key, (2, 3, 4))
    n = unit_noise(5, (3, 4))
    for t, s in ((999, 998), (500, 400), (120, 3)):
        a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
        alpha = a_t / a_s
        mean = np.sqrt(a_s) * (1 - alpha) * x0 + np.sqrt(alpha) * (1 - a_s) * x_vp
        variance = (1 - a_s) / (1 - a_t) * (1 - alpha)
        expected = mean / (1 - a_t) + np.sqrt(variance) * n(0)
        pair = schedule.sigmas[[t, s]]
        found = samplers.solve(
            [(lambda x, sigma: x0, pair)], x_vp * np.sqrt(1 + pair[0] ** 2), method="ancestral",
            noise=n,
        )  # fmt: skip
        found = found / np.sqrt(1 + pair[1] ** 2)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_ancestral_sampling_keeps_a_gaussian(key):
    """With the exact denoiser of N(0, s^2) every state keeps its marginal, s^2 + sigma^2."""
    grid, n = EDM().grid(400)[:150], 20000
    x = np.sqrt(0.5**2 + grid[0] ** 2) * jax.random.normal(key, (n,))
    end = samplers.solve([(gaussian(0.5), grid)], x, method="ancestral", noise=unit_noise(1, (n,)))
    assert float(jnp.var(end)) == pytest.approx(0.5**2 + grid[-1] ** 2, rel=0.05)
    # the end state does not depend on the start, unlike that of the deterministic solvers
    low = samplers.solve(
        [(gaussian(0.5), EDM().grid(100))], 80 * jax.random.normal(key, (n,)),
        method="ancestral", noise=unit_noise(2, (n,)),
    )  # fmt: skip
    assert abs(np.corrcoef(low, x)[0, 1]) < 0.05 and float(jnp.std(low)) == pytest.approx(0.5, 0.1)


@pytest.mark.parametrize("method", ["heun", "euler", "ancestral"])
def test_segments_of_one_denoiser_are_one_segment(method, key):
    D, grid = gaussian(0.5), EDM().grid(12)
    x = 80 * jax.random.normal(key, (2, 3))
    options = {"method": method}
    if method == "ancestral":
        options["noise"] = unit_noise(0, (2, 3))
    whole = samplers.solve([(D, grid)], x, **options)
    parts = [(D, part) for part in samplers.split_grid(grid, [4, 9])]
    np.testing.assert_array_equal(samplers.solve(parts, x, **options), whole)


def test_each_segment_calls_its_own_denoiser_in_both_directions():
    """The denoisers record which of them was called, and at which level."""
    calls = []

    def expert(index):
        def record(sigma):
            calls.append((index, float(sigma)))

        def denoise(x, sigma):
            jax.debug.callback(record, sigma, ordered=True)
            return x * 0

        return denoise

    grid = noise.karras_grid(7)
    for direction in (grid, grid[::-1]):
        parts = samplers.split_grid(direction, [3])
        calls.clear()
        samplers.solve([(expert(i), p) for i, p in enumerate(parts)], jnp.ones((1,)))
        jax.effects_barrier()
        expected = [
            (i, s) for i, part in enumerate(parts) for step in zip(part, part[1:]) for s in step
        ]
        np.testing.assert_allclose(calls, expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["heun", "euler"])
@pytest.mark.parametrize("grid", [EDM().grid(4), EDM().inversion_grid(4)])
def test_a_sampler_makes_as_many_network_calls_as_nfe_says(method, grid):
    calls = []

    def D(x, sigma):
        jax.debug.callback(lambda: calls.append(1))
        return gaussian(0.5)(x, sigma)

    jax.block_until_ready(samplers.solve([(D, grid)], jnp.ones((1,)), method=method))
    jax.effects_barrier()
    assert len(calls) == samplers.nfe(grid, method)


def test_network_calls_are_counted():
    assert samplers.nfe(EDM().inversion_grid(40)) == 78
    assert samplers.nfe(EDM().grid(40)) == 79
    assert samplers.nfe(EDM().grid(40), "euler") == 40
    assert [samplers.nfe(p) for p in samplers.split_grid(EDM().grid(10), [5])] == [10, 9]


def test_last_step_to_zero_returns_the_estimate_and_clip_bounds_it():
    x = jnp.array([4.0, -0.3])
    D = gaussian(1.0)
    np.testing.assert_allclose(samplers.solve([(D, [0.5, 0.0])], x), D(x, 0.5), rtol=1e-6)
    np.testing.assert_allclose(
        samplers.solve([(D, [0.5, 0.0])], x, clip=True), jnp.clip(D(x, 0.5), -1, 1), rtol=1e-6
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
        samplers.solve(segments, jnp.ones(1))


def test_unknown_methods_and_bad_cuts_are_refused():
    with pytest.raises(ValueError, match="unknown solver"):
        samplers.solve([(None, [1.0, 0.5])], jnp.ones(1), method="rk4")
    with pytest.raises(ValueError, match="'ancestral' without noise"):
        samplers.solve([(None, [1.0, 0.5])], jnp.ones(1), method="ancestral")
    with pytest.raises(ValueError, match="'heun' with noise"):
        samplers.solve([(None, [1.0, 0.5])], jnp.ones(1), noise=unit_noise(0, (1,)))
    with pytest.raises(ValueError, match="cannot invert"):
        samplers.solve([(None, [0.5, 1.0])], jnp.ones(1), method="ancestral", noise=unit_noise)
    with pytest.raises(ValueError, match="nodes"):
        samplers.split_grid(noise.karras_grid(5), [4])
