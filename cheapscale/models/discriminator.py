"""Projected discriminator: small trainable heads on the randomly mixed features of frozen networks.

Sauer et al. 2021 (Projected GANs, arXiv 2111.01007) and 2022 (StyleGAN-XL, arXiv 2202.00273), as
PaGoDA uses them (spec 3.4). For each frozen network with maps f_0 (finest) ... f_n:

    m_i = CCM_i f_i                       random 1x1 convolution to width * 2^i channels   (1)
    o_n = up(CSM_n m_n)                   random 1x1 convolution, bilinear enlargement     (2)
    o_i = up(CSM_i (m_i + o_{i+1}))       to the size of map i - 1; twice its own for i = 0 (3)
    D_i = head_i(o_i, label)              trainable                                        (4)

CCM and CSM are drawn once and frozen. `up` keeps the corners aligned; its rows sum to one, so it
commutes with the 1x1 convolution, which is done first, where there are fewer pixels. Maps as large
as the network's own input are left out: (3) would enlarge them, and most of the time would go into
judging them at twice the resolution of the image.

A head halves o_i with spectral-norm 4x4 convolutions, batch norm and LeakyReLU(0.2) until it is
nominally 8 px (round(log2(side / 8)) times), then a spectral-norm 4x4 convolution without padding.
Two rules for small runs: a map that needs no halving has one 3x3 block at its own size in
place of it, so that no head is linear in the frozen features; and the last kernel is min(4, side).

Batch norm always uses the statistics of the batch it is given: pass real and fake images in
separate calls. Under `jit` with a batch sharded over devices these are the statistics of the global
batch; `bn_groups` splits it into equal consecutive ghost batches.

Spectral norm (Miyato et al. 2018): W / sigma with sigma = u' W v. Every call makes one power
iteration v <- W'u, u <- W v (each normalised, eps 1e-12) and returns the new u; u and v are
constants to the gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models.diffaugment import POLICY, augment, check_policy
from cheapscale.models.features.network import FeatureNetwork

PyTree = Any

HEAD_SIZE = 8  # nominal side at which a head stops halving
WIDTH_MULTIPLES = {128: 1, 64: 1, 32: 2, 16: 4, 8: 8}  # nominal side -> channels / width


class ProjectedDiscriminator(NamedTuple):
    """The three functions of a discriminator.

    init: key -> (params, spectral); traceable.
    init_frozen: key -> frozen, the networks' weights and the random projections. An argument of
      the training step, never closed over.
    apply: (params, spectral, frozen, x [b, R, R, 3] in [-1, 1], label [b] int or None, key)
      -> (logits [b, n], new spectral). `key` drives DiffAugment: use the same one for the real and
      the fake images of one step. A label outside [0, num_classes) has a zero embedding;
      without classes labels are ignored.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    init_frozen: Callable[[jax.Array], PyTree]
    apply: Callable[..., tuple[jax.Array, PyTree]]


