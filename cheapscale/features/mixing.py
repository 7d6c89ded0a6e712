"""Random mixing of feature maps across channels and scales (Sauer et al. 2021, arXiv 2111.01007).

For the maps f_0 (finest) ... f_n of one frozen network:

    m_i = CCM_i f_i                       random 1x1 convolution to width * 2^i channels   (1)
    o_n = up(CSM_n m_n)                   random 1x1 convolution, bilinear enlargement     (2)
    o_i = up(CSM_i (m_i + o_{i+1}))       `up` gives the size of f_{i-1}; twice f_0's for i = 0 (3)

The discriminator and the feature distance read such maps, each through random convolutions of its
own. `projections` computes them for several batches in one pass of the frozen networks. The
discriminator may read the tokens of vision transformers instead, which are not mixed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.features.diffaugment import POLICY, augment
from cheapscale.features.network import FeatureNetwork, enlarge

PyTree = Any
Maps = dict[str, list[jax.Array]]  # mixed maps of each network, finest first


class View(NamedTuple):
    """Images [b, R, R, 3] in [-1, 1] for one reader, "discriminator" or "distance".

    key: of DiffAugment. The same key augments two batches alike. The discriminator's images are
    augmented before they are enlarged, the distance's afterwards, as in PaGoDA's published code.
    """

    reader: str
    images: jax.Array
    key: jax.Array


class Projections(NamedTuple):
    """init_frozen: key -> frozen weights, which the training step takes as an argument, because XLA
    would compile them in as constants. apply: (frozen, {name: View}) -> {name: Maps}."""

    init_frozen: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, dict[str, View]], dict[str, Maps]]


def projections(
    networks: Sequence[FeatureNetwork],
    *,
    resolution: int,
    width: int,
    policy: tuple[str, ...] = POLICY,
    tokens: bool = False,
) -> Projections:
    """The mixed maps of frozen networks with distinct names, for images of one resolution.

    width: channels of the finest mixed map. policy: operations of DiffAugment, () for none. tokens:
    of a network that has tokens [b, t, c] the discriminator reads these.
    """
    names = [network.name for network in networks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"feature networks {names}: give at least one, with distinct names")

    def init_frozen(key):
        frozen = {}
        for n, k in zip(networks, jax.random.split(key, len(networks))):
            k_network, k_discriminator, k_distance = jax.random.split(k, 3)
            shapes = map_shapes(n, resolution)
            frozen[n.name] = {
                "network": n.draw(k_network),
                "discriminator": init_mixing(k_discriminator, shapes, width),
                "distance": init_mixing(k_distance, shapes, width),
            }
        return frozen

    def prepare(view: View, size: int) -> jax.Array:
        if view.images.shape[1:] != (resolution, resolution, 3):
            raise ValueError(
                f"images have shape {view.images.shape}, but the feature networks were built for "
                f"resolution {resolution}: give [b, {resolution}, {resolution}, 3]"
            )
        if view.reader == "discriminator":
            return enlarge(augment(view.images, view.key, policy), size)
        return augment(enlarge(view.images, size), view.key, policy)

    def apply(frozen, views):
        found = {name: {} for name in views}
        for n in networks:

            def read(views, function, n=n):
                # One call for all batches compiles the network once. It has no batch statistics.
                prepared = [prepare(view, n.input_size) for view in views.values()]
                read = function(frozen[n.name]["network"], together(prepared))
                return zip(views.items(), apart(read, len(views)))

            by_tokens = {
                name: view
                for name, view in views.items()
                if tokens and n.tokens and view.reader == "discriminator"
            }
            by_maps = {name: view for name, view in views.items() if name not in by_tokens}
            for (name, _), own in read(by_tokens, n.tokens) if by_tokens else ():
                found[name][n.name] = own
            for (name, view), own in read(by_maps, n.apply) if by_maps else ():
                own = reduced(n, resolution, own)
                found[name][n.name] = mix(frozen[n.name][view.reader], own)
        return found

    return Projections(init_frozen, apply)


def together(batches: Sequence[jax.Array]) -> jax.Array:
    """n arrays [b, ...] as one [b * n, ...]. Rows alternate, so that a batch that is split over
    devices stays where it is."""
    stacked = jnp.stack(batches, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def apart(tree: PyTree, n: int) -> list[PyTree]:
    """The inverse of `together` for every array of a tree: n trees."""
    return [jax.tree.map(lambda x: x[i::n], tree) for i in range(n)]  # noqa: B023


def map_shapes(network: FeatureNetwork, resolution: int) -> list[tuple[int, int]]:
    """(side, channels) of the maps that are mixed, finest first, without running the network."""
    x = jax.ShapeDtypeStruct((1, resolution, resolution, 3), jnp.float32)
    maps = reduced(network, resolution, jax.eval_shape(network.apply, network.params, x))
    return [(m.shape[1], m.shape[3]) for m in maps]


def token_shapes(network: FeatureNetwork, resolution: int) -> list[tuple[int, int]]:
    """(number, channels) of a network's tokens at each depth, without running it."""
    assert network.tokens is not None
    x = jax.ShapeDtypeStruct((1, resolution, resolution, 3), jnp.float32)
    return [t.shape[1:] for t in jax.eval_shape(network.tokens, network.params, x)]


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
