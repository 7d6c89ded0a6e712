"""Layers of the U-Nets: convolution, norm, attention, resampling, embeddings of the noise level.

Arrays are NHWC. Norm statistics and softmax are float32 whatever the dtype of the computation.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

Initialiser = Callable[..., jax.Array]

MOST_LOGITS = 2**28  # of attention that are held at once: 1 GiB of float32


def uniform(scale: float, mode: str = "fan_in") -> Initialiser:
    """Uniform initialiser of variance scale / fan; scale 0 gives zeros. mode: fan_in | fan_avg."""
    if scale == 0:
        return nn.initializers.zeros
    return nn.initializers.variance_scaling(scale, mode, "uniform")


def _as_input(x: jax.Array, *weights: jax.Array | None, **_) -> list[jax.Array | None]:
    return [x, *(w if w is None else w.astype(x.dtype) for w in weights)]


# linen's layers, which compute in the dtype of their input; their parameters are float32
Dense = functools.partial(nn.Dense, promote_dtype=_as_input)
Conv = functools.partial(nn.Conv, kernel_size=(3, 3), promote_dtype=_as_input)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) of x [b, ..., c] over space and over c / groups channels.

    The moments of each channel are computed first and then combined over the group,

        mean_g = mean_c m_c,    var_g = mean_c v_c + mean_c (m_c - mean_g)^2,

    where v_c is the variance around the channel's own mean. This avoids the cancellation of
    E[x^2] - E[x]^2. nn.GroupNorm(use_fast_variance=False) avoids it too, but reduces a five-axis
    view, which made a training step of the CIFAR-10 DDPM++ 3 % slower and its buffers 10 % larger
    (CPU).

    An optional variable "mask" [c] of ones and zeros in the collection "keep" removes channels from
    the moments: the other channels are normalised as if the masked ones had been pruned.
    """

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, *space, channels = x.shape
        grouped = (b, self.groups, channels // self.groups)
        scale = self.param("scale", nn.initializers.ones, (channels,)).reshape(1, *grouped[1:])
        bias = self.param("bias", nn.initializers.zeros, (channels,)).reshape(1, *grouped[1:])
        share = jnp.full((1, *grouped[1:]), self.groups / channels)
        if self.has_variable("keep", "mask"):
            mask = self.get_variable("keep", "mask").reshape(share.shape)
            share = mask / jnp.sum(mask, axis=2, keepdims=True)

        wide, axes = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
        m = jnp.mean(wide, axis=axes, keepdims=True)
        v = jnp.mean(jnp.square(wide - m), axis=axes).reshape(grouped)
        m = m.reshape(grouped)
        mean = jnp.sum(share * m, axis=2, keepdims=True)
        var = jnp.sum(share * (v + jnp.square(m - mean)), axis=2, keepdims=True)

        # y = (x - mean) / std * scale + bias as one multiply-add with [b, c] coefficients
        gain = jax.lax.rsqrt(var + self.eps) * scale
        shift = bias - mean * gain
        flat = (b, *(1 for _ in space), channels)
        return (wide * gain.reshape(flat) + shift.reshape(flat)).astype(x.dtype)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, bias: jax.Array | None = None
) -> jax.Array:
    """Softmax attention. q: [b, m, heads * d], k: [b, n, heads * d], v: [b, n, heads * e]
    -> [b, m, heads * e].

    Channels are laid out (head, dim); logits [b, heads, m, n] are scaled by 1 / sqrt(d), and `bias`
    (broadcast against them) is added. More than MOST_LOGITS logits are computed for a part of the
    queries at a time, and again in the backward pass; a `bias` that differs by query prevents that.
    """
    q, k, v = (rearrange(a, "b n (heads d) -> b n heads d", heads=heads) for a in (q, k, v))

    def mixed(q: jax.Array) -> jax.Array:
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        # Logits and softmax are float32: in bfloat16 a large logit would lose its fraction.
        logits = logits / math.sqrt(q.shape[-1])
        weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)
        return jnp.einsum("bhqk,bkhe->bqhe", weights.astype(v.dtype), v)

    b, m = q.shape[:2]
    parts = min(math.ceil(b * heads * m * k.shape[1] / MOST_LOGITS), m)
    if parts > 1 and (bias is None or bias.shape[-2] == 1):
        parts = next(p for p in range(parts, m + 1) if m % p == 0)
        chunks = rearrange(q, "b (parts m) heads d -> parts b m heads d", parts=parts)
        out = jax.lax.map(jax.checkpoint(mixed), chunks)
        out = rearrange(out, "parts b m heads e -> b (parts m) heads e")
    else:
        out = mixed(q)
    return rearrange(out, "b n heads e -> b n (heads e)")


