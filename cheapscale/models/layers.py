"""Layers of the U-Nets: convolution, group norm, attention, resampling, noise embeddings.

Arrays are NHWC. Parameters are float32 whatever the precision of the computation; a layer computes
in the dtype of its input. Norm statistics and softmax are always float32.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

Initialiser = Callable[..., jax.Array]


@functools.cache
def uniform(scale: float, mode: str = "fan_in") -> Initialiser:
    """Uniform initialiser of variance scale / fan; scale 0 gives zeros. mode: fan_in | fan_avg."""
    if scale == 0:
        return nn.initializers.zeros

    # Flax checks every tensor's shape in every trace of a network by tracing its initialiser anew;
    # under jit the trace is found again.
    @functools.partial(jax.jit, static_argnums=1)
    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        fan_in, fan_out = math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]
        fan = fan_in if mode == "fan_in" else (fan_in + fan_out) / 2
        numbers = hashed_uniform(key, math.prod(shape)).reshape(shape)
        return numbers * math.sqrt(3 * scale / fan)

    return init


def hashed_uniform(key: jax.Array, size: int) -> jax.Array:
    """[size] numbers, uniform on [-1, 1): an integer hash of the position and of the key.

    A network has a hundred tensors of as many shapes, and XLA:CPU compiles a Threefry generator for
    each: 13 s for a tiny U-Net's initialisation, against 1.6 s with these few integer operations.
    They are elementwise, so the numbers do not depend on the device, the mesh or the backend.
    """
    seeds = jax.random.key_data(key)
    bits = jax.lax.iota(jnp.uint32, size) * np.uint32(0x9E3779B9) ^ seeds[0]
    for seed in (seeds[-1], seeds[0]):  # two rounds: multiply, fold the high bits down, re-key
        bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
        bits = (bits ^ (bits >> 16)) + seed
    return (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1


class Dense(nn.Module):
    """Linear map of the last axis: x [..., in] -> [..., out]. On images it is a 1x1 convolution."""

    features: int
    kernel_init: Initialiser
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            y = y + over_axes(self.param("bias", nn.initializers.zeros, (self.features,)), y)
        return y


class Conv(nn.Module):
    """3x3 (or other odd) convolution, stride 1: x [b, h, w, in] -> [b, h, w, out].

    padding: zero pixels on each side; None keeps the size. dilation: between the kernel's taps.
    """

    features: int
    kernel_init: Initialiser
    size: int = 3
    padding: int | None = None
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        same = self.dilation * (self.size // 2)
        padding = same if self.padding is None else self.padding
        y = convolve(x, kernel.astype(x.dtype), padding, self.dilation)
        return y + over_axes(bias, y)


def convolve(x: jax.Array, kernel: jax.Array, padding: int, dilation: int = 1) -> jax.Array:
    """Cross-correlation of x [b, h, w, in] with kernel [k, k, in, out], zero padding, stride 1.

    XLA's own convolution is also the fastest on CPU (jax 0.10): against it, gathered patches and
    one matrix product, nine shifted products, and either of them as the kernel's gradient only,
    took 0.9 to 3 times as long forwards and backwards at 8 to 32 px and 32 to 64 channels.
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=((padding, padding), (padding, padding)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) of x [b, ..., c] over space and over c / groups channels.

    The moments of each channel are taken first and then combined over the group,

        mean_g = mean_c m_c,    var_g = mean_c v_c + mean_c (m_c - mean_g)^2,

    with v_c the variance around the channel's own mean. XLA reduces [b, h, w, c] over (h, w) many
    times faster than it reduces the group's five-axis view, and nothing large is subtracted from
    something large. The number of groups is stored, never derived from the width.

    A variable "mask" [c] of ones and zeros in the collection "keep", where there is one, takes
    channels out of the moments: what is left is normalised as if they had been cut out.
    """

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"{'/'.join(self.path)} normalises {channels} channels in {self.groups} groups: "
                "give it a number of groups that divides the channels"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        space = tuple(range(1, x.ndim - 1))
        wide = x.astype(jnp.float32)
        mean_c = jnp.mean(wide, axis=space, keepdims=True)
        var_c = jnp.mean(jnp.square(wide - mean_c), axis=space)
        mean_c = mean_c.reshape(x.shape[0], self.groups, -1)
        var_c = var_c.reshape(x.shape[0], self.groups, -1)
        if self.has_variable("keep", "mask"):
            mask = self.get_variable("keep", "mask").reshape(1, self.groups, -1)
            share = mask / jnp.sum(mask, axis=2, keepdims=True)
        else:
            share = jnp.full((1, self.groups, 1), self.groups / channels)
        mean = jnp.sum(share * mean_c, axis=2, keepdims=True)
        var = jnp.sum(share * (var_c + jnp.square(mean_c - mean)), axis=2, keepdims=True)
        # y = (x - mean) / std * scale + bias as one multiply-add with [b, c] coefficients
        gain = jax.lax.rsqrt(var + self.eps) * scale.reshape(1, self.groups, -1)
        shift = bias.reshape(1, self.groups, -1) - mean * gain
        flat = (x.shape[0], *(1,) * len(space), channels)
        return (wide * gain.reshape(flat) + shift.reshape(flat)).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Softmax attention over positions. q, k: [b, n, heads * d], v: [b, n, heads * e] -> like v.

    Channels are laid out (head, dim); logits are scaled by 1 / sqrt(d).
    """
    q, k, v = (rearrange(a, "b n (heads d) -> b n heads d", heads=heads) for a in (q, k, v))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]), axis=-1)
    mixed = jnp.einsum("bhqk,bkhe->bqhe", weights.astype(v.dtype), v)
    return rearrange(mixed, "b n heads d -> b n (heads d)")


def downsample(x: jax.Array, taps: tuple[int, ...]) -> jax.Array:
    """Halve [b, h, w, c] with the separable filter `taps`: (1, 1) averages, (1, 3, 3, 1) is FIR.

    The filter is normalised; zeros are seen beyond the border.
    """
    if taps == (1, 1):
        return rearrange(x, "b (h p) (w q) c -> b h p w q c", p=2, q=2).mean(axis=(2, 4))
    side = (len(taps) - 1) // 2
    x = jnp.pad(x, ((0, 0), (side, side), (side, side), (0, 0)))
    return filter_stride2(x, taps)


def filter_stride2(x: jax.Array, taps: tuple[int, ...]) -> jax.Array:
    """Every second output of the separable normalised filter, where it fits inside x."""
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
    """Double [b, h, w, c]: (1, 1) repeats pixels, (1, 3, 3, 1) interpolates, zeros outside."""
    if taps == (1, 1):
        # a broadcast, not jnp.repeat: its gradient is a reduction instead of a scatter
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        return rearrange(x, "b h p w q c -> b (h p) (w q) c")
    if taps != (1, 3, 3, 1):
        raise ValueError(f"no upsampling with filter taps {taps}: use (1, 1) or (1, 3, 3, 1)")
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


def over_axes(vector: jax.Array, like: jax.Array) -> jax.Array:
    """[c] -> [1, ..., 1, c] with as many axes as `like`, in its dtype."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)
