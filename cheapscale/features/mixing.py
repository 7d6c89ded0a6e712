"""Random mixing of feature maps across channels and scales (Sauer et al. 2021, arXiv 2111.01007).

For the maps f_0 (finest) ... f_n of one frozen network:

    m_i = CCM_i f_i                       random 1x1 convolution to width * 2^i channels   (1)
    o_n = up(CSM_n m_n)                   random 1x1 convolution, bilinear enlargement     (2)
    o_i = up(CSM_i (m_i + o_{i+1}))       `up` gives the size of f_{i-1}; twice f_0's for i = 0 (3)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.features.network import FeatureNetwork

PyTree = Any


def map_shapes(network: FeatureNetwork, resolution: int) -> list[tuple[int, int]]:
    """(side, channels) of the maps that are mixed, finest first, without running the network."""
    x = jax.ShapeDtypeStruct((1, resolution, resolution, 3), jnp.float32)
    maps = reduced(network, resolution, jax.eval_shape(network.apply, network.params, x))
    return [(m.shape[1], m.shape[3]) for m in maps]


def reduced(network: FeatureNetwork, resolution: int, maps: Sequence) -> tuple:
    """The maps that are smaller than the network's input."""
    side = max(resolution, network.input_size)
    kept = tuple(m for m in maps if m.shape[1] < side)
    if not kept:
        raise ValueError(
            f"every map of {network.name!r} is as large as its {side}-px input: projected features "
            "need a network with strides above 1"
        )
    return kept


def mixed_shapes(shapes: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int]]:
    """(side, channels) of the mixed maps o_i."""
    sides = [2 * shapes[0][0]] + [side for side, _ in shapes[:-1]]
    return [(side, width * 2 ** max(i - 1, 0)) for i, side in enumerate(sides)]


def init_mixing(key: jax.Array, shapes: Sequence[tuple[int, int]], width: int) -> PyTree:
    """Random CCM and CSM, {"ccm": [...], "csm": [...]} of {"kernel" [in, out], "bias" [out]},
    normal with variance 1 / in."""
    mixing = {"ccm": [], "csm": []}
    for i, ((_, c_in), (_, c_out)) in enumerate(zip(shapes, mixed_shapes(shapes, width))):
        c_mid = width * 2**i
        for name, fan_in, fan_out in (("ccm", c_in, c_mid), ("csm", c_mid, c_out)):
            key, a, b = jax.random.split(key, 3)
            kernel = jax.random.normal(a, (fan_in, fan_out), jnp.float32) * fan_in**-0.5
            bias = jax.random.normal(b, (fan_out,), jnp.float32) * fan_in**-0.5
            mixing[name].append({"kernel": kernel, "bias": bias})
    return mixing


def mix(mixing: PyTree, features: Sequence[jax.Array]) -> list[jax.Array]:
    """Maps [b, h_i, w_i, c_i], finest first -> mixed maps o_i in the same order."""
    m = [_project(ccm, f) for ccm, f in zip(mixing["ccm"], features)]  # (1)
    return cross_scale(mixing["csm"], m)


def cross_scale(csm: PyTree, maps: Sequence[jax.Array]) -> list[jax.Array]:
    """(2) and (3), from the coarsest map to the finest; maps and results finest first."""
    out = []
    for i in reversed(range(len(maps))):
        x = maps[i] + out[0] if out else maps[i]
        sides = maps[i - 1].shape[1:3] if i else (2 * x.shape[1], 2 * x.shape[2])
        # `up` commutes with a 1x1 convolution, because its rows sum to one; convolving first
        # handles fewer pixels.
        out.insert(0, enlarge_aligned(_project(csm[i], x), sides))
    return out


def enlarge_aligned(x: jax.Array, sides: tuple[int, ...]) -> jax.Array:
    """Bilinear resize of x [b, h, w, c] to `sides`, with aligned corners (not in jax.image)."""
    x = jnp.einsum("Hh,bhwc->bHwc", aligned_matrix(x.shape[1], sides[0]), x)
    return jnp.einsum("Ww,bhwc->bhWc", aligned_matrix(x.shape[2], sides[1]), x)


def aligned_matrix(size: int, target: int) -> np.ndarray:
    """[target, size]: the matrix of linear interpolation between grids with the same end points."""
    position = np.arange(target) * ((size - 1) / max(target - 1, 1))
    weight = 1.0 - np.abs(position[:, None] - np.arange(size)[None, :])
    return np.maximum(weight, 0.0).astype(np.float32)


def _project(layer: PyTree, x: jax.Array) -> jax.Array:
    return jnp.einsum("bhwc,cd->bhwd", x, layer["kernel"]) + layer["bias"][None, None, None, :]
