"""Self-cascade without tuning: closed forms on Gaussian data, invariances, costs and refusals.

The denoiser of a stage is a function, so most tests give it one whose answer is known.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion import denoiser, pivot, process
from cheapscale.models.unet import unet
from cheapscale.stages.cascade_sampler import (
    cascade_cost,
    cascade_plan,
    cascade_sampler,
    frozen_teacher,
    network_calls,
    scale_noise,
)
from cheapscale.stages.networks import complete
from cheapscale.stages.sampling import levels, prior, sample
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.sharding import make_mesh


@pytest.fixture(autouse=True)
def one_device():
    """Programs for one device compile faster than those for eight; one test takes all."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


UNET = {"resolution": 8, "channels": 8, "channel_mult": (1,), "attention": (8,), "num_blocks": 1,
        "groups": 4, "num_classes": 3}  # fmt: skip
EDM = {"process": "edm", "prediction": "x0", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0,
       "sigma_data": 0.5}  # fmt: skip
VP = EDM | {"process": "scaled_linear", "prediction": "eps", "sigma_min": 0.03, "sigma_max": 14.0}


def teacher(params=None, diffusion=EDM, label_dropout=0.1, **fields):
    meta = {
        "stage": "pretrain",
        "networks": {"net": complete(UNET | fields)},
        "diffusion": diffusion,
        "config": {"pretrain": {"label_dropout": label_dropout}},
    }
    return Loaded(params or {}, meta, 0, "nowhere")


# no weights: what it denoises with is given
GREY = teacher(in_channels=1, out_channels=1, channel_mult=(1, 2), num_classes=0)


def whole(make):
    """A stage's denoiser from one that owns its whole grid."""

    def denoiser(params, pivot, label, grid):
        return [(make(params, pivot, label), grid)]

    return denoiser


def spectrum(side):
    """Variance of each (orthonormal) Fourier coefficient of Gaussian images side x side; the
    pixels' standard deviation is about 0.1, so that nothing is ever clamped."""
    f = np.fft.fftfreq(side) * side
    return 0.3 / (1 + f[:, None] ** 2 + f[None] ** 2) ** 1.5 * (side / 8) ** 2


@whole
def gaussian(params, pivot, label):
    """The exact denoiser of that data at whatever size it is called."""

    def D(x, sigma):
        S = jnp.asarray(spectrum(x.shape[1]), x.dtype)[None, :, :, None]
        return jnp.fft.ifft2(jnp.fft.fft2(x, axes=(1, 2)) * S / (S + sigma**2), axes=(1, 2)).real

    return D


def gain(S, grid):
    """What Heun's steps along a grid multiply a coefficient by, exactly."""
    total = np.ones_like(S)
    for s, t in zip(grid, grid[1:]):
        slope = s / (S + s**2)
        euler = 1 + (t - s) * slope
        total *= 1 + (t - s) / 2 * (slope + t / (S + t**2) * euler) if t > 0 else euler
    return total


def bilinear(small, large):
    """[large, small]: pixel centres at half integers, the border held."""
    at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    low = np.minimum(at.astype(int), small - 2)
    U = np.zeros((large, small))
    U[np.arange(large), low], U[np.arange(large), low + 1] = 1 - (at - low), at - low
    return U


def fourier(x):
    return np.fft.fft2(np.asarray(x, np.float64)[..., 0], norm="ortho")


