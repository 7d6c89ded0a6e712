"""The guidance scale omega as an input of the generator (PaGoDA, Kim et al. 2024, arXiv 2405.14822,
section 4.2 and appendix C), so that guided images take one network call, too.

    L_rec   on unguided pairs, at omega = 1; guided inversion is the option, at its own scales
    L_dstl  = E d(G(z, c, omega), x^)        on the teacher's guided samples (z, c, omega, x^)
    L_adv   fake (G(z', c, omega), c, omega) with omega ~ pi(omega), or omega = 1
            real (x, c, omega_phi(x, c)), since p(c) pi(omega) p(x|c, omega) = p(x, c) p(omega|x, c)
    L_phi   = E (omega - omega_phi(x^, c))^2                   on the teacher's samples

omega_phi is the encoder of a U-Net with one output; it starts as the teacher's encoder. Its optimum
is the mean of p(omega | x, c), which lies in the range of pi, so the output does as well. Larger
generators keep the estimator of their base, which sees their images at the base resolution.

That identity holds if guided images are distributed as data, which they are not: omega_phi gives
real images smaller scales in a narrower range (3.6 to 4.5 on scenes) than pi (2 to 10), so that D
could tell real from fake by omega alone, which G cannot change. Here omega_phi decides the order
only: the k-th smallest scale of the fakes in a batch belongs to the real image with the k-th
smallest omega_phi. Real and fake scales thus have one distribution, pi. At omega = 1 a real image
needs no estimate, since p(x|c, 1) is the data's: a part UNGUIDED_SHARE of the rows has that scale.

The paper feeds its estimator the outer product of CLIP's embeddings of image and text; here it
sees the image, and the conditions as the generator does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cheapscale.diffusion.denoiser import process_from
from cheapscale.diffusion.guidance import SCALES, UNGUIDED, draw_scale
from cheapscale.models.unet import UNet, unet
from cheapscale.training.checkpoint import load_network, read_meta
from cheapscale.training.exported import model_file

PyTree = Any
Conditions = dict[str, jax.Array]


UNGUIDED_SHARE = 0.25  # of the rows of L_adv


class Guidance(NamedTuple):
    """draw: (key, n) -> omega [n] of L_adv. estimate: (phi, x, c) -> omega_phi(x, c) [b]."""

    draw: Callable[[jax.Array, int], jax.Array]
    estimate: Callable[[PyTree, jax.Array, Conditions], jax.Array]


def make_guidance(meta: dict) -> Guidance:
    """The Guidance of a stage whose meta has `omega`, pi's name, and the estimator's fields."""
    process, net = process_from(meta["diffusion"]), unet(**meta["helpers"]["estimator"])
    low, high, *_ = SCALES[meta["omega"]]

    def estimate(phi, x, c):
        x = block_mean(x, net.config.resolution)
        x, c_noise = process.inputs(x, process.sigma_min, net.config.noise_feature)
        out = net.apply({"params": phi}, x, c_noise, label=c["label"])[:, 0]
        return low + (high - low) * jax.nn.sigmoid(out)

    def draw(key, n):
        unguided = jax.random.bernoulli(jax.random.fold_in(key, 1), UNGUIDED_SHARE, (n,))
        return jnp.where(unguided, UNGUIDED, draw_scale(key, (n,), meta["omega"]))

    return Guidance(draw, estimate)


def in_order_of(omega: jax.Array, estimate: jax.Array) -> jax.Array:
    """The scales omega [n] as those of real images with omega_phi = `estimate` [n]: the same
    values, the larger the estimate the larger. Rows with scale 1 keep it."""
    rank = jnp.argsort(jnp.argsort(jnp.where(omega == UNGUIDED, 0.0, estimate)))
    return jnp.sort(omega)[rank]


def block_mean(x: jax.Array, side: int) -> jax.Array:
    """Images [b, h, w, c] as means of equal blocks, [b, side, side, c]."""
    b, h, w, c = x.shape
    return x.reshape(b, side, h // side, side, w // side, c).mean(axis=(2, 4))


def conditions(rows: dict[str, jax.Array], guided: bool) -> Conditions:
    """c of a batch: all that is neither image nor noise. A guided generator's has omega, 1 for rows
    without a scale."""
    c = {name: value for name, value in rows.items() if name not in ("image", "z")}
    unguided = jnp.full(len(rows["image"]), UNGUIDED, jnp.float32)
    return {"omega": unguided} | c if guided else c


def described(net: UNet, theta: PyTree, c: Conditions) -> Conditions:
    """c with the pooled vectors of its captions, by the encoder of a network with weights theta; of
    a network without captions as it is."""
    if not net.config.text:
        return c
    return c | {"caption": net.encode(theta, c["label"]).pooled}


def estimator_fields(model: dict) -> dict:
    """The fields of omega_phi for a U-Net's: its encoder, with one output."""
    return model | {"encoder": True, "out_channels": 1, "extra_conditions": 0, "growth": ()}


def with_omega(fresh: PyTree, first: PyTree) -> PyTree:
    """A generator's weights `first`, with the embedding of omega from `fresh` if they lack it."""
    return {name: fresh[name] for name in fresh if name.startswith("map_extra")} | first


def initial_estimator(fresh: PyTree, workdir: str, first: PyTree) -> PyTree:
    """The estimator of the run in `workdir`, if that has one; else `fresh` with the encoder of the
    U-Net's weights `first`."""
    if workdir and "estimator" in read_meta(workdir)[1].get("helpers", {}):
        if model_file(workdir):
            raise ValueError(
                f"{workdir} is an exported generator, without the estimator of omega that its "
                "training needs: give the work directory of that run"
            )
        return load_network(workdir, "estimator", ema=False).params
    return {name: first.get(name, fresh[name]) for name in fresh}
