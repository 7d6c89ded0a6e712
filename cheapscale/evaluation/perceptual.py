"""LPIPS between pairs of images, for reconstructions (Zhang et al. 2018, arXiv 1801.03924)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.evaluation.pixels import check_images, float_pair
from cheapscale.models.distances import lpips_distance
from cheapscale.models.features.network import FeatureNetwork


def lpips(
    network: FeatureNetwork,
    x: jax.Array | np.ndarray,
    y: jax.Array | np.ndarray,
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """LPIPS of each pair with a network loaded as "vgg16_lpips".

    x, y: [n, h, w, 3] in [-1, 1]. Returns float64 [n].
    """
    apply = lpips_distance(network).apply
    x, y = float_pair(check_images(np.asarray(x)), check_images(np.asarray(y)), "lpips")
    size, found = min(batch_size, len(x)), []
    compiled = jax.jit(functools.partial(apply, key=None))  # lpips draws nothing
    for start in range(0, len(x), size):
        pair = [v[start : start + size].astype(np.float32) for v in (x, y)]
        count = len(pair[0])
        # the last batch is filled up, so that there is one compilation
        fill = np.zeros((size - count, *x.shape[1:]), np.float32)
        pair = [jnp.asarray(np.concatenate([v, fill])) for v in pair]
        found.append(np.asarray(compiled(network.params, *pair), np.float64)[:count])
    return np.concatenate(found)
