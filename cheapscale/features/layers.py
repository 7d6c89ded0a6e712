"""Layers of the feature networks, and functions that read them under PyTorch's names.

A layer is {"kernel" [kh, kw, in, out] or [in, out], "bias" [out]}. Padding "SAME" is TensorFlow's:
an odd pixel of padding comes last.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.features.weights import Weights

PyTree = Any


def read_conv(weights: Weights, name: str, *shape: int) -> PyTree:
    """The convolution `name` with a bias; `shape` is PyTorch's (out, in, h, w), -1 for any."""
    kernel = weights.take(name + ".weight", *shape)
    bias = weights.take(name + ".bias", kernel.shape[0])
    return {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}


def read_linear(weights: Weights, name: str, inputs: int, outputs: int = -1) -> PyTree:
    """The linear layer `name`: {"kernel" [in, out], "bias" [out]}."""
    kernel = weights.take(name + ".weight", outputs, inputs).T
    return {"kernel": kernel, "bias": weights.take(name + ".bias", kernel.shape[1])}


def folded(weights: Weights, name: str, norm: str, shape: tuple[int, ...], eps: float) -> PyTree:
    """The convolution `name` with the evaluation-mode batch norm `norm` folded in; `shape` as in
    `read_conv`."""
    kernel = weights.take(name + ".weight", *shape)
    parts = ("weight", "bias", "running_mean", "running_var")
    scale, offset, mean, variance = (weights.take(f"{norm}.{p}", len(kernel)) for p in parts)
    factor = scale / np.sqrt(variance + eps)
    kernel = (kernel * factor[:, None, None, None]).transpose(2, 3, 1, 0)
    return {"kernel": kernel, "bias": offset - mean * factor}


def linear(x: jax.Array, layer: PyTree) -> jax.Array:
    """x [..., in] -> [..., out]."""
    return x @ layer["kernel"] + layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def conv(x: jax.Array, layer: PyTree, stride: int = 1, padding: str | int = "SAME") -> jax.Array:
    """x [b, h, w, in] -> [b, h', w', out]; a number as `padding` pads every side by it."""
    x = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        window_strides=(stride, stride),
        padding=padding if isinstance(padding, str) else [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x + layer["bias"][None, None, None, :] if "bias" in layer else x


def depthwise(x: jax.Array, layer: PyTree, stride: int = 1) -> jax.Array:
    """x [b, h, w, c], kernel [kh, kw, 1, c] -> [b, h', w', c] with padding "SAME".

    The result is a sum of shifted products, which XLA fuses into one loop; the hand-written
    gradient is a sum of the same kind. On two CPU cores, EfficientNet-lite0's gradient with respect
    to 32 images of 32 px takes 0.08 s, against 0.15 s with the automatic gradient and 0.74 s with a
    grouped convolution (4 images of 128 px: 0.14 s against 0.30 s). Forward mode is not supported.

    If x has no more pixels than the kernel has taps, it is a matrix for each channel instead: as
    fast, but a tenth of the operations to trace and compile.
    """
    kernel = layer["kernel"]
    few = x.shape[1] * x.shape[2] <= kernel.shape[0] * kernel.shape[1]
    return (_matrices if few else _depthwise)(x, kernel, stride) + layer["bias"][None, None, None]


def _matrices(x, kernel, stride):
    """The same with a matrix from the pixels (i, j) of x to those of the result, (p, q)."""
    rows, columns = (_reached(*axis, stride) for axis in zip(x.shape[1:3], kernel.shape))
    matrix = jnp.einsum("tpi,uqj,tuc->ijpqc", rows, columns, kernel[:, :, 0])
    return jnp.einsum("bijc,ijpqc->bpqc", x, matrix)


def _reached(size, taps, stride):
    """[taps, out, size]: one where the tap of an output reads the input."""
    ((before, _),) = jax.lax.padtype_to_pads((size,), (taps,), (stride,), "SAME")
    tap, out, read = np.ogrid[:taps, : -(-size // stride), :size]
    return (out * stride + tap - before == read).astype(np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x, kernel, stride):
    sides = tuple(-(-side // stride) for side in x.shape[1:3])
    return _products(_padded(x, kernel, stride), kernel, sides, stride)


def _forward(x, kernel, stride):
    return _depthwise(x, kernel, stride), (x, kernel)


def _backward(stride, saved, g):
    x, kernel = saved
    # For x: put g's pixels `stride` apart, then convolve with the mirrored kernel.
    config = [(0, 0, 0)]
    for axis, (before, _) in enumerate(_pads(x, kernel, stride), start=1):
        reach = kernel.shape[axis - 1] - 1
        after = x.shape[axis] + before - ((g.shape[axis] - 1) * stride + 1)
        config.append((reach - before, after, stride - 1))
    spread = jax.lax.pad(g, jnp.zeros((), g.dtype), (*config, (0, 0, 0)))
    for_x = _products(spread, kernel[::-1, ::-1], x.shape[1:3], 1)
    padded = _padded(x, kernel, stride)
    (for_kernel,) = jax.vjp(lambda k: _products(padded, k, g.shape[1:3], stride), kernel)[1](g)
    return for_x, for_kernel


_depthwise.defvjp(_forward, _backward)


def _products(padded, kernel, sides, stride):
    """The sum over the kernel's taps of (input shifted by the tap) * weight, at `sides`."""
    (h, w), out = ((side - 1) * stride + 1 for side in sides), 0.0
    for i, j in np.ndindex(*kernel.shape[:2]):
        out += padded[:, i : i + h : stride, j : j + w : stride] * kernel[i, j][None, None]
    return out


def _pads(x, kernel, stride):
    return jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")


def _padded(x, kernel, stride):
    return jnp.pad(x, ((0, 0), *_pads(x, kernel, stride), (0, 0)))
