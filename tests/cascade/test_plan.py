"""The plan of a cascade: sizes, K in every unit, truncated grids."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.cascade import plan
from cheapscale.cascade.plan import cascade_plan, network_calls
from cheapscale.diffusion import noise
from cheapscale.diffusion import samplers as solvers
from cheapscale.teacher.teacher import make_generator
from tests.cascade.toys import EDM, GREY, UNET, VP, teacher

# R and the intermediate sizes (arXiv 2402.10491, section 3). A 512-px latent model has stride 8.
SIZES = [
    ((512, 512), (1024, 1024), 64, [(512, 512), (1024, 1024)]),
    ((512, 512), (2048, 2048), 64, [(512, 512), (1024, 1024), (2048, 2048)]),
    ((64, 64), (128, 128), 8, [(64, 64), (128, 128)]),
    ((8, 8), (64, 64), 2, [(8, 8), (16, 16), (32, 32), (64, 64)]),
    ((8, 8), (8, 8), 2, [(8, 8)]),
    # ratio 9 of pixels: the last stage is less than a doubling
    ((8, 8), (24, 24), 2, [(8, 8), (16, 16), (24, 24)]),
    # 3072 x 1536 from 512: ratio 18, R = 3; as many pixels as 512 x 512, and 4 times as many each
    ((512, 512), (1536, 3072), 64, [(384, 704), (704, 1472), (1472, 2880), (1536, 3072)]),
    ((8, 8), (16, 64), 2, [(4, 16), (8, 32), (16, 64)]),
]


@pytest.mark.parametrize("trained, target, stride, sizes", SIZES)
def test_stages_and_their_sizes(trained, target, stride, sizes):
    assert plan.stage_sizes(trained, target, stride) == tuple(sizes)


def test_sizes_of_any_target_grow_by_four_and_keep_its_shape():
    rng = np.random.default_rng(0)
    stride = 4
    for target in stride * rng.integers(9, 60, (300, 2)):
        target = tuple(map(int, target))
        ratio = target[0] * target[1] / 32**2
        sizes = plan.stage_sizes((32, 32), target, stride)
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
    assert plan.read_sizes("2x,4x", (16, 16), 2) == ((16, 16), (32, 32), (64, 64))
    assert plan.read_sizes("4x", (16, 16), 2) == ((16, 16), (64, 64))  # one jump
    assert plan.read_sizes("1x, 1.5x", (16, 8), 4) == ((16, 8), (16, 8), (24, 12))
    assert plan.read_sizes("32x64", (16, 16), 4) == ((12, 24), (24, 44), (32, 64))


def test_given_images_are_scale_0_whatever_their_size():
    assert plan.read_sizes("12x36", (6, 18), 4, given=True) == ((6, 18), (12, 36))
    assert plan.read_sizes("2x", (6, 18), 4, given=True) == ((6, 18), (12, 36))
    # 5 x 15 px enlarged to a width of 32 is 10.7 x 32: the stride makes it 12
    assert plan.read_sizes("12x32", (5, 15), 4, given=True) == ((5, 15), (12, 28), (12, 32))


@pytest.mark.parametrize(
    "text, start, given, message",
    [
        ("30x32", (8, 8), False, "target is 30x32 px, but .* multiples of its stride 4: 32x32"),
        ("1.25x", (8, 8), False, "scale 1.25x of 8x8 px is 10x10 px, .* stride 4: 12x12"),
        ("1.3x", (8, 8), False, "scale 1.3x of 8x8 px is 10.4x10.4 px, .* stride 4: 12x12"),
        ("4x,2x", (8, 8), False, "scales 4x,2x do not increase"),
        ("2x,2x", (8, 8), False, "scales 2x,2x do not increase"),
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
        plan.read_sizes(text, start, 4, given=given)


def sigma_of(k, ratio=4.0):
    return plan.restart_sigma(k, GREY, ratio)


def test_k_means_the_same_noise_in_every_unit_and_for_every_schedule():
    """K = 0.7 T of the scaled-linear schedule, on data of deviation 1: SNR 0.0907."""
    sigma = sigma_of("t0.7")
    assert round(sigma, 2) == 3.32
    assert round(1 / sigma**2, 4) == 0.0907
    assert sigma == noise.vp_schedule("scaled_linear").sigmas[699]
    decibels = noise.decibels(sigma)
    for same in (
        f"sigma{sigma:.9f}", f"snr{decibels:.9f}dB", f"block{decibels + 10 * np.log10(4):.9f}dB",
        f"sd{2 * sigma:.9f}", "t0.7@scaled_linear",
    ):  # fmt: skip
        assert sigma_of(same) == pytest.approx(sigma, rel=1e-7)
    # the same SNR belongs to other times of other schedules
    for name, time in (("linear", 493), ("cosine", 811)):
        at = noise.vp_schedule(name).time_of_sigma(sigma)
        assert round(at) == time
        assert sigma_of(f"t{(at + 1) / 1000:.9f}@{name}") == pytest.approx(sigma, rel=1e-6)
    # the same index has another SNR in other schedules
    assert round(1 / sigma_of("t0.7@linear") ** 2, 4) == 0.0070
    assert round(1 / sigma_of("t0.7@cosine") ** 2, 3) == 0.255
    # the block mean over 16 pixels has 12 dB more, wherever the stage is one jump of 4x a side
    assert sigma_of("block0dB", ratio=16) == 4 and sigma_of("block0dB", ratio=2.25) == 1.5
    assert sigma_of("sigma0") == sigma_of("t0") == 0


def test_a_time_is_a_ratio_to_the_deviation_of_the_data(caplog):
    """Only times scale with the data's deviation, which is 1 for the paper's latents."""
    small = teacher({}, std=0.4)
    assert plan.restart_sigma("t0.7", small) == pytest.approx(0.4 * sigma_of("t0.7"))
    assert plan.restart_sigma("t0.7@cosine", small) == pytest.approx(0.4 * sigma_of("t0.7@cosine"))
    for k in ("sigma3.32", "snr-10.4dB", "block-4.4dB", "sd6.64"):
        assert plan.restart_sigma(k, small) == sigma_of(k)
    unknown = teacher({}, std=None)
    with caplog.at_level("WARNING"):
        assert plan.restart_sigma("t0.7", unknown) == pytest.approx(0.5 * sigma_of("t0.7"))
    assert "does not say the deviation of its data" in caplog.text


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
    schedule = noise.vp_schedule("scaled_linear")
    full, top = schedule.grid(50), schedule.sigmas[-1]
    tail = plan.restart_grid(full, sigma_of("t0.7"), top)
    np.testing.assert_array_equal(tail, schedule.grid(50, last=699))
    assert tail[0] == schedule.sigmas[681]  # the first time fed to the network, not 700
    np.testing.assert_array_equal(plan.restart_grid(full, sigma_of("t1"), top), full)
    karras = GREY.process.grid(40)
    tail = plan.restart_grid(karras, sigma_of("t0.7"), 80.0)
    np.testing.assert_array_equal(tail, karras[-len(tail) :])
    assert tail[0] <= sigma_of("t0.7") < karras[-len(tail) - 1]
    # a level that equals K up to rounding belongs to the tail
    for level in karras[:-1]:
        k = sigma_of(f"snr{noise.decibels(level):.8f}dB")
        assert plan.restart_grid(karras, k, 80.0)[0] == level
    np.testing.assert_array_equal(plan.restart_grid(karras, 0.0, 80.0), [0.0])


def test_k_outside_the_schedule_is_refused():
    karras = GREY.process.grid(40)
    with pytest.raises(ValueError, match="K is sigma 157.4 .* above the 80 .* at most sigma80"):
        plan.restart_grid(karras, sigma_of("t1@linear"), 80.0)
    with pytest.raises(ValueError, match="below every level .* last is 0.002"):
        plan.restart_grid(karras, 0.001, 80.0)


@pytest.mark.parametrize("method", ["heun", "euler"])
def test_the_tail_ends_as_the_full_run_does_from_the_same_state(method, key):
    """The head and the tail of the grid, in sequence, equal the full run bit for bit."""
    full = GREY.process.grid(12)
    tail = plan.restart_grid(full, sigma_of("t0.7"), 80.0)

    def D(x, sigma):
        return jnp.tanh(x) / (1 + sigma**2)

    x = 80 * jax.random.normal(key, (4, 3))
    state = solvers.solve([(D, full[: len(full) - len(tail) + 1])], x, method=method)
    # Heun's step to the first level of the tail includes its corrector
    np.testing.assert_array_equal(
        solvers.solve([(D, tail)], state, method=method),
        solvers.solve([(D, full)], x, method=method),
    )


@pytest.mark.parametrize("sizes, size, pixels", [("2x", (8, 8), 4), ("16x32", (8, 16), 4)])
def test_k_in_blocks_counts_the_pixels_that_a_stage_adds(sizes, size, pixels):
    """The SNR of means over blocks of n pixels is n times the pixels'."""
    plans = [
        cascade_plan(GREY, sizes, k=k, steps=400, pivot_size=size).restarts[0]
        for k in ("block-4.4dB", f"snr{-4.4 - 10 * np.log10(pixels):.6f}dB", "snr-4.4dB")
    ]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert plans[0][0] > 1.5 * plans[2][0]


