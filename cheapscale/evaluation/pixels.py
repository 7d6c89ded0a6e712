"""Images as they are judged: eight bits, checked, and the distances that need no network.

    PSNR = 10 log10(4 / mean (x - y)^2)
    SSIM = mean of (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))

with local means m, variances s^2 and covariance s_xy under a Gaussian window, c_i = (k_i L)^2, and
peak-to-peak L = 2 in both (Wang et al. 2004, whose window and constants are used).
"""

import functools

import jax
import numpy as np

WINDOW, WINDOW_SIGMA = 11, 1.5  # pixels, of SSIM
K1, K2 = 0.01, 0.03
PEAK = 2.0


def check_images(images: np.ndarray, name: str = "images") -> np.ndarray:
    """The images [n, h, w, 3]; refuses other shapes and channel counts, and names the first NaN."""
    if images.ndim != 4 or not len(images):
        raise ValueError(f"{name} must be [n, h, w, 3] with n > 0, got shape {images.shape}")
    if images.shape[3] != 3:
        raise ValueError(
            f"{name} have {images.shape[3]} channels: give RGB (data.resize.to_rgb converts)"
        )
    if not np.issubdtype(images.dtype, np.integer):
        finite = np.isfinite(np.asarray(images, np.float32)).reshape(len(images), -1).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"image {int(np.argmin(finite))} of {len(images)} {name} holds a NaN or an "
                f"infinity, as do {int((~finite).sum())} in all: the sampler or the checkpoint "
                "has diverged"
            )
    return images


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
    x, y = float_pair(x, y, "psnr")
    mse = np.mean(np.square(x - y), axis=tuple(range(1, x.ndim)))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / mse)


def ssim(x: jax.Array | np.ndarray, y: jax.Array | np.ndarray) -> np.ndarray:
    """Structural similarity of each pair, 1 where equal: the mean over channels and over the
    places where the whole window fits.

    x, y: [b, h, w, c] in [-1, 1], at least 11 pixels a side. Returns float64 [b].
    """
    x, y = float_pair(x, y, "ssim")
    if x.ndim != 4 or min(x.shape[1:3]) < WINDOW:
        raise ValueError(
            f"ssim takes [b, h, w, c] of at least {WINDOW} pixels a side, got {x.shape}: "
            "use psnr for smaller images"
        )
    x_mean, y_mean = _window(x), _window(y)
    x_var, y_var = _window(x * x) - x_mean**2, _window(y * y) - y_mean**2
    covariance = _window(x * y) - x_mean * y_mean
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similarity = (2 * x_mean * y_mean + c1) * (2 * covariance + c2)
    similarity /= (x_mean**2 + y_mean**2 + c1) * (x_var + y_var + c2)
    return similarity.mean(axis=(1, 2, 3))


def float_pair(
    x: jax.Array | np.ndarray, y: jax.Array | np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64; refuses different shapes, in the name of the metric `name`."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"{name} compares image by image, got shapes {x.shape} and {y.shape}")
    return x, y


def _window(x):
    """Gaussian mean of every 11 x 11 window that fits: [b, h, w, c] -> [b, h - 10, w - 10, c]."""
    offset = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offset / WINDOW_SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (1, 2):
        reach = x.shape[axis] - WINDOW + 1
        views = (np.moveaxis(x, axis, 0)[i : i + reach] for i in range(WINDOW))
        parts = (w * view for w, view in zip(weights, views))
        x = np.moveaxis(functools.reduce(np.add, parts), 0, axis)
    return x
