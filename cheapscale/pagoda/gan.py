"""The loss of PaGoDA's one-step generator (Kim et al. 2024, arXiv 2405.14822, section 3.2, Eq. 4):

    L      = L_rec + lambda L_adv
    L_rec  = E_(x, z) d(G(z, y), x)              on data-latent pairs z = ODE inversion of x
    L_adv  = E_z' [-D(G(z', y), y)]              on fresh noise z' ~ N(0, sigma_max^2 I)
    lambda = factor * clip(|grad L_rec| / |grad L_adv|, 0.01, 10) at the last layer (section 5.1),
             or the factor itself

D is trained on hinge losses of real images against G(z', y). Stage 2 (`distill`) and stage 3
(`grow`) share this file. They differ in the origin of the generator's weights, in the weights that
train, in the resolution of the target and in lambda.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from cheapscale.data.loader import pair_and_real_batches
from cheapscale.data.pairs import InvertedPairs, PairStore, SampledPairs
from cheapscale.features.mixing import View, apart, together
from cheapscale.models.unet import init_params
from cheapscale.pagoda.loss_networks import make_loss_networks
from cheapscale.teacher.sampling import one_step, prior
from cheapscale.teacher.teacher import Generator, make_generator, resolve_model
from cheapscale.training.compiler import for_depthwise
from cheapscale.training.log import image_grid
from cheapscale.training.mesh import in_batches
from cheapscale.training.optim import make_optimiser
from cheapscale.training.stage import Stage
from cheapscale.training.state import Optimiser, TrainState, merge, stream_key, update_ema

PyTree = Any

# (discriminator loss of (real, fake) logits, generator loss of fake logits). The published code
# trains with the hinge; the paper (Eq. 3) has log sigmoid, and G minimises log(1 - sigmoid(D)).
GAN_LOSSES = {
    "hinge": (
        lambda real, fake: jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean(),
        lambda fake: -fake.mean(),
    ),
    "logistic": (
        lambda real, fake: jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean(),
        lambda fake: -jax.nn.softplus(fake).mean(),
    ),
}


def gan_step(
    state: TrainState,
    frozen: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    generate: Callable,
    see: Callable,
    discriminate: Callable,
    distance: Callable,
    optimisers: dict[str, Optimiser],
    sigma_max: float,
    ema_decay: float,
    adversarial_weight: float,
    reconstruct: bool = True,
    gan_loss: str = "hinge",
    adaptive_layer: str | None = None,
    squared_norms: bool = False,
) -> tuple[TrainState, dict]:
    """One discriminator and one generator update: (new state, {name: scalar}).

    Args:
        batch: {"pair": {image, z, label}, "real": {image, label}}. Only L_rec uses the latents z;
            the fakes of L_adv always come from fresh noise, so that G learns the whole prior.
        generate: G(params, z [b, h, w, c], label [b]) -> images [b, H, W, c].
        see: (frozen, {name: View}) -> {name: maps of the frozen networks}; it leaves out those of
            L_rec where no term of d reads maps.
        discriminate: (params, spectral, maps, label) -> (logits [b, n], spectral).
        distance: (frozen, maps of x, maps of y, x, y) -> {term: [b]}, the weighted terms of d.
        adversarial_weight: the factor of lambda; 0 leaves out L_adv.
        reconstruct: False leaves out L_rec.
        adaptive_layer: path of the kernel at which the gradients are compared; None makes lambda
            the constant factor.
        squared_norms: square the norms in lambda, as section 5.1 does; the published code does not.
    """
    pair, real = batch["pair"], batch["real"]
    k_prior_d, k_augment_d, k_prior_g, k_augment_g, k_rec = jax.random.split(key, 5)
    loss_of_D, loss_of_G = GAN_LOSSES[gan_loss]
    theta, psi = state.params["generator"], state.params["discriminator"]
    spectral = state.extra["discriminator"]  # power-iteration vectors, advanced by every pass
    opt_G, opt_D = state.opt_state["generator"], state.opt_state["discriminator"]
    metrics = {}

    def fresh_noise(key):
        return sigma_max * jax.random.normal(key, pair["z"].shape, pair["z"].dtype)

    # Features that no gradient passes through: of real images, of D's fakes and of L_rec's targets.
    views = {}
    if reconstruct:
        views["target"] = View("distance", pair["image"], k_rec)
    if adversarial_weight:
        fake = generate(theta, fresh_noise(k_prior_d), real["label"])
        # Real and fake images of D have the same augmentation.
        views["real"] = View("discriminator", real["image"], k_augment_d)
        views["fake"] = View("discriminator", fake, k_augment_d)
    seen = see(frozen, views)

    # D: real images against fakes from fresh noise with the same labels.
    if adversarial_weight:
        loss = functools.partial(discriminator_loss, discriminate=discriminate, loss_of_D=loss_of_D)
        (L_D, (spectral, means)), grads = jax.value_and_grad(loss, has_aux=True)(
            psi, spectral, seen["real"], seen["fake"], real["label"]
        )
        psi, opt_D = optimisers["discriminator"].apply(grads, opt_D, psi)
        metrics |= {"loss_disc": L_D} | means

    # G: L_rec on data-latent pairs; L_adv on fresh noise, with the updated discriminator.
    z = {}
    if reconstruct:
        z["x"] = pair["z"]
    if adversarial_weight:
        z["fake"] = fresh_noise(k_prior_g)

    def generated(moving):
        images = generate(
            merge(moving, fixed), together([*z.values()]), together([pair["label"]] * len(z))
        )
        return dict(zip(z, apart(images, len(z))))

    def losses(images):
        views, L, aux = {}, {}, {}
        if reconstruct:
            views["x"] = View("distance", images["x"], k_rec)
        if adversarial_weight:
            views["fake"] = View("discriminator", images["fake"], k_augment_g)
        own = see(frozen, views)
        if reconstruct:
            terms = distance(frozen, own.get("x"), seen.get("target"), images["x"], pair["image"])
            aux["terms"] = {name: term.mean() for name, term in terms.items()}
            L["rec"] = sum(aux["terms"].values())
        if adversarial_weight:
            logits, aux["spectral"] = discriminate(psi, spectral, own["fake"], pair["label"])
            L["adv"] = loss_of_G(logits)
        return L, aux

    optimiser = optimisers["generator"]
    # Gradients only of the parameters that train: nothing is stored for the frozen trunk.
    moving, fixed = optimiser.split(theta)
    images, to_weights = jax.vjp(generated, moving)
    L, to_images, aux = jax.vjp(losses, images, has_aux=True)
    # The gradients of both terms with respect to the images in one pass: L_rec depends on G(z)
    # alone, L_adv on G(z') alone.
    (slope,) = to_images(jax.tree.map(jnp.ones_like, L))
    lam = jnp.asarray(adversarial_weight, jnp.float32)
    if adaptive_layer and reconstruct and adversarial_weight:
        lam = lam * balance(to_weights, slope, adaptive_layer, squared_norms)
    if adversarial_weight:
        slope = slope | {"fake": lam * slope["fake"]}
        spectral = aux["spectral"]
        metrics |= {"loss_adv": L["adv"], "lambda": lam}
    if reconstruct:
        metrics |= {"loss_rec": L["rec"]}
        metrics |= {f"loss_rec_{name}": term for name, term in aux["terms"].items()}

    (grads,) = to_weights(slope)
    total = L.get("rec", 0.0) + lam * L.get("adv", 0.0)
    metrics |= {"loss": total, "grad_norm": optax.tree.norm(grads)}
    theta, opt_G = optimiser.apply(grads, opt_G, theta)
    ema = update_ema(state.ema_params["generator"], theta, state.step, ema_decay)

    new = state.replace(
        step=state.step + 1,
        params={"generator": theta, "discriminator": psi},
        ema_params={"generator": ema},
        opt_state={"generator": opt_G, "discriminator": opt_D},
        extra=state.extra | {"discriminator": spectral},
    )
    return new, metrics


def discriminator_loss(
    psi: PyTree,
    spectral: PyTree,
    real: PyTree,
    fake: PyTree,
    label: jax.Array,
    *,
    discriminate: Callable,
    loss_of_D: Callable,
) -> tuple[jax.Array, tuple[PyTree, dict]]:
    """(L_D, (spectral, mean logits)) of maps of real and fake images with the same labels."""
    # Two passes: batch norm must not mix real and fake images.
    on_real, spectral = discriminate(psi, spectral, real, label)
    on_fake, spectral = discriminate(psi, spectral, fake, label)
    means = {"logit_real": on_real.mean(), "logit_fake": on_fake.mean()}
    return loss_of_D(on_real, on_fake), (spectral, means)


def balance(to_weights: Callable, slope: dict, layer: str, squared: bool) -> jax.Array:
    """`adaptive_weight` of the gradients of L_rec and L_adv at the kernel `layer`.

    to_weights: pulls {"x", "fake"} back from images to weights. slope: the gradients of L_rec with
    respect to G(z) and of L_adv with respect to G(z'). XLA computes only `layer`'s entry of both.
    """
    rest = jax.tree.map(jnp.zeros_like, slope)
    (of_rec,), (of_adv,) = (to_weights(rest | {name: slope[name]}) for name in ("x", "fake"))
    rec, adv = (flatten_dict(grads, sep="/")[layer] for grads in (of_rec, of_adv))
    return adaptive_weight(rec, adv, squared)


def adaptive_weight(grad_rec: jax.Array, grad_adv: jax.Array, squared: bool = False) -> jax.Array:
    """clip(|grad L_rec| / (|grad L_adv| + 1e-4), 0.01, 10) at one kernel, as in VQGAN (Esser et al.
    2021). The gradients are those of the global batch, so every device has the same weight.
    """
    rec, adv = jnp.linalg.norm(grad_rec.ravel()), jnp.linalg.norm(grad_adv.ravel())
    ratio = rec**2 / (adv**2 + 1e-4) if squared else rec / (adv + 1e-4)
    return jnp.clip(ratio, 0.01, 10.0)


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
    name, loss = config.stage, config[config.stage].to_dict()
    compute = {field: value for field, value in config.compute.to_dict().items() if value}
    model = resolve_model(model | compute)
    store, pairs = open_pairs(config, source, teacher, loss["pairs"], loss["data_proportion"])
    rescaled = upstream.get("config", {}).get("rescale_latents", False)
    begun = "generator" in upstream["networks"]
    if begun and rescaled != config.rescale_latents:
        place = config.get("base") or config.start
        raise ValueError(
            f"rescale_latents is {config.rescale_latents}, but {place} was trained with "
            f"{rescaled}: give --config.rescale_latents={rescaled}"
        )
    weights = {term: loss[f"{term}_weight"] for term in ("feature", "lpips", "pixel")}
    reads_features = bool(loss["adversarial_weight"] or weights["feature"])
    networks = make_loss_networks(
        source,
        settings=config.features.to_dict(),
        discriminator=config.discriminator.to_dict(),
        weights=weights,
        conditional=bool(model["num_classes"]),
    )
    optimisers = {
        "generator": Optimiser(make_optimiser(**config.optim), trainable),
        "discriminator": Optimiser(make_optimiser(**config.optim_discriminator)),
    }
    meta = {
        "stage": name,
        "networks": {"generator": model},
        "diffusion": upstream["diffusion"],
        "data": source.describe(),
        "teacher": teacher,
        # the networks in the smaller generator's losses; the training loop adds this run's
        "frozen_networks": upstream.get("frozen_networks", {}),
        "ledger": starting_cost(upstream, None if begun else store),
    }
    generator = make_generator(None, meta)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        k_generator, k_discriminator = jax.random.split(key)
        psi, spectral = networks.init(k_discriminator)
        params = {"generator": init_params(model, k_generator), "discriminator": psi}
        return params, {"discriminator": spectral}

    return Stage(
        init_params=init,
        optimisers=optimisers,
        step=functools.partial(
            gan_step,
            generate=lambda params, z, label: generator.replace(params=params)(z, label),
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
        ),
        batches=functools.partial(
            pair_and_real_batches,
            source,
            pairs,
            batch_size=config.batch_size,
            seed=config.seed,
            flips=config.data.flip,
            process=(jax.process_index(), jax.process_count()),
            num_threads=config.data.num_threads,
        ),
        load_frozen=lambda: networks.load(stream_key(config.seed, "projections", 0)),
        frozen_shapes=networks.shapes,
        warm_start=warm_start,
        evals={"one_step": (config.eval_every, functools.partial(preview, generator=generator))},
        meta=meta,
        batch_size=config.batch_size,
        fits=networks.fits,
        # A regression of pixels runs no feature network.
        compiler_options=for_depthwise() if reads_features else None,
    )


def starting_cost(upstream: dict, store: PairStore | None) -> dict:
    """The ledger before the first step: the upstream run's, and the cost of making the latents.

    store: of the latents; None for a generator that starts from another, whose run counts them.
    """
    costs = [store.cost(), store.manifest.get("extra_cost", {})] if store else []
    return {
        unit: total + sum(cost.get(unit, 0.0) for cost in costs)
        for unit, total in upstream["ledger"].items()
    }


def open_pairs(
    config, source, teacher: str, kind: str, proportion: float
) -> tuple[PairStore, InvertedPairs | SampledPairs]:
    """(latent store, the pairs of L_rec). Raises ValueError for latents of another teacher, data
    set or resize, and for latents made with guidance.

    kind: "inverted" (real images and their noise) or "teacher" (noise and the teacher's samples,
    for the L_dstl baseline). proportion: the share of each class whose pairs are used.
    """
    if not config.latents:
        raise ValueError("latents is empty: give --config.latents=DIR, the folder of the pairs")
    direction = {"inverted": "invert", "teacher": "sample"}[kind]
    expect = {"teacher": teacher, "direction": direction}
    if kind == "inverted":
        expect["cfg_scale"] = 1.0  # G(z, y) takes no guidance scale
    store = PairStore.open(config.latents, expect=expect)
    if kind == "inverted":
        options = {"flips": config.data.flip, "rescale": config.rescale_latents}
        return store, InvertedPairs(source, store, proportion, **options)
    if proportion != 1.0:
        raise ValueError(
            f"data_proportion is {proportion}, which chooses among inverted pairs: for "
            "the teacher's samples give --config.distill.data_proportion=1"
        )
    return store, SampledPairs(store)


def preview(state: TrainState, frozen: PyTree, *, generator: Generator, count: int = 16) -> dict:
    """{"grid": picture} of one-step EMA samples from fixed noise, classes in turn."""
    ids = np.arange(count)
    z = np.asarray(prior(0, ids, generator.shape, generator.process.sigma_max))
    labels = (ids % max(generator.num_classes, 1)).astype(np.int32)
    averaged = generator.replace(params=state.ema_params["generator"])
    return {"grid": image_grid(in_batches(one_step, averaged, z, labels, batch_size=count))}
