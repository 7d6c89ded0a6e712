"""The Stage of PaGoDA's one-step generator from its config: what stages 2 and 3 share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cheapscale.data.loader import pair_and_real_batches
from cheapscale.data.pairs import InvertedPairs, PairStore, SampledPairs
from cheapscale.data.sources import pictures_of
from cheapscale.models.autoencoder import Autoencoder
from cheapscale.models.unet import init_params
from cheapscale.pagoda import guided
from cheapscale.pagoda.alignment import Aligner, make_aligner
from cheapscale.pagoda.gan import Game, gan_step
from cheapscale.pagoda.loss_networks import LossNetworks, make_loss_networks
from cheapscale.teacher.codec import codec_of, leave
from cheapscale.teacher.data import preview_labels
from cheapscale.teacher.sampling import one_step, prior
from cheapscale.teacher.teacher import Generator, make_generator, resolve_model
from cheapscale.training.compiler import for_depthwise
from cheapscale.training.log import image_grid
from cheapscale.training.mesh import in_batches
from cheapscale.training.optim import make_optimiser
from cheapscale.training.stage import Stage
from cheapscale.training.state import Optimiser, TrainState, averaged, stream_key

PyTree = Any


def generator_stage(
    config,
    source,
    *,
    model: dict,
    upstream: dict,
    warm_start: Callable[[PyTree], PyTree],
    trainable: Callable[[str], bool] | None,
    adaptive_layer: str,
    teacher: str,
) -> Stage:
    """The Stage that trains the one-step generator `model` on `source` with `gan_step`.

    upstream: meta of the run that the generator starts from; its noise process and ledger continue.
    teacher: fingerprint of the teacher; latents of another teacher are refused.
    """
    loss = config[config.stage].to_dict()
    compute = {field: value for field, value in config.compute.to_dict().items() if value}
    model = resolve_model(model | compute)
    takes_omega = bool(model["extra_conditions"])
    check_upstream(config, upstream, takes_omega)
    store, pairs = open_pairs(config, source, teacher, takes_omega)
    sampled = open_samples(config, teacher) if config.get("samples") else None
    weights = {term: loss[f"{term}_weight"] for term in ("feature", "lpips", "pixel")}
    codec = codec_of({"data": source.describe()})
    aligner = open_aligner(config, source, model, codec) if loss["alignment_weight"] else None
    networks = make_loss_networks(
        pictures_of(source),
        codec=codec,
        settings=config.features.to_dict(),
        discriminator=config.discriminator.to_dict(),
        weights=weights,
        conditional=bool(model["num_classes"]),
        caption_dim=model["text"]["width"] if model["text"] else 0,
        guided=takes_omega,
        aligner=aligner,
    )
    optimisers = make_optimisers(config, trainable, takes_samples=bool(sampled))
    meta = meta_of_run(config, source, store, sampled, model, upstream) | {"teacher": teacher}
    generator = make_generator(None, meta)
    game = Game(
        generate=lambda params, z, c: generator.replace(params=params)(z, **c),
        see=networks.see,
        discriminate=networks.discriminate,
        distance=networks.distance,
        optimisers=optimisers,
        sigma_max=generator.process.sigma_max,
        ema_decay=config.ema.decay,
        adversarial_weight=loss["adversarial_weight"],
        reconstruct=any(weights.values()),
        gan_loss=loss["gan_loss"],
        adaptive_layer=adaptive_layer if loss["adaptive"] else None,
        squared_norms=loss["squared_norms"],
        guidance=guided.make_guidance(meta) if takes_omega else None,
        describe=functools.partial(guided.described, generator.net),
        align=aligner and aligner.distance,
        alignment_weight=loss["alignment_weight"],
    )
    grid = functools.partial(preview, generator=generator, labels=preview_labels(source))
    reads_features = bool(loss["adversarial_weight"] or weights["feature"])
    return Stage(
        init_params=functools.partial(init, meta, networks),
        optimisers=optimisers,
        step=functools.partial(gan_step, game=game),
        batches=functools.partial(
            pair_and_real_batches,
            source,
            pairs,
            batch_size=config.batch_size,
            seed=config.seed,
            flips=config.data.flip,
            sampled=sampled,
            process=(jax.process_index(), jax.process_count()),
            num_threads=config.data.num_threads,
        ),
        load_frozen=lambda: networks.load(stream_key(config.seed, "projections", 0)),
        frozen_shapes=networks.shapes,
        warm_start=warm_start,
        evals={"one_step": (config.eval_every, grid)},
        meta=meta,
        batch_size=config.batch_size,
        fits=networks.fits,
        # A regression of pixels runs no feature network.
        compiler_options=for_depthwise() if reads_features else None,
    )


def open_aligner(config, source, model: dict, codec: Autoencoder | None) -> Aligner:
    """What measures L_clip; ValueError for latents."""
    if codec:
        raise ValueError(
            f"{config.stage}.alignment_weight is {config[config.stage].alignment_weight}, but the "
            "aligner sees pictures, not latents: give "
            f"--config.{config.stage}.alignment_weight=0"
        )
    return make_aligner(config.features.to_dict(), source, model["text"])


def make_optimisers(config, trainable: Callable | None, takes_samples: bool) -> dict:
    """{network: Optimiser}; the encoder of captions never trains, here as in the generator."""
    optimisers = {
        "generator": Optimiser(make_optimiser(**config.optim), trainable),
        "discriminator": Optimiser(make_optimiser(**config.optim_discriminator)),
    }
    if takes_samples:
        learns = lambda path: not path.startswith("text/")  # noqa: E731
        optimisers["estimator"] = Optimiser(make_optimiser(**config.optim), learns)
    return optimisers


def init(meta: dict, networks: LossNetworks, key: jax.Array) -> tuple[PyTree, PyTree]:
    """({network: fresh weights}, the vectors of spectral norm) of the run that meta describes."""
    k_generator, k_discriminator = jax.random.split(key)
    psi, spectral = networks.init(k_discriminator)
    fresh = init_params(meta["networks"]["generator"], k_generator)
    params = {"generator": fresh, "discriminator": psi}
    for n, (helper, fields) in enumerate(meta.get("helpers", {}).items(), start=1):
        params[helper] = init_params(fields, jax.random.fold_in(k_generator, n))
    return params, {"discriminator": spectral}


def check_upstream(config, upstream: dict, takes_omega: bool) -> None:
    """Raises ValueError where the generator that this run continues was trained otherwise."""
    rescaled = upstream.get("config", {}).get("rescale_latents", False)
    if "generator" in upstream["networks"] and rescaled != config.rescale_latents:
        place = config.get("base") or config.start
        raise ValueError(
            f"rescale_latents is {config.rescale_latents}, but {place} was trained with "
            f"{rescaled}: give --config.rescale_latents={rescaled}"
        )
    if "omega" in upstream and not takes_omega:
        raise ValueError(
            f"start is {config.start}, which was trained with guidance: give --config.samples=DIR, "
            "the teacher's guided samples"
        )


def meta_of_run(
    config,
    source,
    store: PairStore,
    sampled: SampledPairs | None,
    model: dict,
    upstream: dict,
) -> dict:
    """The meta of a generator's checkpoints, without the teacher's fingerprint."""
    # What this run is the first to use: no earlier run has counted its cost.
    stores = [] if "generator" in upstream["networks"] else [store]
    stores += [sampled.store] if sampled and "omega" not in upstream else []
    meta = {
        "stage": config.stage,
        "networks": {"generator": model},
        "diffusion": upstream["diffusion"],
        "data": source.describe(),
        "inversion": store.inversion(config.rescale_latents),
        # the networks in the smaller generator's losses; the training loop adds this run's
        "frozen_networks": upstream.get("frozen_networks", {}),
        "ledger": starting_cost(upstream["ledger"], stores),
    }
    if model["extra_conditions"]:
        estimator = upstream.get("helpers", {}).get("estimator") or guided.estimator_fields(model)
        meta["helpers"] = {"estimator": resolve_model(estimator)}
        meta["omega"] = sampled.store.manifest["omega"] if sampled else upstream["omega"]
    return meta


def starting_cost(ledger: dict, stores: list[PairStore]) -> dict:
    """The ledger before the first step: the upstream run's, and the cost of making the stores."""
    costs = [cost for s in stores for cost in (s.cost(), s.manifest.get("extra_cost", {}))]
    return {
        unit: total + sum(cost.get(unit, 0.0) for cost in costs) for unit, total in ledger.items()
    }