def test_each_sample_of_gaussian_data_is_the_closed_form():
    """Two stages, 8 -> 16 -> 32, in float64 from the noise alone."""
    plan = cascade_plan(GREY.meta, "2x,4x", k=("t0.7", "sigma0.5"), steps=18)
    ids = np.arange(3, 7)
    scales, _ = cascade_sampler(GREY, plan, denoisers=[gaussian] * 3, seed=5).draw(ids)
    shapes = [(side, side, 1) for side in (8, 16, 32)]
    assert [images.shape[1:] for images in scales] == shapes
    noise = [
        np.asarray(scale_noise(r, ids, seeds=(5, 5, 5), shapes=shapes, coupled=False))
        for r in range(3)
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
    """Variance of every frequency: what the pivot brings and what noise and network add. From the
    top it is that of direct sampling; from near 0 that of the resized pivot."""
    n = 1200
    plan = cascade_plan(GREY.meta, "2x", k=(k,), steps=12)
    sampler = cascade_sampler(GREY, plan, denoisers=[gaussian] * 2, batch_size=n)
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
        np.testing.assert_allclose(direct, images, atol=0.02)  # the same noise: a paired baseline
        assert np.abs(np.mean(np.abs(fourier(direct)) ** 2, 0) / expected - 1).max() < 0.2
    if k == "sigma0.05":
        assert np.abs(expected[:3, :3] / of_y[:3, :3] - 1).max() < 0.05


def test_k_towards_0_returns_the_resized_pivot_and_0_runs_nothing():
    pivots = np.asarray(0.1 * jax.random.normal(jax.random.key(2), (2, 8, 8, 1)))
    for k, atol, calls in (("sigma0.002", 0.01, 1), ("sigma0", 1e-6, 0)):
        plan = cascade_plan(GREY.meta, "2x", k=(k,), pivot_size=(8, 8))
        sampler = cascade_sampler(GREY, plan, denoisers=[None, gaussian])
        (given, images), _ = sampler.draw(np.arange(2), pivots=pivots)
        np.testing.assert_array_equal(given, pivots)
        np.testing.assert_allclose(images, pivot.resize(pivots, (16, 16)), atol=atol)
        assert network_calls(plan) == ((0, calls), 79)


@whole
def shrinking(params, pivot, label):
    """A denoiser that hears its label and works pixel by pixel."""
    by_label = 1 + 0.1 * label.astype(jnp.float32)[:, None, None, None]
    return lambda x, sigma: jnp.tanh(x) * by_label / (by_label + sigma**2)


@whole
def standing(params, pivot, label):
    """D(x) = x: nothing moves, and a stage returns the state it started from."""
    return lambda x, sigma: x


def test_the_law_of_the_restart_noise_through_the_whole_stage():
    n, plan = 4000, cascade_plan(GREY.meta, "2x", k=("sigma0.12",), pivot_size=(4, 4))
    pivots = np.broadcast_to(np.linspace(-0.3, 0.3, 16).reshape(1, 4, 4, 1), (n, 4, 4, 1))
    sampler = cascade_sampler(GREY, plan, denoisers=[None, standing], batch_size=n, coupled=True)
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
    plan = cascade_plan(GREY.meta, "2x,6x", k=("sigma0.15",), pivot_size=(4, 6))
    ids, zero = np.arange(5, 8), np.zeros((3, 4, 6, 1), np.float32)
    sampler = cascade_sampler(
        GREY, plan, denoisers=[None, standing, standing], seed=2, coupled=True
    )
    _, first, second = sampler.draw(ids, pivots=zero)[0]
    sigma = plan.restarts[0][0]
    n1 = first / sigma
    np.testing.assert_allclose(
        2 * pivot.block_mean(n1, (4, 6)), prior(2, ids, (4, 6, 1), 1.0), atol=1e-4
    )
    n2 = (second - np.asarray(pivot.resize(first, (24, 36)))) / sigma
    np.testing.assert_allclose(3 * pivot.block_mean(n2, (8, 12)), n1, atol=1e-4)
    with pytest.raises(ValueError, match="12x12 px are no whole multiple of 8x8"):
        bad = cascade_plan(GREY.meta, "1.5x")
        cascade_sampler(GREY, bad, coupled=True)


@pytest.fixture(scope="module")
def real_teacher():
    """A U-Net with weights that do something, without compiling its initialisation."""
    net, rng = unet(**UNET), np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda key: net.init(key, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), label=jnp.zeros(1, int)),
        jax.random.key(0),
    )
    fill = lambda s: rng.normal(0.02, 0.1, s.shape).astype(np.float32)  # noqa: E731
    return teacher(jax.tree.map(fill, shapes["params"]))


