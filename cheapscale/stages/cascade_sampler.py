"""Self-cascade (Guo et al. 2024, Algorithm 2): a larger canvas for the same frozen teacher.

    z0 <- a full run of the sampler at the size trained at
    for r = 1 .. R:
        y  <- U_r(z0)                                 enlarge the clean sample: the pivot
        x  <- y + sigma eps_r                         at the first level of the grid below K
        z0 <- the same grid from there down to 0, the same network on the larger canvas

Nothing else happens by default: no dilation, no scaled attention, no shifted schedule, nothing of
the pivot mixed in again on the way. What a stage does differently it does in its denoiser,

    denoiser(params, pivot, label, grid) -> segments, [(D(x, sigma), the part of the grid it owns)],

called once for a stage and outside the loop over steps, so that whatever is computed from the clean
pivot is computed once. At scale 0 and in direct sampling the pivot is None.

Image i depends on (seed, i) alone; each stage has a seed of its own.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion import process, solvers
from cheapscale.diffusion.pivot import (
    KERNELS,
    Size,
    coupled_noise,
    named,
    read_sizes,
    renoise,
    resize,
    restart_grid,
    restart_sigma,
)
from cheapscale.models.unet import unet
from cheapscale.stages.networks import check_guidance, make_segments
from cheapscale.stages.sampler_cost import segment_calls
from cheapscale.stages.sampling import check_labels, labels_for, levels, prior
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.sharding import in_batches

PyTree = Any
StageDenoiser = Callable[
    [PyTree, jax.Array | None, jax.Array, np.ndarray], Sequence[solvers.Segment]
]

# Sides over the trained one: what is larger is a slip of the pen, found only when memory runs out.
FARTHEST_PIVOT, FARTHEST = 16, 128
OWNERS = ("level", "snr")
SPACES = ("model", "image")


class CascadePlan(NamedTuple):
    """What a cascade will do, checked.

    sizes: of scales 0 .. R. grid: sigmas of a full run, descending to 0. restarts: for each stage
    1 .. R the tail of that grid which it runs. direct: the grid of direct sampling at the last
    size. given: scale 0 is images, not samples.
    """

    sizes: tuple[Size, ...]
    grid: np.ndarray
    restarts: tuple[np.ndarray, ...]
    direct: np.ndarray
    given: bool


class Cascade(NamedTuple):
    """Two samplers of a last size; images are float32 in [-1, 1].

    draw(ids, labels=None, pivots=None) -> (images of every scale, scale 0 first, labels [n]).
    direct(ids, labels=None) -> (images, labels): the baseline, the whole grid from noise alone. Its
    noise is that of the last stage, so that the two compare image by image.
    Both take other weights as `params`, without compiling again.
    """

    draw: Callable
    direct: Callable


def cascade_plan(
    meta: dict,
    cascade: str,
    *,
    k: Sequence[str] = ("t0.7",),
    steps: int = 40,
    spacing: str = "karras",
    pivot_size: Size | None = None,
    shifted: bool = False,
) -> CascadePlan:
    """Sizes and noise levels for the teacher of `meta`; ValueError for whatever does not fit.

    Args:
        cascade: scales per side "2x,4x", or a last size "64x96", see `pivot.read_sizes`.
        k: where the stages restart, see `pivot.restart_sigma`; one for all, or one for each.
        spacing: of the levels, as plain sampling has it, see `sampling.levels`.
        pivot_size: size of the images that take the place of scale 0.
        shifted: multiply the levels of each canvas by `schedule_shift`, for denoisers that are told
            the level divided by it.
    """
    model, diffusion = _teacher(meta)
    trained = (model["resolution"], model["resolution"])
    given = pivot_size is not None
    start = pivot_size if given else trained
    sizes = read_sizes(cascade, start, unet(**model).config.stride, given=given)
    for size, limit, remedy in (
        (sizes[0], FARTHEST_PIVOT, "shrink it first (--pivot_resolution)"),
        (sizes[-1], FARTHEST, "ask for a smaller size"),
    ):
        if max(size) > limit * model["resolution"]:
            raise ValueError(
                f"{named(size)} px is more than {limit} times the {model['resolution']} px that "
                f"this teacher was trained at: {remedy}"
            )
    if len(k) not in (1, len(sizes) - 1):
        raise ValueError(
            f"{len(k)} values of K ({', '.join(k)}) for {len(sizes) - 1} stages "
            f"({', '.join(map(named, sizes[1:]))}): give one, or one for each stage"
        )
    grid, top = _full_grid(diffusion, steps, spacing)
    restarts = []
    for r, (small, large) in enumerate(zip(sizes, sizes[1:])):
        ratio = large[0] * large[1] / (small[0] * small[1])
        sigma = restart_sigma(k[r % len(k)], area_ratio=ratio, sigma_data=diffusion["sigma_data"])
        shift = schedule_shift(model, large) if shifted else 1.0
        restarts.append(restart_grid(shift * grid, sigma, shift * top))
    alone = grid * (schedule_shift(model, sizes[-1]) if shifted else 1.0)
    return CascadePlan(sizes, grid, tuple(restarts), alone, given)


def schedule_shift(model: dict, size: Size) -> float:
    """sqrt of the ratio of pixels to the trained size: means over blocks of so many pixels have at
    sigma times it the SNR that the trained size has at sigma."""
    return math.sqrt(size[0] * size[1]) / model["resolution"]


def owner_shift(model: dict, size: Size, owner: str) -> float:
    """What levels are divided by before a set is asked who owns them."""
    return schedule_shift(model, size) if owner == "snr" else 1.0


def frozen_teacher(
    model: dict,
    diffusion: dict,
    cfg_scale: float = 1.0,
    noise_shift: float = 1.0,
    owner_shift: float = 1.0,
) -> StageDenoiser:
    """The tuning-free denoiser of every scale: the teacher, which never looks at the pivot.

    noise_shift: see `denoiser.edm`; owner_shift: see `networks.make_segments`.
    """
    segments = make_segments(
        model, diffusion, cfg_scale=cfg_scale, noise_shift=noise_shift, owner_shift=owner_shift
    )

    def denoiser(params, pivot, label, grid):
        return segments(params, label, grid)

    return denoiser


def cascade_sampler(
    loaded: Loaded,
    plan: CascadePlan,
    *,
    denoisers: Sequence[StageDenoiser] | None = None,
    direct_denoiser: StageDenoiser | None = None,
    seed: int = 0,
    stage_seeds: Sequence[int] = (),
    batch_size: int = 64,
    method: str = "heun",
    cfg_scale: float = 1.0,
    kernel: str = "bilinear",
    space: str = "model",
    coupled: bool = False,
    owner: str = "level",
) -> Cascade:
    """The cascade and the direct baseline of one plan. Each scale compiles once, at first use.

    Raises ValueError before anything compiles; `draw` and `direct` too.

    Args:
        denoisers: one for each scale 0 .. R, by default `frozen_teacher`. They are given
            `loaded.params`, whatever tree that is.
        direct_denoiser: of direct sampling; by default that of scale 0.
        stage_seeds: seeds of stages 1 .. R; by default the cascade's. Scale 0 always has `seed`.
        kernel: see `pivot.resize`.
        space: what is resized, the network's own units ("model") or the image, within [-1, 1].
        coupled: a stage's noise continues that of the scale before, `pivot.coupled_noise`; where
            scale 0 is given images, fresh noise of their size begins the chain.
        owner: which specialist of a set takes a step of a larger canvas: the one trained at its
            "level", or at the level with the "snr" that means over blocks of the trained size have.
    """
    model, diffusion = _teacher(loaded.meta)
    if method not in ("heun", "euler"):
        raise ValueError(f"a cascade is sampled by heun or euler, not by {method!r}")
    if owner not in OWNERS or (owner != "level" and "specialists" not in diffusion):
        raise ValueError(
            f"owner is {owner!r}: choose one of {', '.join(OWNERS)}, snr for a set of specialists"
        )
    last = len(plan.sizes) - 1
    check_guidance(loaded.meta, cfg_scale)
    if denoisers is None:
        denoisers = [
            frozen_teacher(model, diffusion, cfg_scale, owner_shift=owner_shift(model, size, owner))
            for size in plan.sizes
        ]
    _check_options(last, denoisers, stage_seeds, kernel, space)
    noise = functools.partial(
        scale_noise,
        seeds=(seed, *(stage_seeds or [seed] * last)),
        shapes=[(*size, model["in_channels"]) for size in plan.sizes],
        coupled=coupled,
    )
    jax.eval_shape(lambda: noise(last, np.zeros(1, np.int32)))  # do the sizes fit together?
    full_run = functools.partial(_solve, denoisers[0], plan.grid, method)
    alone = functools.partial(_solve, direct_denoiser or denoisers[0], plan.direct, method)
    stages = [
        functools.partial(
            _stage,
            denoiser=denoisers[r],
            grid=plan.restarts[r - 1],
            method=method,
            enlarge=functools.partial(enlarged, size=plan.sizes[r], kernel=kernel, space=space),
            noise=functools.partial(noise, r),
        )
        for r in range(1, last + 1)
    ]

    def base(params: PyTree, z: jax.Array, label: jax.Array) -> jax.Array:
        return full_run(params, None, z, label)

    def from_noise(params: PyTree, ids: jax.Array, label: jax.Array) -> jax.Array:
        return alone(params, None, float(plan.direct[0]) * noise(last, ids), label)

    def classes(ids: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        if labels is None and plan.given and model["num_classes"]:
            raise ValueError(
                f"the teacher has {model['num_classes']} classes, but the pivots have no labels: "
                "say which class each of them is (--labels)"
            )
        if labels is None:
            return labels_for(seed, ids, model["num_classes"])
        labels = np.asarray(labels, np.int32)
        check_labels(labels, model["num_classes"])
        return labels

    def sample_base(params: PyTree, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
        z = prior(seed, ids, (*plan.sizes[0], model["in_channels"]), float(plan.grid[0]))
        return in_batches(base, params, np.asarray(z), labels, batch_size=batch_size)

    def draw(
        ids: np.ndarray,
        labels: np.ndarray | None = None,
        pivots: np.ndarray | None = None,
        params: PyTree = loaded.params,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        ids, labels = np.asarray(ids), classes(ids, labels)
        shape = (len(ids), *plan.sizes[0], model["in_channels"]) if plan.given else None
        found = None if pivots is None else pivots.shape
        if found != shape:
            raise ValueError(
                f"pivots of shape {found} were given, but the plan and the ids ask for {shape}: "
                "make the plan with the pivots' size, or without one to sample them"
            )
        scales = [pivots if plan.given else sample_base(params, ids, labels)]
        for stage in stages:
            rows = (ids, scales[-1], labels)
            scales.append(in_batches(stage, params, *rows, batch_size=batch_size))
        return [np.clip(z0, -1.0, 1.0) for z0 in scales], labels

    def direct(
        ids: np.ndarray, labels: np.ndarray | None = None, params: PyTree = loaded.params
    ) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = np.asarray(ids), classes(ids, labels)
        images = in_batches(from_noise, params, ids, labels, batch_size=batch_size)
        return np.clip(images, -1.0, 1.0), labels

    return Cascade(draw, direct)


def _stage(params, ids, pivot, label, *, denoiser, grid, method, enlarge, noise):
    """One turn of the algorithm's loop: pivot [b, h, w, c] of the scale before -> [b, H, W, c]."""
    y = enlarge(pivot)
    if len(grid) == 1:  # K = 0
        return y
    return _solve(denoiser, grid, method, params, pivot, renoise(y, grid[0], noise(ids)), label)