def open_pairs(
    config, source, teacher: str, takes_omega: bool
) -> tuple[PairStore, InvertedPairs | SampledPairs]:
    """(latent store, the pairs of L_rec). Raises ValueError for latents of another teacher, data
    set or resize, and for latents made with guidance for a generator that does not take omega.

    The field `pairs` says which: "inverted" (real images and their noise) or "teacher" (noise and
    the teacher's samples, for the L_dstl baseline); `data_proportion` is the share of each class
    whose pairs are used.
    """
    kind, proportion = (config[config.stage][name] for name in ("pairs", "data_proportion"))
    if not config.latents:
        raise ValueError("latents is empty: give --config.latents=DIR, the folder of the pairs")
    direction = {"inverted": "invert", "teacher": "sample"}[kind]
    expect = {"teacher": teacher, "direction": direction}
    if kind == "inverted":
        expect["cfg_scale"] = 1.0  # L_rec is at omega = 1, or at the scales that the store holds
    store = PairStore.open(config.latents, expect=expect)
    if "omega" in store.manifest and not takes_omega:
        raise ValueError(
            f"the pairs in {config.latents} have guidance scales, but the generator takes none: "
            "give the teacher's guided samples as --config.samples=DIR, or other --config.latents"
        )
    if kind == "inverted":
        options = {"flips": config.data.flip, "rescale": config.rescale_latents}
        return store, InvertedPairs(source, store, proportion, **options)
    if proportion != 1.0:
        raise ValueError(
            f"data_proportion is {proportion}, which chooses among inverted pairs: for "
            "the teacher's samples give --config.distill.data_proportion=1"
        )
    return store, SampledPairs(store)


