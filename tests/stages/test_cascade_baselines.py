"""Baselines of self-cascade: what each is at the trained size, and its arithmetic beyond it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion import denoiser, process
from cheapscale.diffusion.pivot import restart_sigma
from cheapscale.models.layers import convolve
from cheapscale.models.unet import ResBlock, plan, unet
from cheapscale.stages.cascade_baselines import BASELINES, baseline, starts, windowed
from cheapscale.stages.cascade_sampler import cascade_plan, frozen_teacher, schedule_shift
from cheapscale.stages.networks import complete
from cheapscale.training.sharding import make_mesh

UNET = complete({"resolution": 8, "channels": 8, "channel_mult": (1, 2), "attention": (4,),
                 "num_blocks": 1, "groups": 4, "num_classes": 3})  # fmt: skip
EDM = {"process": "edm", "prediction": "x0", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0,
       "sigma_data": 0.5}  # fmt: skip
META = {"networks": {"net": UNET}, "diffusion": EDM}
GRID = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.0])
LABEL = jnp.array([0, 2])


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


@functools.cache
def weights():
    net, rng = unet(**UNET), np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda key: net.init(key, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), label=jnp.zeros(1, int)),
        jax.random.key(0),
    )
    fill = lambda s: rng.normal(0.02, 0.25, s.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(fill, shapes["params"])


def estimates(denoisers, x, sigma):
    """What the first segment of each denoiser makes of x: one program."""

    @jax.jit
    def run(x):
        return [d(weights(), None, LABEL, GRID)[0][0](x, sigma) for d in denoisers]

    return run(x)


@pytest.mark.parametrize("name", BASELINES)
def test_at_the_trained_size_each_is_the_teacher_and_beyond_it_is_not(name):
    free = frozen_teacher(UNET, EDM)
    small, large = (jax.random.normal(jax.random.key(0), (2, side, side, 3)) for side in (8, 16))
    ours, plain = estimates([baseline(name, META, (8, 8)), free], small, 1.3)
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
    ours, plain = estimates([baseline(name, META, (16, 16)), free], large, 1.3)
    assert ours.shape == plain.shape and np.abs(ours - plain).max() > 3e-5
    with pytest.raises(ValueError, match="unknown baseline 'fourier': choose one of attention"):
        baseline("fourier", META, (16, 16))


def test_a_block_with_steady_entropy_has_sharper_queries():
    """At 4 x 4 positions of a block that is native at 2 x 2: q times sqrt(log 16 / log 4)."""
    (plain,) = (b for b in plan(unet(**UNET).config) if b.name == "enc_4_block0")
    block = dataclasses.replace(plain, resolution=2)
    params = weights()["enc_4_block0"]
    x, emb = (
        jax.random.normal(jax.random.key(i), s) for i, s in ((0, (1, 4, 4, 16)), (1, (1, 32)))
    )
    x = x[..., : block.in_channels]

    def run(params, steady):
        net = ResBlock(block, (1.0, "fan_in"), 0.0, steady_entropy=steady)
        return jax.jit(lambda p: net.apply({"params": p}, x, emb, False))(params)

    sharper = jax.tree.map(np.copy, params)
    sharper["qkv"]["kernel"][:, : block.qk] *= np.sqrt(2)
    sharper["qkv"]["bias"][: block.qk] *= np.sqrt(2)
    np.testing.assert_allclose(run(params, True), run(sharper, False), rtol=1e-4, atol=1e-5)
    assert np.abs(run(params, True) - run(params, False)).max() > 1e-4


def test_a_set_of_specialists_has_no_single_network_to_change():
    of_set = META | {"diffusion": EDM | {"specialists": {"models": [UNET], "borders": []}}}
    for name in BASELINES:
        with pytest.raises(ValueError, match=f"baseline '{name}' changes one network"):
            baseline(name, of_set, (16, 16))


def test_a_dilated_convolution_is_the_plain_one_on_every_second_pixel():
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    whole = convolve(x, kernel, 2, 2)
    assert whole.shape == (1, 8, 8, 4)
    for i in range(2):
        for j in range(2):
            part = convolve(x[:, i::2, j::2], kernel, 1)
            np.testing.assert_allclose(whole[:, i::2, j::2], part, rtol=1e-4, atol=1e-5)


def test_dilation_owns_the_steps_from_above_its_border():
    border = restart_sigma("t0.6", area_ratio=4, sigma_data=0.5)  # 2.28
    assert GRID[1] > border > GRID[2]
    segments = baseline("dilated", META, (16, 16))(weights(), None, LABEL, GRID)
    np.testing.assert_array_equal(segments[0][1], GRID[:3])
    np.testing.assert_array_equal(segments[1][1], GRID[2:])
    (only,) = baseline("dilated", META, (16, 16))(weights(), None, LABEL, GRID[2:])
    np.testing.assert_array_equal(only[1], GRID[2:])  # a restart below is not dilated at all
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    late = jax.jit(lambda x: (segments[1][0](x, 0.7), plain(x, 0.7)))
    ((plain, _),) = frozen_teacher(UNET, EDM)(weights(), None, LABEL, GRID)
    np.testing.assert_array_equal(*late(x))


def test_the_shifted_schedule_keeps_the_base_snr_in_block_means():
    """Levels times 2 at twice the side: the mean of 4 pixels has the base's noise; the network is
    told the base's level, while skip and scales follow the true one."""
    meta = META | {"stage": "pretrain"}
    plain, shifted = (
        cascade_plan(meta, "2x", steps=6, pivot_size=(8, 8), shifted=s) for s in (False, True)
    )
    np.testing.assert_allclose(shifted.direct, 2 * plain.direct)
    np.testing.assert_array_equal(shifted.grid, plain.grid)  # of the base itself
    assert shifted.restarts[0][0] <= 3.33 and schedule_shift(UNET, (16, 32)) == 8**0.5
    heard = []

    def F(x, noise):
        heard.append(noise)
        return 0.1 * x

    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    D = denoiser.edm(F, 0.5, "edm", noise_shift=2.0)(x, 3.0)
    np.testing.assert_allclose(heard[0], np.log(1.5) / 4, rtol=1e-6)
    c_skip, c_out, c_in = denoiser.preconditioning(3.0, 0.5)
    np.testing.assert_allclose(D, c_skip * x + c_out * 0.1 * c_in * x, rtol=1e-6)
    schedule = process.vp_schedule("linear")
    denoiser.vp_denoiser(F, schedule, "eps", noise_shift=2.0)(x, 3.0)
    np.testing.assert_allclose(heard[1], schedule.time_of_sigma(1.5), rtol=1e-5)


