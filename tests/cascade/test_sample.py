"""Self-cascade without tuning: closed forms on Gaussian data, invariances, costs and refusals.

The denoiser of a stage is a function, so most tests give it one whose answer is known.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.cascade import pivot
from cheapscale.cascade.pivot import scale_noise
from cheapscale.cascade.plan import cascade_plan, network_calls
from cheapscale.cascade.sample import (
    Cascade,
    cascade,
    make_cascade,
    tuning_free,
)
from cheapscale.diffusion import noise as noise_levels
from cheapscale.diffusion.noise import vp_schedule
from cheapscale.teacher.experts import join
from cheapscale.teacher.sampling import prior, sample
from cheapscale.training.mesh import make_mesh
from tests.cascade.toys import GREY, SMALL, VP, teacher, weights


@pytest.fixture(autouse=True)
def one_device():
    """Use one device, for which programs compile faster; one test uses all eight."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def whole(make):
    """A stage's denoiser from one that takes the whole grid."""

    def denoiser(model, pivot, label, grid):
        return [(make(model, pivot, label), grid)]

    return denoiser


def sampler_of(model, plan, denoisers, **options):
    return Cascade(model, plan, denoisers, denoisers[0] or denoisers[1], **options)


def spectrum(side):
    """Variance of each (orthonormal) Fourier coefficient of Gaussian images side x side; the
    pixels' standard deviation is about 0.1, so that no pixel is clamped."""
    f = np.fft.fftfreq(side) * side
    return 0.3 / (1 + f[:, None] ** 2 + f[None] ** 2) ** 1.5 * (side / 8) ** 2


@whole
def gaussian(model, pivot, label):
    """The exact denoiser of that data, at any size."""

    def D(x, sigma):
        S = jnp.asarray(spectrum(x.shape[1]), x.dtype)[None, :, :, None]
        return jnp.fft.ifft2(jnp.fft.fft2(x, axes=(1, 2)) * S / (S + sigma**2), axes=(1, 2)).real

    return D


def gain(S, grid):
    """The exact factor by which Heun's steps along a grid multiply a coefficient."""
    total = np.ones_like(S)
    for s, t in zip(grid, grid[1:]):
        slope = s / (S + s**2)
        euler = 1 + (t - s) * slope
        total *= 1 + (t - s) / 2 * (slope + t / (S + t**2) * euler) if t > 0 else euler
    return total


def bilinear(small, large):
    """[large, small]: linear interpolation, pixel centres at half integers, repeated border."""
    at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    low = np.minimum(at.astype(int), small - 2)
    U = np.zeros((large, small))
    U[np.arange(large), low], U[np.arange(large), low + 1] = 1 - (at - low), at - low
    return U


def fourier(x):
    return np.fft.fft2(np.asarray(x, np.float64)[..., 0], norm="ortho")


def test_each_sample_of_gaussian_data_is_the_closed_form():
    """Two stages, 8 -> 16 -> 32, in float64 from the noise alone."""
    plan = cascade_plan(GREY, "2x,4x", k=("t0.7", "sigma0.5"), steps=18)
    ids = np.arange(3, 7)
    scales, _ = sampler_of(GREY, plan, [gaussian] * 3, seed=5).draw(ids)
    assert [images.shape[1:] for images in scales] == [(s, s, 1) for s in (8, 16, 32)]
    noise = [
        np.asarray(scale_noise(r, ids, seed=5, sizes=plan.sizes, channels=1)) for r in range(3)
    ]
    assert plan.restarts[0][0] <= 3.3205 and plan.restarts[1][0] <= 0.5
    expected = np.fft.ifft2(gain(spectrum(8), plan.grid) * fourier(80 * noise[0]), norm="ortho")
    np.testing.assert_allclose(scales[0][..., 0], expected.real, atol=2e-5)
    for r in (1, 2):
        grid, U = plan.restarts[r - 1], bilinear(4 * 2**r, 8 * 2**r)
        y = np.einsum("ij,njk,lk->nil", U, expected.real, U)[..., None]
        expected = np.fft.ifft2(
            gain(spectrum(8 * 2**r), grid) * fourier(y + grid[0] * noise[r]), norm="ortho"
        )
        np.testing.assert_allclose(scales[r][..., 0], expected.real, atol=2e-5)


