"""Baselines: each equals the teacher at the trained size; closed forms at larger sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.cascade.baselines import BASELINES, baseline_denoiser, starts, windowed
from cheapscale.cascade.plan import cascade_plan, restart_sigma, schedule_shift
from cheapscale.cascade.sample import make_cascade
from cheapscale.diffusion.denoiser import preconditioning
from cheapscale.diffusion.noise import vp_schedule
from cheapscale.models.layers import Conv
from cheapscale.models.unet import ResBlock, plan, unet
from cheapscale.teacher.experts import join
from cheapscale.training.mesh import make_mesh
from tests.cascade.toys import UNET, VP, teacher, weights

GRID = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.0])
HEADS = {"attention": (4,)}
LABEL = jnp.array([0, 2])


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def test_at_the_trained_size_each_is_the_teacher_and_beyond_it_is_not():
    model = teacher(**HEADS)

    @jax.jit
    def estimates(model, x):
        size = x.shape[1:3]
        made = [baseline_denoiser(name, model, size) for name in BASELINES]
        first = [denoiser(model, None, LABEL, GRID)[0][0](x, 1.3) for denoiser in made]
        return model.denoise(x, 1.3, LABEL), first

    small, large = (jax.random.normal(jax.random.key(0), (2, side, side, 3)) for side in (8, 16))
    plain, ours = estimates(model, small)
    for name, found in zip(BASELINES, ours):
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6, err_msg=name)
    plain, ours = estimates(model, large)
    for name, found in zip(BASELINES, ours):
        assert found.shape == plain.shape and np.abs(found - plain).max() > 3e-5, name
    with pytest.raises(ValueError, match="unknown baseline 'fourier': choose one of attention"):
        baseline_denoiser("fourier", model, (16, 16))


def test_a_block_with_steady_entropy_has_sharper_queries():
    """At 4 x 4 positions, a block trained at 2 x 2 multiplies q by sqrt(log 16 / log 4)."""
    (plain,) = (b for b in plan(unet(**UNET | HEADS).config) if b.name == "enc_4_block0")
    block = dataclasses.replace(plain, resolution=2)
    params = weights(**HEADS)["enc_4_block0"]
    x, emb = (
        jax.random.normal(jax.random.key(i), s) for i, s in ((0, (1, 4, 4, 16)), (1, (1, 32)))
    )
    x = x[..., : block.in_channels]

    def run(params, steady):
        net = ResBlock(block, (1.0, "fan_in"), 0.0, entropy_scaling=steady)
        return jax.jit(lambda p: net.apply({"params": p}, x, emb, False))(params)

    sharper = jax.tree.map(np.copy, params)
    sharper["qkv"]["kernel"][:, : block.qk] *= np.sqrt(2)
    sharper["qkv"]["bias"][: block.qk] *= np.sqrt(2)
    np.testing.assert_allclose(run(params, True), run(sharper, False), rtol=1e-4, atol=1e-5)
    assert np.abs(run(params, True) - run(params, False)).max() > 1e-4


def test_a_set_of_experts_has_no_single_network_to_change():
    one = teacher({})
    both = join(one.meta, "base", [1.0], [one, one])
    with pytest.raises(ValueError, match="baseline 'attention' changes one network"):
        make_cascade(both, "2x", baseline="attention")
    with pytest.raises(ValueError, match="two methods for the same canvas"):
        make_cascade(one, "2x", baseline="attention", tuned=["somewhere"])


def test_a_dilated_convolution_is_the_plain_one_on_every_second_pixel():
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    kernel = {"kernel": jax.random.normal(jax.random.key(1), (3, 3, 3, 4))}
    plain, dilated = (Conv(4, use_bias=False, kernel_dilation=d) for d in (1, 2))
    whole = dilated.apply({"params": kernel}, x)
    assert whole.shape == (1, 8, 8, 4)
    for i in range(2):
        for j in range(2):
            part = plain.apply({"params": kernel}, x[:, i::2, j::2])
            np.testing.assert_allclose(whole[:, i::2, j::2], part, rtol=1e-4, atol=1e-5)


def test_dilation_takes_the_steps_from_above_its_boundary():
    model = teacher()
    boundary = restart_sigma("t0.6", model)  # 2.28
    assert GRID[1] > boundary > GRID[2]
    dilated = baseline_denoiser("dilated", model, (16, 16))
    segments = dilated(model, None, LABEL, GRID)
    np.testing.assert_array_equal(segments[0][1], GRID[:3])
    np.testing.assert_array_equal(segments[1][1], GRID[2:])
    ((D, only),) = dilated(model, None, LABEL, GRID[2:])
    np.testing.assert_array_equal(only, GRID[2:])  # a restart below it is not dilated
    ((_, all_above),) = dilated(model, None, LABEL, np.array([5.0, 3.0, 0.0]))
    np.testing.assert_array_equal(all_above, [5.0, 3.0, 0.0])
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    late, plain = jax.jit(lambda x: (D(x, 0.7), model.denoise(x, 0.7, LABEL)))(x)
    np.testing.assert_array_equal(late, plain)


def test_the_shifted_schedule_keeps_the_base_snr_in_block_means():
    """At twice the side, levels are doubled: the mean of 4 pixels has the base's noise. The network
    is conditioned on the base's level, while c_skip, c_out and c_in follow the actual level."""
    model = teacher({})
    plain, shifted = (
        cascade_plan(model, "2x", steps=6, pivot_size=(8, 8), shifted=s) for s in (False, True)
    )
    np.testing.assert_allclose(shifted.direct, 2 * plain.direct)
    np.testing.assert_array_equal(shifted.grid, plain.grid)  # the base's grid
    assert shifted.restarts[0][0] <= 3.33 and schedule_shift(model, (16, 32)) == 8**0.5
    given = []

    def F(x, noise):
        given.append(noise)
        return 0.1 * x

    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    D = model.process.denoise(F, x, 3.0, noise_shift=2.0)
    np.testing.assert_allclose(given[0], np.log(1.5) / 4, rtol=1e-6)
    c_skip, c_out, c_in = preconditioning(3.0, 0.5)
    np.testing.assert_allclose(D, c_skip * x + c_out * 0.1 * c_in * x, rtol=1e-6)
    teacher({}, VP).process.denoise(F, x, 3.0, noise_shift=2.0)
    np.testing.assert_allclose(given[1], vp_schedule("linear").time_of_sigma(1.5), rtol=1e-5)


