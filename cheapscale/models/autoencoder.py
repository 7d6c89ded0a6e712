"""Autoencoders of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): pictures to latents and
back.

AutoencoderKL is that of Stable Diffusion, with layers named as in diffusers' PyTorch networks:

    moments = quant_conv(encoder(x)),    z = the first half of their channels, the mean
    x = decoder(post_quant_conv(z))

AutoencoderTiny is TAESD: convolutions alone, which give what the large one gives. Both see x in
[-1, 1], NHWC; a diffusion model sees the latents

    l = (z - shift) scale.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models import layers

PyTree = Any

EPS = 1e-6  # of every norm of AutoencoderKL
SATURATION = 3.0  # AutoencoderTiny decodes 3 tanh(z / 3)
conv3 = layers.Conv
conv1 = functools.partial(layers.Conv, kernel_size=(1, 1))


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """The sizes of an AutoencoderKL.

    channels: width of each level, finest first; every level but the last halves the picture.
    blocks: residual blocks of an encoder's level; the decoder's have one more. quant, post_quant:
    whether there is a 1x1 convolution after the encoder and before the decoder. attention: whether
    the middle has a block of attention.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    latent_channels: int = 4
    image_channels: int = 3
    attention: bool = True
    quant: bool = True
    post_quant: bool = True

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.channels) - 1)


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """The sizes of an AutoencoderTiny: one width, and the blocks of each level of encoder and
    decoder, in the order in which they run."""

    channels: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    image_channels: int = 3

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.encoder_blocks) - 1)


Config = KLConfig | TinyConfig


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))); a 1x1 convolution where the width changes."""

    channels: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(layers.GroupNorm(self.groups, EPS, name="norm1")(x))
        h = conv3(self.channels, name="conv1")(h)
        h = nn.silu(layers.GroupNorm(self.groups, EPS, name="norm2")(h))
        h = conv3(self.channels, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = conv1(self.channels, name="conv_shortcut")(x)
        return x + h


class SelfAttention(nn.Module):
    """x + to_out(attention over all positions of group_norm(x)), with one head."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        h = layers.GroupNorm(self.groups, EPS, name="group_norm")(x).reshape(b, -1, c)
        q, k, v = (layers.Dense(c, name=f"to_{name}")(h) for name in "qkv")
        h = layers.Dense(c, name="to_out.0")(layers.attention(q, k, v, heads=1))
        return x + h.reshape(b, height, width, c)


class KLEncoder(nn.Module):
    """x [b, h, w, 3] -> moments [b, h / f, w / f, 2 latent_channels]."""

    config: KLConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        h = conv3(config.channels[0], name="conv_in")(x)
        for level, width in enumerate(config.channels):
            here = f"down_blocks.{level}"
            for block in range(config.blocks):
                h = ResnetBlock(width, config.groups, name=f"{here}.resnets.{block}")(h)
            if level < len(config.channels) - 1:
                h = jnp.pad(h, ((0, 0), (0, 1), (0, 1), (0, 0)))
                halve = functools.partial(conv3, strides=2, padding="VALID")
                h = halve(width, name=f"{here}.downsamplers.0.conv")(h)
        h = _middle(config, h)
        h = nn.silu(layers.GroupNorm(config.groups, EPS, name="conv_norm_out")(h))
        return conv3(2 * config.latent_channels, name="conv_out")(h)


class KLDecoder(nn.Module):
    """z [b, h, w, latent_channels] -> x [b, f h, f w, 3]."""

    config: KLConfig

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        config = self.config
        h = _middle(config, conv3(config.channels[-1], name="conv_in")(z))
        for level, width in enumerate(config.channels[::-1]):
            here = f"up_blocks.{level}"
            for block in range(config.blocks + 1):
                h = ResnetBlock(width, config.groups, name=f"{here}.resnets.{block}")(h)
            if level < len(config.channels) - 1:
                h = conv3(width, name=f"{here}.upsamplers.0.conv")(layers.upsample(h, (1, 1)))
        h = nn.silu(layers.GroupNorm(config.groups, EPS, name="conv_norm_out")(h))
        return conv3(config.image_channels, name="conv_out")(h)


