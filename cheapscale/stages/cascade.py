"""Self-cascade, tuned (Guo et al. 2024, Algorithm 1): a few weights beside a frozen teacher.

    for (x, y) in high-resolution data:
        p   = downsample(x, 2)                          the aligned pivot, in the teacher's units
        t   ~ uniform on 1 .. K,  eps ~ N(0, I)         the levels that the cascade visits
        f   = encoder and middle of theta at (p, t=0, y)
        minimise over phi  |eps - eps_theta(x_t, t, y; h_n + phi_n(f_n, t))|^2

For an EDM teacher t and the weight are those of its own training, cut at sigma_K. In the same
harness two controls that the paper samples directly only, and that sampled from a pivot tell what
the pivot alone brings: low-rank adapters (tune=lora) and fine-tuning (tune=ft), at all levels.

tune=none trains nothing: a job that draws the tuning-free cascade, its base and direct sampling.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.data.augment import random_flip
from cheapscale.data.files import whole_or_nothing
from cheapscale.diffusion import denoiser, guidance, process
from cheapscale.diffusion.pivot import block_mean, restart_sigma
from cheapscale.evaluation.pixels import to_uint8
from cheapscale.models import upsampler
from cheapscale.models.lora import adapted, init_lora
from cheapscale.models.unet import unet
from cheapscale.models.upsampler import DESIGNS, Upsamplers, upsampler_config
from cheapscale.stages import data
from cheapscale.stages.cascade_sampler import cascade_plan, cascade_sampler, network_calls
from cheapscale.stages.networks import fingerprint, load_teacher, make_denoiser
from cheapscale.stages.one_step import init_generator
from cheapscale.stages.sampling import teacher_map
from cheapscale.stages.tuned import (
    Tuned,
    injection,
    load_tuned,
    reader,
    stage_denoiser,
    upsampled_denoiser,
)
from cheapscale.training.checkpoint import Loaded, claim_workdir
from cheapscale.training.logging import enlarge, image_grid, save_png
from cheapscale.training.optim import make_optimiser
from cheapscale.training.stage import Job, Stage, denoise_step, noise_bins
from cheapscale.training.state import Optimiser, TrainState

PyTree = Any
NETS = dict.fromkeys(DESIGNS, "upsampler") | {"lora": "lora", "ft": "net"}
PIVOTS = ("aligned", "sampled")
TIMES = ("to_k", "all")


def build(config) -> Stage | Job:
    """The stage of `config.cascade.tune`. Raises ValueError where teacher and data do not fit."""
    settings = config.cascade.to_dict()
    tune = settings["tune"]
    if tune not in ("none", *NETS):
        raise ValueError(f"tune is {tune!r}: choose one of {', '.join(('none', *NETS))}")
    teacher = load_teacher(config.teacher)
    source = data.open_data(config.data)
    model = teacher.meta["networks"]["net"]
    if model["num_classes"] not in (0, source.num_classes):
        raise ValueError(
            f"the teacher has {model['num_classes']} classes, but {source.name} has "
            f"{source.num_classes}: use the data set that the teacher was trained on"
        )
    if tune == "none":
        return sampling_job(config, teacher)
    diffusion = teacher.meta["diffusion"]
    if "specialists" in diffusion:
        raise ValueError(
            f"{config.teacher} is a set of specialists, whose members hold different features: "
            "tune beside its base"
        )
    settings |= {
        # adapters and fine-tuned weights also sample without a pivot
        "times": settings["times"] or ("all" if tune in ("lora", "ft") else "to_k"),
        "label_dropout": teacher.meta["config"]["pretrain"]["label_dropout"]
        if settings["label_dropout"] < 0
        else settings["label_dropout"],
    }
    check_settings(settings, diffusion)
    sizes = trained_sizes(settings, source.resolution, model)
    net = NETS[tune]
    fields = network_fields(settings, model)
    optimiser = Optimiser(make_optimiser(**config.optim))
    before = run_before(settings, fields, teacher)

    def init_params(key: jax.Array) -> tuple[PyTree, PyTree]:
        if net == "upsampler":
            params = upsampler.init_upsamplers(upsampler.from_fields(fields), key)
        else:
            params = init_generator(model, key)
            if net == "lora":
                params = init_lora(params, settings["lora_rank"], key)
        return {net: params}, {net: noise_bins()}

    def warm_start(params: PyTree) -> PyTree:
        if before:
            return {net: before.params}
        return {net: teacher.params} if tune == "ft" else params

    meta = {
        "stage": "cascade",
        "networks": {net: fields},
        "diffusion": diffusion,
        "data": data.describe(source),
        "teacher": fingerprint(teacher.params),
        "cascade": settings | {"sizes": sizes},
        "ledger": (before.meta if before else teacher.meta)["ledger"],
        "frozen_networks": teacher.meta.get("frozen_networks", {}),
    }
    return Stage(
        init_params=init_params,
        optimisers={net: optimiser},
        step=functools.partial(
            denoise_step,
            loss_fn=functools.partial(
                tuning_loss,
                settings=settings,
                fields=fields,
                model=model,
                diffusion=diffusion,
                sizes=sizes,
            ),
            optimiser=optimiser,
            ema_decay=config.ema.decay,
            net=net,
        ),
        batches=data.stream(config, source, random_flip if config.data.flip else None),
        load_frozen=lambda: ({"teacher": teacher.params}, {}),
        frozen_shapes=lambda: {"teacher": jax.eval_shape(lambda p: p, teacher.params)},
        warm_start=warm_start,
        evals={
            "cascade": (
                config.eval_every,
                preview(teacher, Tuned({}, meta, tune), settings["preview_steps"]),
            )
        },
        meta=meta,
        batch_size=config.batch_size,
        fits={},
    )


def trained_sizes(settings: dict, resolution: int, model: dict) -> tuple[int, ...]:
    """The sides of the canvases to tune at: one pair of scales, or several that share weights."""
    sizes, ratio = tuple(settings["sizes"]) or (resolution,), settings["ratio"]
    if ratio < 2:
        raise ValueError(f"cascade.ratio is {ratio}: a canvas is at least twice its pivot")
    reached = [model["resolution"] * ratio]
    while reached[-1] < resolution:
        reached.append(reached[-1] * ratio)
    for side in sizes:
        if resolution % side or side not in reached:
            raise ValueError(
                f"cascade.sizes has {side} px: sizes divide data.resolution {resolution} and are "
                f"the trained {model['resolution']} px times powers of cascade.ratio {ratio}"
            )
    return sizes


def run_before(settings: dict, fields: dict, teacher: Loaded) -> Tuned | None:
    """The run of the stage before, where there is one; ValueError if its weights mean another
    thing."""
    if not settings["init_from"]:
        return None
    old = load_tuned(settings["init_from"], teacher)
    (held,) = old.meta["networks"].values()
    same = ("tune", "mode", "features")
    differ = [name for name in same if old.meta["cascade"][name] != settings[name]]
    if differ or json.loads(json.dumps(fields)) != held:
        raise ValueError(
            f"cascade.init_from {settings['init_from']!r} holds other modules than tune="
            f"{settings['tune']} has here ({', '.join(differ) or 'their fields'}): start from a "
            "run of the same kind"
        )
    return old


def check_settings(settings: dict, diffusion: dict) -> None:
    """Refuse unknown choices before anything is built."""
    injection(settings, diffusion["sigma_data"])
    if not sigma_of_k(settings, diffusion) > 0:
        raise ValueError(
            f"cascade.k is {settings['k']!r}, below which there is nothing to tune at: raise it"
        )
    if settings["pivot"] not in PIVOTS or settings["times"] not in TIMES:
        raise ValueError(
            f"cascade.pivot is {settings['pivot']!r} and cascade.times {settings['times']!r}: "
            f"choose one of {PIVOTS} and one of {TIMES}"
        )


def network_fields(settings: dict, model: dict) -> dict:
    """Plain values that travel with the weights: of the upsamplers, the adapters or the U-Net."""
    tune = settings["tune"]
    if tune == "lora":
        return {"rank": settings["lora_rank"], "scale": settings["lora_scale"]}
    if tune == "ft":
        return model
    chosen = {name: settings[name] for name in ("init", "width", "resize")}
    return dataclasses.asdict(upsampler_config(unet(**model).config, tune, **chosen))


def tuning_loss(
    params: PyTree,
    frozen: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    settings: dict,
    fields: dict,
    model: dict,
    diffusion: dict,
    sizes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """(weighted loss [b n], sigma [b n]) of one batch {image [b, R, R, c], label} at n sizes."""
    theta = jax.lax.stop_gradient(frozen["teacher"])
    losses, sigmas = [], []
    for i, side in enumerate(sizes):
        k_loss, k_label, k_pivot, k_drop = jax.random.split(jax.random.fold_in(key, i), 4)
        x, dropout = block_mean(batch["image"], (side, side)), settings["label_dropout"]
        label = guidance.dropped(k_label, batch["label"], dropout, model["num_classes"])
        if settings["tune"] == "ft":
            D = make_denoiser(model, diffusion)(params, train=True, rngs={"dropout": k_drop})
        elif settings["tune"] == "lora":
            D = make_denoiser(model, diffusion)(adapted(theta, params, settings["lora_scale"]))
        else:
            smaller = side // settings["ratio"]
            p = block_mean(x, (smaller, smaller))
            if settings["pivot"] == "sampled":  # the released code's: of the same class, no more
                p = sampled_pivot(theta, p.shape, label, k_pivot, model, diffusion, settings)
            D = injected(theta, params, p, settings, fields, model, diffusion)
        loss, sigma = noise_loss(D, x, k_loss, settings, diffusion, label=label)
        losses.append(loss)
        sigmas.append(sigma)
    return jnp.concatenate(losses), jnp.concatenate(sigmas)


def injected(theta, phi, pivot, settings, fields, model, diffusion):
    """The denoiser D(x, sigma, label=...) with phi's features of `pivot` added."""
    config = upsampler.from_fields(fields)
    read = reader(model, diffusion, config)
    denoise = upsampled_denoiser(model, diffusion, config, settings["mode"])
    ratio = (float(settings["ratio"]),) * 2

    def D(x, sigma, label):
        step = sigma if settings["features"] == "step" else diffusion["sigma_min"]
        features = jax.lax.stop_gradient(read(theta, pivot, step, label))
        lifted = Upsamplers(config).apply({"params": phi}, features, ratio, method=Upsamplers.lift)
        return denoise(theta, phi, lifted, x, sigma, label)

    return D


