"""The loss of PaGoDA's one-step generator (Kim et al. 2024, arXiv 2405.14822, section 3.2):

    L      = L_rec + lambda L_adv                                                       (Eq. 4)
    L_rec  = E_(x, z) d(G(z, y), x)              on data-latent pairs z = ODE inversion of x
    L_adv  = E_z' [-D(G(z', y), y)]              on fresh noise z' ~ N(0, sigma_max^2 I)  (Eq. 3)
    lambda = factor * clip(|grad L_rec| / |grad L_adv|, 0.01, 10) at the last layer (section 5.1),
             or the factor itself

D is trained on hinge losses of real images against G(z', y). Stage 2 (`distill`) and stage 3
(`grow`) share this file. They differ in the origin of the generator's weights, in the weights that
train, in the resolution of the target and in lambda. A generator that takes the guidance scale
omega, its losses L_dstl and L_phi, and its triples of L_adv are explained in guided.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from cheapscale.features.mixing import View, apart, together
from cheapscale.pagoda.guided import Conditions, Guidance, conditions, in_order_of
from cheapscale.training.state import Optimiser, TrainState, merge, update_ema

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


@dataclasses.dataclass(frozen=True)
class Game:
    """The two players, their losses and their optimisers.

    generate: G(params, z [b, h, w, c], c) -> images [b, H, W, c], for the conditions c of the rows:
        {"label": [b]}, with guidance also "omega": [b].
    see: (frozen, {name: View}) -> {name: maps of the frozen networks}; it leaves out those of L_rec
        where no term of d reads maps.
    discriminate: (params, spectral, maps, c) -> (logits [b, n], spectral).
    distance: (frozen, maps of x, maps of y, x, y) -> {term: [b]}, the weighted terms of d.
    adversarial_weight: the factor of lambda; 0 leaves out L_adv.
    reconstruct: False leaves out L_rec.
    adaptive_layer: path of the kernel at which the gradients are compared; None makes lambda the
        constant factor.
    squared_norms: square the norms in lambda, as section 5.1 does; the published code does not.
    guidance: of a generator that takes omega.
    describe: (theta, c) -> c as D reads it, with captions as vectors of G's frozen encoder.
    align, alignment_weight: (frozen, images, captions) -> L_clip [b] (alignment.py), and its weight
        beside L_adv.
    """

    generate: Callable
    see: Callable
    discriminate: Callable
    distance: Callable
    optimisers: dict[str, Optimiser]
    sigma_max: float
    ema_decay: float
    adversarial_weight: float
    reconstruct: bool = True
    gan_loss: str = "hinge"
    adaptive_layer: str | None = None
    squared_norms: bool = False
    guidance: Guidance | None = None
    describe: Callable = lambda theta, c: c
    align: Callable | None = None
    alignment_weight: float = 0.0

    def conditions(self, rows: PyTree) -> Conditions:
        """c of the rows of a batch, with omega = 1 for rows without a scale."""
        return conditions(rows, self.guidance is not None)

    def fresh(self, key: jax.Array, rows: PyTree, z: jax.Array) -> tuple[jax.Array, Conditions]:
        """z' ~ N(0, sigma_max^2 I) like z, with the conditions of `rows`, and omega of L_adv."""
        c = self.conditions(rows)
        if self.guidance:
            c |= {"omega": self.guidance.draw(jax.random.fold_in(key, 1), len(z))}
        return self.sigma_max * jax.random.normal(key, z.shape, z.dtype), c

    def descend(self, state: TrainState, net: str, grads: PyTree) -> TrainState:
        """The state after one step of the optimiser of `net`."""
        weights, memory = self.optimisers[net].apply(grads, state.opt_state[net], state.params[net])
        return state.replace(
            params=state.params | {net: weights}, opt_state=state.opt_state | {net: memory}
        )


