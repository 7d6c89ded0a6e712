"""Numbers that see detail: patch kernel distances with intervals, and radial power spectra.

With k of equation (2) of `fid`, for crops a of image i and b of image j,

    (1)  K_xy[i, j] = mean_(a, b) k(x_ia, y_jb)
    (2)  PKD = mean_(i != j) K_xx + mean_(i != j) K_yy - 2 mean_(i, j) K_xy
             = mean_i u_i + mean_j v_j,   u_i = mean_(j != i) K_xx[i, j] - mean_j K_xy[i, j]
    (3)  Var PKD ~ 4 Var(u) / n + 4 Var(v) / m

(2) leaves out pairs of crops of one image, which are not independent: equal distributions have the
expectation 0. (3) is the first term of Hoeffding's decomposition. Two sets of samples with the same
noise share it, which `ratio` uses.
"""

from typing import NamedTuple

import numpy as np

from cheapscale.data.resize import downsample
from cheapscale.evaluation.fid import CHUNK
from cheapscale.evaluation.patches import random_crops

PATCH = 8  # side in pixels of the patches of `detail_patches`
CROPS = 4  # for each image
NORMAL = 1.96  # half-width of a 95 % interval in standard deviations


class PatchDistance(NamedTuple):
    """Equation (2), and the terms u [n] and v [m] of the images of both sets."""

    value: float
    u: np.ndarray
    v: np.ndarray

    @property
    def interval(self) -> float:
        """Half the width of the 95 % interval (3)."""
        return NORMAL * _deviation(self.u, self.v)


def patch_distance(x: np.ndarray, y: np.ndarray) -> PatchDistance:
    """The patch kernel distance of features x [n, crops, d] and y [m, crops, d] of patches."""
    n, m = len(x), len(y)
    xx, yy = ((_kernel_sums(a, a)[0] - _own_kernels(a)) / (len(a) - 1) for a in (x, y))
    to_y, to_x = _kernel_sums(x, y)
    u, v = xx - to_y / m, yy - to_x / n
    return PatchDistance(float(u.mean() + v.mean()), u, v)


def ratio(x: PatchDistance, other: PatchDistance) -> tuple[float, float]:
    """(x / other, half the width of its 95 % interval), for one reference and paired samples:
    image i of both sets has the same noise."""
    r = x.value / other.value
    # d (x / other) = (dx - r d other) / other
    spread = _deviation(x.u - r * other.u, x.v - r * other.v)
    return r, NORMAL * spread / abs(other.value)


def _deviation(u: np.ndarray, v: np.ndarray) -> float:
    return 2 * float(np.sqrt(u.var(ddof=1) / len(u) + v.var(ddof=1) / len(v)))


def _kernel_sums(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums of (1) over the images of y [n], and over those of x [m]."""
    crops, size = x.shape[1], x.shape[2]
    rows, columns = np.zeros(len(x)), np.zeros(len(y) * y.shape[1])
    flat = y.reshape(-1, size).astype(np.float64)
    for start in range(0, len(x), CHUNK // crops):
        part = x[start : start + CHUNK // crops]
        kernels = part.reshape(-1, size).astype(np.float64) @ flat.T / size
        kernels += 1
        kernels *= kernels * kernels
        rows[start : start + len(part)] = kernels.sum(axis=1).reshape(-1, crops).mean(axis=1)
        columns += kernels.sum(axis=0)
    return rows / y.shape[1], columns.reshape(len(y), -1).mean(axis=1) / crops


def _own_kernels(x: np.ndarray) -> np.ndarray:
    """K_xx[i, i] of (1), [n]."""
    x = x.astype(np.float64)
    return ((np.einsum("nad,nbd->nab", x, x) / x.shape[2] + 1) ** 3).mean(axis=(1, 2))


def enlarge_bicubic(images: np.ndarray, resolution: int) -> np.ndarray:
    """Images [n, r, r, 3] in [-1, 1], enlarged to [n, R, R, 3]."""
    return np.stack([downsample(image, resolution, allow_upscale=True) for image in images])


def detail_of(images: np.ndarray) -> np.ndarray:
    """Images [n, R, R, 3] in [-1, 1] minus themselves reduced to half their size and enlarged
    again: what a doubling of the resolution adds."""
    side = images.shape[1]
    halves = np.stack([downsample(image, side // 2) for image in images])
    return images - enlarge_bicubic(halves, side)


def detail_patches(images: np.ndarray, scale: float) -> np.ndarray:
    """Features [n, CROPS, d] of random patches of the detail, for a distance without a network.

    scale: the deviation of the detail of real images. The features are the patch and its absolute
    values. The kernel sees moments up to the third, so that it needs the latter to tell edges from
    noise of the same power.
    """
    side = min(PATCH, images.shape[1])
    patches = random_crops(detail_of(images) / scale, np.arange(len(images)), side, crops=CROPS)
    flat = patches.reshape(len(images), CROPS, -1)
    return np.concatenate([flat, np.abs(flat)], axis=2)


def power_spectrum(images: np.ndarray) -> np.ndarray:
    """The mean power of images [n, R, R, 3] at the radii 0 ... R // 2, in cycles per image.

    Each image loses its mean and gets Hann's window, because its borders do not continue.
    """
    side = images.shape[1]
    window = np.hanning(side + 1)[:-1]
    centred = images - images.mean(axis=(1, 2), keepdims=True)
    waves = np.fft.fft2(centred * np.outer(window, window)[None, :, :, None], axes=(1, 2))
    power = np.mean(np.abs(waves) ** 2, axis=(0, 3))
    cycles = np.fft.fftfreq(side, 1 / side)
    radius = np.rint(np.hypot(cycles[:, None], cycles[None])).astype(int)
    return np.array([power[radius == r].mean() for r in range(side // 2 + 1)])


def spectrum_error(spectrum: np.ndarray, real: np.ndarray) -> float:
    """The root mean square, in decibels, of the ratio of two spectra [R // 2 + 1] at the radii
    above a quarter of the resolution R, which an image of half the resolution cannot show."""
    first = len(spectrum) // 2 + 1
    floor = 1e-12 * real.max()  # an image without any detail is finitely far away
    decibels = 10 * np.log10((spectrum[first:] + floor) / (real[first:] + floor))
    return float(np.sqrt(np.mean(decibels**2)))