def noise_loss(D, x, key, settings, diffusion, **cond):
    """The teacher's own loss, at the levels up to sigma_K (or at all)."""
    cut, sigma_K = settings["times"] == "to_k", sigma_of_k(settings, diffusion)
    if diffusion["process"] == "edm":
        P = {name: diffusion[name] for name in ("P_mean", "P_std", "sigma_data")}
        levels = (0.0, sigma_K) if cut else None
        return denoiser.edm_loss(D, x, key, **P, sigma_range=levels, **cond)
    schedule = process.vp_schedule(diffusion["process"])
    steps = int(np.sum(schedule.sigmas <= sigma_K * (1 + 1e-9))) if cut else None
    return denoiser.vp_loss(D, x, key, schedule, steps=steps, **cond)


def sigma_of_k(settings: dict, diffusion: dict) -> float:
    """The level that the stages restart at."""
    area = settings["ratio"] ** 2
    return restart_sigma(settings["k"], area_ratio=area, sigma_data=diffusion["sigma_data"])


def sampled_pivot(theta, shape, label, key, model, diffusion, settings):
    """A fresh base sample (or one at the pivot's size) of the label, unaligned with the image."""
    draw = teacher_map(model, diffusion, steps=settings["pivot_steps"], method="euler")
    z = diffusion["sigma_max"] * jax.random.normal(key, shape)
    return jax.lax.stop_gradient(draw(theta, z, label))