def test_at_one_times_from_the_top_it_is_plain_sampling_bit_for_bit(real_teacher):
    ids = np.array([4, 0, 9])
    options = {"seed": 3, "batch_size": 3}
    base = cascade_plan(real_teacher.meta, "1x", k=("sigma0",), steps=5)
    images, labels = sample(real_teacher, ids, steps=5, **options)
    scales, same_labels = cascade_sampler(real_teacher, base, **options).draw(ids)
    np.testing.assert_array_equal(scales[0], images)
    np.testing.assert_array_equal(same_labels, labels)
    # without a pivot, a stage from the top is plain sampling of its own noise
    given = cascade_plan(real_teacher.meta, "1x", k=("sigma80",), steps=5, pivot_size=(8, 8))
    np.testing.assert_array_equal(given.restarts[0], levels(EDM, 5, "sample"))
    sampler = cascade_sampler(real_teacher, given, **options)
    stage = sampler.draw(ids, labels, np.zeros((3, 8, 8, 3), np.float32))[0][1]
    np.testing.assert_array_equal(stage, sampler.direct(ids, labels)[0])
    assert np.abs(stage - images).max() > 0.1  # its own: not the base's


def test_the_frozen_teacher_runs_on_any_canvas_with_guidance(real_teacher):
    """16 x 24 px from a network of 8: the conditional and the unconditional estimate, weighed."""
    x = jax.random.normal(jax.random.key(1), (2, 16, 24, 3))
    label = jnp.array([1, 2])

    @jax.jit
    def all_three(params):
        def D(w, y):
            ((denoise, _),) = frozen_teacher(complete(UNET), EDM, w)(params, None, y, None)
            return denoise(x, 0.7)

        return D(2.5, label), D(1.0, label), D(0.0, label)

    guided, conditional, null = all_three(real_teacher.params)
    np.testing.assert_allclose(guided, null + 2.5 * (conditional - null), rtol=1e-4, atol=1e-5)
    assert np.abs(conditional - null).max() > 1e-3


LABELLED = teacher(in_channels=1, out_channels=1)


def test_image_i_depends_on_the_seed_and_i_alone():
    """Not on the batch, the company or the devices."""
    plan = cascade_plan(LABELLED.meta, "2x,3x", steps=8)

    def draw(ids, batch_size, **options):
        options |= {"denoisers": [shrinking] * 3, "batch_size": batch_size}
        return cascade_sampler(LABELLED, plan, **options).draw(ids)

    some = np.array([9, 2, 5])
    few, few_labels = draw(some, 2)
    assert len(jax.devices()) == 8
    with jax.set_mesh(make_mesh()):
        scales, labels = draw(np.arange(11), 8)
    np.testing.assert_array_equal(few_labels, labels[some])
    for a, b in zip(scales, few):
        np.testing.assert_allclose(a[some], b, rtol=1e-5, atol=1e-6)
    # each stage has a seed of its own: the second changes the second alone
    other, _ = draw(some, 2, stage_seeds=(0, 1))
    np.testing.assert_array_equal(other[0], few[0])
    np.testing.assert_array_equal(other[1], few[1])
    assert np.abs(other[2] - few[2]).max() > 0.1


def test_a_stage_is_told_the_clean_pivot_once_and_compiles_once():
    calls = []

    @whole
    def follow(params, clean, label):
        calls.append(None if clean is None else clean.shape)
        target = 1.5 if clean is None else pivot.resize(clean, (2 * clean.shape[1],) * 2) + params
        return lambda x, sigma: jnp.broadcast_to(target, x.shape)

    plan = cascade_plan(GREY.meta, "2x,4x", steps=6)
    loaded = GREY._replace(params=jnp.float32(-0.75))
    sampler = cascade_sampler(loaded, plan, denoisers=[follow] * 3, batch_size=8)
    for start in (0, 20):
        scales, _ = sampler.draw(np.arange(start, start + 12))
        for r, images in enumerate(scales):
            # what is returned is clamped, what is handed on is not
            np.testing.assert_allclose(images, min(1.0, 1.5 - 0.75 * r), atol=1e-6)
    assert calls == [None, (8, 8, 8, 1), (8, 16, 16, 1)]


