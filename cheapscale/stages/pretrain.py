"""Stage 1: a diffusion model on downsampled images (spec section 1; Karras et al. 2022).

    for (x, y) in data at base resolution, flipped and augmented:
        y <- null with probability label_dropout
        ln sigma ~ N(P_mean, P_std^2),  eps ~ N(0, I)
        minimise (sigma^2 + sigma_d^2) / (sigma sigma_d)^2 * mean_pixels (D(x + sigma eps; sigma, y) - x)^2
        ema <- min(decay, (1+n)/(10+n)) average of the weights

A VP process trains the same network with DDPM's simple loss instead.
"""  # noqa: E501

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.data.augment import AUGMENT_DIM, random_augment, random_flip
from cheapscale.diffusion import denoiser, guidance, process
from cheapscale.models.unet import unet
from cheapscale.stages import data
from cheapscale.stages.groups import draw_levels, level_loss, make_groups
from cheapscale.stages.networks import check_process, complete, make_denoiser
from cheapscale.stages.sampling import prior, teacher_map
from cheapscale.training.logging import image_grid
from cheapscale.training.optim import make_optimiser
from cheapscale.training.sharding import in_batches
from cheapscale.training.stage import Stage, denoise_step, noise_bins
from cheapscale.training.state import Optimiser, TrainState

PyTree = Any


def build(config) -> Stage:
    """Stage 1 from its config (see configs/). Raises ValueError on a config that cannot run."""
    model = complete(config.model.to_dict())
    diffusion = config.diffusion.to_dict()
    check_process(diffusion)
    source = data.open_data(config.data)
    data.check_model(model, source)
    if config.pretrain.augment and model["augment_dim"] != AUGMENT_DIM:
        raise ValueError(
            f"pretrain.augment is {config.pretrain.augment}, but model.augment_dim is "
            f"{model['augment_dim']}: set it to {AUGMENT_DIM}, or the network learns to augment"
        )
    optimiser = Optimiser(make_optimiser(**config.optim))

    def init_params(key: jax.Array) -> tuple[PyTree, PyTree]:
        net = unet(**model)
        shape = (1, source.resolution, source.resolution, 3)
        params = net.init(key, jnp.zeros(shape), jnp.zeros(1), label=jnp.zeros(1, jnp.int32))
        return {"net": params["params"]}, {"net": noise_bins()}

    return Stage(
        init_params=init_params,
        optimisers={"net": optimiser},
        step=functools.partial(
            denoise_step,
            loss_fn=functools.partial(
                denoising_loss,
                bind=make_denoiser(model, diffusion),
                diffusion=diffusion,
                null_label=model["num_classes"],
                label_dropout=config.pretrain.label_dropout,
                antithetic=config.pretrain.antithetic,
            ),
            optimiser=optimiser,
            ema_decay=config.ema.decay,
        ),
        batches=data.stream(
            config,
            source,
            functools.partial(
                augmented, flips=config.data.flip, probability=config.pretrain.augment
            ),
        ),
        load_frozen=lambda: ({}, {}),
        frozen_shapes=dict,
        warm_start=lambda params: params,
        evals={
            "samples": (
                config.eval_every,
                functools.partial(
                    preview,
                    run=teacher_map(model, diffusion, steps=config.pretrain.preview_steps),
                    model=model,
                    sigma_max=diffusion["sigma_max"],
                ),
            )
        },
        meta={
            "stage": "pretrain",
            "networks": {"net": model},
            "diffusion": diffusion,
            "data": data.describe(source),
        },
        batch_size=config.batch_size,
        fits={},
    )


def augmented(item: dict, rng: np.random.Generator, *, flips: bool, probability: float) -> dict:
    """One training image: mirrored half of the time, then EDM's non-leaking augmentation."""
    if flips:
        item = random_flip(item, rng)
    return random_augment(item, rng, p=probability) if probability else item


def denoising_loss(
    params: PyTree,
    frozen: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    bind,
    diffusion: dict,
    null_label: int,
    label_dropout: float,
    antithetic: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(weighted loss [b], sigma [b]) of one batch {image, label[, augment]} (spec section 1.2).

    antithetic: levels in pairs mirrored in the whole range, DDIM's published code's t and T-1-t.
    """
    del frozen
    k_loss, k_drop, k_label = jax.random.split(key, 3)
    D = bind(params, train=True, rngs={"dropout": k_drop})
    condition = {"label": guidance.dropped(k_label, batch["label"], label_dropout, null_label)}
    if "augment" in batch:
        condition["augment"] = batch["augment"]
    if antithetic:
        k_level, k_noise = jax.random.split(k_loss)
        whole = make_groups(diffusion, 1)
        sigma = draw_levels(k_level, len(batch["image"]), diffusion, whole, whole.positions(0))
        return level_loss(D, batch["image"], sigma, k_noise, diffusion, **condition), sigma
    if diffusion["process"] == "edm":
        return denoiser.edm_loss(
            D,
            batch["image"],
            k_loss,
            diffusion["P_mean"],
            diffusion["P_std"],
            diffusion["sigma_data"],
            **condition,
        )
    schedule = process.vp_schedule(diffusion["process"])
    return denoiser.vp_loss(D, batch["image"], k_loss, schedule, **condition)


def preview(
    state: TrainState, frozen: PyTree, *, run, model: dict, sigma_max: float, count: int = 16
) -> dict:
    """{"grid": EMA samples from fixed noise, classes in turn; "loss/<sigma>": loss of each bin}.

    run: a `teacher_map`.
    """
    ids = np.arange(count)
    base = model["resolution"]
    z = np.asarray(prior(0, ids, (base, base, model["in_channels"]), sigma_max))
    labels = (ids % max(model["num_classes"], 1)).astype(np.int32)
    images = in_batches(run, state.ema_params["net"], z, labels, batch_size=count)
    bins = jax.device_get(state.extra["net"])
    centres = np.exp((bins["edges"][1:] + bins["edges"][:-1]) / 2)
    losses = {
        f"loss/{sigma:.3g}": float(loss)
        for sigma, loss, count in zip(centres, bins["loss"], bins["count"])
        if count
    }
    return {"grid": image_grid(images)} | losses