def _solve(denoiser, grid, method, params, pivot, x, label):
    return solvers.solve(denoiser(params, pivot, label, grid), x, method=method)


def enlarged(pivot: jax.Array, *, size: Size, kernel: str, space: str) -> jax.Array:
    """y = U(pivot). Pixels are both spaces of this teacher: as an "image" they stay in [-1, 1]."""
    if space == "model":
        return resize(pivot, size, kernel)
    return jnp.clip(resize(jnp.clip(pivot, -1, 1), size, kernel), -1, 1)


def scale_noise(
    scale: int,
    ids: jax.Array,
    *,
    seeds: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    coupled: bool,
) -> jax.Array:
    """Unit noise [b, *shapes[scale]] of one scale, a function of (seed, id); scale 0 has that of
    plain sampling."""
    if scale == 0:
        return prior(seeds[0], ids, shapes[0], 1.0)
    # by size, not by number of stages: two stages, one jump and direct sampling end on the same
    stream = "cascade " + named(shapes[scale][:2])
    fresh = prior(seeds[scale], ids, shapes[scale], 1.0, stream=stream)
    if not coupled:
        return fresh
    below = scale_noise(scale - 1, ids, seeds=seeds, shapes=shapes, coupled=True)
    return coupled_noise(below, fresh)