def downsample(x: jax.Array, taps: tuple[int, ...]) -> jax.Array:
    """Halve [b, h, w, c] with the separable filter `taps`: (1, 1) averages, (1, 3, 3, 1) is FIR.

    The filter is normalised; pixels beyond the border count as zero.
    """
    if taps == (1, 1):
        return rearrange(x, "b (h p) (w q) c -> b h p w q c", p=2, q=2).mean(axis=(2, 4))
    side = (len(taps) - 1) // 2
    x = jnp.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
    return filter_stride2(x, taps)


def filter_stride2(x: jax.Array, taps: tuple[int, ...]) -> jax.Array:
    """Every second output of the separable normalised filter, without padding."""
    weights = np.asarray(taps, np.float64) / sum(taps)
    for axis in (1, 2):
        count = (x.shape[axis] - len(taps)) // 2 + 1
        shifted = (
            jax.lax.slice_in_dim(x, k, k + 2 * count - 1, stride=2, axis=axis) * float(weight)
            for k, weight in enumerate(weights)
        )
        x = sum(shifted)
    return x


def upsample(x: jax.Array, taps: tuple[int, ...]) -> jax.Array:
    """Double [b, h, w, c]: (1, 1) repeats pixels; (1, 3, 3, 1) interpolates with zero padding."""
    if taps == (1, 1):
        # The gradient of a broadcast is a reduction; that of jnp.repeat would be a scatter.
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        return rearrange(x, "b h p w q c -> b (h p) (w q) c")
    if taps != (1, 3, 3, 1):
        raise ValueError(f"no upsampling with filter taps {taps}: use (1, 1) or (1, 3, 3, 1)")
    # Each output lies a quarter pixel from its input pixel: weights 3/4 and 1/4 of two neighbours.
    for axis in (1, 2):
        padded = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)])
        n = x.shape[axis]
        before = jax.lax.slice_in_dim(padded, 0, n, axis=axis)
        after = jax.lax.slice_in_dim(padded, 2, n + 2, axis=axis)
        pairs = jnp.stack([(3 * x + before) / 4, (3 * x + after) / 4], axis=axis + 1)
        x = pairs.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


def sinusoids(value: jax.Array, width: int, *, endpoint: bool = False) -> jax.Array:
    """value [b] -> [b, width] = [cos(f v), sin(f v)], f from 1 down towards 1 / 10000.

    endpoint: the lowest frequency is exactly 1 / 10000 (frequencies i / (half - 1) instead of
    i / half in the exponent).
    """
    half = width // 2
    exponent = np.arange(half) / (half - 1 if endpoint else half)
    frequencies = jnp.asarray(10000.0**-exponent, jnp.float32)
    angle = value.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def change_from_zero(
    first: nn.Dense, scalars: jax.Array, width: int, dtype: Any = jnp.float32
) -> jax.Array:
    """silu(first(sinusoids)) of scalars [b, n], minus that of scalars 0: [b, features].

    Embedded by a linear map without bias that starts at zero, it leaves a trained network as it is
    where the scalars are 0, whatever the map learns. width: of the sinusoids of each scalar.
    """

    def hidden(scalars):
        features = sinusoids(scalars.reshape(-1), width)
        return nn.silu(first(features.reshape(len(scalars), -1).astype(dtype)))

    return hidden(scalars) - hidden(jnp.zeros((1, scalars.shape[1])))


class Fourier(nn.Module):
    """Random Fourier features of value [b] -> [b, width] = [cos, sin] of 2 pi f v, f ~ N(0, 16^2).

    The frequencies are drawn once and receive no gradient.
    """

    width: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, value: jax.Array) -> jax.Array:
        draw = nn.initializers.normal(self.scale)
        frequencies = jax.lax.stop_gradient(self.param("freqs", draw, (self.width // 2,)))
        angle = 2 * np.pi * value.astype(jnp.float32)[:, None] * frequencies[None, :]
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
