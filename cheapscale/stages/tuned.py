"""What a tuned self-cascade samples with: upsamplers, adapters or fine-tuned weights (spec 3, 5.5).

    f   = features(theta, p, t=0)                      once a stage, from the clean pivot p
    u   = phi(f, t)                                    at every step
    D   = theta's denoiser of x_t with u added at four places

The base theta is frozen; phi lives beside it. A tuned run is read from its own work directory and
runs on the teacher it was tuned for, which its fingerprint tells.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion import process
from cheapscale.diffusion.pivot import Size, named, restart_sigma
from cheapscale.models import upsampler
from cheapscale.models.lora import adapted
from cheapscale.models.upsampler import DESIGNS, Upsamplers
from cheapscale.stages.cascade_sampler import CascadePlan, StageDenoiser, frozen_teacher
from cheapscale.stages.networks import fingerprint, make_denoiser, make_taps
from cheapscale.training.checkpoint import Loaded, load_network

PyTree = Any
MODES = ("S", "M")
FEATURES = ("clean", "step")


class Injection(NamedTuple):
    """How pivot features enter: the paper's way by default, the released code's by each switch.

    mode: "S" adds u_n to what the decoder receives from a block, the literal text; "M" to the main
    stream, the released code. features: read once from the clean pivot ("clean"), or at every step
    with the step's own embedding ("step"). off_below: sigma under which nothing is injected.
    pivot_decay: the pivot that is read at the i-th step is pivot_decay^i of itself (the released
    code's scaling bug has 0.13025).
    """

    mode: str = "S"
    features: str = "clean"
    off_below: float = 0.0
    pivot_decay: float = 1.0


def injection(settings: dict, sigma_data: float) -> Injection:
    """From config.cascade; raises ValueError on what does not fit."""
    mode, features = settings["mode"], settings["features"]
    if mode not in MODES or features not in FEATURES:
        raise ValueError(
            f"cascade.mode is {mode!r} and cascade.features {features!r}: choose one of {MODES} "
            f"and one of {FEATURES}"
        )
    decay = settings["pivot_decay"]
    if decay != 1.0 and features == "clean":
        raise ValueError(
            f"cascade.pivot_decay is {decay}, but cascade.features 'clean' reads the pivot once: "
            "set features to 'step'"
        )
    off = settings["off_below"]
    area = settings["ratio"] ** 2
    below = restart_sigma(off, area_ratio=area, sigma_data=sigma_data) if off else 0.0
    return Injection(mode, features, below, decay)


def reader(model: dict, diffusion: dict, config: upsampler.UpsamplerConfig) -> Callable:
    """read(theta, pivot [b,h,w,c], step, label) -> {place: f_n}. The pivot is clean, at the level
    of step 0, the lowest that the teacher samples at; `step` is the sigma whose embedding the
    network is given with it: that of step 0 in the paper, every step's own in the released code."""
    taps = make_taps(model, diffusion, tuple(name for name, _ in config.channels))

    def read(theta: PyTree, pivot: jax.Array, step: Any, label: jax.Array) -> dict[str, jax.Array]:
        return taps(theta, pivot, diffusion["sigma_min"], label, told=step)

    return read


def embedder(model: dict, diffusion: dict) -> Callable:
    """embed(theta, sigma [b], label [b]) -> [b, E]: the frozen network's own embedding of a step.

    The network is called on a canvas of its stride; all but the embedding falls out when compiled.
    """
    read = make_taps(model, diffusion, ("emb",))
    stride = 2 ** (len(model["channel_mult"]) - 1)

    def embed(theta: PyTree, sigma: jax.Array, label: jax.Array) -> jax.Array:
        x = jnp.zeros((len(sigma), stride, stride, model["in_channels"]), sigma.dtype)
        return read(theta, x, sigma, label)["emb"]

    return embed


def inject_at(config: upsampler.UpsamplerConfig, mode: str) -> dict[str, str]:
    """{place: the U-Net's key for adding there}. The bottleneck has one stream in both modes."""
    ending = {"S": "/skip", "M": "/stream"}[mode]
    return {name: name if name.startswith("dec_") else name + ending for name, _ in config.channels}


def upsampled_denoiser(
    model: dict, diffusion: dict, config: upsampler.UpsamplerConfig, mode: str
) -> Callable:
    """D(theta, phi, lifted, x, sigma, label), sigma scalar or [b]: the frozen network with u added;
    `weight` [b] or scalar multiplies u."""
    module, keys = Upsamplers(config), inject_at(config, mode)
    bind, embed = make_denoiser(model, diffusion), embedder(model, diffusion)

    def denoise(theta, phi, lifted, x, sigma, label, weight=1.0, **options):
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), x.shape[:1])
        u = module.apply({"params": phi}, lifted, embed(theta, sigma, label), sigma)
        inject = {keys[name]: process.over_pixels(weight, u[name]) * u[name] for name in u}
        return bind(theta, inject=inject, **options)(x, sigma, label=label)

    return denoise


