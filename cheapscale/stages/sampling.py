"""Images from any checkpoint: a teacher through its ODE, a generator in one call.

Image i depends on (seed, i) alone: its noise is sigma_max * normal(fold_in(key, i)), never on the
batch size or the number of devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion import process, solvers
from cheapscale.stages.networks import check_guidance, make_generator, make_segments
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.sharding import in_batches
from cheapscale.training.state import stream_key

PyTree = Any
SPACINGS = ("karras", "leading", "trailing", "quadratic")
OF_TEACHERS = ("steps", "method", "spacing", "cfg_scale")  # what a one-step generator has not


def prior(
    seed: int, ids: np.ndarray, shape: tuple[int, ...], sigma_max: float, stream: str = "sample"
) -> jax.Array:
    """z [n, *shape] at scale sigma_max, one independent draw for each id of a named stream."""
    keys = jax.vmap(lambda i: stream_key(seed, stream, i))(jnp.asarray(ids))
    return sigma_max * jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def labels_for(seed: int, ids: np.ndarray, num_classes: int) -> np.ndarray:
    """A uniform class for each id; zeros where there are no classes."""
    if not num_classes:
        return np.zeros(len(ids), np.int32)
    keys = jax.vmap(lambda i: stream_key(seed, "label", i))(jnp.asarray(ids))
    draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, num_classes))
    return np.asarray(draw(keys), np.int32)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Refuse a label outside [0, num_classes)."""
    if num_classes and (labels.min() < 0 or labels.max() >= num_classes):
        bad = int(labels.max() if labels.max() >= num_classes else labels.min())
        raise ValueError(
            f"label {bad} is out of range: the model has classes 0 ... {num_classes - 1}"
        )
    if not num_classes and labels.any():
        raise ValueError(f"label {int(labels.max())} was asked for, but the model is unconditional")


def teacher_map(
    model: dict,
    diffusion: dict,
    *,
    steps: int = 40,
    method: str = "heun",
    cfg_scale: float = 1.0,
    direction: str = "sample",
    spacing: str = "karras",
    clip: bool = False,
    seed: int = 0,
) -> Callable:
    """fn(params, x, label, ids=None): the probability-flow ODE as one pure function.

    direction "sample": z at the highest level -> image, on `steps` levels of a `spacing` and a last
    step to 0; with method "ancestral" the noise of image i is a function of (seed, ids[i]).
    "round_trip": z -> image on exactly the inversion's levels, with no step to 0.
    "invert": image (taken as living at sigma_min) -> z (spec section 2.1).
    """
    grid = levels(diffusion, steps, direction, spacing)
    segments = make_segments(model, diffusion, cfg_scale=cfg_scale)

    def run(
        params: PyTree, x: jax.Array, label: jax.Array, ids: jax.Array | None = None
    ) -> jax.Array:
        noise = None
        if method == "ancestral":
            if ids is None:
                raise ValueError("ancestral sampling draws noise by image: give their ids")

            def noise(step: jax.Array) -> jax.Array:
                def of_image(i):
                    key = jax.random.fold_in(stream_key(seed, "ancestral", i), step)
                    return jax.random.normal(key, x.shape[1:], x.dtype)

                return jax.vmap(of_image)(ids)

        return solvers.solve(
            segments(params, label, grid), x, method=method, clip=clip, noise=noise
        )

    return run


def levels(diffusion: dict, steps: int, direction: str, spacing: str = "karras") -> np.ndarray:
    """The sigmas that `teacher_map` walks along.

    spacing: of sampling; "karras" levels from sigma_max to sigma_min, or of a VP teacher the times
    of `VPSchedule.grid`, which begin near the end of its table whatever sigma_max is.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    if spacing != "karras":
        if diffusion["process"] == "edm":
            raise ValueError(
                f"{spacing} times are those of a VP schedule, but this teacher's process is edm: "
                "use spacing karras"
            )
        if direction != "sample":
            raise ValueError(f"spacing {spacing!r} is for sampling, not to {direction}: use karras")
        return process.vp_schedule(diffusion["process"]).grid(steps, spacing=spacing)
    make = {
        "sample": process.sampling_grid,
        "round_trip": process.karras_grid,
        "invert": process.inversion_grid,
    }[direction]
    return make(steps, **{name: diffusion[name] for name in ("sigma_min", "sigma_max", "rho")})


def network_calls(
    diffusion: dict,
    steps: int,
    direction: str,
    *,
    method: str = "heun",
    cfg_scale: float = 1.0,
    spacing: str = "karras",
) -> int:
    """Network calls that `teacher_map` makes for one image (NFE); guidance doubles them."""
    calls = sum(solvers.nfe([(None, levels(diffusion, steps, direction, spacing))], method))
    return calls if cfg_scale in (0.0, 1.0) else 2 * calls


def sampler(
    loaded: Loaded,
    *,
    seed: int = 0,
    batch_size: int = 64,
    steps: int = 40,
    method: str = "heun",
    cfg_scale: float = 1.0,
    spacing: str = "karras",
) -> Callable:
    """draw(ids, labels=None) -> (images [n,R,R,3] clamped to [-1, 1], labels [n]).

    From a teacher or a generator; steps, method, cfg_scale and spacing belong to teachers, a
    generator takes one call. Many draws from one sampler compile once.
    """
    meta = loaded.meta
    (name, model), = meta["networks"].items()  # fmt: skip
    base = model["resolution"]
    if name == "generator":
        generate, top = make_generator(model, meta["diffusion"]), meta["diffusion"]["sigma_max"]

        def run(params, z, label, ids):
            return generate(params, z, label)
    else:
        check_guidance(meta, cfg_scale)
        run = teacher_map(
            model, meta["diffusion"], steps=steps, method=method, cfg_scale=cfg_scale,
            spacing=spacing, seed=seed,
        )  # fmt: skip
        top = levels(meta["diffusion"], steps, "sample", spacing)[0]

    def draw(ids: np.ndarray, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray(ids)
        if labels is None:
            labels = labels_for(seed, ids, model["num_classes"])
        labels = np.asarray(labels, np.int32)
        check_labels(labels, model["num_classes"])
        z = prior(seed, ids, (base, base, model["in_channels"]), top)
        rows = (np.asarray(z), labels, ids.astype(np.int32))
        images = in_batches(run, loaded.params, *rows, batch_size=batch_size)
        return np.clip(images, -1.0, 1.0), labels

    return draw


def sample(
    loaded: Loaded, ids: np.ndarray, *, labels: np.ndarray | None = None, **options
) -> tuple[np.ndarray, np.ndarray]:
    """One draw of `sampler`, with its options."""
    return sampler(loaded, **options)(ids, labels)
