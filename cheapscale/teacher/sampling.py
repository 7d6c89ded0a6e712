"""Images from any model, and noise from images: a teacher by its ODE, a generator in one call.

Image i depends only on (seed, i), through its noise sigma_max * normal(fold_in(key, i)), and not on
the batch size or the number of devices.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.data.numbers import image_ids, real, whole
from cheapscale.data.pixels import check_finite
from cheapscale.diffusion.denoiser import Process
from cheapscale.diffusion.guidance import LARGEST_SCALE
from cheapscale.diffusion.samplers import nfe, solve
from cheapscale.features.network import full_precision
from cheapscale.teacher.codec import leave
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.teacher import Generator, Teacher
from cheapscale.training.mesh import in_batches, pinned
from cheapscale.training.state import stream_key

Model = Teacher | Experts | Generator
# A one-step generator takes at most the last one, if it was trained with guidance.
ODE_OPTIONS = ("steps", "method", "spacing", "cfg_scale")
MOST_STEPS = 10_000  # of a sampler; a larger number is a mistake


class Samples(NamedTuple):
    """images: float32 [n, h, w, 3] in [-1, 1], decoded if the model draws latents. labels: int32
    [n], zeros without classes; or the token numbers of captions, int32 [n, length]."""

    images: np.ndarray
    labels: np.ndarray


@pinned()
def prior(
    seed: int,
    ids: np.ndarray | jax.Array,
    shape: tuple[int, ...],
    sigma_max: float,
    stream: str = "sample",
) -> jax.Array:
    """z [n, *shape] at scale sigma_max, one independent draw for each id of a named stream."""
    # A key for each image, not for each batch: any split into batches draws the same noise.
    keys = jax.vmap(lambda i: stream_key(seed, stream, i))(jnp.asarray(ids, jnp.uint32))
    unit = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
    return jnp.float32(sigma_max) * unit


@pinned()
def labels_for(seed: int, ids: np.ndarray, num_classes: int) -> np.ndarray:
    """A uniform class for each id, int32 [n]; zeros where there are no classes."""
    if not num_classes:
        return np.zeros(len(ids), np.int32)
    keys = jax.vmap(lambda i: stream_key(seed, "label", i))(jnp.asarray(ids, jnp.uint32))
    draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, num_classes, jnp.int32))
    return np.asarray(draw(keys))


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Refuse a class outside [0, num_classes); captions, token numbers [n, length], always fit."""
    if labels.ndim == 2:
        return
    if num_classes and (labels.min() < 0 or labels.max() >= num_classes):
        bad = int(labels.max() if labels.max() >= num_classes else labels.min())
        raise ValueError(
            f"label {bad} is out of range: the model has classes 0 ... {num_classes - 1}"
        )
    if not num_classes and labels.any():
        raise ValueError(f"label {int(labels.max())} was asked for, but the model is unconditional")


def check_guidance(model: Model, cfg_scale: float) -> None:
    """Refuse a scale below 0, guidance by a teacher that never saw its null class, and a scale that
    a generator was not trained with."""
    real(cfg_scale, "cfg_scale", 0)
    if isinstance(model, Generator):
        if cfg_scale != 1.0 and not model.guided:
            raise ValueError(
                f"cfg_scale is {cfg_scale}, but the generator in {model.workdir} was trained "
                "without guidance: leave it out, or train one by launch.pipeline with --arg=guided"
            )
        if not 1.0 <= cfg_scale <= LARGEST_SCALE:
            raise ValueError(
                f"cfg_scale is {cfg_scale}, but a generator is trained on scales from 1 to "
                f"{LARGEST_SCALE:g}: give one of these"
            )
    elif cfg_scale != 1.0 and not model.meta["config"]["pretrain"]["label_dropout"]:
        raise ValueError(
            f"cfg_scale is {cfg_scale}, but this teacher was trained without label dropout, so it "
            "has no unconditional estimate: give 1, or train one with "
            "--config.pretrain.label_dropout=0.1"
        )


def levels(
    process: Process,
    steps: int,
    direction: str = "sample",
    spacing: str = "karras",
    level: float = 0.0,
) -> np.ndarray:
    """float64: the sigmas of `ode_map`, in the order of its steps.

    "sample": `steps` levels of a spacing, descending, and a last step to 0. "invert": `steps`
    Karras nodes, ascending from `level`, at least sigma_min. "round_trip": the same nodes back
    down, with a step to 0 only from a level above sigma_min.
    """
    whole(steps, "steps", 1, MOST_STEPS)
    if direction == "sample":
        return process.grid(steps, spacing)
    if spacing != "karras":
        raise ValueError(f"spacing {spacing!r} is for sampling, not to {direction}: use karras")
    if not 0 <= level < process.sigma_max:
        raise ValueError(
            f"the inversion starts at noise level {level}: give one from 0 to sigma_max, "
            f"{process.sigma_max:g}"
        )
    up = process.inversion_grid(steps, level)
    if direction == "invert":
        return up
    return np.append(up[::-1], 0.0) if up[0] > process.sigma_min else up[::-1]


