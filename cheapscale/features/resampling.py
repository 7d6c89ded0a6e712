"""Resizing by matrices, for networks that were trained with conventions that jax.image lacks.

A matrix [out, in] interpolates one axis; `separable` applies one to the rows, one to the columns.
"""

import jax
import jax.numpy as jnp
import numpy as np


def bilinear_tf1(size: int, out: int) -> np.ndarray:
    """Float32 [out, size]: bilinear as in TensorFlow 1.

    Pixel i of the result lies at i * size / out, the last pixel repeats, and there is no
    antialiasing. Positions are float32, as in TensorFlow.
    """
    source = np.arange(out, dtype=np.float32) * np.float32(size / out)
    low = np.floor(source).astype(np.int64)
    return _matrix(size, low, {0: 1 - (source - low), 1: source - low})


def bicubic(size: int, out: int, offset: float = 0.0) -> np.ndarray:
    """Float32 [out, size]: bicubic (Keys' kernel with a = -3/4) between pixel centres.

    offset: pixel i of the result lies at (i + 1/2) * size / (out + offset) - 1/2. DINOv2 was
      published with 0.1.
    """
    a = -0.75
    source = (np.arange(out) + 0.5) * size / (out + offset) - 0.5
    low = np.floor(source).astype(np.int64)
    weights = {}
    for step in (-1, 0, 1, 2):
        d = np.abs(source - low - step)
        # Keys' cubic convolution kernel at distance d: `near` for d <= 1, `far` for d <= 2.
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weights[step] = np.where(d <= 1, near, far)
    return _matrix(size, low, weights)


def _matrix(size: int, low: np.ndarray, weights: dict[int, np.ndarray]) -> np.ndarray:
    """Row i has weights[step][i] at column low[i] + step; the border repeats."""
    matrix = np.zeros((len(low), size), np.float32)
    for step, weight in weights.items():
        np.add.at(matrix, (np.arange(len(low)), np.clip(low + step, 0, size - 1)), weight)
    return matrix


def separable(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """x [b, h, w, c], rows [h', h], columns [w', w] -> [b, h', w', c]."""
    exact = jax.lax.Precision.HIGHEST  # resizing must not round pixels to bfloat16
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision=exact)
    return jnp.einsum("jw,biwc->bijc", columns, x, precision=exact)