def network_calls(
    plan: CascadePlan, *, method: str = "heun", cfg_scale: float = 1.0
) -> tuple[tuple[int, ...], int]:
    """(calls for one image at scales 0 .. R, calls of direct sampling); guidance doubles them."""
    times = 1 if cfg_scale in (0.0, 1.0) else 2

    def calls(grid):
        return times * sum(solvers.nfe([(None, grid)], method)) if len(grid) > 1 else 0

    at_base = 0 if plan.given else calls(plan.grid)
    return (at_base, *map(calls, plan.restarts)), calls(plan.direct)


def cascade_cost(
    loaded: Loaded,
    plan: CascadePlan,
    *,
    batch_size: int = 1,
    method: str = "heun",
    cfg_scale: float = 1.0,
    owner: str = "level",
) -> dict:
    """What one image of the tuning-free cascade costs, and of direct sampling at its last size.

    {"scales": [{size, nfe, flops_per_call, flops_per_image}], "nfe", "flops_per_image", "direct":
    one such row, "flops_ratio": cascade / direct, which is the paper's 1/C + K/T}. FLOPs are sums
    over network calls of a compiled one. A scale of given images makes no call.
    """
    model, diffusion = _teacher(loaded.meta)
    guided = 1 if cfg_scale in (0.0, 1.0) else 2

    def row(size: Size, grid: np.ndarray | None) -> dict:
        if grid is None or len(grid) < 2:
            return {"size": size, "nfe": 0, "flops_per_call": 0.0, "flops_per_image": 0.0}
        shape = (batch_size, *size, model["in_channels"])
        parts = segment_calls(
            model, diffusion, loaded.params, shape, grid, method=method,
            owner_shift=owner_shift(model, size, owner),
        )  # fmt: skip
        calls, flops = (guided * sum(n * each for n, each in rows) for rows in (
            [(n, 1) for n, _ in parts], parts))  # fmt: skip
        return {
            "size": size, "nfe": calls, "flops_per_call": flops / calls, "flops_per_image": flops,
        }  # fmt: skip

    grids = (None if plan.given else plan.grid, *plan.restarts)
    scales = [row(size, grid) for size, grid in zip(plan.sizes, grids)]
    direct, total = (
        row(plan.sizes[-1], plan.direct),
        sum(scale["flops_per_image"] for scale in scales),
    )
    return {
        "scales": scales,
        "nfe": sum(scale["nfe"] for scale in scales),
        "flops_per_image": total,
        "direct": direct,
        "flops_ratio": total / direct["flops_per_image"],
    }