def test_the_same_k_gives_the_same_images_under_every_schedule():
    """Gaussian data, whose eps-prediction is known under each: same SNR, same restart, same end."""

    def eps_denoiser(schedule):
        table = jnp.asarray(np.log(schedule.sigmas), jnp.float32)

        def F(x, time):
            sigma = jnp.exp(jnp.interp(time, jnp.arange(1000.0), table))
            return x * process.over_pixels(
                sigma * jnp.sqrt(1 + sigma**2) / (0.04 + sigma**2), x
            )  # eps = (x_edm - D) / sigma, D = 0.04 / (0.04 + sigma^2) x_edm

        D = denoiser.vp_denoiser(F, schedule, "eps")
        return whole(lambda params, pivot, label: D)

    @whole
    def edm_denoiser(params, pivot, label):
        return lambda x, sigma: 0.04 / (0.04 + sigma**2) * x

    ends = {}
    for name in ("edm", "linear", "scaled_linear", "cosine"):
        loaded = teacher(
            diffusion=VP | {"process": name}, in_channels=1, out_channels=1, num_classes=0
        )
        plan = cascade_plan(loaded.meta, "2x", k=("snr-10.4dB",), steps=10)
        by_time = cascade_plan(loaded.meta, "2x", k=("t0.7",), steps=10)
        np.testing.assert_array_equal(plan.restarts[0], by_time.restarts[0])
        D = edm_denoiser if name == "edm" else eps_denoiser(process.vp_schedule(name))
        ends[name] = cascade_sampler(loaded, plan, denoisers=[D] * 2).draw(np.arange(4))[0][1]
    for name in ends:
        np.testing.assert_allclose(ends[name], ends["edm"], atol=2e-4)
    assert np.std(ends["edm"]) > 0.1


def test_the_kernel_and_the_space_reach_the_pivot():
    pivots = np.asarray(1.2 * np.sign(jax.random.normal(jax.random.key(0), (2, 4, 4, 1))))
    plan = cascade_plan(GREY.meta, "2x", k=("sigma0",), pivot_size=(4, 4))

    def drawn(**options):
        sampler = cascade_sampler(GREY, plan, denoisers=[None, standing], **options)
        return sampler.draw(np.arange(2), pivots=pivots)[0][1]

    for kernel in ("nearest", "bicubic"):
        expected = np.clip(pivot.resize(pivots, (8, 8), kernel), -1, 1)
        np.testing.assert_allclose(drawn(kernel=kernel), expected, atol=1e-6)
    # as an image the pivot is within [-1, 1] before it is resized, in the model's units it is not
    expected = pivot.resize(np.clip(pivots, -1, 1), (8, 8))
    np.testing.assert_allclose(drawn(space="image"), expected, atol=1e-6)
    assert np.abs(drawn() - drawn(space="image")).max() > 0.05


def test_calls_and_flops_are_those_of_the_papers_model(real_teacher):
    """50 DDIM steps at the base and round(50 K/T) = 35 beyond it; 1/C + K/T of direct sampling."""
    loaded = real_teacher._replace(meta=real_teacher.meta | {"diffusion": VP})
    plan = cascade_plan(loaded.meta, "2x", steps=50, spacing="leading")
    cost = cascade_cost(loaded, plan, method="euler", batch_size=2)
    base, stage = cost["scales"]
    assert (base["nfe"], stage["nfe"], cost["direct"]["nfe"]) == (50, 35, 50)
    assert (base["size"], stage["size"]) == ((8, 8), (16, 16))
    C = stage["flops_per_call"] / base["flops_per_call"]
    assert 4 < C < 16  # convolutions and attention
    assert cost["flops_ratio"] == pytest.approx(1 / C + 0.7)
    assert cost["flops_per_image"] == 50 * base["flops_per_call"] + 35 * stage["flops_per_call"]
    assert network_calls(plan, method="euler", cfg_scale=3.0) == ((100, 70), 100)
    # Heun on Karras levels: two calls a step but the last, in the tail as in the full run
    karras = cascade_plan(loaded.meta, "2x,4x", k=("sigma2", "sigma0"), steps=20)
    tail = len(karras.restarts[0]) - 1
    assert network_calls(karras) == ((39, 2 * tail - 1, 0), 39)


