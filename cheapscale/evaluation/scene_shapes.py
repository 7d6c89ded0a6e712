"""Finds and fits the silhouettes of data.scenes in a map of what is not ground.

A silhouette S is a function of shape, centre, size and tilt. Against a cover map s, both shares of
a pixel, it gains

    sum 2 s S - S^2 = |s|^2 - |s - S|^2

which is least squares. `best_fit` looks for the largest gain over a bank of silhouettes at every
place of a grid, by Fourier correlation, and improves the promising ones by Gauss-Newton.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cheapscale.data.resize import area_mean
from cheapscale.data.scenes import BORDER, SHAPE_DEPTH, SHAPES, TILT

SIDE = 64  # silhouettes are sampled on a lattice of at least so many points a side
GRID = 32  # of the search
SIZES = 0.15 * 1.08 ** np.arange(21)  # of the search: 0.15 to 0.70 sides
TILTS = (-0.24, 0.0, 0.24)
ROUND = ("disc", "ring")  # have no tilt
CLOSE = 0.75  # shapes whose template scores this share of the best one's are fitted
STEPS = np.array([0.3 / SIDE, 0.3 / SIDE, 0.5 / SIDE, 0.04])  # of x, y, size, tilt
LIMITS = np.array([[0, 0, 0.1, -1.15 * TILT], [1, 1, 0.9, 1.15 * TILT]])
ITERATIONS = 10
MARGIN = 0.04  # sides around a silhouette that take part in its fit
# where the middle of a picture lands when it is moved round by 0, 1 ... grid points
MOVED = (0.5 + np.arange(GRID) / GRID) % 1


class Fit(NamedTuple):
    """pose: x, y, size, angle as in data.scenes; mask [R, R]: the silhouette; gain: of the mask on
    the map it was fitted to."""

    shape: str
    pose: np.ndarray
    mask: np.ndarray
    gain: float

    @property
    def quality(self) -> float:
        """1 where the map is the silhouette, less where it is not all covered."""
        return self.gain / max(float(np.sum(self.mask**2)), 1e-9)


def silhouettes(
    shape: str,
    poses: np.ndarray,
    resolution: int,
    window: tuple[slice, slice] | None = None,
    *,
    inset: float = 0.0,
) -> np.ndarray:
    """Share of each pixel inside a shape at poses [m, 4]: [m, R, R], or a window of that.

    inset: by how many sides the outline is moved inwards.
    """
    rows, columns = window or (slice(0, resolution), slice(0, resolution))
    k = max(1, SIDE // resolution)
    points = resolution * k
    x, y, size, angle = poses.astype(np.float32).T[:, :, None, None]
    dx = _centres(columns, k, points)[None, None, :] - x
    dy = _centres(rows, k, points)[None, :, None] - y
    cosine, sine, radius = np.cos(angle), np.sin(angle), size / 2
    u, v = (cosine * dx + sine * dy) / radius, (cosine * dy - sine * dx) / radius
    depth = radius * SHAPE_DEPTH[shape](u, v) - np.float32(inset)
    share = np.clip(depth * points + np.float32(0.5), 0, 1)
    if k == 1:
        return share
    height, width = rows.stop - rows.start, columns.stop - columns.start
    return share.reshape(len(poses), height, k, width, k).mean(axis=(2, 4))


def best_fit(
    cover: np.ndarray, *, also: Fit | None = None, avoid: Sequence[Fit] = ()
) -> Fit | None:
    """The silhouette that gains most on a cover map [R, R], R <= 64; None where none gains.

    also: one more pose to start from. avoid: not these shapes centred where these silhouettes are.
    """
    candidates = _search(cover, avoid)
    most = max(gain for gain, _ in candidates.values())
    if most <= 0:
        return None
    close = [shape for shape, (gain, _) in candidates.items() if gain >= CLOSE * most]
    starts = [(shape, candidates[shape][1]) for shape in close]
    if also is not None:
        starts.append((also.shape, also.pose))
    fits = [fit(cover, shape, pose) for shape, pose in starts]
    return max(fits, key=lambda f: f.gain)


def around(found: Fit, resolution: int, reach: float) -> np.ndarray:
    """The silhouette grown by `reach` sides: [R, R]."""
    return silhouettes(found.shape, found.pose[None], resolution, inset=-reach)[0]


def fit(cover: np.ndarray, shape: str, pose: np.ndarray) -> Fit:
    """Gauss-Newton from a pose, taking only steps that gain."""
    side, free = len(cover), 3 if shape in ROUND else 4
    window = _window(pose, side)
    seen = cover[window]
    nudges = np.concatenate([np.zeros((1, 4)), np.diag(STEPS)[:free]])

    def look(pose):
        masks = silhouettes(shape, pose[None] + nudges, side, window)
        return masks, float(np.sum((2 * seen - masks[0]) * masks[0]))

    masks, gain = look(pose)
    for _ in range(ITERATIONS):
        slopes = (masks[1:] - masks[:1]).reshape(free, -1)
        normal, pull = slopes @ slopes.T, slopes @ (seen - masks[0]).ravel()
        for damping in (1e-2, 0.3, 3.0):
            damped = normal + damping * np.diag(np.diag(normal) + 1e-6)
            step = np.zeros(4)
            step[:free] = np.linalg.solve(damped, pull) * STEPS[:free]
            tried = np.clip(pose + step, *LIMITS)
            tried_masks, tried_gain = look(tried)
            if tried_gain > gain:
                break
        else:
            break
        small = tried_gain - gain < 1e-4 * abs(gain)
        pose, masks, gain = tried, tried_masks, tried_gain
        if small:
            break
    mask = np.zeros_like(cover)
    mask[window] = masks[0]
    return Fit(shape, pose, mask, gain)


def resampled(found: Fit, resolution: int) -> Fit:
    """The same silhouette drawn at another resolution."""
    mask = silhouettes(found.shape, found.pose[None], resolution)[0]
    return found._replace(mask=mask.astype(np.float64))


def _centres(pixels, k, points):
    return ((np.arange(pixels.start * k, pixels.stop * k) + 0.5) / points).astype(np.float32)


def _window(pose, side):
    x, y, size, _ = pose
    reach = size / 2 + MARGIN
    return tuple(
        slice(
            int(np.clip(np.floor((c - reach) * side), 0, side - 1)),
            int(np.clip(np.ceil((c + reach) * side), 1, side)),
        )
        for c in (y, x)
    )


class _Bank(NamedTuple):
    # entries: (shape, size, angle) each; spectra: conjugate, of silhouettes in the middle; norms:
    # sum S^2 as seen at the resolution; allowed [n, GRID]: places along an axis that keep inside
    entries: list
    spectra: np.ndarray
    norms: np.ndarray
    allowed: np.ndarray


@functools.cache
def _bank(pixel):
    """Silhouettes on the grid, for maps whose pixels are `pixel` grid points wide."""
    entries = [
        (shape, size, angle)
        for shape in SHAPES
        for size in SIZES
        for angle in ((0.0,) if shape in ROUND else TILTS)
    ]
    poses = [np.array([[0.5, 0.5, size, angle]]) for _, size, angle in entries]
    masks = np.concatenate(
        [silhouettes(shape, pose, GRID) for (shape, *_), pose in zip(entries, poses)]
    )
    spectra = np.fft.rfft2(masks)
    blur = np.zeros((GRID, GRID))
    blur[:pixel, :pixel] = 1 / pixel**2
    blurred = np.fft.irfft2(spectra * np.fft.rfft2(blur)[None], s=(GRID, GRID))
    reach = np.array([size for _, size, _ in entries])[:, None] / 2 - BORDER
    return _Bank(
        entries,
        np.conj(spectra).astype(np.complex64),
        np.sum(blurred**2, axis=(1, 2)).astype(np.float32),
        (MOVED[None] >= reach) & (MOVED[None] <= 1 - reach),
    )


def _search(cover, avoid):
    """{shape: (gain, pose)} of its best template."""
    side = len(cover)
    if side >= GRID:
        seen = area_mean(cover[..., None], GRID)[..., 0]
    else:
        seen = np.kron(cover, np.ones((GRID // side, GRID // side)))
    bank = _bank(max(1, GRID // side))
    spectrum = np.fft.rfft2(seen).astype(np.complex64)[None]
    gains = 2 * np.fft.irfft2(spectrum * bank.spectra, s=(GRID, GRID))
    gains -= bank.norms[:, None, None]
    gains[~(bank.allowed[:, :, None] & bank.allowed[:, None, :])] = -np.inf
    for known in avoid:
        x, y, size, _ = known.pose
        near = np.hypot(MOVED[:, None] - y, MOVED[None, :] - x) < size / 2
        same = np.array([shape == known.shape for shape, *_ in bank.entries])
        gains[same[:, None, None] & near[None]] = -np.inf
    gains = gains.reshape(len(bank.entries), -1)
    places, found = gains.argmax(axis=1), {}
    for (shape, size, angle), place, gain in zip(bank.entries, places, gains.max(axis=1)):
        if shape not in found or gain > found[shape][0]:
            y, x = MOVED[list(divmod(int(place), GRID))]
            found[shape] = float(gain), np.array([x, y, size, angle])
    return found