@pytest.mark.parametrize("k", ["sigma80", "t0.7", "sigma0.05"])
def test_the_spectrum_of_many_samples_is_the_closed_form(k):
    """Pivot and noise each contribute to the variance of a frequency. A restart from the top gives
    the variance of direct sampling, a restart near 0 that of the resized pivot."""
    n = 1200
    plan = cascade_plan(GREY, "2x", k=(k,), steps=12)
    sampler = sampler_of(GREY, plan, [gaussian] * 2, batch_size=n)
    images = sampler.draw(np.arange(n))[0][1]
    # covariance of the pivots, and of their enlargements' coefficients
    F8, F16 = (np.fft.fft2(np.eye(s * s).reshape(-1, s, s), norm="ortho").reshape(s * s, -1).T
               for s in (8, 16))  # fmt: skip
    at_base = (gain(spectrum(8), plan.grid) * 80).ravel() ** 2
    to_y = F16 @ np.kron(bilinear(8, 16), bilinear(8, 16)) @ F8.conj().T
    of_y = (np.abs(to_y) ** 2 @ at_base).reshape(16, 16)
    grid, S = plan.restarts[0], spectrum(16)
    expected = gain(S, grid) ** 2 * (of_y + grid[0] ** 2)
    found = np.mean(np.abs(fourier(images)) ** 2, axis=0)
    assert np.abs(found / expected - 1).max() < 5.5 * math.sqrt(2 / n)
    assert abs(np.mean(found / expected) - 1) < 0.02
    if k == "sigma80":
        np.testing.assert_allclose(expected, gain(S, plan.grid) ** 2 * 6400, rtol=1e-3)
        direct = sampler.direct(np.arange(n))[0]
        np.testing.assert_allclose(direct, images, atol=0.02)  # direct sampling has the same noise
        assert np.abs(np.mean(np.abs(fourier(direct)) ** 2, 0) / expected - 1).max() < 0.2
    if k == "sigma0.05":
        assert np.abs(expected[:3, :3] / of_y[:3, :3] - 1).max() < 0.05


def test_k_towards_0_returns_the_resized_pivot_and_0_runs_nothing():
    pivots = np.asarray(0.1 * jax.random.normal(jax.random.key(2), (2, 8, 8, 1)))
    for k, atol, calls in (("sigma0.002", 0.01, 1), ("sigma0", 1e-6, 0)):
        plan = cascade_plan(GREY, "2x", k=(k,), pivot_size=(8, 8))
        sampler = sampler_of(GREY, plan, [None, gaussian])
        (given, images), _ = sampler.draw(np.arange(2), pivots=pivots)
        np.testing.assert_array_equal(given, pivots)
        np.testing.assert_allclose(images, pivot.resize(pivots, (16, 16)), atol=atol)
        assert network_calls(plan) == ((0, calls), 79)


@whole
def shrinking(model, pivot, label):
    """A denoiser that depends on its label and treats each pixel alone."""
    by_label = 1 + 0.1 * label.astype(jnp.float32)[:, None, None, None]
    return lambda x, sigma: jnp.tanh(x) * by_label / (by_label + sigma**2)


@whole
def standing(model, pivot, label):
    """D(x) = x does not change the state, so a stage returns its start."""
    return lambda x, sigma: x


