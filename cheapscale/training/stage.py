"""A stage of the method as a value, and the two training steps that serve every stage.

`Stage` is what trains, `Job` is what maps. Both are built by `build(config)` in `cheapscale.stages`
and run by the one loop (`loop.train`) or the one job runner (`jobs.run`). The steps below are pure
functions of (state, frozen, batch, key); a stage binds the rest with functools.partial.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cheapscale.training.state import Optimiser, TrainState, merge, update_ema

PyTree = Any


class Stage(NamedTuple):
    """Everything the loop needs to know about one training stage.

    init_params(key) -> ({net: params}, {net: extra}): traceable, no I/O.
    optimisers: {net: Optimiser}, one for each network that trains.
    step(state, frozen, batch, key) -> (state, {name: scalar}): pure; jitted once, state donated.
    batches(start_step) -> iterator of nested dicts of NumPy arrays, this process's rows: a pure
        function of the step, so resuming needs no iterator state.
    load_frozen() -> (weights, {network: SHA-256}): weights that are an argument of `step` but never
        trained, donated or saved; the hashes join `meta`. What must be fitted first is fitted here.
    frozen_shapes() -> those weights as ShapeDtypeStructs, with nothing fitted, for a plan.
    warm_start(params) -> params carrying other runs' weights; only for a fresh work directory.
    evals: name -> (every how many steps, fn(state, frozen) -> {name: scalar or uint8 image}).
    meta: plain JSON values that travel with the weights: enough to rebuild the networks.
    batch_size: global; refused by the loop where the mesh cannot split it.
    fits: {network: how} of those that load_frozen still has to fit.
    warm_optimiser(opt_state) -> opt_state carrying another run's moments; as warm_start.
    """

    init_params: Callable[[jax.Array], tuple[PyTree, PyTree]]
    optimisers: dict[str, Optimiser]
    step: Callable[[TrainState, PyTree, PyTree, jax.Array], tuple[TrainState, dict]]
    batches: Callable[[int], Iterator[PyTree]]
    load_frozen: Callable[[], tuple[PyTree, dict[str, str]]]
    frozen_shapes: Callable[[], PyTree]
    warm_start: Callable[[PyTree], PyTree]
    evals: dict[str, tuple[int, Callable]]
    meta: dict
    batch_size: int
    fits: dict[str, str]
    warm_optimiser: Callable[[PyTree], PyTree] | None = None


class Job(NamedTuple):
    """Work that maps instead of training, cut into numbered shards.

    prepare() -> context (weights, data); the first to write anything. done(shard) -> bool.
    run_shard(context, shard, mesh) writes the shard whole or not at all, and returns
    {name: number} for the log. finish(context) -> summary, once every shard is done.
    items_per_shard: how many results one shard holds, for the rate and the time left.
    describe() -> what else a plan of the job says, such as FLOPs; with "disk_bytes", at most what
        the shards still to do will take, goes "disk", the folder that takes them.
    """

    num_shards: int
    items_per_shard: int
    prepare: Callable[[], Any]
    done: Callable[[int], bool]
    run_shard: Callable[[Any, int, Any], dict]
    finish: Callable[[Any], dict]
    describe: Callable[[], dict] = dict


# (discriminator loss of (real, fake) logits, generator loss of fake logits). The published code
# trains with the hinge; the paper writes f(t) = log sigmoid(t), whose generator minimises f(-D).
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

NOISE_BINS = 16


def noise_bins(log_sigma_min: float = -6.2, log_sigma_max: float = 4.4) -> dict:
    """Empty running means of the loss over equal bins of ln sigma (EDM's 0.002 ... 80)."""
    edges = jnp.linspace(log_sigma_min, log_sigma_max, NOISE_BINS + 1)
    return {"edges": edges, "loss": jnp.zeros(NOISE_BINS), "count": jnp.zeros(NOISE_BINS)}


def update_noise_bins(bins: dict, loss: jax.Array, sigma: jax.Array, rate: float = 0.99) -> dict:
    """Fold one batch of (loss [b], sigma [b]) into the running means; empty bins keep theirs."""
    index = jnp.clip(jnp.searchsorted(bins["edges"], jnp.log(sigma)) - 1, 0, NOISE_BINS - 1)
    member = jax.nn.one_hot(index, NOISE_BINS)
    count = member.sum(0)
    mean = (member * loss[:, None]).sum(0) / jnp.maximum(count, 1.0)
    first = bins["count"] == 0
    moved = jnp.where(first, mean, rate * bins["loss"] + (1 - rate) * mean)
    return bins | {
        "loss": jnp.where(count > 0, moved, bins["loss"]),
        "count": bins["count"] + count,
    }


def denoise_step(
    state: TrainState,
    frozen: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    loss_fn: Callable,
    optimiser: Optimiser,
    ema_decay: float,
    net: str = "net",
) -> tuple[TrainState, dict]:
    """One step of denoising regression (spec section 1.2).

    loss_fn(params, frozen, batch, key) -> (weighted loss [b], sigma [b]).
    """
    moving, fixed = optimiser.split(state.params[net])

    def objective(moving):
        loss, sigma = loss_fn(merge(moving, fixed), frozen, batch, key)
        return loss.mean(), (loss, sigma)

    (mean, (loss, sigma)), grads = jax.value_and_grad(objective, has_aux=True)(moving)
    params, opt_state = optimiser.apply(grads, state.opt_state[net], state.params[net])
    bins = update_noise_bins(state.extra[net], jax.lax.stop_gradient(loss), sigma)
    new = state.replace(
        step=state.step + 1,
        params=state.params | {net: params},
        ema_params={net: update_ema(state.ema_params[net], params, state.step, ema_decay)},
        opt_state=state.opt_state | {net: opt_state},
        extra=state.extra | {net: bins},
    )
    return new, {"loss": mean, "grad_norm": optax.tree.norm(grads)}


def adaptive_weight(
    grad_rec: jax.Array, grad_adv: jax.Array, *, squared: bool = False
) -> jax.Array:
    """clip(|grad L_rec| / (|grad L_adv| + 1e-4), 0.01, 10) at one kernel (spec section 3.3).

    `squared` is the paper's formula with squared norms; the default is the published code's. The
    gradients are those of the global batch, so the weight is the same on every device.
    """
    rec, adv = jnp.linalg.norm(grad_rec.ravel()), jnp.linalg.norm(grad_adv.ravel())
    ratio = rec**2 / (adv**2 + 1e-4) if squared else rec / (adv + 1e-4)
    return jnp.clip(ratio, 0.01, 10.0)


def leaf_at(tree: PyTree, path: str) -> jax.Array:
    """The leaf at a '/'-joined path of a nested dict."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def gan_step(
    state: TrainState,
    frozen: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    generate: Callable,
    discriminate: Callable,
    distance: Callable,
    optimisers: dict[str, Optimiser],
    sigma_max: float,
    ema_decay: float,
    adversarial_weight: float,
    reconstruction_weight: float = 1.0,
    gan_loss: str = "hinge",
    adaptive_layer: str | None = None,
    squared_norms: bool = False,
    separate_updates: bool = False,
) -> tuple[TrainState, dict]:
    """One discriminator and one generator update (spec sections 3.2-3.5, Algorithm of 11.1).

    batch: {"pair": {image, z, label}, "real": {image, label}}: inverted latents feed only L_rec,
    the adversarial fakes come only from fresh prior noise N(0, sigma_max^2).

    generate(params, z [b,h,w,c], label [b]) -> image [b,H,W,c]
    discriminate(params, extra, frozen, image, label, key) -> (logits [b,n], extra); the same key
        gives real and fake images the same augmentation
    distance(frozen, image, target, key) -> [b]

    adversarial_weight is lambda's constant factor; where `adaptive_layer` names a kernel it is
    multiplied by the ratio of the two gradient norms there. A weight of 0 leaves its term out.
    separate_updates: two optimiser steps for the generator, first L_rec, then L_adv (the published
    code at 256 and 512 px).
    """
    pair, real = batch["pair"], batch["real"]
    keys = dict(zip(("z_d", "aug_d", "z_g", "aug_g", "rec"), jax.random.split(key, 5)))
    gen, disc = state.params["generator"], state.params["discriminator"]
    spectral = state.extra["discriminator"]
    opt_state = dict(state.opt_state)
    ema = state.ema_params["generator"]
    metrics = {}
    loss_of_discriminator, loss_of_generator = GAN_LOSSES[gan_loss]

    def prior(key, like):
        return sigma_max * jax.random.normal(key, like.shape, like.dtype)

    # Discriminator: real images against fakes of fresh noise with the same labels.
    if adversarial_weight:
        fake = generate(gen, prior(keys["z_d"], pair["z"]), real["label"])

        def adversary(disc):
            on_real, s = discriminate(
                disc, spectral, frozen, real["image"], real["label"], keys["aug_d"]
            )
            on_fake, s = discriminate(disc, s, frozen, fake, real["label"], keys["aug_d"])
            loss = loss_of_discriminator(on_real, on_fake)
            return loss, (s, on_real.mean(), on_fake.mean())

        (loss, (spectral, on_real, on_fake)), grads = jax.value_and_grad(adversary, has_aux=True)(
            disc
        )
        disc, opt_state["discriminator"] = optimisers["discriminator"].apply(
            grads, opt_state["discriminator"], disc
        )
        metrics |= {"loss_disc": loss, "logit_real": on_real, "logit_fake": on_fake}

    # Generator: L_rec on data-latent pairs, L_adv on fresh noise, two gradients combined.
    optimiser = optimisers["generator"]

    def reconstruction(moving):
        image = generate(merge(moving, fixed), pair["z"], pair["label"])
        return distance(frozen, image, pair["image"], keys["rec"]).mean()

    def adversarial(moving):
        fake = generate(merge(moving, fixed), prior(keys["z_g"], pair["z"]), pair["label"])
        logits, s = discriminate(disc, spectral, frozen, fake, pair["label"], keys["aug_g"])
        return loss_of_generator(logits), s

    def update(gen, opt, ema, grads):
        gen, opt = optimiser.apply(grads, opt, gen)
        return gen, opt, update_ema(ema, gen, state.step, ema_decay)

    moving, fixed = optimiser.split(gen)
    opt = opt_state["generator"]
    grads = jax.tree.map(jnp.zeros_like, moving)
    if reconstruction_weight:
        metrics["loss_rec"], g_rec = jax.value_and_grad(reconstruction)(moving)
        grads = g_rec = jax.tree.map(lambda g: reconstruction_weight * g, g_rec)
        if separate_updates:
            gen, opt, ema = update(gen, opt, ema, g_rec)
            moving, fixed = optimiser.split(gen)
            grads = jax.tree.map(jnp.zeros_like, moving)
    if adversarial_weight:
        (metrics["loss_adv"], spectral), g_adv = jax.value_and_grad(adversarial, has_aux=True)(
            moving
        )
        weight = jnp.asarray(adversarial_weight, jnp.float32)
        if adaptive_layer and reconstruction_weight:
            weight = weight * adaptive_weight(
                leaf_at(g_rec, adaptive_layer),
                leaf_at(g_adv, adaptive_layer),
                squared=squared_norms,
            )
        grads = jax.tree.map(lambda g, a: g + weight * a, grads, g_adv)
        metrics["lambda"] = weight
    metrics["grad_norm"] = optax.tree.norm(grads)
    if adversarial_weight or not separate_updates:
        gen, opt, ema = update(gen, opt, ema, grads)

    new = state.replace(
        step=state.step + 1,
        params={"generator": gen, "discriminator": disc},
        ema_params={"generator": ema},
        opt_state=opt_state | {"generator": opt},
        extra=state.extra | {"discriminator": spectral},
    )
    return new, metrics