def open_samples(config, teacher: str) -> SampledPairs:
    """The teacher's guided samples (z, c, omega, x^) of L_dstl; ValueError for others."""
    expect = {"teacher": teacher, "direction": "sample"}
    store = PairStore.open(config.samples, expect=expect)
    if "omega" not in store.manifest:
        raise ValueError(
            f"the samples in {config.samples} have no guidance scales: make them by stage invert "
            "with --config.invert.direction=sample --config.invert.omega=uniform"
        )
    return SampledPairs(store)


def at_scale(generator: Generator, z: jax.Array, label: jax.Array, omega: jax.Array) -> jax.Array:
    """G(z, label, omega)."""
    return generator(z, label, omega)


PREVIEW_SCALES = (1.0, 2.0, 4.0, 7.0)


def preview(state: TrainState, frozen: PyTree, *, generator: Generator, labels: np.ndarray) -> dict:
    """{"grid": picture} of one-step EMA samples from fixed noise; of a guided generator with a row
    for each of PREVIEW_SCALES."""
    count = len(labels)
    z = np.asarray(prior(0, np.arange(count), generator.shape, generator.process.sigma_max))
    smooth = generator.replace(params=averaged(state, "generator"))
    if not generator.guided:
        images = in_batches(one_step, smooth, z, labels, batch_size=count)
        return {"grid": image_grid(leave(generator.meta, images))}
    omega = np.repeat(np.asarray(PREVIEW_SCALES, np.float32), count)
    z, labels = (np.concatenate([a] * len(PREVIEW_SCALES)) for a in (z, labels))
    images = in_batches(at_scale, smooth, z, labels, omega, batch_size=count)
    return {"grid": image_grid(leave(generator.meta, images), columns=count)}
