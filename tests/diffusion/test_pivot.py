"""The arithmetic of pivot replacement: sizes, K in every unit, truncated grids, resize, noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cheapscale.diffusion import pivot, process, solvers

# Spec 1.2 and 1.3: R and the sizes on the way. Latents of a 512 px model have 64 px, stride 8.
SIZES = [
    ((512, 512), (1024, 1024), 64, [(512, 512), (1024, 1024)]),
    ((512, 512), (2048, 2048), 64, [(512, 512), (1024, 1024), (2048, 2048)]),
    ((64, 64), (128, 128), 8, [(64, 64), (128, 128)]),
    ((8, 8), (64, 64), 2, [(8, 8), (16, 16), (32, 32), (64, 64)]),
    ((8, 8), (8, 8), 2, [(8, 8)]),
    # pixel ratio 9: the last stage is less than a doubling
    ((8, 8), (24, 24), 2, [(8, 8), (16, 16), (24, 24)]),
    # 3072 x 1536 from 512: ratio 18, R = 3; as many pixels as 512 x 512, and 4 times as many each
    ((512, 512), (1536, 3072), 64, [(384, 704), (704, 1472), (1472, 2880), (1536, 3072)]),
    ((8, 8), (16, 64), 2, [(4, 16), (8, 32), (16, 64)]),
]


@pytest.mark.parametrize("trained, target, stride, sizes", SIZES)
def test_stages_and_their_sizes(trained, target, stride, sizes):
    assert pivot.stage_sizes(trained, target, stride) == tuple(sizes)
    assert pivot.num_stages(trained, target) == len(sizes) - 1


def test_sizes_of_any_target_grow_by_four_and_keep_its_shape():
    rng = np.random.default_rng(0)
    stride = 4
    for target in stride * rng.integers(9, 60, (300, 2)):
        target = tuple(map(int, target))
        ratio = target[0] * target[1] / 32**2
        sizes = pivot.stage_sizes((32, 32), target, stride)
        assert sizes[-1] == target
        assert len(sizes) - 1 == max(0, math.ceil(math.log(ratio, 4) - 1e-9))
        for r, size in enumerate(sizes[:-1]):
            # 4^r times the pixels in the target's shape, rounded by half a stride; by less than a
            # whole one, and downwards, where the nearest would be the target itself
            exact = [side * 2**r / math.sqrt(ratio) for side in target]
            off = [side - ideal for side, ideal in zip(size, exact)]
            assert all(side % stride == 0 for side in size)
            assert max(map(abs, off)) <= stride / 2 or (-stride < min(off) and max(off) <= 0)
        assert all(
            small[0] * small[1] < large[0] * large[1] for small, large in zip(sizes, sizes[1:])
        )


def test_scales_are_per_side_and_cumulative():
    assert pivot.read_sizes("2x,4x", (16, 16), 2) == ((16, 16), (32, 32), (64, 64))
    assert pivot.read_sizes("4x", (16, 16), 2) == ((16, 16), (64, 64))  # one jump
    assert pivot.read_sizes("1x, 1.5x", (16, 8), 4) == ((16, 8), (16, 8), (24, 12))
    assert pivot.read_sizes("32x64", (16, 16), 4) == ((12, 24), (24, 44), (32, 64))


def test_given_images_are_scale_0_whatever_their_size():
    assert pivot.read_sizes("12x36", (6, 18), 4, given=True) == ((6, 18), (12, 36))
    assert pivot.read_sizes("2x", (6, 18), 4, given=True) == ((6, 18), (12, 36))
    # 5 x 15 px enlarged to a width of 32 is 10.7 x 32: the stride makes it 12
    assert pivot.read_sizes("12x32", (5, 15), 4, given=True) == ((5, 15), (12, 28), (12, 32))


@pytest.mark.parametrize(
    "text, start, given, message",
    [
        ("30x32", (8, 8), False, "target is 30x32 px, but .* multiples of its stride 4: 32x32"),
        ("1.25x", (8, 8), False, "scale 1.25x of 8x8 px is 10x10 px, .* stride 4: 12x12"),
        ("1.3x", (8, 8), False, "scale 1.3x of 8x8 px is not a whole number"),
        ("4x,2x", (8, 8), False, "scales 4x, 2x do not increase"),
        ("2x,2x", (8, 8), False, "scales 2x, 2x do not increase"),
        ("0.5x", (8, 8), False, "do not increase from 1x"),
        ("4x4", (8, 8), False, "target 4x4 is not larger than the 8x8"),
        ("8x8", (8, 8), True, "not larger"),
        ("16x32", (8, 8), True, "pivot of 8x8 would be stretched to 16x32"),
        ("2,4", (8, 8), False, "'2,4' names no sizes"),
        ("x", (8, 8), False, "names no sizes"),
        ("12x16", (8, 8), True, "stretched"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(text, start, given, message):
    with pytest.raises(ValueError, match=message):
        pivot.read_sizes(text, start, 4, given=given)


def sigma_of(k, ratio=4.0, sigma_data=0.5):
    return pivot.restart_sigma(k, area_ratio=ratio, sigma_data=sigma_data)


def test_k_means_the_same_noise_in_every_unit_and_for_every_schedule():
    """K = 0.7 T of the scaled-linear schedule: spec 1.4 and 2.2 print its figures."""
    sigma = sigma_of("t0.7")
    assert round(sigma, 2) == 3.32
    assert round(1 / sigma**2, 4) == 0.0907
    assert sigma == process.vp_schedule("scaled_linear").sigmas[699]
    decibels = process.decibels(sigma)
    for same in (
        f"sigma{sigma:.9f}", f"snr{decibels:.9f}dB", f"block{decibels + 10 * np.log10(4):.9f}dB",
        f"sd{2 * sigma:.9f}", "t0.7@scaled_linear",
    ):  # fmt: skip
        assert sigma_of(same) == pytest.approx(sigma, rel=1e-7)
    # the same SNR sits at other times of other schedules
    for name, time in (("linear", 493), ("cosine", 811)):
        at = process.vp_schedule(name).time_of_sigma(sigma)
        assert round(at) == time
        assert sigma_of(f"t{(at + 1) / 1000:.9f}@{name}") == pytest.approx(sigma, rel=1e-6)
    # and the same index is another SNR there
    assert round(1 / sigma_of("t0.7@linear") ** 2, 4) == 0.0070
    assert round(1 / sigma_of("t0.7@cosine") ** 2, 3) == 0.255
    # the block mean over 16 pixels has 12 dB more, wherever the stage is one jump of 4x a side
    assert sigma_of("block0dB", ratio=16) == 4 and sigma_of("block0dB", ratio=2.25) == 1.5
    assert sigma_of("sigma0") == sigma_of("t0") == 0


@pytest.mark.parametrize(
    "k, message",
    [
        ("0.7", "K '0.7' is unreadable"),
        ("snr-10.4", "unreadable"),
        ("t0.7dB", "unreadable"),
        ("sigma3@cosine", "unreadable"),
        ("t1.2", "out of range"),
        ("sigma-1", "out of range"),
        ("t0.7@sigmoid", "unknown VP schedule 'sigmoid'"),
    ],
)
def test_unreadable_k_is_refused(k, message):
    with pytest.raises(ValueError, match=message):
        sigma_of(k)


def test_a_truncated_grid_is_the_tail_of_the_full_one():
    schedule = process.vp_schedule("scaled_linear")
    full, top = schedule.grid(50), schedule.sigmas[-1]
    tail = pivot.restart_grid(full, sigma_of("t0.7"), top)
    np.testing.assert_array_equal(tail, schedule.grid(50, last=699))
    assert tail[0] == schedule.sigmas[681]  # the first time fed to the network, not 700
    np.testing.assert_array_equal(pivot.restart_grid(full, sigma_of("t1"), top), full)
    karras = process.sampling_grid(40)
    tail = pivot.restart_grid(karras, sigma_of("t0.7"), 80.0)
    np.testing.assert_array_equal(tail, karras[-len(tail) :])
    assert tail[0] <= sigma_of("t0.7") < karras[-len(tail) - 1]
    # a level that K equals but for rounding is run
    for level in karras[:-1]:
        k = sigma_of(f"snr{process.decibels(level):.8f}dB")
        assert pivot.restart_grid(karras, k, 80.0)[0] == level
    np.testing.assert_array_equal(pivot.restart_grid(karras, 0.0, 80.0), [0.0])


def test_k_outside_the_schedule_is_refused():
    karras = process.sampling_grid(40)
    with pytest.raises(ValueError, match="K is sigma 157.4 .* above the 80 .* at most sigma80"):
        pivot.restart_grid(karras, sigma_of("t1@linear"), 80.0)
    with pytest.raises(ValueError, match="below every level .* last is 0.002"):
        pivot.restart_grid(karras, 0.001, 80.0)


@pytest.mark.parametrize("method", ["heun", "euler"])
def test_the_tail_ends_as_the_full_run_does_from_the_same_state(method, key):
    """Not one call is lost or moved where the grid is cut: the last bits agree."""
    full = process.sampling_grid(12)
    tail = pivot.restart_grid(full, sigma_of("t0.7"), 80.0)

    def D(x, sigma):
        return jnp.tanh(x) / (1 + sigma**2)

    x = 80 * jax.random.normal(key, (4, 3))
    state = solvers.solve([(D, full[: len(full) - len(tail) + 1])], x, method=method)
    # on the way, Heun's step to the first level of the tail ends with its corrector
    np.testing.assert_array_equal(
        solvers.solve([(D, tail)], state, method=method),
        solvers.solve([(D, full)], x, method=method),
    )


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_noise_is_added_with_the_coefficients_of_the_first_time_fed(name, key):
    schedule = process.vp_schedule(name)
    tail = pivot.restart_grid(schedule.grid(50), sigma_of("t0.7"), schedule.sigmas[-1])
    first = int(round(schedule.time_of_sigma(tail[0])))
    y, eps = jax.random.normal(key, (2, 3, 4, 4, 1))
    a = schedule.alpha_bar[first]
    np.testing.assert_allclose(
        process.to_vp(pivot.renoise(y, tail[0], eps), tail[0]),
        np.sqrt(a) * y + np.sqrt(1 - a) * eps,
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    assert schedule.sigma(first) <= sigma_of("t0.7") < schedule.sigma(first + 20)


def test_resizing_keeps_constants_and_ramps_and_agrees_with_pillow(key):
    x = np.asarray(jax.random.normal(key, (2, 5, 6, 3)))
    pillow = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
              "lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}  # fmt: skip
    size = (10, 14)  # 2 and 7/3 times: no tie between neighbours
    for kernel in pivot.KERNELS:
        y = np.asarray(pivot.resize(x, size, kernel))
        assert y.shape == (2, *size, 3)
        constant = pivot.resize(np.full((1, 5, 6, 3), 0.3, np.float32), size, kernel)
        np.testing.assert_allclose(constant, 0.3, atol=1e-6)
        plane = Image.fromarray(x[1, :, :, 2]).resize(size[::-1], pillow[kernel])
        np.testing.assert_allclose(y[1, :, :, 2], np.asarray(plane), atol=2e-6)
        np.testing.assert_array_equal(pivot.resize(x, (5, 6), kernel), x)
    ramp = np.broadcast_to(np.arange(6, dtype=np.float32)[None, :, None], (5, 6, 1))
    inside = pivot.resize(ramp, (10, 12), "bilinear")[3, 1:-1, 0]
    np.testing.assert_allclose(inside, (np.arange(1, 11) + 0.5) / 2 - 0.5, atol=1e-6)
    # frames of a video are resized one by one
    np.testing.assert_allclose(pivot.resize(x[None], size)[0], pivot.resize(x, size), atol=1e-6)
    with pytest.raises(ValueError, match="unknown resize kernel 'area'"):
        pivot.resize(x, size, "area")


@pytest.mark.parametrize("small, large", [((2, 2), (4, 4)), ((1, 2), (3, 4)), ((2, 2), (2, 2))])
def test_coupled_noise_is_white_and_its_block_mean_is_the_small_noise(small, large, key):
    """n = A (e, xi) with A A' = I: white for any white e and xi, to rounding, not to sampling."""
    e, xi = math.prod(small), math.prod(large)

    def flat(v):
        n = pivot.coupled_noise(v[:e].reshape(1, *small, 1), v[e:].reshape(1, *large, 1))
        return n.reshape(-1)

    A = jax.vmap(flat)(jnp.eye(e + xi)).T
    np.testing.assert_allclose(A @ A.T, np.eye(xi), atol=1e-6)
    given = jax.random.normal(key, (3, 5, *small, 2))  # a video, say
    fresh = jax.random.normal(jax.random.key(1), (3, 5, *large, 2))
    n = pivot.coupled_noise(given, fresh)
    k = math.sqrt(xi / e)
    np.testing.assert_allclose(k * pivot.block_mean(n, small), given, atol=1e-5)
    if small == large:
        np.testing.assert_allclose(n, given, atol=1e-6)


def test_coupling_needs_whole_ratios():
    with pytest.raises(ValueError, match="6x6 px are no whole multiple of 4x4"):
        pivot.coupled_noise(jnp.zeros((4, 4, 1)), jnp.zeros((6, 6, 1)))