def gan_step(
    state: TrainState, frozen: PyTree, batch: PyTree, key: jax.Array, *, game: Game
) -> tuple[TrainState, dict]:
    """One update of omega_phi (where G takes omega), of D and of G: (new state, {name: scalar}).

    batch: {"pair": {image, z, label}, "real": {image, label}}, with guidance also "sampled" {image,
        z, label, omega}. Only L_rec and L_dstl use their z; the fakes of L_adv always come from
        fresh noise, so that G learns the whole prior.
    """
    pair, real, metrics = batch["pair"], batch["real"], {}
    pairs = {"rec": pair} if game.reconstruct else {}
    k_prior_d, k_augment_d, k_prior_g, k_augment_g, k_rec = jax.random.split(key, 5)
    if "sampled" in batch:
        pairs["dstl"] = batch["sampled"]
        state, metrics["loss_omega"] = update_estimator(game, state, batch["sampled"])

    # Features that no gradient passes through: of real images, of D's fakes, and of the targets of
    # L_rec and L_dstl. An image and its target have the same augmentation.
    keys = {name: jax.random.fold_in(k_rec, n) if n else k_rec for n, name in enumerate(pairs)}
    views = {
        f"{name} target": View("distance", rows["image"], keys[name])
        for name, rows in pairs.items()
    }
    if game.adversarial_weight:
        z, c = game.fresh(k_prior_d, real, pair["z"])
        fake = game.generate(state.params["generator"], z, c)
        # Real and fake images of D have the same augmentation.
        views["real"] = View("discriminator", real["image"], k_augment_d)
        views["fake"] = View("discriminator", fake, k_augment_d)
    seen = game.see(frozen, views)
    if game.adversarial_weight:
        state, own = update_discriminator(game, state, seen, real["image"], c)
        metrics |= own

    # The inputs of G: (z, c) of L_rec, at omega = 1 if its pairs are unguided, and of L_dstl; fresh
    # noise for L_adv, with the updated discriminator.
    inputs = {name: (rows["z"], game.conditions(rows)) for name, rows in pairs.items()}
    if game.adversarial_weight:
        inputs["fake"] = game.fresh(k_prior_g, pair, pair["z"])
    targets = {name: (rows["image"], seen.get(f"{name} target")) for name, rows in pairs.items()}
    keys["fake"] = k_augment_g
    state, own = update_generator(game, state, frozen, inputs, targets, keys)
    return state.replace(step=state.step + 1), metrics | own


def update_estimator(
    game: Game, state: TrainState, sampled: PyTree
) -> tuple[TrainState, jax.Array]:
    """(state after one step of omega_phi on L_phi, L_phi), section 4.1.

    sampled: the teacher's samples x^ with their conditions c and their scales omega.
    """

    def L_phi(phi):
        omega = game.guidance.estimate(phi, sampled["image"], game.conditions(sampled))
        return ((sampled["omega"] - omega) ** 2).mean()

    loss, grads = jax.value_and_grad(L_phi)(state.params["estimator"])
    return game.descend(state, "estimator", grads), loss


def update_discriminator(
    game: Game, state: TrainState, seen: dict, x: jax.Array, c: Conditions
) -> tuple[TrainState, dict]:
    """(state after one step of D on its part of L_adv (Eq. 3), {name: scalar}).

    seen: maps of the "real" images x and of the "fake" ones, which both have the conditions c.
    """
    theta, metrics, c_real = state.params["generator"], {}, c
    if game.guidance:  # the triple (x, c, omega_phi(x, c))
        estimate = game.guidance.estimate(state.params["estimator"], x, c)
        c_real = c | {"omega": in_order_of(c["omega"], estimate)}
        metrics["omega_real"] = estimate.mean()
    c_real, c_fake = game.describe(theta, c_real), game.describe(theta, c)

    def L_D(psi, spectral):
        # Two passes: batch norm must not mix real and fake images.
        real, spectral = game.discriminate(psi, spectral, seen["real"], c_real)
        fake, spectral = game.discriminate(psi, spectral, seen["fake"], c_fake)
        means = {"logit_real": real.mean(), "logit_fake": fake.mean()}
        return GAN_LOSSES[game.gan_loss][0](real, fake), (spectral, means)

    psi, spectral = state.params["discriminator"], state.extra["discriminator"]
    (loss, (spectral, means)), grads = jax.value_and_grad(L_D, has_aux=True)(psi, spectral)
    state = state.replace(extra=state.extra | {"discriminator": spectral})
    return game.descend(state, "discriminator", grads), metrics | means | {"loss_disc": loss}