def test_the_law_of_the_restart_noise_through_the_whole_stage():
    n, plan = 4000, cascade_plan(GREY, "2x", k=("sigma0.12",), pivot_size=(4, 4))
    pivots = np.broadcast_to(np.linspace(-0.3, 0.3, 16).reshape(1, 4, 4, 1), (n, 4, 4, 1))
    sampler = sampler_of(GREY, plan, [None, standing], batch_size=n, coupled=True)
    z = sampler.draw(np.arange(n), pivots=pivots.astype(np.float32))[0][1]
    sigma = plan.restarts[0][0]
    assert 0.05 < sigma <= 0.12
    y = np.asarray(pivot.resize(pivots[0].astype(np.float32), (8, 8)))
    noise = ((z - y) / sigma).reshape(n, -1)
    assert np.abs(noise.mean(0)).max() < 4.5 / math.sqrt(n)
    covariance = noise.T @ noise / n
    assert np.abs(np.diag(covariance) - 1).max() < 4.5 * math.sqrt(2 / n)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 5 / math.sqrt(n)


def test_coupled_stages_share_their_block_means_down_to_the_base_noise():
    plan = cascade_plan(GREY, "2x,6x", k=("sigma0.15",), pivot_size=(4, 6))
    ids, zero = np.arange(5, 8), np.zeros((3, 4, 6, 1), np.float32)
    sampler = sampler_of(GREY, plan, [None, standing, standing], seed=2, coupled=True)
    _, first, second = sampler.draw(ids, pivots=zero)[0]
    sigma = plan.restarts[0][0]
    n1 = first / sigma
    np.testing.assert_allclose(
        2 * pivot.block_mean(n1, (4, 6)), prior(2, ids, (4, 6, 1), 1.0), atol=1e-4
    )
    n2 = (second - np.asarray(pivot.resize(first, (24, 36)))) / sigma
    np.testing.assert_allclose(3 * pivot.block_mean(n2, (8, 12)), n1, atol=1e-4)
    with pytest.raises(ValueError, match="12x12 px are no whole multiple of 8x8"):
        bad = cascade_plan(GREY, "1.5x")
        sampler_of(GREY, bad, [standing] * 2, coupled=True).draw(ids)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_noise_is_added_with_the_coefficients_of_the_first_time_of_the_tail(name):
    """In VP's units a stage starts from sqrt(a) U z0 + sqrt(1 - a) eps, a = alpha_bar there."""
    schedule, ids = vp_schedule(name), np.arange(3)
    fields = VP | {"process": name, "sigma_min": 0.03, "sigma_max": 14.0}
    model = GREY.replace(process=teacher({}, fields).process)
    plan = cascade_plan(model, "2x", k="t0.7", steps=50, spacing="leading", pivot_size=(4, 4))
    sigma_K = plan.restarts[0][0]
    first = int(round(schedule.time_of_sigma(sigma_K)))
    sigma = vp_schedule("scaled_linear").sigmas[699]
    assert schedule.sigma(first) <= sigma < schedule.sigma(first + 20)
    pivots = np.full((3, 4, 4, 1), 0.1, np.float32)
    sampler = sampler_of(model, plan, [None, standing], method="euler")
    clipped = sampler.draw(ids, pivots=pivots).scales[1]
    eps = scale_noise(1, ids, seed=0, sizes=plan.sizes, channels=1)
    a = schedule.alpha_bar[first]
    z = (np.sqrt(a) * 0.1 + np.sqrt(1 - a) * eps) / np.sqrt(a)
    np.testing.assert_allclose(clipped, np.clip(z, -1, 1), rtol=1e-5, atol=1e-5)


def test_at_one_times_from_the_top_it_is_plain_sampling():
    model, ids = teacher(**SMALL), np.array([4, 0, 9])
    options = {"seed": 3, "batch_size": 3, "steps": 5}
    images, labels = sample(model, ids, **options)
    base = make_cascade(model, "1x", k="sigma0", **options).draw(ids)
    np.testing.assert_array_equal(base.labels, labels)
    np.testing.assert_allclose(base.scales[0], images, atol=2e-5)
    # without a pivot, a stage from the top is plain sampling of its own noise
    given = make_cascade(model, "1x", k="sigma80", pivot_size=(8, 8), **options)
    np.testing.assert_array_equal(given.plan.restarts[0], model.process.grid(5))
    stage = given.draw(ids, labels, np.zeros((3, 8, 8, 3), np.float32)).scales[1]
    np.testing.assert_array_equal(stage, given.direct(ids, labels)[0])
    assert np.abs(stage - images).max() > 0.1  # the stage has other noise than the base