def test_windows_are_refused_where_none_fits_before_anything_is_sampled():
    with pytest.raises(ValueError, match="canvas of 4x32 px holds no window of the trained 8 px"):
        baseline("windows", META, (4, 32))


def test_windows_cover_the_canvas_and_average_what_overlaps():
    assert starts(8, 8) == [0] and starts(16, 8) == [0, 4, 8] and starts(14, 8) == [0, 4, 6]

    def pointwise(params, pivot, label, grid):
        by_label = label.astype(jnp.float32)[:, None, None, None]
        return [(lambda x, sigma: jnp.tanh(x) + by_label, grid)]

    x = jax.random.normal(jax.random.key(0), (2, 12, 16, 3))
    ((D, _),) = windowed(pointwise, 8)(None, None, LABEL, GRID)
    expected = np.tanh(x) + np.array([0, 2]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(D(x, 1.0), expected, rtol=1e-5, atol=1e-6)

    def mean(params, pivot, label, grid):  # of the window it is given
        return [(lambda x, s: jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape), grid)]

    ((D, _),) = windowed(mean, 8)(None, None, LABEL, GRID)
    found = np.asarray(D(x, 1.0))
    x = np.asarray(x)
    windows = {(i, j): x[:, i : i + 8, j : j + 8].mean((1, 2)) for i in (0, 4) for j in (0, 4, 8)}
    np.testing.assert_allclose(found[:, 0, 0], windows[0, 0], atol=1e-6)
    four = sum(windows[i, j] for i in (0, 4) for j in (0, 4)) / 4
    np.testing.assert_allclose(found[:, 5, 6], four, atol=1e-6)