def _middle(config: KLConfig, h: jax.Array) -> jax.Array:
    """Two residual blocks, and attention between them."""
    width = config.channels[-1]
    h = ResnetBlock(width, config.groups, name="mid_block.resnets.0")(h)
    if config.attention:
        h = SelfAttention(config.groups, name="mid_block.attentions.0")(h)
    return ResnetBlock(width, config.groups, name="mid_block.resnets.1")(h)


class AutoencoderKL(nn.Module):
    """The whole network; `encode` and `decode` work on latents z before shift and scale."""

    config: KLConfig

    def setup(self) -> None:
        config = self.config
        self.encoder, self.decoder = KLEncoder(config), KLDecoder(config)
        if config.quant:
            self.quant_conv = conv1(2 * config.latent_channels)
        if config.post_quant:
            self.post_quant_conv = conv1(config.latent_channels)

    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean, log variance) of q(z | x), the variance from exp(-30) to exp(20)."""
        h = self.encoder(x)
        mean, log_var = jnp.split(self.quant_conv(h) if self.config.quant else h, 2, axis=-1)
        return mean, jnp.clip(log_var, -30.0, 20.0)

    def encode(self, x: jax.Array) -> jax.Array:
        """The mean of q(z | x)."""
        return self.moments(x)[0]

    def decode(self, z: jax.Array) -> jax.Array:
        """Pictures in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z) if self.config.post_quant else z)

    def __call__(self, x: jax.Array) -> jax.Array:
        """decode(encode(x)); for `init`."""
        return self.decode(self.encode(x))


class TinyBlock(nn.Module):
    """relu(x + three convolutions with relu between them)."""

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(conv3(self.channels, name="conv.0")(x))
        h = nn.relu(conv3(self.channels, name="conv.2")(h))
        return nn.relu(x + conv3(self.channels, name="conv.4")(h))


class TinyEncoder(nn.Module):
    """x [b, h, w, 3] -> z [b, h / f, w / f, latent_channels]. Layers are numbered as in PyTorch."""

    config: TinyConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, h, n = self.config.channels, (x + 1) / 2, 0
        for level, blocks in enumerate(self.config.encoder_blocks):
            halve = {"strides": 2, "padding": 1, "use_bias": False} if level else {}
            h, n = conv3(width, name=f"layers.{n}", **halve)(h), n + 1
            for _ in range(blocks):
                h, n = TinyBlock(width, name=f"layers.{n}")(h), n + 1
        return conv3(self.config.latent_channels, name=f"layers.{n}")(h)


class TinyDecoder(nn.Module):
    """z [b, h, w, latent_channels] -> x [b, f h, f w, 3]."""

    config: TinyConfig

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        width = self.config.channels
        h = nn.relu(conv3(width, name="layers.0")(SATURATION * jnp.tanh(z / SATURATION)))
        n = 2  # PyTorch counts the relu, and each enlargement
        for blocks in self.config.decoder_blocks[:-1]:
            for _ in range(blocks):
                h, n = TinyBlock(width, name=f"layers.{n}")(h), n + 1
            h = layers.upsample(h, (1, 1))
            h, n = conv3(width, use_bias=False, name=f"layers.{n + 1}")(h), n + 2
        for _ in range(self.config.decoder_blocks[-1]):
            h, n = TinyBlock(width, name=f"layers.{n}")(h), n + 1
        return 2 * conv3(self.config.image_channels, name=f"layers.{n}")(h) - 1


class AutoencoderTiny(nn.Module):
    """The whole network; `encode` and `decode` work on latents z before shift and scale."""

    config: TinyConfig

    def setup(self) -> None:
        self.encoder, self.decoder = TinyEncoder(self.config), TinyDecoder(self.config)

    def encode(self, x: jax.Array) -> jax.Array:
        """The latents of pictures in [-1, 1]."""
        return self.encoder(x)

    def decode(self, z: jax.Array) -> jax.Array:
        """Pictures in about [-1, 1]."""
        return self.decoder(z)

    def __call__(self, x: jax.Array) -> jax.Array:
        """decode(encode(x)); for `init`."""
        return self.decode(self.encode(x))


