"""Projected discriminator: small trainable heads on the randomly mixed features of frozen networks.

Sauer et al. 2021 (Projected GANs, arXiv 2111.01007) and 2022 (StyleGAN-XL, arXiv 2202.00273), as
PaGoDA's published code uses them. For each frozen network, features/mixing.py mixes the network's
maps by random frozen 1x1 convolutions into maps o_i, and small heads are trained on them:

    D_i = head_i(o_i, label)

Maps as large as the network's input are left out: mixing would enlarge them, and heads at twice the
resolution of the image would take most of the time.

A head halves o_i with spectral-norm 4x4 convolutions, batch norm and LeakyReLU(0.2) until it is
nominally 8 px (round(log2(side / 8)) times), then a spectral-norm 4x4 convolution without padding.
Two rules serve small runs: a map that needs no halving gets one 3x3 block at its own size, so that
no head is linear in the frozen features; and the side of the last kernel is min(4, side).

For text-to-image PaGoDA reads the tokens of DINO instead, its patches and its layers 2, 5, 8 and 11
(as StyleGAN-T, Sauer et al. 2023, arXiv 2301.09515). There a head is a linear layer and a residual
convolution over 9 neighbours in the row of tokens, closed to a ring; its last layer gives every
token a logit. The hinge is averaged over the logits of all heads, not taken of their mean.

The guidance scale omega is embedded as in the generator, 0 at omega = 1, and added both to the
features after the first block and to the embedding of the class (PaGoDA, section 4.2).

Batch norm always uses the statistics of the batch it is given: pass real and fake images in
separate calls. Under `jit` with a batch sharded over devices these are the statistics of the global
batch; `bn_groups` splits it into equal consecutive ghost batches.

Spectral norm (Miyato et al. 2018): W / sigma with sigma = u' W v. Every call makes one power
iteration v <- W'u, u <- W v (each normalised, eps 1e-12) and returns the new u; u and v are
constants to the gradient.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion.guidance import omega_feature
from cheapscale.features.mixing import map_shapes, mixed_shapes, token_shapes
from cheapscale.features.network import FeatureNetwork
from cheapscale.models.layers import change_from_zero

PyTree = Any

HEAD_SIZE = 8  # nominal side at which a head stops halving
NEIGHBOURS = 9  # tokens that one of a token head's convolutions sees
TOKEN_WIDTH = 6  # channels of a token head / width: 384 in StyleGAN-T
OMEGA_WIDTH = 64  # of the embedding of omega
WIDTH_MULTIPLES = {128: 1, 64: 1, 32: 2, 16: 4, 8: 8}  # nominal side -> channels / width


class ProjectedDiscriminator(NamedTuple):
    """The two functions of a discriminator.

    init: key -> (params, spectral); traceable.
    apply: (params, spectral, maps, c) -> (logits [b, n], new spectral), for the maps or tokens of
      `features.mixing.projections` and c = {"label": int [b][, "omega": [b]]}, with text "caption"
      [b, caption_dim] beside it. A label outside [0, num_classes) has a zero embedding; without
      classes labels are ignored.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[jax.Array, PyTree]]