def test_the_teacher_runs_on_any_canvas_with_guidance():
    """Guidance at 16 x 24 px weighs the conditional and the unconditional estimate."""
    x = jax.random.normal(jax.random.key(1), (2, 16, 24, 3))
    label = jnp.array([1, 2])

    @jax.jit
    def all_three(model):
        def D(w):
            ((denoise, _),) = tuning_free(model, None, label, None, cfg_scale=w)
            return denoise(x, 0.7)

        return D(2.5), D(1.0), D(0.0)

    guided, conditional, null = all_three(teacher(**SMALL))
    np.testing.assert_allclose(guided, null + 2.5 * (conditional - null), rtol=1e-4, atol=1e-5)
    assert np.abs(conditional - null).max() > 1e-3


LABELLED = teacher({}, in_channels=1, out_channels=1)


def test_image_i_depends_on_the_seed_and_i_alone(eight_devices):
    """Images depend neither on the batch nor on other images nor on the devices."""
    plan = cascade_plan(LABELLED, "2x,3x", steps=8)

    def draw(ids, batch_size):
        sampler = sampler_of(LABELLED, plan, [shrinking] * 3, batch_size=batch_size)
        return sampler.draw(ids)

    some = np.array([9, 2, 5])
    few, few_labels = draw(some, 2)
    assert len(jax.devices()) == 8
    with jax.set_mesh(make_mesh()):
        scales, labels = draw(np.arange(11), 8)
    np.testing.assert_array_equal(few_labels, labels[some])
    for a, b in zip(scales, few):
        np.testing.assert_allclose(a[some], b, rtol=1e-5, atol=1e-6)
    # two stages, one jump and direct sampling to a size share its noise
    two, one = (cascade_plan(LABELLED, sizes, k="t0.5").sizes for sizes in ("2x,4x", "4x"))
    np.testing.assert_array_equal(
        scale_noise(2, some, seed=1, sizes=two), scale_noise(1, some, seed=1, sizes=one)
    )


def test_a_denoiser_gets_the_clean_pivot_once_and_one_program_serves_all_batches():
    calls = []

    @whole
    def follow(model, clean, label):
        calls.append(None if clean is None else clean.shape)
        target = 1.5
        if clean is not None:
            target = pivot.resize(clean, (2 * clean.shape[1],) * 2) + model.params
        return lambda x, sigma: jnp.broadcast_to(target, x.shape)

    plan = cascade_plan(GREY, "2x,4x", steps=6)
    sampler = sampler_of(GREY.replace(params=jnp.float32(-0.75)), plan, [follow] * 3, batch_size=8)
    for start in (0, 20):
        scales, _ = sampler.draw(np.arange(start, start + 12))
        for r, images in enumerate(scales):
            # returned images are clamped; the pivots of the next stage are not
            np.testing.assert_allclose(images, min(1.0, 1.5 - 0.75 * r), atol=1e-6)
    assert calls == [None, (8, 8, 8, 1), (8, 16, 16, 1)]