def test_network_calls_of_a_plan():
    """50 DDIM steps at the base and round(50 K/T) = 35 beyond it; guidance doubles them."""
    vp = teacher({}, VP | {"process": "scaled_linear", "sigma_max": 14.0, "sigma_min": 0.03})
    ddim = cascade_plan(vp, "2x", steps=50, spacing="leading")
    assert network_calls(ddim, method="euler") == ((50, 35), 50)
    assert network_calls(ddim, method="euler", cfg_scale=3.0) == ((100, 70), 100)
    # Heun takes two calls for each step except the last, in the tail and in the full run
    karras = cascade_plan(vp, "2x,4x", k="sigma2,sigma0", steps=20)
    tail = len(karras.restarts[0]) - 1
    assert network_calls(karras) == ((39, 2 * tail - 1, 0), 39)
    given = cascade_plan(vp, "2x", steps=50, pivot_size=(8, 8))
    assert network_calls(given)[0][0] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sizes": "17x32"}, "target is 17x32 px, but .* stride 2"),
        ({"k": "sigma90"}, "sigma 90 .* above the 80"),
        ({"k": "sigma0.0001"}, "below every level"),
        ({"k": ("t0.7", "t0.6")}, "2 values of K .* for 1 stages"),
        ({"spacing": "leading"}, "this model's process is edm"),
        ({"pivot_size": (4, 8), "sizes": "16x16"}, "pivot of 4x8 would be stretched"),
        (
            {"pivot_size": (200, 300)},
            "200x300 px is more than 16 times the 8 px: .*pivot_resolution",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        cascade_plan(GREY, **({"sizes": "2x"} | change))


def test_a_one_step_generator_is_refused():
    meta = {"stage": "distill", "networks": {"generator": UNET}, "diffusion": EDM}
    with pytest.raises(ValueError, match="runs a diffusion teacher, .* distill run's one-step"):
        cascade_plan(make_generator({}, meta), "2x")


def test_a_grid_too_coarse_for_k_is_said(caplog):
    cascade_plan(GREY, "2x", k="sigma1", steps=40)
    assert "--steps" not in caplog.text
    cascade_plan(GREY, "2x", k="sigma1", steps=3)
    assert "give more --steps" in caplog.text