def projected_discriminator(
    networks: Sequence[FeatureNetwork],
    *,
    resolution: int,
    num_classes: int = 0,
    width: int = 64,
    condition_dim: int = 64,
    embedding_dim: int = 64,
    embedding: np.ndarray | None = None,
    policy: tuple[str, ...] = POLICY,
    bn_groups: int = 1,
) -> ProjectedDiscriminator:
    """A projected discriminator for images of one resolution.

    Args:
      networks: frozen feature networks, one set of heads each; their names must differ.
      resolution: side of the images.
      num_classes: 0 for an unconditional discriminator.
      width: channels of the finest mixed map; everything scales with it (64 in the papers).
      condition_dim: channels that the class projection is taken over.
      embedding_dim: size of a class embedding drawn from N(0, 1); `embedding`
        [num_classes, any] is an initial table to use in its place.
      policy: DiffAugment operations, () for none.
      bn_groups: ghost batches per batch.
    """
    names = [network.name for network in networks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"discriminator networks {names}: give at least one, with distinct names")
    if embedding is not None and embedding.shape[:1] != (num_classes,):
        raise ValueError(
            f"class embedding has shape {embedding.shape} but the discriminator has "
            f"num_classes={num_classes}: give one row per class"
        )
    embedding_init = nn.initializers.normal(1.0)
    if embedding is not None:
        embedding_dim = embedding.shape[1]

        def embedding_init(key, shape):
            return jnp.asarray(embedding, jnp.float32)

    policy = check_policy(policy)
    shapes = {n.name: map_shapes(n, resolution) for n in networks}
    heads = {
        name: [
            Head(
                channels=head_channels(side, width),
                condition_dim=condition_dim,
                num_classes=num_classes,
                embedding_dim=embedding_dim,
                embedding_init=embedding_init,
                bn_groups=bn_groups,
            )
            for side, _ in mixed_shapes(shapes[name], width)
        ]
        for name in names
    }

    def init(key):
        params, spectral = {}, {}
        for name in names:
            params[name], spectral[name] = {}, {}
            for i, (side, channels) in enumerate(mixed_shapes(shapes[name], width)):
                key, use = jax.random.split(key)
                x = jnp.zeros((bn_groups, side, side, channels))
                label = jnp.zeros((bn_groups,), jnp.int32) if num_classes else None
                made = heads[name][i].init(use, x, label)
                params[name][f"head{i}"] = made["params"]
                spectral[name][f"head{i}"] = made["spectral"]
        return params, spectral

    def init_frozen(key):
        return {
            n.name: {"network": n.draw(a), "mixing": init_mixing(b, shapes[n.name], width)}
            for n, (a, b) in zip(networks, jax.random.split(key, (len(networks), 2)))
        }

    def apply(params, spectral, frozen, x, label, key):
        if x.ndim != 4 or x.shape[1:] != (resolution, resolution, 3):
            raise ValueError(
                f"discriminator input has shape {x.shape} but it was built for "
                f"resolution={resolution}: give [b, {resolution}, {resolution}, 3]"
            )
        if num_classes and label is None:
            raise ValueError(
                f"discriminator with num_classes={num_classes} got label=None: give labels [b], or "
                "build it with num_classes=0"
            )
        x = augment(x, key, policy)
        logits, advanced = [], {}
        for network in networks:
            name = network.name
            advanced[name] = {}
            features = network.apply(frozen[name]["network"], x)
            mixed = mix(frozen[name]["mixing"], reduced(network, resolution, features))
            for i, (head, feature) in enumerate(zip(heads[name], mixed)):
                slot = f"head{i}"
                variables = {"params": params[name][slot], "spectral": spectral[name][slot]}
                out, state = head.apply(variables, feature, label, mutable=["spectral"])
                logits.append(out)
                advanced[name][slot] = state["spectral"]
        return jnp.concatenate(logits, axis=1), advanced

    return ProjectedDiscriminator(init, init_frozen, apply)


# --- the frozen part ---


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
    """(side, channels) of the mixed maps o_i of (2) and (3)."""
    sides = [2 * shapes[0][0]] + [side for side, _ in shapes[:-1]]
    return [(side, width * 2 ** max(i - 1, 0)) for i, side in enumerate(sides)]


def init_mixing(key: jax.Array, shapes: Sequence[tuple[int, int]], width: int) -> PyTree:
    """Random CCM and CSM, {"ccm": [...], "csm": [...]} of {"kernel" [in, out], "bias" [out]},
    normal with variance 1 / in."""
    ccm, csm = [], []
    for i, ((_, c_in), (_, c_out)) in enumerate(zip(shapes, mixed_shapes(shapes, width))):
        c_mid = width * 2**i
        for into, fan_in, fan_out in ((ccm, c_in, c_mid), (csm, c_mid, c_out)):
            key, a, b = jax.random.split(key, 3)
            std = fan_in**-0.5
            into.append(
                {
                    "kernel": std * jax.random.normal(a, (fan_in, fan_out)),
                    "bias": std * jax.random.normal(b, (fan_out,)),
                }
            )
    return {"ccm": ccm, "csm": csm}


def mix(mixing: PyTree, features: Sequence[jax.Array]) -> list[jax.Array]:
    """Cross-channel and cross-scale mixing (1)-(3): maps finest first -> mixed maps, same order."""
    return cross_scale(mixing["csm"], [_project(w, f) for w, f in zip(mixing["ccm"], features)])


def cross_scale(csm: PyTree, maps: Sequence[jax.Array]) -> list[jax.Array]:
    """The top-down path (2)-(3) on maps [b, h_i, w_i, c_i], finest first."""
    out = []
    for i in reversed(range(len(maps))):
        x = maps[i] + out[0] if out else maps[i]
        sides = maps[i - 1].shape[1:3] if i else (2 * x.shape[1], 2 * x.shape[2])
        out.insert(0, enlarge_aligned(_project(csm[i], x), sides))
    return out


def enlarge_aligned(x: jax.Array, sides: tuple[int, int]) -> jax.Array:
    """Bilinear resize of x [b, h, w, c] to `sides`, corners on corners."""
    x = jnp.einsum("Hh,bhwc->bHwc", aligned_matrix(x.shape[1], sides[0]), x)
    return jnp.einsum("Ww,bhwc->bhWc", aligned_matrix(x.shape[2], sides[1]), x)


def aligned_matrix(size: int, target: int) -> np.ndarray:
    """[target, size] linear interpolation with the end points of both grids coinciding."""
    position = np.arange(target) * ((size - 1) / max(target - 1, 1))
    weight = 1.0 - np.abs(position[:, None] - np.arange(size)[None, :])
    return np.maximum(weight, 0.0).astype(np.float32)


