"""Convolutions of the frozen networks; "SAME" pads as TensorFlow does, an odd pixel last."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models.features.weights import Weights

PyTree = Any


def folded(weights: Weights, name: str, norm: str, shape: tuple[int, ...], eps: float) -> PyTree:
    """Kernel [h, w, in, out] and bias [out] of convolution `name` with the evaluation-mode batch
    norm `norm` folded in.

    shape: (out, in, h, w) in the file, -1 for any.
    """
    kernel = weights.take(name + ".weight", *shape)
    scale, offset, mean, variance = (
        weights.take(f"{norm}.{part}", kernel.shape[0])
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    factor = scale / np.sqrt(variance + eps)
    kernel = (kernel * factor[:, None, None, None]).transpose(2, 3, 1, 0)
    return {"kernel": kernel, "bias": offset - mean * factor}


def conv(
    x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str | int = "SAME"
) -> jax.Array:
    """x [b, h, w, in], kernel [kh, kw, in, out] -> [b, h', w', out]."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding if isinstance(padding, str) else ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """x [b, h, w, c], kernel [kh, kw, 1, c] -> [b, h', w', c], padding "SAME".

    A sum of shifted products, which XLA fuses into one loop: 15 to 50 times as fast as a grouped
    convolution on a CPU, where that has no fast path, and bound by memory like it elsewhere. The
    gradient is written out as the same kind of sum (automatically it is one of padded products,
    up to four times as slow); forward mode is not supported.
    """
    padded = _padded(x, kernel, stride)
    sides = tuple(-(-side // stride) for side in x.shape[1:3])
    return _products(padded, kernel, sides, stride)


def _forward(x, kernel, stride):
    return depthwise(x, kernel, stride), (x, kernel)


def _backward(stride, saved, g):
    x, kernel = saved
    # For x: spread g over the input's pixels, then the mirrored kernel at stride 1.
    config = []
    for side, out, k in zip(x.shape[1:3], g.shape[1:3], kernel.shape[:2]):
        before = k - 1 - _padding(side, k, stride)[0]
        spread = (out - 1) * stride + 1
        config.append((before, side + k - 1 - spread - before, stride - 1))
    padded = jax.lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *config, (0, 0, 0)))
    for_x = _products(padded, kernel[::-1, ::-1], x.shape[1:3], 1)
    padded = _padded(x, kernel, stride)
    windows = [
        jnp.sum(_window(padded, i, j, g.shape[1:3], stride) * g, axis=(0, 1, 2))
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return for_x, jnp.stack(windows).reshape(kernel.shape)


depthwise.defvjp(_forward, _backward)


def _products(padded, kernel, sides, stride):
    y = jnp.zeros((padded.shape[0], *sides, padded.shape[3]), padded.dtype)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            y = y + _window(padded, i, j, sides, stride) * kernel[i, j, 0][None, None, None, :]
    return y


def _window(padded, i, j, sides, stride):
    rows, columns = (
        slice(start, start + (side - 1) * stride + 1, stride) for start, side in zip((i, j), sides)
    )
    return padded[:, rows, columns]


def _padded(x, kernel, stride):
    pads = [_padding(side, k, stride) for side, k in zip(x.shape[1:3], kernel.shape[:2])]
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def _padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2
