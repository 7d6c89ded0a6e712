"""Pivot replacement: the arithmetic of a self-cascade (Guo et al. 2024, arXiv 2402.10491, sec. 3).

    R, r    number of stages; scale r = 0 .. R, scale 0 being the size the model was trained at
    z0      clean sample of the scale before: the pivot, in the network's own units
    U, P    resize to the next size; mean over the blocks that one pixel is enlarged to
    K       the noise at which a stage restarts: sigma_K

    (1)  R = ceil(log4(pixels of the target / pixels trained on))
    (2)  x = U z0 + sigma eps,   in VP units  alpha U z0 + sqrt(1 - alpha^2) eps
         at the first level of the sampler's own grid that is at most sigma_K
    (3)  n = enlarge(e) / k + xi - enlarge(P xi),   e, xi ~ N(0, 1),   k^2 pixels to a block

(3) couples a stage's noise to that of the scale before: it is exactly N(0, 1), and k P n = e. The
block mean of (2) is then a state of the small model at k^2 times the SNR, with the small noise.

Arrays are [..., h, w, c]: frames of a video keep their number. Sizes are (height, width).
"""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion import process

Size = tuple[int, int]

KERNELS = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest", "lanczos": "lanczos3"}
# A level that equals K but for rounding (K given in decibels, say) is one of those at most K.
ROUNDING = 1e-6


def num_stages(trained: Size, target: Size) -> int:
    """R of equation (1), in whole numbers: nothing rounds at exact powers of 4."""
    stages = 0
    while trained[0] * trained[1] * 4**stages < target[0] * target[1]:
        stages += 1
    return stages


def stage_sizes(start: Size, target: Size, stride: int, *, given: bool = False) -> tuple[Size, ...]:
    """The R + 1 sizes on the way to `target`, four times the pixels at each stage but the last.

    All of them have the target's aspect ratio, up to rounding to the stride: where it is not the
    trained one, scale 0 has as many pixels as the model was trained on, but another shape.

    Args:
        start: the size trained at; or, with `given`, that of images which are scale 0 themselves.
        stride: sides at which the network runs are its multiples.
    """
    _check_stride(target, stride, "the target")
    pixels, aspect = start[0] * start[1], target[0] / target[1]
    if target[0] * target[1] < pixels + given:
        raise ValueError(
            f"the target {named(target)} is not larger than the {named(start)} px at scale 0: "
            "a self-cascade only enlarges, ask for a larger size"
        )
    if given and not _same_shape(start, target, stride):
        raise ValueError(
            f"a pivot of {named(start)} would be stretched to {named(target)}: "
            "crop it to the target's aspect ratio, or give scales such as 2x,4x"
        )

    def rounded(r, up):
        sides = math.sqrt(pixels * aspect) * 2**r, math.sqrt(pixels / aspect) * 2**r
        return tuple(stride * max(1, math.floor(side / stride + up)) for side in sides)

    sizes = [rounded(r, 0.5) for r in range(num_stages(start, target))]
    if sizes and sizes[-1] == target:  # to the nearest multiple, unless that leaves no last stage
        sizes[-1] = rounded(len(sizes) - 1, 0.0)
    sizes.append(target)
    return (start, *sizes[1:]) if given else tuple(sizes)


def scaled_sizes(start: Size, scales: Sequence[float], stride: int) -> tuple[Size, ...]:
    """`start` and its multiples; the scales are per side and cumulative: 2, 4 is two doublings."""
    if not scales or scales[0] < 1 or any(b <= a for a, b in zip(scales, scales[1:])):
        raise ValueError(
            f"the scales {', '.join(f'{s:g}x' for s in scales)} do not increase from 1x: they are "
            "per side and cumulative, so that two doublings are 2x,4x"
        )
    sizes = [start]
    for scale in scales:
        sides = start[0] * scale, start[1] * scale
        if any(side != round(side) for side in sides):
            raise ValueError(
                f"scale {scale:g}x of {named(start)} px is not a whole number of pixels: choose "
                f"one that makes both sides multiples of the stride {stride}"
            )
        sizes.append((round(sides[0]), round(sides[1])))
        _check_stride(sizes[-1], stride, f"scale {scale:g}x of {named(start)} px")
    return tuple(sizes)


def read_sizes(text: str, start: Size, stride: int, *, given: bool = False) -> tuple[Size, ...]:
    """Sizes of scales 0 .. R from "2x,4x" (`scaled_sizes`) or "64x96", height first
    (`stage_sizes`, which see for `given`)."""
    size = re.fullmatch(r"(\d+)x(\d+)", text)
    if size:
        return stage_sizes(start, (int(size[1]), int(size[2])), stride, given=given)
    scales = [re.fullmatch(r"(\d+(?:\.\d+)?)x", word.strip()) for word in text.split(",")]
    if not all(scales):
        raise ValueError(
            f"{text!r} names no sizes: give scales per side such as 2x,4x, or a size such as 64x96 "
            "(height x width)"
        )
    return scaled_sizes(start, [float(scale[1]) for scale in scales], stride)