def _project(weights: PyTree, x: jax.Array) -> jax.Array:
    return jnp.einsum("bhwc,cd->bhwd", x, weights["kernel"]) + weights["bias"][None, None, None, :]


# --- the trainable part ---


def head_channels(side: int, width: int) -> tuple[int, ...]:
    """Channels after each halving of a head on a map of this side; () where none is needed."""
    halvings = max(round(math.log2(side / HEAD_SIZE)), 0)
    sides = [HEAD_SIZE * 2**i for i in reversed(range(halvings))]
    return tuple(width * WIDTH_MULTIPLES.get(s, 1) for s in sides)


class SpectralConv(nn.Module):
    """Convolution with a spectrally normalised kernel; `u` lives in the collection "spectral"."""

    features: int
    kernel: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        bound = (self.kernel**2 * x.shape[-1]) ** -0.5
        kernel = self.param("kernel", _uniform(bound), shape)
        u = self.variable(
            "spectral", "u", lambda: unit(jax.random.normal(self.make_rng("params"), shape[-1:]))
        )
        normalised, u.value = spectral_norm(kernel, u.value)
        x = jax.lax.conv_general_dilated(
            x,
            normalised,
            window_strides=(self.stride, self.stride),
            padding=((self.padding, self.padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            bias = self.param("bias", _uniform(bound), (self.features,))
            x = x + bias[None, None, None, :]
        return x


def spectral_norm(kernel: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """kernel [..., out] / its largest singular value as a matrix to `out`, and the next u [out]."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    fixed = jax.lax.stop_gradient(matrix)
    v = unit(fixed @ jax.lax.stop_gradient(u))
    u = unit(v @ fixed)
    sigma = v @ (matrix @ u)
    return kernel / sigma, u


def unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12)."""
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x)), 1e-12)


class BatchNorm(nn.Module):
    """Batch normalisation with the statistics of each of `groups` consecutive parts, always."""

    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        if x.shape[0] % self.groups:
            raise ValueError(
                f"a batch of {x.shape[0]} does not split into bn_groups={self.groups}: "
                "choose a divisor of the batch"
            )
        grouped = x.reshape(self.groups, -1, x.shape[-1])
        mean = jnp.mean(grouped, axis=1, keepdims=True)
        centred = grouped - mean
        variance = jnp.mean(centred * centred, axis=1, keepdims=True)
        factor = jax.lax.rsqrt(variance + 1e-5) * scale[None, None, :]
        return (centred * factor + bias[None, None, :]).reshape(x.shape)


class Head(nn.Module):
    """One mini-discriminator (4).

    Attributes:
      channels: output channels of the halving convolutions; () for one 3x3 block at full size.
      condition_dim: channels of the last convolution that the class projection is taken over.
      num_classes: 0 for unconditional (the last convolution has one channel).
    """

    channels: tuple[int, ...]
    condition_dim: int = 64
    num_classes: int = 0
    embedding_dim: int = 64
    embedding_init: Callable = nn.initializers.normal(1.0)
    bn_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array | None) -> jax.Array:
        """x [b, h, w, c], label [b] -> logits [b, n], one per position of the last convolution."""
        blocks = [(c, 4, 2) for c in self.channels] or [(x.shape[-1], 3, 1)]
        for i, (features, kernel, stride) in enumerate(blocks):
            x = SpectralConv(features, kernel, stride, padding=1, name=f"block{i}_conv")(x)
            x = nn.leaky_relu(BatchNorm(self.bn_groups, name=f"block{i}_norm")(x), 0.2)
        outputs = self.condition_dim if self.num_classes else 1
        last = SpectralConv(outputs, min(4, x.shape[1], x.shape[2]), use_bias=False, name="out")
        x = last(x).reshape(x.shape[0], -1, outputs)
        if not self.num_classes:
            return x[:, :, 0]
        condition = self._condition(label)
        return jnp.einsum("bnc,bc->bn", x, condition) * self.condition_dim**-0.5

    def _condition(self, label: jax.Array) -> jax.Array:
        # The linear layer follows StyleGAN's equalised learning rate: weights are stored with unit
        # variance and scaled by 1 / sqrt(fan-in) in the forward pass.
        dim = self.embedding_dim
        table = self.param("embedding", self.embedding_init, (self.num_classes, dim))
        kernel = self.param(
            "condition_kernel", nn.initializers.normal(1.0), (dim, self.condition_dim)
        )
        bias = self.param("condition_bias", nn.initializers.zeros, (self.condition_dim,))
        embedded = jax.nn.one_hot(label, self.num_classes) @ table
        hidden = embedded @ kernel * dim**-0.5 + bias[None, :]
        return nn.leaky_relu(hidden, 0.2) * math.sqrt(2.0)


def _uniform(bound: float) -> Callable:
    def init(key, shape):
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    return init
