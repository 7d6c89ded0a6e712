"""The denoisers of a tuned self-cascade: upsamplers phi, adapters or fine-tuned weights beside a
frozen teacher theta (Guo et al. 2024, arXiv 2402.10491, section 3.3).

A tuned run is loaded from its work directory and fits one teacher, checked by its fingerprint.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.cascade.lora import adapted
from cheapscale.cascade.plan import ROUNDING, CascadePlan, Size, named
from cheapscale.cascade.upsampler import DESIGNS, UpsamplerConfig, Upsamplers, from_fields
from cheapscale.diffusion.denoiser import Denoiser
from cheapscale.diffusion.samplers import Segment
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.teacher import Origin, Teacher
from cheapscale.training.checkpoint import load_network

PyTree = Any
RATIO = 2  # side of a canvas / side of its pivot, for which upsamplers are tuned


class Tuned(flax.struct.PyTreeNode):
    """The weights of a tuned run, a pytree, and the origin of their checkpoint."""

    params: PyTree
    origin: Origin = flax.struct.field(pytree_node=False)

    @property
    def settings(self) -> dict:
        """config.cascade with numbers for `sizes` and `sigma_K`, see `tune.resolve_settings`."""
        return self.origin.meta["cascade"]

    @property
    def config(self) -> UpsamplerConfig:
        """The config of the upsamplers; only for runs that tuned upsamplers."""
        return from_fields(self.origin.meta["networks"]["upsampler"])


class Beside(NamedTuple):
    """The model of a tuned cascade: a frozen teacher, and the runs tuned beside it (None: none)."""

    teacher: Teacher
    runs: tuple[Tuned | None, ...]


def lift(
    teacher: Teacher, tuned: Tuned, pivot: jax.Array, label: jax.Array, ratio: tuple[float, float]
) -> PyTree:
    """The part of phi that depends only on the clean pivot [b, h, w, c], for all steps.

    The features f_n are read at the teacher's lowest level, in place of the paper's step 0.
    """
    f = teacher.read(tuned.config.places, pivot, teacher.process.sigma_min, label)
    f = jax.lax.stop_gradient(f)
    module = Upsamplers(tuned.config)
    return module.apply({"params": tuned.params}, f, ratio, method=Upsamplers.lift)


def denoise(
    teacher: Teacher, tuned: Tuned, lifted: PyTree, x: jax.Array, sigma: Any, label: jax.Array
) -> jax.Array:
    """D(x; sigma, label) of the frozen network with u_n = phi_n(f_n, t) added at four places."""
    sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
    emb = embedding(teacher, sigma, label)
    u: Any = Upsamplers(tuned.config).apply({"params": tuned.params}, lifted, emb, sigma)
    keys = inject_at(tuned.config.places, tuned.settings["mode"])
    return teacher.denoise(x, sigma, label, inject={keys[name]: u[name] for name in u})


def embedding(teacher: Teacher, sigma: jax.Array, label: jax.Array) -> jax.Array:
    """[b, E]: the frozen network's embedding of levels [b]."""
    # The smallest canvas that the network accepts; XLA removes everything but the embedding.
    side, channels = teacher.net.config.stride, teacher.shape[-1]
    x = jnp.zeros((len(sigma), side, side, channels), sigma.dtype)
    return teacher.read(("emb",), x, sigma, label)["emb"]


def inject_at(places: Sequence[str], mode: str) -> dict[str, str]:
    """{block: the key of `UNet.__call__`'s `inject`}.

    Mode "S" adds to the skip connection from an encoder block to the decoder, as the paper's "skip
    features" suggest; "M" adds to the main stream, as the released code does. The bottleneck has no
    skip connection.
    """
    ending = {"S": "/skip", "M": "/stream"}[mode]
    return {name: name if name.startswith("dec_") else name + ending for name in places}


def tuned_denoiser(
    model: Beside,
    pivot: jax.Array | None,
    label: jax.Array,
    grid: np.ndarray,
    *,
    run: int | None,
    size: Size,
    cfg_scale: float = 1.0,
) -> Sequence[Segment]:
    """The denoiser of a stage to `size` with model.runs[run]; None: the teacher alone."""
    theta, tuned = model.teacher, None if run is None else model.runs[run]
    if tuned is None:
        return theta.segments(label, grid, cfg_scale=cfg_scale)
    tune = tuned.settings["tune"]
    if tune in DESIGNS:
        assert pivot is not None, "upsamplers read a pivot"
        ratio = (size[0] / pivot.shape[1], size[1] / pivot.shape[2])
        return [(upsampled(theta, tuned, pivot, label, ratio, cfg_scale), grid)]
    params = adapted(theta.params, tuned.params) if tune == "lora" else tuned.params
    return theta.replace(params=params).segments(label, grid, cfg_scale=cfg_scale)