def _check_options(stages, denoisers, stage_seeds, kernel, space):
    if len(denoisers) != stages + 1:
        raise ValueError(f"{len(denoisers)} denoisers for {stages + 1} scales: give one for each")
    if len(stage_seeds) not in (0, stages):
        raise ValueError(f"{len(stage_seeds)} stage seeds for {stages} stages: give one for each")
    if kernel not in KERNELS or space not in SPACES:
        raise ValueError(
            f"unknown resize kernel {kernel!r} or space {space!r}: choose one of "
            f"{tuple(KERNELS)} and one of {SPACES}"
        )


def _full_grid(diffusion: dict, steps: int, spacing: str) -> tuple[np.ndarray, float]:
    """(sigmas of a full run, the highest that the teacher knows)."""
    grid = levels(diffusion, steps, "sample", spacing)
    if spacing == "karras":
        return grid, diffusion["sigma_max"]
    return grid, float(process.vp_schedule(diffusion["process"]).sigmas[-1])


def _teacher(meta: dict) -> tuple[dict, dict]:
    """(U-Net fields, diffusion) of a teacher; refuses other networks."""
    if "net" not in meta["networks"]:
        raise ValueError(
            f"a self-cascade runs a diffusion teacher, but this model is a {meta['stage']} run's "
            f"{', '.join(meta['networks'])}, which samples in one step: name a pretrain run"
        )
    return meta["networks"]["net"], meta["diffusion"]
