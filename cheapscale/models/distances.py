"""Distances between two batches of images, [b] each: the d(x, y) of PaGoDA's L_rec (spec 3.2).

With f_l the maps of frozen networks and n(f) = f / sqrt(|f|^2 + 1e-20) over channels:

    pixel    mean over pixels and channels of (x - y)^2
    feature  sum_l sum_channels mean_pixels (n(f_l(x)) - n(f_l(y)))^2; the maps are randomly
             projected (CCM and CSM of discriminator.py, a draw of their own) and both images go
             through DiffAugment with the same parameters after enlarging ("cnn_vit" in the code
             released with the paper)
    lpips    sum_l mean_pixels sum_channels w_l (n(f_l(x)) - n(f_l(y)))^2 with the learned weights
             w_l of Zhang et al. 2018 (arXiv 1801.03924), no augmentation

Adding 1e-20 under the root is the papers' 1e-10 beside it, with a gradient where f = 0.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cheapscale.models.diffaugment import POLICY, augment, check_policy
from cheapscale.models.discriminator import init_mixing, map_shapes, mix, reduced
from cheapscale.models.features.network import FeatureNetwork, enlarge

PyTree = Any


class Distance(NamedTuple):
    """A distance as two functions.

    name: for logs; `networks` lists the feature networks used, for the run's summary.
    init_frozen: key -> frozen weights, an argument of the training step.
    apply: (frozen, x, y, key) -> [b], for images x, y [b, h, w, 3] in [-1, 1].
    """

    name: str
    init_frozen: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array]
    networks: tuple[str, ...] = ()


def pixel_distance() -> Distance:
    """Mean squared difference of pixels."""

    def apply(frozen, x, y, key):
        _check(x, y)
        return jnp.mean((x - y) ** 2, axis=(1, 2, 3))

    return Distance("pixel", lambda key: {}, apply)


def feature_distance(
    networks: Sequence[FeatureNetwork],
    *,
    resolution: int,
    width: int = 64,
    policy: tuple[str, ...] = POLICY,
    projected: bool = True,
) -> Distance:
    """Distance of randomly projected features, summed over maps and networks.

    Args:
      networks: frozen feature networks with distinct names.
      resolution: side of the images.
      width: channels of the finest projected map.
      policy: DiffAugment operations, () for none.
      projected: False compares the networks' own maps (LPIPS with unit weights).
    """
    names = tuple(network.name for network in networks)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"distance networks {names}: give at least one, with distinct names")
    policy = check_policy(policy)

    def init_frozen(key):
        frozen = {}
        for network, (a, b) in zip(networks, jax.random.split(key, (len(networks), 2))):
            frozen[network.name] = {"network": network.draw(a)}
            if projected:
                shapes = map_shapes(network, resolution)
                frozen[network.name]["mixing"] = init_mixing(b, shapes, width)
        return frozen

    def maps(frozen, network, x, key):
        x = augment(enlarge(x, network.input_size), key, policy)
        features = network.apply(frozen["network"], x)
        if not projected:
            return features
        return mix(frozen["mixing"], reduced(network, resolution, features))

    def apply(frozen, x, y, key):
        _check(x, y)
        total = jnp.zeros(x.shape[0])
        for network in networks:
            own = frozen[network.name]
            for f, g in zip(maps(own, network, x, key), maps(own, network, y, key)):
                difference = (normalise(f) - normalise(g)) ** 2
                total = total + jnp.mean(jnp.sum(difference, axis=3), axis=(1, 2))
        return total

    return Distance("feature", init_frozen, apply, names)


def lpips_distance(network: FeatureNetwork) -> Distance:
    """LPIPS with a network loaded as "vgg16_lpips" (its params hold the linear heads as "lin")."""
    if "lin" not in network.params:
        raise ValueError(
            f"LPIPS needs linear heads and {network.name!r} has none: load 'vgg16_lpips' with heads"
        )

    def apply(frozen, x, y, key):
        _check(x, y)
        total = jnp.zeros(x.shape[0])
        pairs = zip(network.apply(frozen, x), network.apply(frozen, y), frozen["lin"], strict=True)
        for f, g, weight in pairs:
            difference = (normalise(f) - normalise(g)) ** 2
            total = total + jnp.mean(difference @ weight, axis=(1, 2))
        return total

    return Distance("lpips", lambda key: network.params, apply, (network.name,))


def normalise(x: jax.Array) -> jax.Array:
    """x [..., c] scaled to unit length over its channels."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-20)


def _check(x: jax.Array, y: jax.Array) -> None:
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"distance between shapes {x.shape} and {y.shape}: give two [b, h, w, 3]")
