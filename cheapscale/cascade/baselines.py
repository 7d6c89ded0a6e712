"""Published methods that run a teacher on a larger canvas, for comparison with self-cascade.

    attention   multiplies the logits by sqrt(log N / log N_trained), so that attention over more
                positions keeps its entropy (Jin et al. 2023, arXiv 2306.08645)
    dilated     dilates the 3x3 convolutions of the encoder and the bottleneck by the scale, at
                levels above time 0.6 T (ScaleCrafter, He et al. 2024, arXiv 2310.07702: 20 of
                50 steps)
    shifted     multiplies the levels by the scale, so that block means have the SNR of the trained
                size, and conditions the network on the level divided by the scale (MegaFusion, Wu
                et al. 2024, arXiv 2408.11001)
    windows     averages the teacher's estimates in half-overlapping windows of its trained size
                (MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113)

`baseline_denoiser` makes their denoisers for direct sampling and for the stages of a cascade. None
of them is part of self-cascade.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.cascade.plan import Size, named, restart_sigma, schedule_shift
from cheapscale.diffusion.denoiser import Denoiser
from cheapscale.diffusion.samplers import Segment
from cheapscale.models.unet import unet
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.teacher import Teacher

DILATED_ABOVE = "t0.6"


def attention(
    model: Teacher, label: jax.Array, grid: np.ndarray, size: Size, cfg_scale: float
) -> Sequence[Segment]:
    """The teacher with sharper attention logits, by the number of positions."""
    return changed(model, entropy_scaling=True).segments(label, grid, cfg_scale=cfg_scale)


def dilated(
    model: Teacher, label: jax.Array, grid: np.ndarray, size: Size, cfg_scale: float
) -> Sequence[Segment]:
    """A dilated network at the noisier levels, the plain network at the others."""
    bottleneck = f"dec_{model.resolution >> (len(model.net.config.channel_mult) - 1)}_in"
    factor = max(1, round(schedule_shift(model, size)))
    spread = changed(model, dilation=factor, dilated=("enc_", bottleneck))
    # The network of a step's noisier end takes the step.
    cut = int(np.sum(grid > restart_sigma(DILATED_ABOVE, model)))
    first = spread.segments(label, grid[: cut + 1], cfg_scale=cfg_scale) if cut else []
    rest = model.segments(label, grid[cut:], cfg_scale=cfg_scale) if cut < len(grid) - 1 else []
    return [*first, *rest]


def shifted(
    model: Teacher, label: jax.Array, grid: np.ndarray, size: Size, cfg_scale: float
) -> Sequence[Segment]:
    """The teacher, conditioned on the level divided by the scale."""
    shift = schedule_shift(model, size)
    return model.segments(label, grid, cfg_scale=cfg_scale, noise_shift=shift)


def windows(
    model: Teacher, label: jax.Array, grid: np.ndarray, size: Size, cfg_scale: float
) -> Sequence[Segment]:
    """The mean of the teacher's estimates in overlapping windows of the trained size."""
    D_of = functools.partial(model.denoiser, cfg_scale=cfg_scale)
    return [(windowed(D_of, label, model.resolution), grid)]


def windowed(D_of: Callable[[jax.Array], Denoiser], label: jax.Array, side: int) -> Denoiser:
    """D(x, sigma) for x [b, H, W, c]: the mean of D_of(labels)(crops, sigma) over all windows of
    `side` px, half a window apart."""

    def D(x: jax.Array, sigma: Any) -> jax.Array:
        b, height, width, channels = x.shape
        corners = [(i, j) for i in starts(height, side) for j in starts(width, side)]
        crops = jnp.concatenate([x[:, i : i + side, j : j + side] for i, j in corners])
        estimates = D_of(jnp.tile(label, len(corners)))(crops, sigma)
        # Border pixels lie in fewer windows, so each pixel is divided by its own count.
        total, count = jnp.zeros_like(x), np.zeros((1, height, width, 1), np.float32)
        for (i, j), value in zip(corners, estimates.reshape(-1, b, side, side, channels)):
            total = total.at[:, i : i + side, j : j + side].add(value)
            count[:, i : i + side, j : j + side] += 1
        return total / count

    return D


def changed(model: Teacher, **fields: Any) -> Teacher:
    """The same weights in a network with other fields."""
    return model.replace(net=unet(**model.fields | fields))


def num_windows(size: Size, side: int) -> int:
    """The number of windows on a canvas, each of which takes one network call."""
    return len(starts(size[0], side)) * len(starts(size[1], side))


def starts(length: int, side: int) -> list[int]:
    """Starts of the windows of `side` along a canvas of `length`; the last ends with the canvas."""
    return sorted({*range(0, length - side, max(side // 2, 1)), length - side})


BASELINES = {"attention": attention, "dilated": dilated, "shifted": shifted, "windows": windows}


def baseline_denoiser(
    name: str, model: Teacher, size: Size, cfg_scale: float = 1.0
) -> Callable[..., Sequence[Segment]]:
    """The denoiser of a baseline at `size`; "shifted" also needs a `shifted` plan."""
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}: choose one of {', '.join(BASELINES)}")
    if isinstance(model, Experts):
        raise ValueError(
            f"baseline {name!r} changes one network, but this teacher is a set of experts: "
            "name the work directory of its base"
        )
    if name == "windows" and min(size) < model.resolution:
        raise ValueError(
            f"a canvas of {named(size)} px holds no window of the trained {model.resolution} px: "
            "windows need canvases at least as large on both sides"
        )

    def denoiser(model, pivot, label, grid):  # none of them looks at the pivot
        return BASELINES[name](model, label, grid, size, cfg_scale)

    return denoiser
