"""Checks of images, eight-bit conversion, and the distances PSNR and SSIM.

    PSNR = 10 log10(4 / mean (x - y)^2)
    SSIM = mean of (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))

with local means m, variances s^2 and covariance s_xy under a Gaussian window, c_i = (k_i L)^2 and
dynamic range L = 2, as images lie in [-1, 1] (Wang et al. 2004, IEEE TIP 13(4), Eq. 13, with their
window and constants).
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

WINDOW, WINDOW_SIGMA = 11, 1.5  # side and standard deviation of SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03
PEAK = 2.0


def check_images(images: np.ndarray, name: str = "images") -> np.ndarray:
    """The same images, if they are finite and [n, h, w, 3] with n > 0; else ValueError."""
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


def to_uint8(images: ArrayLike) -> np.ndarray:
    """uint8 images from images in [-1, 1]: (x + 1) * 127.5, truncated as in EDM's sampler.

    Real images and samples are both converted here, so that a metric cannot see a difference in
    rounding. 1e-3 is added before truncation: the float32 value of u / 127.5 - 1 may be slightly
    too small, and would otherwise come back as u - 1.
    """
    images = np.clip(np.asarray(images, np.float32), -1, 1)
    return np.trunc((images + 1) * 127.5 + 1e-3).clip(0, 255).astype(np.uint8)


def from_uint8(images: np.ndarray) -> np.ndarray:
    """float32 images in [-1, 1] from uint8 images."""
    return images.astype(np.float32) / 127.5 - 1


def psnr(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """The peak signal-to-noise ratio of each pair in decibels, for a dynamic range of 2.

    x, y: [b, ...] in [-1, 1]. Returns float64 [b]; infinity where the images are equal.
    """
    x, y = _float_pair(x, y, "psnr")
    mse = np.mean(np.square(x - y), axis=tuple(range(1, x.ndim)))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / mse)


def ssim(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """The structural similarity of each pair; equal images have 1.

    x, y: [b, h, w, c] in [-1, 1], at least 11 pixels high and wide. Returns float64 [b], the mean
    over channels and over the positions where the whole window fits.
    """
    x, y = _float_pair(x, y, "ssim")
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


def _float_pair(x: ArrayLike, y: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays as float64; raises ValueError, with the metric's name, if the shapes differ."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape:
        raise ValueError(f"{name} compares image by image, got shapes {x.shape} and {y.shape}")
    return x, y


def _window(x: np.ndarray) -> np.ndarray:
    """Gaussian-weighted mean of each 11 x 11 window: [b, h, w, c] -> [b, h - 10, w - 10, c]."""
    half = WINDOW // 2
    means = ndimage.gaussian_filter(x, WINDOW_SIGMA, axes=(1, 2), radius=half)
    return means[:, half:-half, half:-half]