def ode_map(
    model: Teacher | Experts,
    x: jax.Array,
    label: jax.Array,
    ids: jax.Array | None = None,
    *,
    direction: str = "sample",
    steps: int = 40,
    method: str = "heun",
    cfg_scale: float = 1.0,
    spacing: str = "karras",
    level: float = 0.0,
    clip: bool = False,
    seed: int = 0,
) -> jax.Array:
    """The probability-flow ODE as a pure function of the model (a pytree) and arrays.

    direction "sample": z at the highest level -> image. "invert": image, taken to lie at sigma_min,
    or with the noise of a `level` at that, -> z at sigma_max (PaGoDA, Kim et al. 2024, arXiv
    2405.14822, section 3.2). "round_trip": z -> image on exactly the inversion's nodes.

    Args:
        x: [b, h, w, c] float32. label: [b]. ids: [b], only for method "ancestral": its
            noise for image i is a function of (seed, ids[i]).
        clip: clamp each estimate of x0 to [-1, 1].
    """
    grid = levels(model.process, steps, direction, spacing, level)
    if isinstance(model, Experts):
        model.check_levels(grid, method)
    noise = functools.partial(_image_noise, seed, ids, x) if method == "ancestral" else None
    segments = model.segments(label, grid, cfg_scale=cfg_scale)
    x = solve(segments, x, method=method, clip=clip, noise=noise)
    # A published sampler that ends above 0 leaves x_vp = alpha x there.
    return x / math.hypot(1, grid[-1]) if spacing == "own" and grid[-1] > 0 else x


def _image_noise(seed: int, ids: jax.Array | None, like: jax.Array, step: jax.Array) -> jax.Array:
    """Unit noise like `like` for one step, drawn for each image from its own id."""
    if ids is None:
        raise ValueError("ancestral sampling draws noise by image: give their ids")

    def of_image(i):
        key = jax.random.fold_in(stream_key(seed, "ancestral", i), step)
        return jax.random.normal(key, like.shape[1:], like.dtype)

    return jax.vmap(of_image)(ids)


def one_step(
    generator: Generator,
    z: jax.Array,
    label: jax.Array,
    ids: jax.Array | None = None,
    *,
    cfg_scale: float = 1.0,
) -> jax.Array:
    """G(z, label, omega = cfg_scale); the signature is that of `ode_map`."""
    del ids
    omega = None if cfg_scale == 1.0 else jnp.full(len(z), cfg_scale, jnp.float32)
    return generator(z, label, omega)


def network_calls(
    process: Process,
    steps: int,
    direction: str = "sample",
    *,
    method: str = "heun",
    cfg_scale: float = 1.0,
    spacing: str = "karras",
) -> int:
    """Network calls that `ode_map` makes for one image (NFE); guidance doubles them."""
    calls = nfe(levels(process, steps, direction, spacing), method)
    return calls if cfg_scale in (0.0, 1.0) else 2 * calls


def sampler(
    model: Model,
    *,
    seed: int = 0,
    batch_size: int = 64,
    steps: int = 40,
    method: str = "heun",
    cfg_scale: float = 1.0,
    spacing: str = "karras",
) -> Callable[..., Samples]:
    """A function draw(ids, labels=None) -> Samples of those ids, clamped to [-1, 1].

    A generator ignores steps, method and spacing. All draws of one sampler share one compilation.
    """
    check_guidance(model, cfg_scale)
    if isinstance(model, Generator):
        top = model.process.sigma_max  # G is called at sigma_max
        run = functools.partial(one_step, cfg_scale=cfg_scale) if cfg_scale != 1.0 else one_step
    else:
        # The first noise has the deviation of the grid's own first level: a VP schedule's spacing
        # need not begin at sigma_max.
        top = model.process.start(levels(model.process, steps, "sample", spacing), spacing)
        run = functools.partial(
            ode_map, steps=steps, method=method, cfg_scale=cfg_scale, spacing=spacing, seed=seed
        )

    def draw(ids: np.ndarray, labels: np.ndarray | None = None) -> Samples:
        ids = image_ids(ids)
        if labels is None:
            labels = labels_for(seed, ids, model.num_classes)
        labels = np.asarray(labels, np.int32)
        check_labels(labels, model.num_classes)
        rows = (np.asarray(prior(seed, ids, model.shape, top)), labels, ids)
        images = in_batches(run, model, *rows, batch_size=batch_size)
        check_finite(images, "samples", ids)
        return Samples(leave(model.meta, images), labels)

    return draw


def sample(
    model: Model, ids: np.ndarray, *, labels: np.ndarray | None = None, **options
) -> Samples:
    """One draw of `sampler`, with its options."""
    return sampler(model, **options)(ids, labels)


@functools.cache
def _exact_map(**options) -> Callable:
    """`ode_map` with these options; the same object each time, which compiles once."""
    return full_precision(functools.partial(ode_map, **options))


def inverter(
    teacher: Teacher | Experts,
    *,
    direction: str = "invert",
    nodes: int = 40,
    level: float = 0.0,
    clip: bool = False,
    batch_size: int = 64,
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function solve(x [n, h, w, c], labels [n]) -> z by "invert", or images by "round_trip".

    Matrix products are full float32: an accelerator rounds their factors to fewer bits by default,
    and inversion amplifies rounding errors made near sigma_min.
    """
    # This refuses a wrong number before anything compiles.
    levels(teacher.process, nodes, direction, level=level)
    run = _exact_map(direction=direction, steps=nodes, level=level, clip=clip)

    def solve_rows(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
        found = in_batches(run, teacher, x, labels, batch_size=batch_size)
        return check_finite(found, "solutions of the ODE")

    return solve_rows


def round_trip(
    teacher: Teacher | Experts,
    *,
    nodes: int = 40,
    level: float = 0.0,
    clip: bool = False,
    batch_size: int = 64,
) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A function trip(images, labels) -> (z, images solved back from z on the same nodes)."""
    options = {"nodes": nodes, "level": level, "clip": clip, "batch_size": batch_size}
    there = inverter(teacher, direction="invert", **options)
    back = inverter(teacher, direction="round_trip", **options)

    def trip(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = there(images, labels)
        return z, back(z, labels)

    return trip
