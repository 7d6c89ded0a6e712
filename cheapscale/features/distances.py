"""Distances d(x, y) between two batches of images, for PaGoDA's L_rec (arXiv 2405.14822), and their
weighted sum.

Let f_l be the maps of frozen networks and n(f) = f / sqrt(|f|^2 + 1e-20) over channels. (LPIPS adds
1e-10 to the root instead; inside the root, the gradient at f = 0 stays finite.)

    pixel    mean over pixels and channels of (x - y)^2
    feature  sum_l sum_channels mean_pixels (n(f_l(x)) - n(f_l(y)))^2 of randomly projected maps,
             both images under the same DiffAugment ("cnn_vit" in the code released with the paper)
    lpips    sum_l mean_pixels sum_channels w_l (n(f_l(x)) - n(f_l(y)))^2 with the learned weights
             w_l of Zhang et al. 2018 (arXiv 1801.03924), no augmentation
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.features.mixing import Maps
from cheapscale.features.network import FeatureNetwork

PyTree = Any


def pixel_distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """[b]: mean squared difference of the pixels of x, y [b, h, w, 3]."""
    return jnp.mean((x - y) ** 2, axis=(1, 2, 3))


def feature_distance(f: Maps, g: Maps) -> jax.Array:
    """[b]: distance of the projected maps of two batches, summed over maps and networks."""
    pairs = [d for network in f for d in squares(f[network], g[network])]
    return sum((jnp.mean(jnp.sum(d, axis=3), axis=(1, 2)) for d in pairs), jnp.zeros(()))


def lpips_distance(network: FeatureNetwork) -> Callable:
    """(weights, x, y) -> [b]: LPIPS with a network loaded as "vgg16_lpips", whose params hold the
    linear heads as "lin". ValueError without heads."""
    if "lin" not in network.params:
        raise ValueError(
            f"LPIPS needs linear heads and {network.name!r} has none: load 'vgg16_lpips' with heads"
        )

    def distance(params, x, y):
        differences = squares(network.apply(params, x), network.apply(params, y))
        pairs = zip(differences, params["lin"], strict=True)
        return sum(jnp.mean(d @ w, axis=(1, 2)) for d, w in pairs)

    return distance


def squares(f: Sequence[jax.Array], g: Sequence[jax.Array]) -> list[jax.Array]:
    """(n(f_l) - n(g_l))^2 of each pair of maps [b, h, w, c]."""
    return [(normalise(a) - normalise(b)) ** 2 for a, b in zip(f, g, strict=True)]


def normalise(x: jax.Array) -> jax.Array:
    """x [..., c] scaled to unit length over its channels."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-20)