def restart_sigma(k: str, *, area_ratio: float, sigma_data: float) -> float:
    """sigma_K of a stage; whatever the form, the same sigma (and so SNR) for every model.

    t0.7           time K/T of latent diffusion's scaled-linear schedule: sigma 3.32
    t0.7@cosine    the same time of another schedule: sigma 1.98
    sigma3.32      itself; sigma0 is the resized pivot, without a network call
    snr-10.4dB     SNR = 1/sigma^2
    block-4.4dB    SNR of the mean over the pixels that one is enlarged to, area_ratio / sigma^2
    sd6.64         in units of sigma_data

    Papers count K from 1: time t is index t T - 1 of the table.
    """
    found = re.fullmatch(r"(t|sigma|snr|block|sd)(-?\d+(?:\.\d+)?)(dB)?(?:@(\w+))?", k.strip())
    kind, number, unit, schedule = found.groups() if found else ("", "0", None, None)
    value, is_time = float(number), kind == "t"
    if not found or bool(unit) != (kind in ("snr", "block")) or (schedule and not is_time):
        raise ValueError(
            f"K {k!r} is unreadable: give a time t0.7 or t0.7@cosine, sigma3.32, snr-10.4dB, "
            "block-4.4dB or sd6.64"
        )
    if unit:
        gain = area_ratio if kind == "block" else 1.0
        return math.sqrt(gain) * 10 ** (-value / 20)
    if value < 0 or (is_time and value > 1):
        raise ValueError(f"K {k!r} is out of range: times go from 0 to 1, sigmas upwards from 0")
    if is_time and value > 0:
        table = process.vp_schedule(schedule or "scaled_linear")
        return float(table.sigma(value * table.num_steps - 1))
    return value * (sigma_data if kind == "sd" else 1.0)


def restart_grid(grid: np.ndarray, sigma: float, top: float) -> np.ndarray:
    """The levels of a full run's grid from `sigma` down: its own tail, not a denser grid.

    Args:
        grid: descending, ending in 0. top: the highest level the model knows, which may lie above
            the first of the grid.

    Returns:
        at least one level and the final 0; [0] alone for sigma = 0, where nothing is to be run.
    """
    if sigma > top * (1 + ROUNDING):
        raise ValueError(
            f"K is sigma {sigma:.4g} ({process.decibels(sigma):.1f} dB), above the {top:.4g} that "
            f"the model's schedule ends at: choose K at most sigma{top:.4g}"
        )
    tail = grid[grid <= sigma * (1 + ROUNDING)]
    if len(tail) < 2 and sigma > 0:
        raise ValueError(
            f"K is sigma {sigma:.4g}, below every level of the sampler's grid, whose last is "
            f"{grid[-2]:.4g}: choose a larger K, more steps, or sigma0 for the resized pivot"
        )
    return tail


def resize(x: jax.Array, size: Size, kernel: str = "bilinear") -> jax.Array:
    """U: [..., h, w, c] -> [..., *size, c], pixel centres at half integers; smoothed if smaller.

    Beyond the border there is nothing: the weights inside are normalised, as in Pillow. The same
    size gives x itself. bilinear is the paper's, bicubic the released code's.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown resize kernel {kernel!r}: choose one of {tuple(KERNELS)}")
    return jax.image.resize(x, (*x.shape[:-3], *size, x.shape[-1]), KERNELS[kernel])


def renoise(y: jax.Array, sigma: float, noise: jax.Array) -> jax.Array:
    """Equation (2): y + sigma * noise, the noise of unit variance and in y's shape."""
    return y + float(sigma) * noise


def block_mean(x: jax.Array, size: Size) -> jax.Array:
    """P: [..., H, W, c] -> [..., *size, c]; both sides must be whole multiples."""
    *lead, height, width, channels = x.shape
    if height % size[0] or width % size[1]:
        raise ValueError(
            f"{named((height, width))} px are no whole multiple of {named(size)}: block means and "
            "coupled noise need scales such as 2x,4x"
        )
    blocks = (*lead, size[0], height // size[0], size[1], width // size[1], channels)
    return x.reshape(blocks).mean((-4, -2))


def coupled_noise(small: jax.Array, fresh: jax.Array) -> jax.Array:
    """Equation (3): noise in the shape of `fresh` whose block mean, scaled to unit variance, is
    `small`. Both of unit variance, [..., H, W, c] and [..., h, w, c]."""
    (h, w), (height, width) = small.shape[-3:-1], fresh.shape[-3:-1]
    mean = block_mean(fresh, (h, w))
    k = math.sqrt((height // h) * (width // w))
    return fresh + _repeated(small / k - mean, (height // h, width // w))


def named(size: Size) -> str:
    """(16, 24) -> "16x24", height first."""
    return f"{size[0]}x{size[1]}"


def _repeated(x, factors):
    return jnp.repeat(jnp.repeat(x, factors[0], axis=-3), factors[1], axis=-2)


def _same_shape(start, target, stride):
    """Is `target` an enlargement of `start`, one side rounded to the stride?"""
    (h, w), (height, width) = start, target
    return min(abs(height - width * h / w), abs(width - height * w / h)) <= stride / 2


def _check_stride(size, stride, what):
    if any(side % stride or not side for side in size):
        near = tuple(stride * max(1, math.floor(side / stride + 0.5)) for side in size)
        raise ValueError(
            f"{what} is {named(size)} px, but the network runs at multiples of its stride "
            f"{stride}: {named(near)} would do"
        )