def upsampled(
    theta: Teacher,
    tuned: Tuned,
    pivot: jax.Array,
    label: jax.Array,
    ratio: tuple[float, float],
    cfg_scale: float,
) -> Denoiser:
    """D(x, sigma) of one stage. With guidance, both branches read the pivot with their own label;
    one call computes both."""
    null = jnp.full_like(label, theta.null)
    if cfg_scale in (0, 1):
        label = label if cfg_scale else null
        lifted = lift(theta, tuned, pivot, label, ratio)
        return lambda x, sigma: denoise(theta, tuned, lifted, x, sigma, label)
    both = jnp.concatenate([label, null])
    lifted = lift(theta, tuned, jnp.concatenate([pivot, pivot]), both, ratio)

    def D(x, sigma):
        D_c, D_u = jnp.split(denoise(theta, tuned, lifted, jnp.concatenate([x, x]), sigma, both), 2)
        return D_u + cfg_scale * (D_c - D_u)

    return D


def load_tuned(workdir: str, teacher: Teacher | Experts) -> Tuned:
    """The EMA weights of a cascade run; ValueError if they belong to another teacher."""
    loaded = load_network(workdir)
    if "cascade" not in loaded.meta:
        raise ValueError(f"{workdir} is a {loaded.meta['stage']} run, nothing tuned: name another")
    if isinstance(teacher, Experts):
        raise ValueError(
            f"{workdir} was tuned beside one network, but {teacher.workdir} is a set of "
            "experts: name the work directory of its base"
        )
    if loaded.meta["teacher"] != teacher.fingerprint:
        raise ValueError(
            f"{workdir} was tuned for the teacher {loaded.meta['teacher']}, but {teacher.workdir} "
            f"holds {teacher.fingerprint}: use them with the teacher they were tuned on, and the "
            "same --ema"
        )
    return Tuned(loaded.params, Origin(loaded.meta, loaded.step, workdir))


def tuned_denoisers(
    teacher: Teacher, runs: Sequence[Tuned | None], plan: CascadePlan, cfg_scale: float = 1.0
) -> tuple[Beside, list[Callable], Callable]:
    """(model, a denoiser for each scale, the denoiser of direct sampling) of a tuned `Cascade`.

    runs: one for all stages, or one for each; None for a tuning-free stage. Adapters and fine-tuned
    weights also sample directly. Upsamplers need a pivot, so with them the teacher alone samples
    directly. Raises ValueError if upsamplers were not tuned for their stage.
    """
    sizes, stages = plan.sizes, len(plan.restarts)
    if len(runs) not in (1, stages):
        raise ValueError(
            f"{len(runs)} tuned runs for {stages} stages: give one for all, or one for each"
        )

    def needs_pivot(tuned):
        return tuned is not None and tuned.settings["tune"] in DESIGNS

    def denoiser(run, size):
        return functools.partial(tuned_denoiser, run=run, size=size, cfg_scale=cfg_scale)

    denoisers = [denoiser(None, sizes[0])]
    for r, grid in enumerate(plan.restarts, 1):
        run = (r - 1) % len(runs)
        if needs_pivot(runs[run]):
            _check_stage(runs[run].settings, sizes[r - 1], sizes[r], grid)
        denoisers.append(denoiser(run, sizes[r]))
    direct = denoiser(None, sizes[-1]) if needs_pivot(runs[-1]) else denoisers[-1]
    return Beside(teacher, tuple(runs)), denoisers, direct


def _check_stage(settings: dict, small: Size, large: Size, grid: np.ndarray) -> None:
    if large != (RATIO * small[0], RATIO * small[1]):
        raise ValueError(
            f"upsamplers tuned to enlarge {RATIO}x cannot go from {named(small)} to "
            f"{named(large)}: choose scales such as {RATIO}x,{RATIO**2}x"
        )
    if grid[0] > settings["sigma_K"] * (1 + ROUNDING):
        raise ValueError(
            f"the stage to {named(large)} restarts at sigma {grid[0]:.4g}, but its run was tuned "
            f"up to K {settings['k']}, sigma {settings['sigma_K']:.4g}: lower --cascade_k, or tune "
            "with a higher --config.cascade.k"
        )
