"""Images as they are judged: eight bits, and the distances that need no network."""

import jax
import numpy as np


def to_uint8(images: jax.Array | np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0..255 by truncation, trunc((x + 1) * 127.5), as the published samplers store it.

    Reals and samples both pass through here, so that the rounding cannot tell them apart. A
    thousandth of a level is added first: u / 127.5 - 1 in float32 may lie an ulp below u.
    """
    images = np.clip(np.asarray(images, np.float32), -1, 1)
    return np.trunc((images + 1) * 127.5 + 1e-3).clip(0, 255).astype(np.uint8)


def from_uint8(images: np.ndarray) -> np.ndarray:
    """0..255 -> float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def psnr(x: jax.Array | np.ndarray, y: jax.Array | np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in decibels of each pair, peak-to-peak 2.

    x, y: [b, ...] in [-1, 1]. Returns float64 [b]; infinite where the images are equal.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"psnr compares image by image, got shapes {x.shape} and {y.shape}")
    mse = np.mean(np.square(x - y), axis=tuple(range(1, x.ndim)))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(4 / mse)
