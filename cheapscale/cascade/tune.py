"""Stage "cascade": trains a few weights beside a frozen teacher (self-cascade, Guo et al. 2024,
arXiv 2402.10491, Algorithm 1).

    for (x, y) in high-resolution data:
        p   = downsample(x, 2)                          the pivot, aligned with x
        t   ~ the teacher's training levels up to K,  eps ~ N(0, I)
        f   = features of theta at (p, t = 0, y)
        minimise over phi  |eps - eps_theta(x_t, t, y; h_n + phi_n(f_n, t))|^2

The loss is the teacher's weighted error of D, which for eps-prediction is the error of eps. Two
controls of the paper train in the same way, but at all levels, because they also sample directly:
low-rank adapters (tune=lora) and fine-tuning (tune=ft).
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.cascade import upsampler
from cheapscale.cascade.lora import adapted, init_lora
from cheapscale.cascade.pivot import block_mean
from cheapscale.cascade.plan import restart_sigma
from cheapscale.cascade.sample import make_cascade
from cheapscale.cascade.tuned import RATIO, Beside, Tuned, denoise, lift, load_tuned
from cheapscale.data.augment import random_flip
from cheapscale.data.sources import open_data
from cheapscale.diffusion.denoiser import Denoiser, denoising_loss
from cheapscale.diffusion.guidance import drop_labels
from cheapscale.models.unet import init_params
from cheapscale.teacher.data import match_classes
from cheapscale.teacher.load import load_network_teacher
from cheapscale.teacher.teacher import Origin, Teacher
from cheapscale.training.log import enlarge, image_grid
from cheapscale.training.stage import Stage, denoise_stage
from cheapscale.training.state import TrainState

PyTree = Any
NETS = dict.fromkeys(upsampler.DESIGNS, "upsampler") | {"lora": "lora", "ft": "net"}
PREVIEW_STEPS = 20


def build(config: Any) -> Stage:
    """The stage of `config.cascade.tune`. Raises ValueError where teacher and data do not fit."""
    teacher = load_network_teacher(config.teacher, "its members hold different features")
    source = open_data(config.data)
    match_classes(teacher.meta, teacher.num_classes, source, config.teacher)
    settings = resolve_settings(config.cascade.to_dict(), teacher, source.resolution)
    net, fields = NETS[settings["tune"]], network_fields(settings, teacher)
    meta = {
        "stage": "cascade",
        "networks": {net: fields},
        "diffusion": teacher.meta["diffusion"],
        "data": source.describe(),
        "teacher": teacher.fingerprint,
        "cascade": settings,
        "frozen_networks": teacher.meta.get("frozen_networks", {}),
    }
    before = run_before(meta, teacher)
    meta["ledger"] = (before.origin if before else teacher).meta["ledger"]
    tuned = Tuned(None, Origin(meta))

    def warm_start(params: PyTree) -> PyTree:
        if before:
            return {net: before.params}
        return {net: teacher.params} if net == "net" else params

    loss = functools.partial(
        tuning_loss, teacher=teacher, tuned=tuned,
        label_dropout=teacher.meta["config"]["pretrain"]["label_dropout"],
    )  # fmt: skip
    return denoise_stage(
        config,
        source,
        init=functools.partial(init_tuned, meta, teacher),
        loss_fn=loss,
        meta=meta,
        warm_start=warm_start,
        transform=random_flip if config.data.flip else None,
        frozen={"teacher": teacher.params},
        evals={"cascade": (config.eval_every, preview(teacher, tuned, source.resolution))},
        net=net,
    )


def resolve_settings(settings: dict, teacher: Teacher, resolution: int) -> dict:
    """config.cascade with numbers for `sizes`, the sides of the canvases tuned at (several share
    the weights), and `sigma_K`, the highest level tuned at, None for all."""
    sizes = tuple(settings["sizes"]) or (resolution,)
    for side in sizes:
        doublings = np.log2(side / teacher.resolution)
        if resolution % side or doublings < 1 or doublings % 1:
            raise ValueError(
                f"cascade.sizes has {side} px: sizes divide the data's {resolution} px and are "
                f"the trained {teacher.resolution} px times powers of {RATIO}"
            )
    sigma_K = restart_sigma(settings["k"], teacher, RATIO**2)
    if not sigma_K > 0:
        raise ValueError(
            f"cascade.k is {settings['k']!r}, below which there is nothing to tune at: give "
            "--config.cascade.k=t0.7, say"
        )
    everywhere = settings["tune"] in ("lora", "ft")
    return settings | {"sizes": sizes, "sigma_K": None if everywhere else sigma_K}


def network_fields(settings: dict, teacher: Teacher) -> dict:
    """Plain values that travel with the weights of the upsamplers, the adapters or the U-Net."""
    if settings["tune"] == "lora":
        return {"rank": settings["lora_rank"]}
    if settings["tune"] == "ft":
        return teacher.fields
    chosen = {name: settings[name] for name in ("init", "width")}
    config = upsampler.upsampler_config(teacher.net.config, settings["tune"], **chosen)
    return dataclasses.asdict(config)


def init_tuned(meta: dict, teacher: Teacher, key: jax.Array) -> PyTree:
    """Fresh weights of the one network of `meta`."""
    ((net, fields),) = meta["networks"].items()
    if net == "lora":
        return init_lora(teacher.params, fields["rank"], key)
    if net == "net":
        return init_params(fields, key)
    return upsampler.init_upsamplers(upsampler.from_fields(fields), key)


def run_before(meta: dict, teacher: Teacher) -> Tuned | None:
    """The run of `cascade.init_from`, if any; ValueError where its weights mean another thing."""
    workdir = meta["cascade"]["init_from"]
    if not workdir:
        return None
    old = load_tuned(workdir, teacher)
    differ = [name for name in ("tune", "mode") if old.settings[name] != meta["cascade"][name]]
    if differ or json.loads(json.dumps(meta["networks"])) != old.origin.meta["networks"]:
        raise ValueError(
            f"cascade.init_from {workdir!r} holds other modules than tune="
            f"{meta['cascade']['tune']} has here ({', '.join(differ) or 'their fields'}): start "
            "from a run of the same kind"
        )
    return old


def tuning_loss(
    params: PyTree,
    frozen: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    teacher: Teacher,
    tuned: Tuned,
    label_dropout: float,
) -> tuple[jax.Array, jax.Array]:
    """(weighted loss [b n], sigma [b n]) of one batch {image [b, R, R, c], label [b]} at n sizes.

    teacher, tuned: the model and the run whose weights are frozen["teacher"] and `params`.
    """
    theta = teacher.replace(params=jax.lax.stop_gradient(frozen["teacher"]))
    phi, sigma_K = tuned.replace(params=params), tuned.settings["sigma_K"] or np.inf
    losses, sigmas = [], []
    for i, side in enumerate(tuned.settings["sizes"]):
        k_sigma, k_eps, k_label, k_drop = jax.random.split(jax.random.fold_in(key, i), 4)
        x = block_mean(batch["image"], (side, side))
        y = drop_labels(k_label, batch["label"], label_dropout, teacher.null)
        sigma = teacher.process.draw_sigma(k_sigma, len(x), high=sigma_K)
        D = tuning_denoiser(theta, phi, x, y, k_drop)
        losses.append(denoising_loss(D, teacher.process, x, sigma, k_eps))
        sigmas.append(sigma)
    return jnp.concatenate(losses), jnp.concatenate(sigmas)


def tuning_denoiser(
    theta: Teacher, phi: Tuned, x: jax.Array, label: jax.Array, k_drop: jax.Array
) -> Denoiser:
    """D(x_t, sigma) that is trained on the images x [b, H, W, c]."""
    if phi.settings["tune"] == "ft":
        tuned, rngs = theta.replace(params=phi.params), {"dropout": k_drop}
        return functools.partial(tuned.denoise, label=label, train=True, rngs=rngs)
    if phi.settings["tune"] == "lora":
        merged = adapted(theta.params, phi.params)
        return functools.partial(theta.replace(params=merged).denoise, label=label)
    p = block_mean(x, (x.shape[1] // RATIO, x.shape[2] // RATIO))
    lifted = lift(theta, phi, p, label, (RATIO, RATIO))
    return lambda x, sigma: denoise(theta, phi, lifted, x, sigma, label)


def preview(teacher: Teacher, tuned: Tuned, top: int, count: int = 8) -> Callable:
    """An eval(state, frozen) -> {"grid"}: in rows the teacher's images enlarged, direct sampling,
    the tuning-free cascade and the tuned one, all from the same noise."""
    doublings = int(np.log2(top / teacher.resolution))
    sides = [teacher.resolution * RATIO**r for r in range(1, doublings + 1)]
    make = functools.partial(
        make_cascade, teacher, ",".join(f"{side // teacher.resolution}x" for side in sides),
        k=tuned.settings["k"], steps=PREVIEW_STEPS, method="euler", batch_size=count,
    )  # fmt: skip
    runs = [tuned if side in tuned.settings["sizes"] else None for side in sides]
    free, ours, ids = make(), make(tuned=runs), np.arange(count)
    labels = (ids % max(teacher.num_classes, 1)).astype(np.int32)

    @functools.cache
    def untuned() -> list[np.ndarray]:
        scales = free.draw(ids, labels).scales
        return [enlarge(scales[0], scales[-1].shape[1]), free.direct(ids, labels)[0], scales[-1]]

    def run(state: TrainState, frozen: PyTree) -> dict:
        (weights,) = state.ema_params.values()
        now = tuple(each and each.replace(params=weights) for each in runs)
        model = Beside(teacher.replace(params=frozen["teacher"]), now)
        images = ours.draw(ids, labels, model=model).scales[-1]
        return {"grid": image_grid(np.concatenate([*untuned(), images]), columns=count)}

    return run
