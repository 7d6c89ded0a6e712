"""Sizes and noise levels of a self-cascade (Guo et al. 2024, arXiv 2402.10491, section 3).

    R           number of stages; scale 0 is the trained size, scale R the target
    K, sigma_K  the noise from which a stage restarts: step K = 0.7 T in the paper, a level here

A stage runs the tail of the sampler's grid, the levels of at most sigma_K. Sizes are (height,
width) in pixels.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from cheapscale.diffusion.noise import decibels, vp_schedule
from cheapscale.diffusion.samplers import nfe
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.sampling import levels
from cheapscale.teacher.teacher import Generator, Teacher

Size = tuple[int, int]

LARGEST_SIDE = 2**12  # in pixels; a larger canvas is a mistake
ROUNDING = 1e-6  # levels are compared with K up to rounding: K may have been given in decibels


class CascadePlan(NamedTuple):
    """The sizes and noise levels of a cascade.

    sizes: the sizes of scales 0 ... R. grid: sigmas of a full run, descending to 0. restarts: for
    each stage 1 ... R the tail of that grid, or [0] for K = 0. direct: the grid of direct sampling
    at the last size. given: whether the caller gives the images of scale 0. calls: network calls
    for one estimate D(x; sigma) at each scale, more than one for windows. start: deviation of the
    noise from which full runs start, in levels grid[0].
    """

    sizes: tuple[Size, ...]
    grid: np.ndarray
    restarts: tuple[np.ndarray, ...]
    direct: np.ndarray
    given: bool
    calls: tuple[int, ...]
    start: float = 1.0


def cascade_plan(
    model: Teacher | Experts,
    sizes: str,
    *,
    k: str | Sequence[str] = "t0.7",
    steps: int = 40,
    spacing: str = "karras",
    pivot_size: Size | None = None,
    shifted: bool = False,
) -> CascadePlan:
    """Sizes and noise levels of a cascade; ValueError where they do not fit the model.

    Args:
        sizes: scales per side "2x,4x" or a last size "64x96", see `read_sizes`.
        k: where the stages restart, see `restart_sigma`; one for all stages, or one for each.
        steps, spacing: the sampler's grid, see `EDM.grid` and `VP.grid`.
        pivot_size: size of given images that take the place of scale 0.
        shifted: multiply the levels at each size by its `schedule_shift`.
    """
    if isinstance(model, Generator):
        raise ValueError(
            f"a self-cascade runs a diffusion teacher, but this model is a {model.meta['stage']} "
            "run's one-step generator: name a pretrain run"
        )
    side, stride, given = model.resolution, model.net.config.stride, pivot_size is not None
    start = pivot_size or (side, side)
    check_pivot(start, side)
    scales = read_sizes(sizes, start, stride, given=given)
    if max(scales[-1]) > LARGEST_SIDE:
        raise ValueError(
            f"{named(scales[-1])} px is more than {LARGEST_SIDE} a side: ask for a smaller size"
        )
    stages = len(scales) - 1
    k = k.split(",") if isinstance(k, str) else list(map(str, np.atleast_1d(k)))
    if len(k) not in (1, stages):
        raise ValueError(
            f"{len(k)} values of K ({', '.join(k)}) for {stages} stages "
            f"({', '.join(map(named, scales[1:]))}): give one, or one for each stage"
        )
    grid = levels(model.process, steps, spacing=spacing)
    top = max(grid[0], model.process.sigma_max)
    shifts = [schedule_shift(model, size) if shifted else 1.0 for size in scales]
    restarts = []
    for r in range(1, stages + 1):
        area_ratio = math.prod(scales[r]) / math.prod(scales[r - 1])
        sigma_K = restart_sigma(k[(r - 1) % len(k)], model, area_ratio)
        restarts.append(restart_grid(shifts[r] * grid, sigma_K, shifts[r] * top))
        if restarts[-1][0] < sigma_K / 4:
            logging.warning(
                "stage %d restarts at sigma %.3g, the highest of %d levels below K = %.3g, and "
                "hardly changes the enlarged pivot: give more --steps",
                r, restarts[-1][0], steps, sigma_K,
            )  # fmt: skip
    calls = (1,) * len(scales)
    first = model.process.start(grid, spacing) / grid[0]
    return CascadePlan(scales, grid, tuple(restarts), shifts[-1] * grid, given, calls, first)


def schedule_shift(model: Teacher | Experts, size: Size) -> float:
    """sqrt(n) for a canvas of n times the trained pixels: the ratio of a pixel's noise to that of a
    block mean.

    A mean over n pixels has n times the SNR of a pixel. On the larger canvas, the layout therefore
    has the same SNR at level sqrt(n) sigma as at level sigma at the trained size.
    """
    return math.sqrt(math.prod(size)) / model.resolution


def network_calls(
    plan: CascadePlan, *, method: str = "heun", cfg_scale: float = 1.0
) -> tuple[tuple[int, ...], int]:
    """(network calls for one image at scales 0 ... R, calls of direct sampling)."""
    guided = 1 if cfg_scale in (0.0, 1.0) else 2

    def calls(each, grid):
        return guided * each * nfe(grid, method) if len(grid) > 1 else 0

    base = np.zeros(1) if plan.given else plan.grid
    scales = tuple(map(calls, plan.calls, (base, *plan.restarts)))
    return scales, calls(plan.calls[-1], plan.direct)


# Sizes


def check_pivot(size: Size, side: int) -> None:
    """Raise ValueError for a picture that would fill the memory of a teacher of `side` px; log one
    that is larger than what the teacher draws."""
    advice = f"--pivot_resolution={side} shrinks it"
    if max(size) > 16 * side:
        raise ValueError(
            f"a pivot of {named(size)} px is more than 16 times the {side} px: {advice}"
        )
    if max(size) > 2 * side:
        text = "the pivot has %s px, and the teacher draws %d: %s"
        logging.log_first_n(logging.INFO, text, 1, named(size), side, advice)


def read_sizes(text: str, start: Size, stride: int, *, given: bool = False) -> tuple[Size, ...]:
    """Sizes of scales 0 ... R.

    text: scales per side and cumulative, "2x,4x" for two doublings of `start`; or a last size
    "64x96", height first, reached as `stage_sizes` says. stride: the network runs at sides that
    are multiples of it.
    """
    last = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if last:
        return stage_sizes(start, (int(last[1]), int(last[2])), stride, given=given)
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{1,5}(\.\d+)?x", word) for word in words):
        raise ValueError(f"{text!r} names no sizes: give scales as 2x,4x or height x width, 64x96")
    scales = [float(word[:-1]) for word in words]
    if scales[0] < 1 or any(b <= a for a, b in zip(scales, scales[1:])):
        raise ValueError(f"the scales {text} do not increase from 1x: two doublings are 2x,4x")
    sizes = [(start[0] * scale, start[1] * scale) for scale in scales]
    for scale, size in zip(scales, sizes):
        _check_stride(size, stride, f"scale {scale:g}x of {named(start)} px")
    return (start, *((round(height), round(width)) for height, width in sizes))


def in_latents(text: str, factor: int) -> str:
    """`text` of `read_sizes` with a last size in latents of `factor` pixels, instead of pixels."""
    last = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if factor == 1 or not last:
        return text
    sides = [int(side) for side in last.groups()]
    if any(side % factor for side in sides):
        near = named(
            (max(factor, sides[0] // factor * factor), max(factor, sides[1] // factor * factor))
        )
        raise ValueError(
            f"{text} px does not divide into latents of {factor} px: give --cascade={near}, say"
        )
    return "x".join(str(side // factor) for side in sides)


def stage_sizes(start: Size, target: Size, stride: int, *, given: bool = False) -> tuple[Size, ...]:
    """The R + 1 sizes up to `target`, R = ceil(log4(target pixels / start pixels)). Each has four
    times the pixels of the previous one, the last at most four times.

    All have the target's aspect ratio, up to rounding to the stride. If that is not the trained
    ratio, scale 0 has the trained number of pixels in another shape.

    given: `start` is the size of images which are scale 0 themselves, not the trained size.
    """
    _check_stride(target, stride, "the target")
    pixels, aspect = math.prod(start), target[0] / target[1]
    if math.prod(target) < pixels + given:
        raise ValueError(
            f"the target {named(target)} is not larger than the {named(start)} px at scale 0: "
            "a self-cascade only enlarges, ask for a larger size"
        )
    # The width that the pivot's shape asks for, or the height; the other side is rounded.
    (h, w), (height, width) = start, target
    if given and min(abs(height - width * h / w), abs(width - height * w / h)) > stride / 2:
        raise ValueError(
            f"a pivot of {named(start)} would be stretched to {named(target)}: "
            "crop it to the target's aspect ratio, or give scales such as 2x,4x"
        )

    def rounded(r, up=0.5):
        height, width = math.sqrt(pixels * aspect) * 2**r, math.sqrt(pixels / aspect) * 2**r
        return nearest(height, up), nearest(width, up)

    def nearest(side, up):
        return stride * max(1, math.floor(side / stride + up))

    sizes: list[Size] = []
    while pixels * 4 ** len(sizes) < math.prod(target):  # whole numbers: exact at powers of 4
        sizes.append(rounded(len(sizes)))
    if sizes and sizes[-1] == target:  # rounded to the nearest, there would be no last stage
        sizes[-1] = rounded(len(sizes) - 1, up=0.0)
    sizes.append(target)
    return (start, *sizes[1:]) if given else tuple(sizes)


def named(size: Sequence[float]) -> str:
    """(16, 24) -> "16x24", height first."""
    return f"{size[0]:g}x{size[1]:g}"


def _check_stride(size: Sequence[float], stride: int, what: str) -> None:
    if any(side % stride or not side for side in size):
        near = [stride * max(1, math.floor(side / stride + 0.5)) for side in size]
        raise ValueError(
            f"{what} is {named(size)} px, but the network runs at multiples of its stride "
            f"{stride}: {named(near)} would do"
        )


# Noise levels


def restart_sigma(k: str, model: Teacher | Experts, area_ratio: float = 4.0) -> float:
    """sigma_K of a stage that multiplies the pixels by area_ratio.

    t0.7           time K/T of latent diffusion's scaled-linear schedule. The paper's latents have
                   deviation 1; here it is 3.32 times the deviation of the teacher's data
    t0.7@cosine    the same for another schedule, 1.98 times the deviation
    sigma3.32      the level itself; sigma0 is the resized pivot, without a network call
    snr-10.4dB     SNR = 1 / sigma^2
    block-4.4dB    SNR of the mean over the pixels that one is enlarged to, area_ratio / sigma^2
    sd6.64         in units of sigma_data

    Papers count steps from 1: time t is index t T - 1 of the schedule's table.
    """
    found = re.fullmatch(r"(t|sigma|snr|block|sd)(-?\d+(?:\.\d+)?)(dB)?(?:@(\w+))?", k.strip())
    kind, number, unit, schedule = found.groups() if found else ("", "0", None, None)
    value, is_time = float(number), kind == "t"
    if not found or bool(unit) != (kind in ("snr", "block")) or (schedule and not is_time):
        raise ValueError(f"K {k!r} is unreadable: give t0.7, sigma3.32, snr-10.4dB or sd6.64")
    low, high = (-200, 200) if unit else (0, 1 if is_time else 1e6)
    if not low <= value <= high:
        raise ValueError(f"K {k!r} is out of range: give a number from {low} to {high:g}")
    if unit:
        gain = area_ratio if kind == "block" else 1.0
        return math.sqrt(gain) * 10 ** (-value / 20)
    if is_time and value > 0:
        table = vp_schedule(schedule or "scaled_linear")
        return float(table.sigma(value * table.num_steps - 1)) * data_deviation(model)
    return value * (model.process.sigma_data if kind == "sd" else 1.0)


def data_deviation(model: Teacher | Experts) -> float:
    """The standard deviation of the training images, measured by stage pretrain; sigma_data if the
    checkpoint does not contain it."""
    measured = model.meta.get("data", {}).get("std")
    if measured is None:
        logging.warning(
            "the teacher %s does not say the deviation of its data: K = t... is taken relative to "
            "sigma_data = %g", model.workdir, model.process.sigma_data,
        )  # fmt: skip
        return model.process.sigma_data
    return measured


def restart_grid(grid: np.ndarray, sigma: float, top: float) -> np.ndarray:
    """The levels of a full run's grid from `sigma` down: at least one level and the final 0, or
    [0] alone for sigma = 0.

    Args:
        grid: descending, ending in 0. top: the highest level that the model was trained on.
    """
    if sigma > top * (1 + ROUNDING):
        raise ValueError(
            f"K is sigma {sigma:.4g} ({decibels(sigma):.1f} dB), above the {top:.4g} that the "
            f"model's schedule ends at: choose K at most sigma{top:.4g}"
        )
    if sigma == 0:
        return np.zeros(1)
    tail = grid[grid <= sigma * (1 + ROUNDING)]
    if len(tail) < 2:
        raise ValueError(
            f"K is sigma {sigma:.4g}, below every level of the sampler's grid, whose last is "
            f"{grid[-2]:.4g}: choose a larger K, more steps, or sigma0 for the resized pivot"
        )
    return tail
