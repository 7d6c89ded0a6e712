"""What stages 2 and 3 share: a one-step generator trained on pairs and against a discriminator.

`distill` and `grow` differ in where the generator's weights come from, which of them train, the
resolution of the target, and lambda; everything else is here.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.data.latents import LatentStore, PairSource
from cheapscale.models.unet import unet
from cheapscale.stages import data
from cheapscale.stages.adversary import make_judges
from cheapscale.stages.networks import complete, make_generator
from cheapscale.stages.sampling import prior
from cheapscale.training.logging import image_grid
from cheapscale.training.optim import make_optimiser
from cheapscale.training.sharding import in_batches
from cheapscale.training.stage import GAN_LOSSES, Stage, gan_step
from cheapscale.training.state import Optimiser, TrainState, stream_key

PyTree = Any


def generator_stage(
    config,
    source,
    *,
    name: str,
    model: dict,
    upstream: dict,
    loss: dict,
    warm_start: Callable[[PyTree], PyTree],
    trainable: Callable[[str], bool] | None,
    adaptive_layer: str | None,
    teacher: str,
) -> Stage:
    """A Stage that trains the one-step generator `model` on `source`.

    upstream: meta of the run the generator starts from (its diffusion and ledger carry on).
    loss: config.distill or config.grow as a dict, the keywords of `gan_step` among them.
    teacher: fingerprint of the teacher; latents of another one are refused.
    """
    if loss["gan_loss"] not in GAN_LOSSES:
        raise ValueError(
            f"{name}.gan_loss is {loss['gan_loss']!r}: choose one of {', '.join(GAN_LOSSES)}"
        )
    compute = {name: value for name, value in config.compute.to_dict().items() if value}
    model = complete(model | compute)
    store, pairs = open_pairs(config, source, teacher, loss["pairs"], loss["data_proportion"])
    if model["num_classes"] not in (0, source.num_classes):
        raise ValueError(
            f"the generator has {model['num_classes']} classes, but {source.name} has "
            f"{source.num_classes}: use the data set that the teacher was trained on"
        )
    # The pairs are paid for once, where they are first used.
    costs = (store.cost(), store.manifest.get("paid", {})) if name == "distill" else ()
    ledger = {
        unit: total + sum(cost.get(unit, 0.0) for cost in costs)
        for unit, total in upstream["ledger"].items()
    }
    diffusion = upstream["diffusion"]
    judges = make_judges(
        source,
        settings=config.features.to_dict(),
        discriminator=config.discriminator.to_dict(),
        distance=loss["distance"],
        conditional=bool(model["num_classes"]),
    )
    optimisers = {
        "generator": Optimiser(make_optimiser(**config.optim), trainable),
        "discriminator": Optimiser(make_optimiser(**config.optim_discriminator)),
    }
    generate = make_generator(model, diffusion)

    def init_params(key: jax.Array) -> tuple[PyTree, PyTree]:
        k_generator, k_discriminator = jax.random.split(key)
        discriminator, spectral = judges.init(k_discriminator)
        generator = init_generator(model, k_generator)
        params = {"generator": generator, "discriminator": discriminator}
        return params, {"discriminator": spectral}

    return Stage(
        init_params=init_params,
        optimisers=optimisers,
        step=functools.partial(
            gan_step,
            generate=generate,
            discriminate=judges.discriminate,
            distance=judges.distance,
            optimisers=optimisers,
            sigma_max=diffusion["sigma_max"],
            ema_decay=config.ema.decay,
            adversarial_weight=loss["adversarial_weight"],
            reconstruction_weight=loss["reconstruction_weight"],
            gan_loss=loss["gan_loss"],
            adaptive_layer=adaptive_layer,
            squared_norms=loss["squared_norms"],
            separate_updates=loss["separate_updates"],
        ),
        batches=functools.partial(
            data.pair_and_real_batches,
            source,
            pairs,
            batch_size=config.batch_size,
            seed=config.seed,
            flips=config.data.flip,
            num_threads=config.data.num_threads,
        ),
        load_frozen=lambda: judges.load(stream_key(config.seed, "projections", 0)),
        frozen_shapes=judges.shapes,
        warm_start=warm_start,
        evals={
            "one_step": (
                config.eval_every,
                functools.partial(preview, generate=generate, model=model, diffusion=diffusion),
            )
        },
        meta={
            "stage": name,
            "networks": {"generator": model},
            "diffusion": diffusion,
            "data": data.describe(source),
            "teacher": teacher,
            # of the smaller generator's losses; load_frozen adds this one's. None may measure it
            "frozen_networks": upstream.get("frozen_networks", {}),
            "ledger": ledger,
        },
        batch_size=config.batch_size,
        fits=judges.fits,
    )


def init_generator(model: dict, key: jax.Array) -> PyTree:
    """Fresh generator weights; the latent has the base resolution whatever the output's is."""
    shape = (1, model["resolution"], model["resolution"], model["in_channels"])
    label = jnp.zeros(1, jnp.int32)
    return unet(**model).init(key, jnp.zeros(shape), jnp.zeros(1), label=label)["params"]


def open_pairs(config, source, teacher: str, kind: str, proportion: float):
    """(latent store, what feeds L_rec); refuses latents of another teacher, data set or resize.

    kind: "inverted" (real images and their noise) or "teacher" (noise and the teacher's samples).
    proportion: the share of each class whose pairs are used (section 3.3).
    """
    directions = {"inverted": "invert", "teacher": "sample"}
    if kind not in directions:
        raise ValueError(f"distill.pairs is {kind!r}: choose 'inverted' or 'teacher'")
    if not config.latents:
        raise ValueError("config.latents is empty: name the folder of the latent store")
    expect = {"teacher": teacher, "direction": directions[kind]}
    store = LatentStore.open(config.latents, expect=expect, in_memory=config.data.cache_latents)
    if kind == "teacher" and proportion != 1.0:
        raise ValueError(
            f"data_proportion is {proportion}, which chooses among inverted pairs: with "
            "distill.pairs='teacher' make fewer samples, or set it to 1"
        )
    if kind == "teacher":
        return store, data.TeacherPairs(store)
    return store, PairSource(source, store, proportion, flips=config.data.flip)


def preview(
    state: TrainState, frozen: PyTree, *, generate, model: dict, diffusion: dict, count: int = 16
) -> dict:
    """{"grid": picture} of one-step EMA samples from fixed noise, classes in turn."""
    ids = np.arange(count)
    base = model["resolution"]
    z = np.asarray(prior(0, ids, (base, base, model["in_channels"]), diffusion["sigma_max"]))
    labels = (ids % max(model["num_classes"], 1)).astype(np.int32)
    images = in_batches(generate, state.ema_params["generator"], z, labels, batch_size=count)
    return {"grid": image_grid(images)}