def test_the_same_k_gives_the_same_images_under_every_schedule():
    """Gaussian data, whose eps-prediction is known under each: same SNR, same restart, same end."""
    ends, ids = {}, np.arange(4)

    def eps_denoiser(model, pivot, label):
        def F(x, time):
            table = jnp.asarray(np.log(model.process.schedule.sigmas), jnp.float32)
            sigma = jnp.exp(jnp.interp(time, jnp.arange(1000.0), table))
            # eps = (x_edm - D) / sigma with D = 0.04 / (0.04 + sigma^2) x_edm
            eps = sigma * jnp.sqrt(1 + sigma**2) / (0.04 + sigma**2)
            return x * noise_levels.over_pixels(eps, x)

        return functools.partial(model.process.denoise, F)

    def edm_denoiser(model, pivot, label):
        return lambda x, sigma: 0.04 / (0.04 + sigma**2) * x

    for name in ("edm", "linear", "scaled_linear", "cosine"):
        fields = VP | {"process": name, "sigma_min": 0.03, "sigma_max": 14.0}
        model = teacher({}, fields, in_channels=1, out_channels=1, num_classes=0)
        plan = cascade_plan(model, "2x", k="snr-10.4dB", steps=10)
        by_time = cascade_plan(model, "2x", k="t0.7", steps=10)
        np.testing.assert_array_equal(plan.restarts[0], by_time.restarts[0])
        D = whole(edm_denoiser if name == "edm" else eps_denoiser)
        ends[name] = sampler_of(model, plan, [D] * 2).draw(ids).scales[1]
    for name in ends:
        np.testing.assert_allclose(ends[name], ends["edm"], atol=2e-4)
    assert np.std(ends["edm"]) > 0.1


def test_the_kernel_reaches_the_pivot():
    pivots = np.asarray(1.2 * np.sign(jax.random.normal(jax.random.key(0), (2, 4, 4, 1))))
    plan = cascade_plan(GREY, "2x", k="sigma0", pivot_size=(4, 4))
    for kernel in ("nearest", "bicubic"):
        sampler = sampler_of(GREY, plan, [None, standing], kernel=kernel)
        expected = np.clip(pivot.resize(pivots, (8, 8), kernel), -1, 1)
        np.testing.assert_allclose(
            sampler.draw(np.arange(2), pivots=pivots).scales[1], expected, atol=1e-6
        )


def test_on_a_larger_canvas_experts_may_be_chosen_by_the_snr_of_blocks():
    """At twice the side, block means at level sigma have the SNR of sigma / 2: a cleaner expert."""
    one, other = (teacher(weights(seed, **SMALL), **SMALL) for seed in (0, 1))
    sigma_K = cascade_plan(one, "2x", steps=6).restarts[0][0]
    # a boundary between sigma_K / 2 and sigma_K: by block means, the first expert takes all steps
    both = join(one.meta, "base", [0.6 * float(sigma_K)], [one, other])
    pivots, labels = np.full((2, 8, 8, 3), -0.1, np.float32), np.zeros(2, np.int32)

    def draw(model, **options):
        return cascade(model, "2x", num=2, labels=labels, pivots=pivots, steps=6, **options).scales[
            1
        ]

    by_snr, alone = draw(both, expert_rule="snr"), draw(one)
    np.testing.assert_allclose(by_snr, alone, atol=2e-5)
    assert np.abs(draw(both) - alone).max() > 1e-3


def test_options_and_conditions_that_do_not_fit_are_refused_before_anything_runs():
    plan = cascade_plan(LABELLED, "2x")
    refuse = functools.partial(pytest.raises, ValueError)
    never = [None, None]  # would fail if it were called
    with refuse(match="trained without label dropout"):
        sampler_of(teacher({}, label_dropout=0.0), plan, never, cfg_scale=2.0)
    sampler = sampler_of(LABELLED, plan, never)
    with refuse(match="label 3 is out of range"):
        sampler.draw(np.arange(2), [0, 3])
    with refuse(match=r"shapes \[\], but \[\(2, 8, 8, 1\)\] are given"):
        sampler.draw(np.arange(2), pivots=np.zeros((2, 8, 8, 1)))
    given = cascade_plan(LABELLED, "2x", pivot_size=(6, 6))
    sampler = sampler_of(LABELLED, given, never)
    with refuse(match="3 classes, but the pivots have no labels"):
        sampler.draw(np.arange(2), pivots=np.zeros((2, 6, 6, 1)))
    for pivots in (None, np.zeros((2, 8, 8, 1)), np.zeros((3, 6, 6, 1))):
        with refuse(match=r"ask for pivots of the shapes \[\(2, 6, 6, 1\)\]"):
            sampler.draw(np.arange(2), [0, 1], pivots)