class Autoencoder(flax.struct.PyTreeNode):
    """A trained autoencoder and the scale of its latents: what a latent diffusion model needs.

    params: the weights. scale, shift: l = (z - shift) scale, one number for each latent channel.
    """

    params: PyTree
    config: Config = flax.struct.field(pytree_node=False)
    scale: tuple[float, ...] = flax.struct.field(pytree_node=False)
    shift: tuple[float, ...] = flax.struct.field(pytree_node=False)

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        return self.config.factor

    def encode(self, x: jax.Array) -> jax.Array:
        """Latents l [b, h / f, w / f, c] of pictures [b, h, w, 3] in [-1, 1].

        Raises ValueError for sides that f does not divide.
        """
        self.check(x.shape)
        scale, shift = self._affine(x.dtype)
        return (self._apply(x, "encode") - shift) * scale

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError for pictures [b, h, w, 3] whose sides f does not divide."""
        if any(side % self.factor for side in shape[1:3]):
            raise ValueError(
                f"a picture of {shape[1]} x {shape[2]} px does not divide by the autoencoder's "
                f"{self.factor}: resize it to multiples of {self.factor}"
            )

    def decode(self, latents: jax.Array) -> jax.Array:
        """Pictures [b, f h, f w, 3] in about [-1, 1] of latents l [b, h, w, c]; not clipped."""
        scale, shift = self._affine(latents.dtype)
        return self._apply(latents / scale + shift, "decode")

    def _affine(self, dtype: Any) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(v, dtype)[None, None, None] for v in (self.scale, self.shift))

    def _apply(self, x: jax.Array, method: str) -> jax.Array:
        return network(self.config).apply({"params": self.params}, x, method=method)


def network(config: Config) -> AutoencoderKL | AutoencoderTiny:
    """The module of a config."""
    return (AutoencoderKL if isinstance(config, KLConfig) else AutoencoderTiny)(config)


def init_autoencoder(config: Config, key: jax.Array) -> PyTree:
    """Fresh parameters."""
    side = config.factor
    return network(config).init(key, jnp.zeros((1, side, side, config.image_channels)))["params"]


def decode_tiled(
    autoencoder: Autoencoder, latents: jax.Array, *, tile: int = 64, overlap: int = 16
) -> jax.Array:
    """`decode` in tiles, so that memory does not grow with the canvas.

    Tiles of `tile` latents a side share `overlap` with their neighbours. There each counts with a
    weight that falls linearly to its border, as a tile's border knows nothing of what lies beyond:

        x = sum_k w_k decode(l_k) / sum_k w_k

    A canvas of at most one tile is decoded whole. All tiles have one size: a last tile that would
    stand out moves back. AutoencoderKL's norms and attention see one tile at a time, so that its
    tiles may differ in tone; TAESD's have no such seam.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap}: give 0 to {tile - 1}, less than the tile's side")
    sides, f = latents.shape[1:3], autoencoder.factor
    spans = [min(tile, side) for side in sides]
    starts = [_starts(side, span, overlap) for side, span in zip(sides, spans)]
    weight = np.outer(*(_ramp(span, overlap, f) for span in spans))[None, :, :, None]
    height, width = (f * side for side in sides)
    out = jnp.zeros((len(latents), height, width, autoencoder.config.image_channels))
    total = np.zeros((1, height, width, 1), np.float32)
    decode = jax.jit(Autoencoder.decode)
    for top in starts[0]:
        for left in starts[1]:
            rows, columns = slice(top, top + spans[0]), slice(left, left + spans[1])
            x = decode(autoencoder, latents[:, rows, columns])
            place = np.s_[:, f * top : f * rows.stop, f * left : f * columns.stop]
            out = out.at[place].add(weight * x)
            total[place] += weight
    return (out / total).astype(latents.dtype)


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """The first latent of each tile along one side."""
    count = -(-(side - overlap) // (tile - overlap)) if side > tile else 1
    return [min(n * (tile - overlap), side - tile) for n in range(count)]


def _ramp(tile: int, overlap: int, factor: int) -> np.ndarray:
    """Weights of the pixels along a tile's side: up over the overlap, 1, and down again."""
    pixel = np.arange(tile * factor) + 0.5
    return np.minimum(1.0, np.minimum(pixel, pixel[::-1]) / max(1, overlap * factor))
