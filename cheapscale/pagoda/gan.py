"""The loss of PaGoDA's one-step generator (Kim et al. 2024, arXiv 2405.14822, section 3.2, Eq. 4):

    L      = L_rec + lambda L_adv
    L_rec  = E_(x, z) d(G(z, y), x)              on data-latent pairs z = ODE inversion of x
    L_adv  = E_z' [-D(G(z', y), y)]              on fresh noise z' ~ N(0, sigma_max^2 I)
    lambda = factor * clip(|grad L_rec| / |grad L_adv|, 0.01, 10) at the last layer (section 5.1),
             or the factor itself

D is trained on hinge losses of real images against G(z', y). Stage 2 (`distill`) and stage 3
(`grow`) share this file. They differ in the origin of the generator's weights, in the weights that
train, in the resolution of the target and in lambda. A generator that takes the guidance scale
omega, its losses L_dstl and L_phi, and its triples of L_adv are explained in guided.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from cheapscale.features.mixing import View, apart, together
from cheapscale.pagoda.guided import Guidance, conditions
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
    guidance: Guidance | None = None,
    describe: Callable = lambda theta, c: c,
) -> tuple[TrainState, dict]:
    """One discriminator and one generator update: (new state, {name: scalar}).

    Args:
        batch: {"pair": {image, z, label}, "real": {image, label}}, with guidance also "sampled"
            {image, z, label, omega}. Only L_rec and L_dstl use their z; the fakes of L_adv always
            come from fresh noise, so that G learns the whole prior.
        generate: G(params, z [b, h, w, c], c) -> images [b, H, W, c], for the conditions c of the
            rows: {"label": [b]}, with guidance also "omega": [b].
        see: (frozen, {name: View}) -> {name: maps of the frozen networks}; it leaves out those of
            L_rec where no term of d reads maps.
        discriminate: (params, spectral, maps, c) -> (logits [b, n], spectral).
        distance: (frozen, maps of x, maps of y, x, y) -> {term: [b]}, the weighted terms of d.
        adversarial_weight: the factor of lambda; 0 leaves out L_adv.
        reconstruct: False leaves out L_rec.
        adaptive_layer: path of the kernel at which the gradients are compared; None makes lambda
            the constant factor.
        squared_norms: square the norms in lambda, as section 5.1 does; the published code does not.
        guidance: of a generator that takes omega.
        describe: (theta, c) -> c as D reads it, with captions as vectors of G's frozen encoder.
    """
    real, guided = batch["real"], guidance is not None
    pairs = {"rec": batch["pair"]} if reconstruct else {}
    k_prior_d, k_augment_d, k_prior_g, k_augment_g, k_rec = jax.random.split(key, 5)
    loss_of_D, loss_of_G = GAN_LOSSES[gan_loss]
    theta, psi = state.params["generator"], state.params["discriminator"]
    spectral = state.extra["discriminator"]  # power-iteration vectors, advanced by every pass
    opt_G, opt_D = state.opt_state["generator"], state.opt_state["discriminator"]
    params, opt_state, metrics = state.params, state.opt_state, {}

    def fresh(key, rows):
        """z' ~ N(0, sigma_max^2 I) with the rows' conditions, and omega ~ pi(omega)."""
        z, c = batch["pair"]["z"], conditions(rows, guided)
        if guided:
            c |= {"omega": guidance.draw(jax.random.fold_in(key, 1), len(z))}
        return sigma_max * jax.random.normal(key, z.shape, z.dtype), c

    # omega_phi: the known scales of the teacher's samples.
    if "sampled" in batch:
        pairs["dstl"] = sampled = batch["sampled"]

        def L_phi(phi):
            omega = guidance.estimate(phi, sampled["image"], conditions(sampled, guided))
            return ((sampled["omega"] - omega) ** 2).mean()

        opt, phi, opt_phi = (d["estimator"] for d in (optimisers, params, opt_state))
        metrics["loss_omega"], grads = jax.value_and_grad(L_phi)(phi)
        phi, opt_phi = opt.apply(opt.split(grads)[0], opt_phi, phi)
        params, opt_state = params | {"estimator": phi}, opt_state | {"estimator": opt_phi}

    # Features that no gradient passes through: of real images, of D's fakes, and of the targets of
    # L_rec and L_dstl. An image and its target have the same augmentation.
    k_pairs = {name: jax.random.fold_in(k_rec, n) if n else k_rec for n, name in enumerate(pairs)}
    views = {
        f"{name} target": View("distance", rows["image"], k_pairs[name])
        for name, rows in pairs.items()
    }
    if adversarial_weight:
        z, c = fresh(k_prior_d, real)
        fake = generate(theta, z, c)
        # Real and fake images of D have the same augmentation.
        views["real"] = View("discriminator", real["image"], k_augment_d)
        views["fake"] = View("discriminator", fake, k_augment_d)
    seen = see(frozen, views)

    # D: real images against fakes from fresh noise with the same labels.
    if adversarial_weight:
        c_real = c
        if guided:  # the triple (x, c, omega_phi(x, c))
            c_real = c | {"omega": guidance.estimate(params["estimator"], real["image"], c)}
            metrics["omega_real"] = c_real["omega"].mean()
        loss = functools.partial(discriminator_loss, discriminate=discriminate, loss_of_D=loss_of_D)
        (L_D, (spectral, means)), grads = jax.value_and_grad(loss, has_aux=True)(
            psi, spectral, seen["real"], seen["fake"], describe(theta, c_real), describe(theta, c)
        )
        psi, opt_D = optimisers["discriminator"].apply(grads, opt_D, psi)
        metrics |= {"loss_disc": L_D} | means

    # G: L_rec on data-latent pairs, at omega = 1 if they are unguided; L_dstl on the teacher's
    # samples; L_adv on fresh noise, with the updated discriminator.
    inputs = {name: (rows["z"], conditions(rows, guided)) for name, rows in pairs.items()}
    if adversarial_weight:
        inputs["fake"] = fresh(k_prior_g, batch["pair"])

    def generated(moving):
        z, c = jax.tree.map(lambda *rows: together(rows), *inputs.values())
        return dict(zip(inputs, apart(generate(merge(moving, fixed), z, c), len(inputs))))

    def losses(images):
        L, aux = {}, {}
        views = {name: View("distance", images[name], k_pairs[name]) for name in pairs}
        if adversarial_weight:
            views["fake"] = View("discriminator", images["fake"], k_augment_g)
        own = see(frozen, views)
        for name, rows in pairs.items():
            target = seen.get(f"{name} target")
            terms = distance(frozen, own.get(name), target, images[name], rows["image"])
            terms = {f"loss_{name}_{term}": d.mean() for term, d in terms.items()}
            aux |= terms
            L[name] = sum(terms.values())
        if adversarial_weight:
            c = describe(theta, inputs["fake"][1])
            logits, aux["spectral"] = discriminate(psi, spectral, own["fake"], c)
            L["adv"] = loss_of_G(logits)
        return L, aux

    optimiser = optimisers["generator"]
    # Gradients only of the parameters that train: nothing is stored for the frozen trunk.
    moving, fixed = optimiser.split(theta)
    images, to_weights = jax.vjp(generated, moving)
    L, to_images, aux = jax.vjp(losses, images, has_aux=True)
    # The gradients of all terms with respect to the images in one pass: each term depends on the
    # images of its own noise alone.
    (slope,) = to_images(jax.tree.map(jnp.ones_like, L))
    lam = jnp.asarray(adversarial_weight, jnp.float32)
    if adaptive_layer and pairs and adversarial_weight:
        lam = lam * balance(to_weights, slope, adaptive_layer, squared_norms)
    if adversarial_weight:
        slope = slope | {"fake": lam * slope["fake"]}
        spectral = aux.pop("spectral")
        metrics["lambda"] = lam
    metrics |= {f"loss_{name}": term for name, term in L.items()} | aux

    (grads,) = to_weights(slope)
    total = lam * L.get("adv", 0.0)
    for name in pairs:
        total = L[name] + total
    metrics |= {"loss": total, "grad_norm": optax.tree.norm(grads)}
    theta, opt_G = optimiser.apply(grads, opt_G, theta)
    ema = update_ema(state.ema_params["generator"], theta, state.step, ema_decay)

    new = state.replace(
        step=state.step + 1,
        params=params | {"generator": theta, "discriminator": psi},
        ema_params={"generator": ema},
        opt_state=opt_state | {"generator": opt_G, "discriminator": opt_D},
        extra=state.extra | {"discriminator": spectral},
    )
    return new, metrics


def discriminator_loss(
    psi: PyTree,
    spectral: PyTree,
    real: PyTree,
    fake: PyTree,
    c_real: PyTree,
    c_fake: PyTree,
    *,
    discriminate: Callable,
    loss_of_D: Callable,
) -> tuple[jax.Array, tuple[PyTree, dict]]:
    """(L_D, (spectral, mean logits)) of maps of real and fake images with their conditions."""
    # Two passes: batch norm must not mix real and fake images.
    on_real, spectral = discriminate(psi, spectral, real, c_real)
    on_fake, spectral = discriminate(psi, spectral, fake, c_fake)
    means = {"logit_real": on_real.mean(), "logit_fake": on_fake.mean()}
    return loss_of_D(on_real, on_fake), (spectral, means)


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
