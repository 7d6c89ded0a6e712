"""Distances d(x, y) between two batches of images, for PaGoDA's L_rec (arXiv 2405.14822).

Let f_l be the maps of frozen networks and n(f) = f / sqrt(|f|^2 + 1e-20) over channels. (LPIPS adds
1e-10 to the root instead; inside the root, the gradient at f = 0 stays finite.)

    pixel    mean over pixels and channels of (x - y)^2
    feature  sum_l sum_channels mean_pixels (n(f_l(x)) - n(f_l(y)))^2 of randomly projected maps,
             both images under the same DiffAugment ("cnn_vit" in the code released with the paper)
    lpips    sum_l mean_pixels sum_channels w_l (n(f_l(x)) - n(f_l(y)))^2 with the learned weights
             w_l of Zhang et al. 2018 (arXiv 1801.03924), no augmentation
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cheapscale.features.diffaugment import POLICY, augment
from cheapscale.features.mixing import init_mixing, map_shapes, mix, reduced
from cheapscale.features.network import FeatureNetwork, enlarge

PyTree = Any


class Distance(NamedTuple):
    """A distance as two functions.

    init_frozen: key -> frozen weights, which the training step takes as an argument.
    apply: (frozen, x, y, key) -> [b], for images x, y [b, h, w, 3] in [-1, 1].
    """

    init_frozen: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array]


def pixel_distance() -> Distance:
    """Mean squared difference of pixels."""

    def apply(frozen, x, y, key):
        return jnp.mean((x - y) ** 2, axis=(1, 2, 3))

    return Distance(lambda key: {}, apply)


def feature_distance(
    networks: Sequence[FeatureNetwork],
    *,
    resolution: int,
    width: int = 64,
    policy: tuple[str, ...] = POLICY,
) -> Distance:
    """Distance of randomly projected features, summed over maps and networks.

    Args:
      networks: frozen feature networks with distinct names.
      resolution: side of the images.
      width: channels of the finest projected map.
      policy: DiffAugment operations, () for none.
    """
    names = [network.name for network in networks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"distance networks {names}: give at least one, with distinct names")

    def init_frozen(key):
        # The discriminator draws other projections, from another key.
        return {
            n.name: {
                "network": n.draw(a),
                "mixing": init_mixing(b, map_shapes(n, resolution), width),
            }
            for n, (a, b) in zip(networks, jax.random.split(key, (len(networks), 2)))
        }

    def maps(frozen, network, x, key):
        # Both images get the same key, hence the same augmentation.
        x = augment(enlarge(x, network.input_size), key, policy)
        features = network.apply(frozen["network"], x)
        return mix(frozen["mixing"], reduced(network, resolution, features))

    def apply(frozen, x, y, key):
        total = jnp.zeros(x.shape[0])
        for network in networks:
            f, g = (maps(frozen[network.name], network, image, key) for image in (x, y))
            total += sum(jnp.mean(jnp.sum(d, axis=3), axis=(1, 2)) for d in squares(f, g))
        return total

    return Distance(init_frozen, apply)


def lpips_distance(network: FeatureNetwork) -> Distance:
    """LPIPS with a network loaded as "vgg16_lpips" (its params hold the linear heads as "lin")."""
    if "lin" not in network.params:
        raise ValueError(
            f"LPIPS needs linear heads and {network.name!r} has none: load 'vgg16_lpips' with heads"
        )

    def apply(frozen, x, y, key):
        differences = squares(network.apply(frozen, x), network.apply(frozen, y))
        pairs = zip(differences, frozen["lin"], strict=True)
        return sum(jnp.mean(d @ w, axis=(1, 2)) for d, w in pairs)

    return Distance(lambda key: network.params, apply)


def squares(f: Sequence[jax.Array], g: Sequence[jax.Array]) -> list[jax.Array]:
    """(n(f_l) - n(g_l))^2 of each pair of maps [b, h, w, c]."""
    return [(normalise(a) - normalise(b)) ** 2 for a, b in zip(f, g, strict=True)]


def normalise(x: jax.Array) -> jax.Array:
    """x [..., c] scaled to unit length over its channels."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-20)
