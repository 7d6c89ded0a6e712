"""Stage 1: a diffusion model on downsampled images (Karras et al. 2022; PaGoDA, Kim et al. 2024,
arXiv 2405.14822, section 3.1).

    for (x, y) in data at the base resolution, flipped and augmented:
        y <- no class or caption, with probability label_dropout
        sigma ~ the process's training distribution,  eps ~ N(0, I)
        minimise  weight(sigma) * mean_pixels (D(x + sigma eps; sigma, y) - x)^2
        ema <- min(decay, (1+n)/(10+n)) average of the weights
"""

import functools
from typing import Any

import jax
import numpy as np

from cheapscale.data.augment import AUGMENT_DIM, random_augment, random_flip
from cheapscale.data.sources import open_data
from cheapscale.diffusion.denoiser import denoising_loss
from cheapscale.diffusion.guidance import drop_labels
from cheapscale.models.growth import trainable
from cheapscale.models.unet import init_params
from cheapscale.teacher.codec import codec_of, leave
from cheapscale.teacher.data import check_model, preview_labels
from cheapscale.teacher.sampling import ode_map, prior
from cheapscale.teacher.teacher import Teacher, make_teacher, resolve_model
from cheapscale.teacher.text import text_fields
from cheapscale.training.log import image_grid
from cheapscale.training.mesh import in_batches
from cheapscale.training.stage import Stage, denoise_stage
from cheapscale.training.state import TrainState, averaged

PyTree = Any
PREVIEW_STEPS = 20


def build(config) -> Stage:
    """Stage 1 from its config. Raises ValueError where the network does not fit the images."""
    source = open_data(config.data)
    channels = {"in_channels": source.channels, "out_channels": source.channels}
    fields = channels | config.model.to_dict()
    if fields.get("num_classes") == -1:
        fields["num_classes"] = source.num_classes
    more, published = text_fields(config.text, source)
    model = resolve_model(fields | more)
    check_model(model, source)
    if config.pretrain.augment and model["augment_dim"] != AUGMENT_DIM:
        raise ValueError(
            f"pretrain.augment is {config.pretrain.augment}, but model.augment_dim is "
            f"{model['augment_dim']}: set it to {AUGMENT_DIM}, or samples will be augmented"
        )
    if config.pretrain.augment and source.channels != 3:
        raise ValueError(
            f"pretrain.augment is {config.pretrain.augment}, which turns and shifts pictures, not "
            "latents: give --config.pretrain.augment=0"
        )
    meta = {
        "stage": "pretrain",
        "networks": {"net": model},
        "diffusion": config.diffusion.to_dict(),
        "data": source.describe() | {"std": deviation(source)},
    }
    codec_of(meta)  # refuses latents without their autoencoder
    teacher = make_teacher(None, meta)
    grid = functools.partial(
        preview, teacher=teacher, steps=PREVIEW_STEPS, labels=preview_labels(source)
    )
    return denoise_stage(
        config,
        source,
        init=functools.partial(init_params, model),
        loss_fn=functools.partial(
            loss,
            teacher=teacher,
            label_dropout=config.pretrain.label_dropout,
            antithetic=config.pretrain.antithetic,
        ),
        meta=meta,
        warm_start=lambda params: {"net": params["net"] | published},
        trainable=trainable(teacher.net.config),
        transform=functools.partial(
            augmented, flips=config.data.flip, probability=config.pretrain.augment
        ),
        evals={"samples": (config.eval_every, grid)},
    )


def deviation(source, most: int = 1024) -> float:
    """The standard deviation of the pixels of up to `most` images, spread evenly over the source.

    The self-cascade gives its restart level K relative to this deviation (`cascade.plan`).
    """
    ids = np.unique(np.linspace(0, len(source) - 1, most).astype(int))
    return float(source.read(ids)[0].std(dtype=np.float64))


def augmented(item: dict, rng: np.random.Generator, *, flips: bool, probability: float) -> dict:
    """One training image: mirrored half of the time, then EDM's non-leaking augmentation."""
    if flips:
        item = random_flip(item, rng)
    return random_augment(item, rng, p=probability) if probability else item


def loss(
    params: PyTree,
    frozen: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    teacher: Teacher,
    label_dropout: float,
    antithetic: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(weighted loss [b], sigma [b]) of one batch {image [b, h, w, c], label [b][, augment]}.

    teacher: the model that `params` are weights of. antithetic: draw levels in mirrored pairs, as
    DDIM's published code does.
    """
    del frozen
    # k_eps: noise, k_drop: dropout in the network, k_label: labels dropped for guidance.
    k_sigma, k_eps, k_drop, k_label = jax.random.split(key, 4)
    x, process = batch["image"], teacher.process
    y = drop_labels(k_label, batch["label"], label_dropout, teacher.null)
    sigma = process.draw_sigma(k_sigma, len(x), antithetic=antithetic)
    D = functools.partial(
        teacher.replace(params=params).denoise,
        label=y,
        augment=batch.get("augment"),
        train=True,
        rngs={"dropout": k_drop},
    )
    return denoising_loss(D, process, x, sigma, k_eps), sigma


def preview(
    state: TrainState, frozen: PyTree, *, teacher: Teacher, steps: int, labels: np.ndarray
) -> dict:
    """{"grid": EMA samples from fixed noise; "loss/<sigma>": loss of each bin}."""
    count = len(labels)
    z = np.asarray(prior(0, np.arange(count), teacher.shape, teacher.process.sigma_max))
    smooth = teacher.replace(params=averaged(state, "net"))
    images = in_batches(_sampler(steps), smooth, z, labels, batch_size=count)
    bins = jax.device_get(state.extra["net"])
    # Bins have edges in ln sigma; a bin without a draw so far has no loss to show.
    centres = np.exp((bins["edges"][1:] + bins["edges"][:-1]) / 2)
    losses = {
        f"loss/{sigma:.3g}": float(value)
        for sigma, value, seen in zip(centres, bins["loss"], bins["count"])
        if seen
    }
    return {"grid": image_grid(leave(teacher.meta, images))} | losses


@functools.cache
def _sampler(steps: int):
    """One function object for each number of steps, so that previews compile once."""
    return functools.partial(ode_map, steps=steps)