def upsampled_teacher(
    model: dict,
    diffusion: dict,
    config: upsampler.UpsamplerConfig,
    injected: Injection,
    *,
    cfg_scale: float,
    choose: Callable[[PyTree], tuple[PyTree, PyTree]],
    size: tuple[int, int],
) -> StageDenoiser:
    """The tuned denoiser of one stage at `size`; choose(params) -> (theta, phi).

    Under guidance both branches have features of their own: those of their own label.
    """
    module = Upsamplers(config)
    read = reader(model, diffusion, config)
    denoise = upsampled_denoiser(model, diffusion, config, injected.mode)
    null = model["num_classes"]

    def denoiser(params, pivot, label, grid):
        theta, phi = choose(params)
        ratio = (size[0] / pivot.shape[1], size[1] / pivot.shape[2])
        levels = jnp.asarray(np.sort(grid), jnp.float32)
        if cfg_scale == 0:
            label = jnp.full_like(label, null)
        elif cfg_scale != 1:  # both branches in one call, as in diffusion.guidance
            label = jnp.concatenate([label, jnp.full_like(label, null)])
            pivot = jnp.concatenate([pivot, pivot])

        def lifted(clean, step):
            features = read(theta, clean, step, label)
            return module.apply({"params": phi}, features, ratio, method=Upsamplers.lift)

        once = lifted(pivot, diffusion["sigma_min"]) if injected.features == "clean" else None

        def D(x, sigma):
            sigma = jnp.asarray(sigma, x.dtype)
            f = once
            if injected.features == "step":
                i = len(levels) - jnp.searchsorted(levels, sigma, side="right")  # steps before
                f = lifted(injected.pivot_decay**i * pivot, sigma)
            on = (sigma >= injected.off_below).astype(x.dtype)
            return denoise(theta, phi, f, x, sigma, label, on)

        def guided(x, sigma):
            D_c, D_u = jnp.split(D(jnp.concatenate([x, x]), sigma), 2)
            return D_u + cfg_scale * (D_c - D_u)

        return [(D if cfg_scale in (0, 1) else guided, grid)]

    return denoiser


class Tuned(NamedTuple):
    """A tuned run: its weights, its meta, and how its network becomes a stage's denoiser."""

    params: PyTree
    meta: dict
    tune: str


def load_tuned(workdir: str, teacher: Loaded, **options) -> Tuned:
    """The EMA weights of a cascade run; ValueError where they belong to another teacher."""
    loaded = load_network(workdir, **options)
    settings = loaded.meta.get("cascade")
    if settings is None:
        raise ValueError(
            f"{workdir} is a {loaded.meta['stage']} run, nothing tuned: name the work directory of "
            "a cascade run"
        )
    if "specialists" in teacher.meta["diffusion"]:
        raise ValueError(
            f"{workdir} was tuned beside one network, but {teacher.workdir} is a set of "
            "specialists: name the work directory of its base"
        )
    expected, found = loaded.meta["teacher"], fingerprint(teacher.params)
    if expected != found:
        raise ValueError(
            f"{workdir} was tuned for the teacher {expected}, but {teacher.workdir} holds {found}: "
            "use them with the teacher they were tuned on, and the same --ema"
        )
    return Tuned(loaded.params, loaded.meta, settings["tune"])