def preview(teacher: Loaded, tuned: Tuned, steps: int, count: int = 8):
    """An eval: {"grid"}, in rows the base enlarged, direct sampling, tuning-free and tuned, from
    common noise. The stages before the tuned ones run tuning-free."""
    settings, model = tuned.meta["cascade"], teacher.meta["networks"]["net"]
    base, top = model["resolution"], tuned.meta["data"]["resolution"]
    ratio, scales = settings["ratio"], []
    while base * ratio ** (len(scales) + 1) <= top:
        scales.append(f"{ratio ** (len(scales) + 1)}x")
    plan = cascade_plan(teacher.meta, ",".join(scales), k=(settings["k"],), steps=steps)
    denoisers = [
        stage_denoiser(tuned if size[0] in settings["sizes"] else None, teacher.meta, 0, size)
        for size in plan.sizes
    ]
    options = {"method": "euler", "batch_size": count}
    free = cascade_sampler(teacher, plan, **options)
    guided = cascade_sampler(teacher, plan, denoisers=denoisers, **options)
    ids = np.arange(count)
    labels = (ids % max(model["num_classes"], 1)).astype(np.int32)

    @functools.cache
    def untuned() -> list[np.ndarray]:
        scales, _ = free.draw(ids, labels)
        direct, _ = free.direct(ids, labels)
        return [enlarge(scales[0], plan.sizes[-1][0]), direct, scales[-1]]

    def run(state: TrainState, frozen: PyTree) -> dict:
        (weights,) = state.ema_params.values()
        params = {"teacher": frozen["teacher"], "tuned": [weights]}
        scales, _ = guided.draw(ids, labels, params=params)
        return {"grid": image_grid(np.concatenate([*untuned(), scales[-1]]), columns=count)}

    return run


