"""Networks rebuilt from a checkpoint alone: a teacher as D(x; sigma, y), a generator as G(z, y).

`meta` is what travels with the weights:
{"networks": {name: U-Net fields}, "diffusion": {...}, "data": {...}}.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion import denoiser, guidance, process, solvers
from cheapscale.models.unet import UNet, unet
from cheapscale.pruning.partition import step_owners
from cheapscale.pruning.structure import pruned_config
from cheapscale.stages.specialists import is_begun, is_set, load_set
from cheapscale.training.checkpoint import Loaded, load_network

PyTree = Any


def complete(model: dict) -> dict:
    """Every field of the U-Net with its value, as plain JSON: what travels with the weights."""
    return dataclasses.asdict(unet(**model).config)


def pruned_model(model: dict, keep: Mapping[str, np.ndarray]) -> dict:
    """The fields of a network of which only the channels `keep` stay."""
    return complete(model | {"overrides": pruned_config(unet(**model).config, keep).overrides})


def members(loaded: Loaded) -> list[tuple[dict, PyTree]]:
    """(fields, weights) of every network of a teacher: of a set from the cleanest group, else its
    only one."""
    specialists = loaded.meta["diffusion"].get("specialists")
    if specialists is None:
        return [(loaded.meta["networks"]["net"], loaded.params)]
    return list(zip(specialists["models"], loaded.params, strict=True))


def check_process(diffusion: dict) -> None:
    """Refuse an unknown prediction, or a range of sigma that the process does not reach."""
    if diffusion["process"] == "edm":
        return
    denoiser.check_prediction(diffusion["prediction"])
    schedule = process.vp_schedule(diffusion["process"])
    if (
        not schedule.sigmas[0]
        <= diffusion["sigma_min"]
        < diffusion["sigma_max"]
        <= schedule.sigmas[-1]
    ):
        raise ValueError(
            f"diffusion.sigma_min {diffusion['sigma_min']} and sigma_max {diffusion['sigma_max']} "
            f"leave the {diffusion['process']} schedule, whose sigmas run from "
            f"{schedule.sigmas[0]:.7g} to {schedule.sigmas[-1]:.7g}: set them inside it, as "
            "0.02 and 80"
        )


def make_denoiser(model: dict, diffusion: dict, noise_shift: float = 1.0) -> Callable:
    """bind(params, **apply options) -> D(x [b,h,w,c], sigma [b] or scalar, label=..., augment=...).

    model: fields of the U-Net. diffusion: `process`, `prediction`, `sigma_data`. The denoiser's
    currency is EDM's sigma whatever process the network was trained for. noise_shift: see
    `denoiser.edm`.
    """
    net = unet(**model)

    def bind(params: PyTree, **options):
        return denoiser_of(net, {"params": params}, diffusion, noise_shift, **options)

    return bind


def denoiser_of(
    net: UNet, variables: PyTree, diffusion: dict, noise_shift: float = 1.0, **options
) -> Callable:
    """D(x, sigma, label=...) of a network with its variables; see `make_denoiser`."""

    def F(x, noise, **condition):
        return net.apply(variables, x, noise, **condition, **options)

    if diffusion["process"] == "edm":
        feature = net.config.noise_feature
        return denoiser.edm(F, diffusion["sigma_data"], feature, noise_shift=noise_shift)
    schedule = process.vp_schedule(diffusion["process"])
    return denoiser.vp_denoiser(F, schedule, diffusion["prediction"], noise_shift=noise_shift)


def make_segments(
    model: dict,
    diffusion: dict,
    *,
    cfg_scale: float = 1.0,
    noise_shift: float = 1.0,
    owner_shift: float = 1.0,
) -> Callable:
    """segments(params, label [b], grid) -> [(D(x, sigma), its part of the grid)] for `solve`.

    A teacher owns the whole grid. Of a set of specialists (`diffusion["specialists"]`, params a
    sequence) each owns the steps whose noisier end lies in its group, whichever way the grid runs:
    steps, not nodes, belong to networks, so that both directions solve the same ODE.

    noise_shift: see `denoiser.edm`. owner_shift: owners are looked up at sigma / owner_shift, as of
    a canvas whose block means have a higher SNR than its pixels.
    """
    null = {"label": model["num_classes"]}
    specialists = diffusion.get("specialists")
    models = specialists["models"] if specialists else [model]
    binds = [make_denoiser(each, diffusion, noise_shift) for each in models]

    def of_label(bind: Callable, params: PyTree, label: jax.Array) -> Callable:
        D = guidance.guided(bind(params), cfg_scale, null=null)
        return lambda x, sigma: D(x, sigma, label=label)

    def segments(params: PyTree, label: jax.Array, grid: np.ndarray) -> list:
        if specialists is None:
            return [(of_label(binds[0], params, label), grid)]
        # who is called is who was trained on the level that the network is told
        shift = noise_shift * owner_shift
        parts = segment_grids(diffusion, grid, shift)
        owners = [step_owners(part / shift, specialists["borders"])[0] for part in parts]
        return [
            (of_label(binds[owner], params[owner], label), part)
            for owner, part in zip(owners, parts)
        ]

    return segments


def segment_grids(diffusion: dict, grid: np.ndarray, shift: float = 1.0) -> list[np.ndarray]:
    """A grid cut where another network takes over: whole for a teacher. shift: of the owners."""
    if "specialists" not in diffusion:
        return [grid]
    owners = step_owners(grid / shift, diffusion["specialists"]["borders"])
    return solvers.split_grid(grid, np.flatnonzero(np.diff(owners)) + 1)


def make_taps(model: dict, diffusion: dict, names: tuple[str, ...]) -> Callable:
    """read(params, x [b,h,w,c], sigma [b] or scalar, label, told=sigma) -> {name: what the network
    holds there} (`UNet.__call__`'s taps), given x at sigma as the denoiser gives it, and told that
    it is at `told`. Nothing after the last is run."""
    net = unet(**model)

    def inputs(x: jax.Array, sigma: Any) -> tuple[jax.Array, jax.Array]:
        if diffusion["process"] == "edm":
            feature = net.config.noise_feature
            return denoiser.edm_inputs(x, sigma, diffusion["sigma_data"], feature)
        return denoiser.vp_inputs(x, sigma, process.vp_schedule(diffusion["process"]))

    def read(
        params: PyTree, x: jax.Array, sigma: Any, label: jax.Array, told: Any = None
    ) -> dict[str, jax.Array]:
        x_in, _ = inputs(x, sigma)
        _, noise = inputs(x, sigma if told is None else told)
        return net.apply({"params": params}, x_in, noise, label, taps=names)[1]

    return read


def make_generator(model: dict, diffusion: dict) -> Callable:
    """generate(params, z [b,h,w,c] at scale sigma_max, label [b]) -> image [b,H,W,c].

    PaGoDA's one-step map: the raw network at the constant sigma_max, without skip or output scaling
    (spec section 3.1).
    """
    net = unet(**model)

    def generate(params: PyTree, z: jax.Array, label: jax.Array) -> jax.Array:
        def F(x, noise, **condition):
            return net.apply({"params": params}, x, noise, **condition)

        sigma_max = diffusion["sigma_max"]
        if diffusion["process"] == "edm":
            feature = net.config.noise_feature
            return denoiser.one_step(F, z, sigma_max, diffusion["sigma_data"], feature, label=label)
        time = process.vp_schedule(diffusion["process"]).time_of_sigma(sigma_max)
        return F(process.to_vp(z, sigma_max), jnp.full(len(z), time, z.dtype), label=label)

    return generate


def load_teacher(workdir: str | pathlib.Path, *, dtype: str = "", **options) -> Loaded:
    """The EMA weights of a pretraining run, or a set of specialists; ValueError where `workdir` is
    another stage's.

    dtype: what the network computes in, in place of what it was trained in.
    """
    if not str(workdir):
        raise ValueError("config.teacher is empty: name the work directory of a pretrain run")
    loaded = load_model(workdir, **options)
    if loaded.meta["stage"] != "pretrain":
        raise ValueError(
            f"{workdir} is the work directory of stage {loaded.meta['stage']}, not a teacher's: "
            "point config.teacher at that of a pretrain run, or at a set of specialists"
        )
    if dtype:
        loaded.meta["networks"]["net"] = complete(loaded.meta["networks"]["net"] | {"dtype": dtype})
        specialists = loaded.meta["diffusion"].get("specialists", {"models": []})
        specialists["models"][:] = [complete(m | {"dtype": dtype}) for m in specialists["models"]]
    return loaded


def load_model(workdir: str | pathlib.Path, *, step: int | None = None, **options) -> Loaded:
    """The only network of a work directory, or a set of specialists from its folder."""
    if is_begun(workdir):
        raise FileNotFoundError(
            f"the assessment of {workdir} is not finished: run the same command again"
        )
    if not is_set(workdir):
        loaded = load_network(workdir, step=step, **options)
        if loaded.meta["stage"] == "prune":
            raise ValueError(
                f"{workdir} holds one specialist, which knows its own levels only: name the folder "
                "of its set"
            )
        if loaded.meta["stage"] == "cascade":
            raise ValueError(
                f"{workdir} holds what was tuned for larger canvases, not a model of its own: name "
                "its teacher, and this folder as --tuned beside --cascade"
            )
        return loaded
    if step is not None:
        raise ValueError(
            f"--step={step} picks a checkpoint of one run, but {workdir} is a set of specialists: "
            "leave it out"
        )
    return load_set(workdir, **options)


def check_guidance(meta: dict, cfg_scale: float) -> None:
    """Refuse guidance by a teacher that never saw its null class."""
    if cfg_scale != 1.0 and not meta["config"]["pretrain"]["label_dropout"]:
        raise ValueError(
            f"cfg_scale is {cfg_scale}, but this teacher was trained without label dropout, so it "
            "has no unconditional estimate: use cfg_scale=1, or train with pretrain.label_dropout"
        )


def fingerprint(params: PyTree) -> str:
    """A short SHA-256 of weights: names, shapes and bytes, in path order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