def projected_discriminator(
    networks: Sequence[FeatureNetwork],
    *,
    resolution: int,
    num_classes: int = 0,
    caption_dim: int = 0,
    width: int = 64,
    condition_dim: int = 64,
    embedding_dim: int = 64,
    embedding: np.ndarray | None = None,
    bn_groups: int = 1,
    tokens: bool = False,
    guided: bool = False,
) -> ProjectedDiscriminator:
    """A projected discriminator for images of one resolution.

    Args:
      networks: frozen feature networks, one set of heads each; their names must differ.
      resolution: side of the images.
      num_classes: 0 for a discriminator without classes.
      caption_dim: width of the captions' pooled vectors, which take the place of the classes; 0 for
        none.
      width: channels of the finest mixed map; everything scales with it (64 in the papers).
      condition_dim: channels of the inner product with the class embedding.
      embedding_dim: size of the class embeddings, which start at random (N(0, 1)).
      embedding: initial table [num_classes, any] of class embeddings instead.
      bn_groups: ghost batches per batch.
      tokens: read the tokens of networks that have them. guided: take omega.
    """
    if embedding is not None and embedding.shape[:1] != (num_classes,):
        raise ValueError(
            f"class embedding has shape {embedding.shape} but the discriminator has "
            f"num_classes={num_classes}: give one row per class"
        )
    embedding_init = nn.initializers.normal(1.0)
    if embedding is not None:
        embedding_dim = embedding.shape[1]
        embedding_init = nn.initializers.constant(embedding, jnp.float32)
    make = functools.partial(
        network_heads,
        resolution=resolution,
        width=width,
        tokens=tokens,
        condition_dim=condition_dim,
        num_classes=num_classes,
        caption_dim=caption_dim,
        embedding_dim=embedding_dim,
        embedding_init=embedding_init,
        bn_groups=bn_groups,
    )
    heads = {network.name: make(network) for network in networks}
    c = {"label": jnp.zeros((bn_groups,), jnp.int32)}
    c |= {"omega": jnp.ones((bn_groups,))} if guided else {}
    c |= {"caption": jnp.zeros((bn_groups, caption_dim))} if caption_dim else {}

    def init(key):
        params, spectral = {}, {}
        for name, own in heads.items():
            params[name], spectral[name] = {}, {}
            for i, (head, shape) in enumerate(own):
                key, use = jax.random.split(key)
                made = head.init(use, jnp.zeros((bn_groups, *shape)), c)
                params[name][f"head{i}"] = made["params"]
                spectral[name][f"head{i}"] = made["spectral"]
        return params, spectral

    def apply(params, spectral, maps, c):
        logits, advanced = [], {}
        for name, own in heads.items():
            advanced[name] = {}
            for i, ((head, _), feature) in enumerate(zip(own, maps[name], strict=True)):
                slot = f"head{i}"
                variables = {"params": params[name][slot], "spectral": spectral[name][slot]}
                out, state = head.apply(variables, feature, c, mutable=["spectral"])
                logits.append(out)
                advanced[name][slot] = state["spectral"]
        return jnp.concatenate(logits, axis=1), advanced

    return ProjectedDiscriminator(init, apply)


def network_heads(
    network: FeatureNetwork, *, resolution: int, width: int, tokens: bool, **options: Any
) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """The heads of one network, each with the shape [..., c] of what it reads."""
    if tokens and network.tokens:
        head = TokenHead(channels=TOKEN_WIDTH * width, **options)
        return [(head, shape) for shape in token_shapes(network, resolution)]
    return [
        (Head(channels=head_channels(side, width), **options), (side, side, channels))
        for side, channels in mixed_shapes(map_shapes(network, resolution), width)
    ]


def head_channels(side: int, width: int) -> tuple[int, ...]:
    """Channels after each halving of a head on a map of this side; () where none is needed."""
    halvings = max(round(math.log2(side / HEAD_SIZE)), 0)
    sides = [HEAD_SIZE * 2**i for i in reversed(range(halvings))]
    return tuple(width * WIDTH_MULTIPLES.get(s, 1) for s in sides)