@pytest.mark.parametrize("cascade, size, pixels", [("2x", (8, 8), 4), ("16x32", (8, 16), 4)])
def test_k_in_blocks_counts_the_pixels_that_a_stage_adds(cascade, size, pixels):
    """The SNR of means over blocks of n pixels is n times the pixels'."""
    plans = [
        cascade_plan(GREY.meta, cascade, k=(k,), steps=400, pivot_size=size).restarts[0]
        for k in ("block-4.4dB", f"snr{-4.4 - 10 * np.log10(pixels):.6f}dB", "snr-4.4dB")
    ]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert plans[0][0] > 1.5 * plans[2][0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cascade": "1.125x"}, "scale 1.125x of 8x8 px is 9x9 px, .* stride 2"),
        ({"cascade": "17x32"}, "target is 17x32 px, but .* stride 2"),
        ({"cascade": "4x,2x"}, "do not increase"),
        ({"k": ("sigma90",)}, "sigma 90 .* above the 80"),
        ({"k": ("sigma0.0001",)}, "below every level"),
        ({"k": ("0.7",)}, "K '0.7' is unreadable"),
        ({"k": ("t0.7", "t0.6")}, "2 values of K .* for 1 stages"),
        ({"spacing": "leading"}, "this teacher's process is edm"),
        ({"spacing": "even"}, "unknown spacing 'even'"),
        ({"pivot_size": (4, 8), "cascade": "16x16"}, "pivot of 4x8 would be stretched"),
        (
            {"pivot_size": (200, 300)},
            "200x300 px is more than 16 times the 8 px .*pivot_resolution",
        ),
        ({"cascade": "100000x100000"}, "100000x100000 px is more than 128 times the 8 px"),
    ],
)
def test_plans_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        cascade_plan(GREY.meta, **({"cascade": "2x"} | change))


def test_a_one_step_generator_is_refused():
    meta = {"stage": "distill", "networks": {"generator": complete(UNET)}, "diffusion": EDM}
    with pytest.raises(ValueError, match="runs a diffusion teacher, .* distill run's generator"):
        cascade_plan(meta, "2x")


def test_options_and_conditions_that_do_not_fit_are_refused_before_anything_runs():
    plan = cascade_plan(LABELLED.meta, "2x")
    refuse = functools.partial(pytest.raises, ValueError)
    with refuse(match="trained without label dropout"):
        cascade_sampler(teacher(label_dropout=0.0), plan, cfg_scale=2.0)
    with refuse(match="unknown resize kernel 'area'"):
        cascade_sampler(LABELLED, plan, kernel="area")
    with refuse(match="space 'latent'"):
        cascade_sampler(LABELLED, plan, space="latent")
    with refuse(match="2 stage seeds for 1 stages"):
        cascade_sampler(LABELLED, plan, stage_seeds=(1, 2))
    with refuse(match="3 denoisers for 2 scales"):
        cascade_sampler(LABELLED, plan, denoisers=[standing] * 3)
    never = [None, None]  # would fail if it were called
    sampler = cascade_sampler(LABELLED, plan, denoisers=never)
    with refuse(match="label 3 is out of range"):
        sampler.draw(np.arange(2), [0, 3])
    with refuse(match=r"pivots of shape \(2, 8, 8, 1\) were given, .* ask for None"):
        sampler.draw(np.arange(2), pivots=np.zeros((2, 8, 8, 1)))
    given = cascade_plan(LABELLED.meta, "2x", pivot_size=(6, 6))
    sampler = cascade_sampler(LABELLED, given, denoisers=never)
    with refuse(match="3 classes, but the pivots have no labels"):
        sampler.draw(np.arange(2), pivots=np.zeros((2, 6, 6, 1)))
    for pivots in (None, np.zeros((2, 8, 8, 1)), np.zeros((3, 6, 6, 1))):
        with refuse(match=r"ask for \(2, 6, 6, 1\)"):
            sampler.draw(np.arange(2), [0, 1], pivots)
