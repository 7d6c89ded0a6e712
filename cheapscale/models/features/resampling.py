"""Resizing by matrices, for networks that were trained with another convention than ours.

A matrix [out, in] interpolates one axis; `separable` applies one to the rows, one to the columns.
Bilinear positions are computed in float32, as the references do.
"""

import jax
import jax.numpy as jnp
import numpy as np


def bilinear_tf1(size: int, out: int) -> np.ndarray:
    """Bilinear as TensorFlow 1 did it: pixel i of the result lies at i * size / out, the last
    pixel repeats, nothing is smoothed ahead of shrinking. Float32 [out, size]."""
    return _linear(np.arange(out, dtype=np.float32) * np.float32(size / out), size)


def bilinear_centres(size: int, out: int) -> np.ndarray:
    """Bilinear between pixel centres, (i + 1/2) * size / out - 1/2, without smoothing ahead of
    shrinking. Float32 [out, size]."""
    source = (np.arange(out, dtype=np.float32) + np.float32(0.5)) * np.float32(size / out)
    return _linear(source - np.float32(0.5), size)


def _linear(source: np.ndarray, size: int) -> np.ndarray:
    low = np.floor(source).astype(np.int64)
    matrix = np.zeros((len(source), size), np.float32)
    for index, weight in ((low, 1 - (source - low)), (low + 1, source - low)):
        np.add.at(matrix, (np.arange(len(source)), np.clip(index, 0, size - 1)), weight)
    return matrix


def bicubic(size: int, out: int, offset: float = 0.0) -> np.ndarray:
    """Bicubic (Keys' kernel with a = -3/4) between pixel centres, the border repeated.

    offset: added to `out` where the positions are computed, (i + 1/2) * size / (out + offset) -
      1/2. DINOv2 was published with 0.1.

    Returns float32 [out, size].
    """
    a = -0.75
    source = (np.arange(out) + 0.5) * size / (out + offset) - 0.5
    low = np.floor(source).astype(np.int64)
    matrix = np.zeros((out, size), np.float32)
    for step in (-1, 0, 1, 2):
        d = np.abs(source - low - step)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        index = np.clip(low + step, 0, size - 1)
        np.add.at(matrix, (np.arange(out), index), np.where(d <= 1, near, far))
    return matrix


def separable(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """x [b, h, w, c], rows [h', h], columns [w', w] -> [b, h', w', c]."""
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision=exact)
    return jnp.einsum("jw,biwc->bijc", columns, x, precision=exact)