def test_windows_are_refused_where_none_fits_before_anything_is_sampled():
    with pytest.raises(ValueError, match="canvas of 4x32 px holds no window of the trained 8 px"):
        baseline_denoiser("windows", teacher({}), (4, 32))


def test_windows_cover_the_canvas_and_average_what_overlaps():
    assert starts(8, 8) == [0] and starts(16, 8) == [0, 4, 8] and starts(14, 8) == [0, 4, 6]

    def pointwise(label):
        by_label = label.astype(jnp.float32)[:, None, None, None]
        return lambda x, sigma: jnp.tanh(x) + by_label

    x = jax.random.normal(jax.random.key(0), (2, 12, 16, 3))
    expected = np.tanh(x) + np.array([0, 2]).reshape(2, 1, 1, 1)
    found = windowed(pointwise, LABEL, 8)(x, 1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def mean(label):  # of the window
        return lambda x, s: jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)

    found, x = np.asarray(windowed(mean, LABEL, 8)(x, 1.0)), np.asarray(x)
    windows = {(i, j): x[:, i : i + 8, j : j + 8].mean((1, 2)) for i in (0, 4) for j in (0, 4, 8)}
    np.testing.assert_allclose(found[:, 0, 0], windows[0, 0], atol=1e-6)
    four = sum(windows[i, j] for i in (0, 4) for j in (0, 4)) / 4
    np.testing.assert_allclose(found[:, 5, 6], four, atol=1e-6)