def sampling_job(config, teacher: Loaded) -> Job:
    """tune=none: `cascade.num` images in shards shard-<n>.npz (images, direct, base, labels, ids)
    in `cascade.out`, and preview.png: in rows the base enlarged, direct sampling, tuning-free."""
    settings = config.cascade.to_dict()
    folder = pathlib.Path(settings["out"])
    if not settings["out"]:
        raise ValueError("cascade.out is empty: name the folder that takes the images of tune=none")
    steps, method = settings["steps"], settings["method"]
    side = config.data.resolution
    plan = cascade_plan(
        teacher.meta, settings["scales"] or f"{side}x{side}", k=settings["k"].split(","),
        steps=steps, spacing=settings["spacing"],
    )  # fmt: skip
    names = ("cfg_scale", "kernel", "space", "coupled", "stage_seeds", "owner")
    sampler = cascade_sampler(
        teacher, plan, seed=config.seed, batch_size=config.batch_size, method=method,
        **{name: settings[name] for name in names},
    )  # fmt: skip
    per_shard, num = settings["per_shard"], settings["num"]

    def path(shard: int) -> pathlib.Path:
        return folder / f"shard-{shard:05d}.npz"

    def prepare() -> None:  # images of other settings are refused, not taken for these
        folder.mkdir(parents=True, exist_ok=True)
        made_by = {"teacher": fingerprint(teacher.params), "seed": config.seed}
        claim_workdir(folder, made_by | {"cascade": settings, "resolution": side})

    def run_shard(context: None, shard: int, mesh) -> dict:
        ids = np.arange(shard * per_shard, min((shard + 1) * per_shard, num))
        scales, labels = sampler.draw(ids)
        direct, _ = sampler.direct(ids)
        images = {"images": scales[-1], "direct": direct, "base": scales[0]}
        images = {name: to_uint8(value) for name, value in images.items()}
        with whole_or_nothing(path(shard)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **images, labels=labels, ids=ids)
        return {"images": len(ids)}

    def finish(context: None) -> dict:
        with np.load(path(0)) as first:
            few = {name: first[name][:8] for name in ("base", "direct", "images")}
        top = few["images"].shape[1]
        rows = np.concatenate([enlarge(few["base"], top), few["direct"], few["images"]])
        if jax.process_index() == 0:
            sheet = image_grid(rows / 127.5 - 1, columns=len(few["images"]))
            save_png(folder / "preview.png", sheet)
        calls, direct = network_calls(plan, method=method, cfg_scale=settings["cfg_scale"])
        return {"out": str(folder), "num": num, "nfe": calls, "nfe_direct": direct}

    return Job(
        num_shards=-(-num // per_shard),
        items_per_shard=per_shard,
        prepare=prepare,
        done=lambda shard: path(shard).is_file(),
        run_shard=run_shard,
        finish=finish,
    )