class SpectralConv(nn.Module):
    """Convolution with a spectrally normalised kernel; `u` lives in the collection "spectral"."""

    features: int
    kernel: int | tuple[int, int]  # (height, width), or both
    stride: int = 1
    padding: int = 0
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sides = (self.kernel,) * 2 if isinstance(self.kernel, int) else self.kernel
        shape = (*sides, x.shape[-1], self.features)
        bound = math.prod(shape[:3]) ** -0.5
        # PyTorch's default initialisation, uniform within 1 / sqrt(fan-in), as in the paper's code.
        kernel = self.param("kernel", _uniform(bound), shape)
        u = self.variable(
            "spectral",
            "u",
            lambda: unit(jax.random.normal(self.make_rng("params"), shape[-1:], jnp.float32)),
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
    """(W / sigma, next u [out]) for the kernel W [..., out] read as a matrix with `out` columns."""
    # PyTorch normalises by the transpose of this matrix; u has the length `out` in both.
    matrix = kernel.reshape(-1, kernel.shape[-1])
    fixed = jax.lax.stop_gradient(matrix)
    v = unit(fixed @ jax.lax.stop_gradient(u))
    u = unit(v @ fixed)
    sigma = v @ (matrix @ u)  # the gradient flows through W alone
    return kernel / sigma, u


def unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12)."""
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x)), 1e-12)


class BatchNorm(nn.Module):
    """Batch normalisation that always uses the statistics of each of `groups` consecutive parts."""

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


class Omega(nn.Module):
    """omega [b] -> [b, width], zero at the start of training and at omega = 1."""

    width: int

    @nn.compact
    def __call__(self, omega: jax.Array) -> jax.Array:
        first = nn.Dense(OMEGA_WIDTH, name="map0")
        change = change_from_zero(first, omega_feature(omega)[:, None], OMEGA_WIDTH)
        zeros = nn.initializers.zeros
        return nn.Dense(self.width, use_bias=False, kernel_init=zeros, name="map1")(change)


class ConditionalHead(nn.Module):
    """What all heads share: how they take the conditions.

    Attributes:
      condition_dim: channels of the last convolution, multiplied with the class embedding.
      num_classes, caption_dim: both 0 for unconditional (the last convolution has one channel).
    """

    condition_dim: int = 64
    num_classes: int = 0
    caption_dim: int = 0
    embedding_dim: int = 64
    embedding_init: Callable = nn.initializers.normal(1.0)
    bn_groups: int = 1

    def normalised(self, x: jax.Array, c: dict[str, jax.Array], block: int) -> jax.Array:
        """The end of a block: batch norm and LeakyReLU of x [b, h, w, c]; the first adds omega."""
        x = nn.leaky_relu(BatchNorm(self.bn_groups, name=f"block{block}_norm")(x), 0.2)
        if block == 0 and "omega" in c:
            x = x + Omega(x.shape[-1], name="omega_features")(c["omega"])[:, None, None, :]
        return x

    def logits(self, x: jax.Array, c: dict[str, jax.Array], kernel: int) -> jax.Array:
        """x [b, h, w, c] -> logits [b, n], one per position of the last convolution."""
        conditional = self.num_classes or self.caption_dim
        outputs = self.condition_dim if conditional else 1
        x = SpectralConv(outputs, kernel, use_bias=False, name="out")(x)
        x = x.reshape(x.shape[0], -1, outputs)
        if not conditional:
            return x[:, :, 0]
        # Projection discriminator (Miyato & Koyama 2018): an inner product at every position.
        return jnp.einsum("bnc,bc->bn", x, self._condition(c)) * self.condition_dim**-0.5

    def _condition(self, c: dict[str, jax.Array]) -> jax.Array:
        # The linear layer follows StyleGAN's equalised learning rate: weights are stored with unit
        # variance and scaled by 1 / sqrt(fan-in) in the forward pass.
        if self.caption_dim:
            embedded = c["caption"]
        else:
            shape = (self.num_classes, self.embedding_dim)
            table = self.param("embedding", self.embedding_init, shape)
            embedded = jax.nn.one_hot(c["label"], self.num_classes) @ table
        dim = embedded.shape[-1]
        kernel = self.param(
            "condition_kernel", nn.initializers.normal(1.0), (dim, self.condition_dim)
        )
        bias = self.param("condition_bias", nn.initializers.zeros, (self.condition_dim,))
        hidden = embedded @ kernel * dim**-0.5 + bias[None, :]
        if "omega" in c:
            hidden += Omega(self.condition_dim, name="omega_condition")(c["omega"])
        return nn.leaky_relu(hidden, 0.2) * math.sqrt(2.0)


class Head(ConditionalHead):
    """One mini-discriminator D_i on a map.

    channels: output channels of the halving convolutions; () for one 3x3 block at full size.
    """

    channels: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, c: dict[str, jax.Array]) -> jax.Array:
        """x [b, h, w, c] -> logits [b, n], one per position of the last convolution."""
        blocks = [(width, 4, 2) for width in self.channels] or [(x.shape[-1], 3, 1)]
        for i, (features, kernel, stride) in enumerate(blocks):
            x = SpectralConv(features, kernel, stride, padding=1, name=f"block{i}_conv")(x)
            x = self.normalised(x, c, i)
        return self.logits(x, c, min(4, x.shape[1], x.shape[2]))


class TokenHead(ConditionalHead):
    """One mini-discriminator on the tokens of one depth, of `channels` channels."""

    channels: int = 384

    @nn.compact
    def __call__(self, x: jax.Array, c: dict[str, jax.Array]) -> jax.Array:
        """Tokens x [b, t, c] -> logits [b, t]."""
        x = SpectralConv(self.channels, 1, name="block0_conv")(x[:, None])
        x = self.normalised(x, c, 0)
        reach = NEIGHBOURS // 2
        ring = jnp.pad(x, ((0, 0), (0, 0), (reach, reach), (0, 0)), mode="wrap")
        h = SpectralConv(self.channels, (1, NEIGHBOURS), name="block1_conv")(ring)
        x = (x + self.normalised(h, c, 1)) * 0.5**0.5
        return self.logits(x, c, 1)


def _uniform(bound: float) -> Callable:
    def init(key, shape):
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return init