def update_generator(
    game: Game, state: TrainState, frozen: PyTree, inputs: dict, targets: dict, keys: dict
) -> tuple[TrainState, dict]:
    """(state after one step of G on L_rec + L_dstl + lambda L_adv (Eq. 4), {name: scalar}).

    inputs: {"rec", "dstl", "fake": (z, c)}. targets: {"rec", "dstl": (image, its maps)}. keys: of
        their augmentations. Without "fake" there is no L_adv.
    """
    theta, psi = state.params["generator"], state.params["discriminator"]
    spectral = state.extra["discriminator"]  # power-iteration vectors, advanced by every pass
    # Gradients only of the parameters that train: nothing is stored for the frozen trunk.
    split = game.optimisers["generator"].split
    moving, fixed = split(theta)

    def G(moving):
        z, c = jax.tree.map(lambda *rows: together(rows), *inputs.values())
        images = game.generate(merge(moving, fixed), z, c)
        return dict(zip(inputs, apart(images, len(inputs))))

    def losses(x):
        L, aux = {}, {}
        readers = dict.fromkeys(targets, "distance") | {"fake": "discriminator"}
        seen = game.see(frozen, {n: View(readers[n], x[n], keys[n]) for n in inputs})
        for name, (target, maps) in targets.items():  # d(G(z, c), x)
            d = game.distance(frozen, seen.get(name), maps, x[name], target)
            terms = {f"loss_{name}_{term}": value.mean() for term, value in d.items()}
            L[name], aux = sum(terms.values()), aux | terms
        if "fake" in inputs:
            c = game.describe(theta, inputs["fake"][1])
            logits, aux["spectral"] = game.discriminate(psi, spectral, seen["fake"], c)
            L["adv"] = GAN_LOSSES[game.gan_loss][1](logits)
            if game.alignment_weight:
                ids = inputs["fake"][1]["label"]
                L_clip = game.align(frozen["aligner"], x["fake"], ids).mean()
                L["adv"], aux["loss_clip"] = L["adv"] + game.alignment_weight * L_clip, L_clip
        return L, aux

    x, to_weights = jax.vjp(G, moving)
    L, to_images, aux = jax.vjp(losses, x, has_aux=True)
    # The gradients of all terms with respect to the images in one pass: each term depends on the
    # images of its own noise alone.
    (slope,) = to_images(jax.tree.map(jnp.ones_like, L))
    metrics = {f"loss_{name}": term for name, term in L.items()}
    lam = jnp.asarray(game.adversarial_weight, jnp.float32)
    if "fake" in inputs:
        if game.adaptive_layer and targets:
            lam = lam * balance(to_weights, slope, game.adaptive_layer, game.squared_norms)
        slope = slope | {"fake": lam * slope["fake"]}
        state = state.replace(extra=state.extra | {"discriminator": aux.pop("spectral")})
        metrics["lambda"] = lam
    (grads,) = to_weights(slope)
    loss = lam * L.get("adv", 0.0)
    for name in targets:
        loss = L[name] + loss
    metrics |= aux | {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    state = game.descend(state, "generator", grads)
    ema, (moving, _) = state.ema_params["generator"], split(state.params["generator"])
    ema = update_ema(ema, moving, state.step, game.ema_decay)
    return state.replace(ema_params={"generator": ema}), metrics


def balance(to_weights: Callable, slope: dict, layer: str, squared: bool) -> jax.Array:
    """`adaptive_weight` of the gradients of L_rec and L_adv at the kernel `layer`.

    to_weights: pulls images back to weights. slope: the gradients with respect to the images, of
    L_adv to "fake" and of L_rec (with L_dstl) to the others. XLA computes only `layer`'s entry.
    """
    none = jax.tree.map(jnp.zeros_like, slope)
    (of_rec,) = to_weights(slope | {"fake": none["fake"]})
    (of_adv,) = to_weights(none | {"fake": slope["fake"]})
    rec, adv = (flatten_dict(grads, sep="/")[layer] for grads in (of_rec, of_adv))
    return adaptive_weight(rec, adv, squared)


def adaptive_weight(grad_rec: jax.Array, grad_adv: jax.Array, squared: bool = False) -> jax.Array:
    """clip(|grad L_rec| / (|grad L_adv| + 1e-4), 0.01, 10) at one kernel, as in VQGAN (Esser et al.
    2021). The gradients are those of the global batch, so every device has the same weight.
    """
    rec, adv = jnp.linalg.norm(grad_rec.ravel()), jnp.linalg.norm(grad_adv.ravel())
    ratio = rec**2 / (adv**2 + 1e-4) if squared else rec / (adv + 1e-4)
    return jnp.clip(ratio, 0.01, 10.0)
