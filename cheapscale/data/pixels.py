"""Arrays that become pictures: their checks, eight-bit conversion, and the distances PSNR and SSIM.

    PSNR = 10 log10(4 / mean (x - y)^2)
    SSIM = mean of (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2))

with local means m, variances s^2 and covariance s_xy under a Gaussian window, c_i = (k_i L)^2 and
dynamic range L = 2, as images lie in [-1, 1] (Wang et al. 2004, IEEE TIP 13(4), Eq. 13, with their
window and constants).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

WINDOW, WINDOW_SIGMA = 11, 1.5  # side and standard deviation of SSIM's Gaussian window, in pixels
K1, K2 = 0.01, 0.03
PEAK = 2.0
ROUNDING = 1e-3  # what rounding, as of float16, may add to an image in [-1, 1]


def check_images(images: np.ndarray, name: str = "images") -> np.ndarray:
    """The same images, if they are finite and [n, h, w, 3] with n > 0; else ValueError."""
    if images.ndim != 4 or not images.size:
        raise ValueError(f"{name} must be [n, h, w, 3] with n > 0, got shape {images.shape}")
    if images.shape[3] != 3:
        turned = images.shape[1] == 3
        fix = (
            f"transpose {images.shape} by (0, 2, 3, 1)"
            if turned
            else "give RGB (data.resize.to_rgb converts)"
        )
        raise ValueError(f"{name} have {images.shape[3]} channels: {fix}")
    return check_finite(images, name)


DIVERGED = "choose an earlier checkpoint (--step), a weaker --cfg_scale, or float32"


def check_finite(
    images: np.ndarray, name: str = "images", ids: Sequence | None = None, fix: str = DIVERGED
) -> np.ndarray:
    """The same images [n, ...], if they are finite; else ValueError, which names the first that is
    not, by its entry in `ids` if they are given."""
    finite = np.isfinite(images)
    if not finite.all():
        finite = finite.reshape(len(images), -1).all(axis=1)
        first = int(np.argmin(finite))
        raise ValueError(
            f"image {first if ids is None else ids[first]} of {len(images)} {name} holds a NaN or "
            f"an infinity, as do {np.sum(~finite)} in all: {fix}"
        )
    return images


def pictures(values: ArrayLike, name: str = "images") -> np.ndarray:
    """Somebody's images [n, h, w, 3] as uint8, or as float32 in [-1, 1].

    Accepts integers of any type in 0 ... 255, and floats in [-1, 1]. Raises ValueError, with what
    was found and what to do, for everything else: floats without a negative value may lie in
    [0, 1], those above 1 in [0, 255], and integers that are only 0 and 1 may be masks or pictures
    in [0, 1], which would be other pictures.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{name} are {values.dtype}: give uint8, or floats in [-1, 1]")
    check_images(check_finite(values, name, fix="leave it out"), name)
    low, high = values.min(), values.max()
    found = f"{name} are {values.dtype} from {low:.5g} to {high:.5g}"
    if values.dtype.kind != "f":
        if low < 0 or high > 255 or high == 1:
            raise ValueError(f"{found}: scale integers to 0 ... 255")
        return values.astype(np.uint8)
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        bytes_ = low >= 0 and high <= 255
        raise ValueError(f"{found}: give {'x / 127.5 - 1' if bytes_ else 'floats in [-1, 1]'}")
    if low >= -ROUNDING:
        raise ValueError(
            f"{found}: give 2 * x - 1 if they lie in [0, 1], pixels.to_uint8(x) if in [-1, 1]"
        )
    return values.astype(np.float32)


def to_uint8(images: ArrayLike) -> np.ndarray:
    """uint8 images from images in [-1, 1]: (x + 1) * 127.5, truncated as in EDM's sampler.

    Real images and samples are both converted here, so that a metric cannot see a difference in
    rounding. 1e-3 is added before truncation: the float32 value of u / 127.5 - 1 may be slightly
    too small, and would otherwise come back as u - 1. A NaN has no picture: it raises ValueError.
    """
    images = np.clip(check_finite(np.asarray(images, np.float32)), -1, 1)
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
