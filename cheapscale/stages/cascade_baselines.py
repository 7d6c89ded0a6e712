"""Other ways to run a base model on a larger canvas, for comparison (self-cascade, spec 5.5).

    attention   logits times sqrt(log N / log N_native): attention stays as sharp over more
                positions (Jin et al. 2023, arXiv 2306.08645)
    dilated     3x3 convolutions of the encoder and the middle spread their taps by the scale, at
                the levels above time 0.6 T (ScaleCrafter, He et al. 2024: 20 of 50 steps)
    shifted     a schedule with the base's SNR in block means: levels times the scale, the network
                told the level divided by it (MegaFusion, Wu et al. 2024)
    windows     the mean of the base model over windows of its own size, half overlapping
                (MultiDiffusion, Bar-Tal et al. 2023)

Each is a denoiser for `cascade_sampler`, for direct sampling and for the stages of a cascade alike.
None of them is part of self-cascade itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion.pivot import Size, named, restart_sigma
from cheapscale.stages.cascade_sampler import StageDenoiser, frozen_teacher, schedule_shift
from cheapscale.stages.networks import complete

PyTree = Any
BASELINES = ("attention", "dilated", "shifted", "windows")
DILATED_ABOVE = "t0.6"


def baseline(name: str, meta: dict, size: Size, cfg_scale: float = 1.0) -> StageDenoiser:
    """The named denoiser of the teacher of `meta` at `size`.

    "shifted" needs a plan that is `shifted` too.
    """
    model, diffusion = meta["networks"]["net"], meta["diffusion"]
    if "specialists" in diffusion:
        raise ValueError(
            f"baseline {name!r} changes one network, but this teacher is a set of specialists: "
            "name the work directory of its base"
        )
    if name == "attention":
        return frozen_teacher(complete(model | {"steady_entropy": True}), diffusion, cfg_scale)
    if name == "dilated":
        return dilated(model, diffusion, size, cfg_scale)
    if name == "shifted":
        shift = schedule_shift(model, size)
        return frozen_teacher(model, diffusion, cfg_scale, noise_shift=shift)
    if name == "windows":
        side = model["resolution"]
        if min(size) < side:
            raise ValueError(
                f"a canvas of {named(size)} px holds no window of the trained {side} px: windows "
                "need canvases at least as large on both sides"
            )
        return windowed(frozen_teacher(model, diffusion, cfg_scale), side)
    raise ValueError(f"unknown baseline {name!r}: choose one of {', '.join(BASELINES)}")


def dilated(model: dict, diffusion: dict, size: Size, cfg_scale: float) -> StageDenoiser:
    """The first part of the levels with a dilated network, the rest with the plain one."""
    factor = max(1, round(schedule_shift(model, size)))
    spread = complete(model | {"dilation": factor, "dilated": ("enc_", middle(model))})
    early = frozen_teacher(spread, diffusion, cfg_scale)
    late = frozen_teacher(model, diffusion, cfg_scale)
    border = restart_sigma(DILATED_ABOVE, area_ratio=1.0, sigma_data=diffusion["sigma_data"])

    def denoiser(params, pivot, label, grid):
        cut = int(np.sum(grid > border))  # steps are owned by their noisier end
        first = early(params, pivot, label, grid[: cut + 1]) if cut else []
        return [*first, *late(params, pivot, label, grid[cut:])]

    return denoiser


def middle(model: dict) -> str:
    """The prefix of the names of the two blocks at the bottleneck."""
    return f"dec_{model['resolution'] >> (len(model['channel_mult']) - 1)}_in"


def windowed(base: StageDenoiser, side: int) -> StageDenoiser:
    """Each estimate is the mean of those of all windows of `side` px, half a window apart."""

    def denoiser(params, pivot, label, grid):
        def estimate(x: jax.Array, sigma: Any) -> jax.Array:
            b, height, width, channels = x.shape
            corners = [(i, j) for i in starts(height, side) for j in starts(width, side)]
            crops = [x[:, i : i + side, j : j + side] for i, j in corners]
            labels = jnp.tile(label, len(corners))
            ((D, _),) = base(params, pivot, labels, grid)
            estimates = D(jnp.concatenate(crops), sigma).reshape(-1, b, side, side, channels)
            total, count = jnp.zeros_like(x), np.zeros((1, height, width, 1), np.float32)
            for (i, j), value in zip(corners, estimates):
                total = total.at[:, i : i + side, j : j + side].add(value)
                count[:, i : i + side, j : j + side] += 1
            return total / count

        return [(estimate, grid)]

    return denoiser


def num_windows(size: Size, model: dict) -> int:
    """Network calls that one estimate of "windows" takes."""
    return len(starts(size[0], model["resolution"])) * len(starts(size[1], model["resolution"]))


def starts(length: int, side: int) -> list[int]:
    """Where windows of `side` begin along a canvas of `length`, the last one at its end."""
    return sorted({*range(0, length - side, max(side // 2, 1)), length - side})