def stage_denoiser(
    tuned: Tuned | None,
    teacher: dict,
    index: int,
    size: tuple[int, int],
    cfg_scale: float = 1.0,
) -> StageDenoiser:
    """A stage's denoiser for params {"teacher": theta, "tuned": [weights, ...]}; None is theta's.

    teacher: meta of the teacher. index: which of the tuned weights. size: of the stage's canvas.
    """
    model, diffusion = teacher["networks"]["net"], teacher["diffusion"]
    frozen = frozen_teacher(model, diffusion, cfg_scale)
    if tuned is None:
        return lambda params, *rest: frozen(params["teacher"], *rest)
    if tuned.tune == "ft":
        return lambda params, *rest: frozen(params["tuned"][index], *rest)
    if tuned.tune == "lora":
        scale = tuned.meta["cascade"]["lora_scale"]

        def with_adapters(params, *rest):
            return frozen(adapted(params["teacher"], params["tuned"][index], scale), *rest)

        return with_adapters
    return upsampled_teacher(
        model,
        diffusion,
        upsampler.from_fields(tuned.meta["networks"]["upsampler"]),
        injection(tuned.meta["cascade"], diffusion["sigma_data"]),
        cfg_scale=cfg_scale,
        choose=lambda params: (params["teacher"], params["tuned"][index]),
        size=size,
    )


def tuned_cascade(
    teacher: Loaded, tuned: Sequence[Tuned], plan: CascadePlan, cfg_scale: float = 1.0
) -> tuple[Loaded, dict]:
    """(what `cascade_sampler` is given in place of the teacher, its denoisers as keywords).

    tuned: one for all stages (shared), or one for each. Fine-tuned weights and adapters also sample
    directly, which upsamplers cannot: they need a pivot. Raises ValueError where a stage asks for
    what its run was not tuned for: another ratio, a higher K, guidance.
    """
    sizes, stages = plan.sizes, len(plan.sizes) - 1
    if len(tuned) not in (1, stages):
        raise ValueError(
            f"{len(tuned)} tuned runs for {stages} stages: give one for all, or one for each"
        )
    for r in range(stages):
        check_stage(tuned[r % len(tuned)], sizes[r], sizes[r + 1], plan.restarts[r], cfg_scale)
    make = functools.partial(stage_denoiser, teacher=teacher.meta, cfg_scale=cfg_scale)
    denoisers = [make(None, index=0, size=sizes[0])]
    for r in range(1, stages + 1):
        index = (r - 1) % len(tuned)
        denoisers.append(make(tuned[index], index=index, size=sizes[r]))
    alone = tuned[-1] if tuned[-1].tune in ("ft", "lora") else None
    direct = make(alone, index=len(tuned) - 1, size=sizes[-1])
    params = {"teacher": teacher.params, "tuned": [run.params for run in tuned]}
    return teacher._replace(params=params), {"denoisers": denoisers, "direct_denoiser": direct}


def check_stage(run: Tuned, small: Size, large: Size, grid: np.ndarray, cfg_scale: float) -> None:
    """Refuse a stage that a tuned run has not seen."""
    settings = run.meta["cascade"]
    ratio, sigma_data = settings["ratio"], run.meta["diffusion"]["sigma_data"]
    sigma_K = restart_sigma(settings["k"], area_ratio=ratio**2, sigma_data=sigma_data)
    if run.tune in DESIGNS and (large[0] != ratio * small[0] or large[1] != ratio * small[1]):
        raise ValueError(
            f"upsamplers tuned to enlarge {ratio}x cannot go from {named(small)} to "
            f"{named(large)}: choose scales such as {ratio}x,{ratio**2}x"
        )
    if settings["times"] == "to_k" and grid[0] > sigma_K * (1 + 1e-6):
        raise ValueError(
            f"the stage to {named(large)} restarts at sigma {grid[0]:.4g}, but its run was tuned "
            f"up to K {settings['k']}, sigma {sigma_K:.4g}: lower --cascade_k, or tune with "
            "cascade.times=all"
        )
    if cfg_scale != 1 and not settings["label_dropout"]:
        raise ValueError(
            f"cfg_scale is {cfg_scale}, but the run was tuned without label dropout, so its "
            "unconditional branch was not: use cfg_scale=1, or tune with cascade.label_dropout"
        )
