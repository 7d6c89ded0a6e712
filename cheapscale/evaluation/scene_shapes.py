"""Finds and fits the silhouettes of data.scenes in a map of what is not ground.

A silhouette S is a function of shape, centre, size and tilt. Against a cover map s, both shares of
a pixel, it gains

    sum 2 s S - S^2 = |s|^2 - |s - S|^2

which is least squares. `best_fit` looks for the largest gain over a bank of silhouettes at every
place of a grid, by Fourier correlation, and improves the promising ones by Gauss-Newton. Most of
the bank is left out: a bound of what a silhouette gains anywhere shows that it cannot come close.
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
NUDGES = np.concatenate([np.zeros((1, 4)), np.diag(STEPS)])
LIMITS = np.array([[0, 0, 0.1, -1.15 * TILT], [1, 1, 0.9, 1.15 * TILT]])
ITERATIONS = 10
BATCH = 40  # templates of the search at a time
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
    dx = _centres(points)[None, None, columns.start * k : columns.stop * k] - x
    dy = _centres(points)[None, rows.start * k : rows.stop * k, None] - y
    radius = size / 2
    cosine, sine = np.cos(angle) / radius, np.sin(angle) / radius
    depth = SHAPE_DEPTH[shape](cosine * dx + sine * dy, cosine * dy - sine * dx)
    share = depth * (radius * points) + np.float32(0.5 - inset * points)
    np.clip(share, 0, 1, out=share)
    if k > 1:
        share = sum(share[:, i::k] for i in range(k))
        share = sum(share[:, :, i::k] for i in range(k)) / np.float32(k * k)
    return share


def best_fit(
    cover: np.ndarray, *, also: Fit | None = None, avoid: Sequence[Fit] = ()
) -> Fit | None:
    """The silhouette that gains most on a cover map [R, R], R <= 64; None where none gains.

    also: one more pose to start from. avoid: not these shapes centred where these silhouettes are.
    """
    starts = _search(cover, avoid)
    if not starts:
        return None
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

    def look(pose):
        masks = silhouettes(shape, pose[None] + NUDGES[: 1 + free], side, window)
        return masks, _gain(seen, masks[0])

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


def _gain(cover, mask):
    return float(np.sum((2 * cover - mask) * mask))


def resampled(found: Fit, resolution: int) -> Fit:
    """The same silhouette drawn at another resolution."""
    mask = silhouettes(found.shape, found.pose[None], resolution)[0]
    return found._replace(mask=mask.astype(np.float64))


@functools.cache
def _centres(points):
    return ((np.arange(points) + 0.5) / points).astype(np.float32)


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
    # n silhouettes S. shapes [n]; poses [n, 4]: in the middle; spectra: their conjugates; ranked
    # [n, GRID^2]: their values in order; norms [n]: sum S^2 as seen at the resolution; prices
    # [n, GRID, GRID]: the same, infinite where S would reach into the border
    shapes: np.ndarray
    poses: np.ndarray
    spectra: np.ndarray
    ranked: np.ndarray
    norms: np.ndarray
    prices: np.ndarray


@functools.cache
def _bank(pixel):
    """Silhouettes on the grid, for maps whose pixels are `pixel` grid points wide."""
    entries = [
        (shape, size, angle)
        for shape in SHAPES
        for size in SIZES
        for angle in ((0.0,) if shape in ROUND else TILTS)
    ]
    poses = np.array([(0.5, 0.5, size, angle) for _, size, angle in entries])
    masks = np.concatenate(
        [silhouettes(shape, pose[None], GRID) for (shape, *_), pose in zip(entries, poses)]
    )
    spectra = np.fft.rfft2(masks)
    blur = np.zeros((GRID, GRID))
    blur[:pixel, :pixel] = 1 / pixel**2
    blurred = np.fft.irfft2(spectra * np.fft.rfft2(blur)[None], s=(GRID, GRID))
    reach = poses[:, 2:3] / 2 - BORDER
    inside = (MOVED[None] >= reach) & (MOVED[None] <= 1 - reach)
    norms = np.sum(blurred**2, axis=(1, 2))
    prices = np.where(inside[:, :, None] & inside[:, None, :], norms[:, None, None], np.inf)
    return _Bank(
        np.array([shape for shape, *_ in entries]),
        poses,
        np.conj(spectra).astype(np.complex64),
        np.sort(masks.reshape(len(masks), -1), axis=1),
        norms,
        prices.astype(np.float32),
    )


def _search(cover, avoid):
    """[(shape, pose)] of the best template of each shape that comes close to the best of all.

    Templates are tried in the order of what they could gain at most, while that can come close.
    """
    side = len(cover)
    if side >= GRID:
        seen = area_mean(cover[..., None], GRID)[..., 0]
    else:
        seen = np.kron(cover, np.ones((GRID // side, GRID // side)))
    bank = _bank(max(1, GRID // side))
    spectrum = np.fft.rfft2(seen).astype(np.complex64)[None]
    avoided = [
        (bank.shapes == shape, np.hypot(MOVED[:, None] - y, MOVED[None, :] - x) < size / 2)
        for shape, (x, y, size, _), *_ in avoid
    ]
    # no template gains more than if its highest values met the cover's highest
    bounds = 2 * (bank.ranked @ np.sort(seen, axis=None).astype(np.float32)) - bank.norms
    gains, places = np.zeros(len(bounds)), np.zeros(len(bounds), int)
    order = np.argsort(-bounds)
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        batch = batch[bounds[batch] > CLOSE * gains.max()]
        if not len(batch):
            break
        maps = 2 * np.fft.irfft2(spectrum * bank.spectra[batch], s=(GRID, GRID))
        maps -= bank.prices[batch]
        for same, near in avoided:
            maps[same[batch][:, None, None] & near[None]] = -np.inf
        maps = maps.reshape(len(batch), -1)
        gains[batch], places[batch] = maps.max(axis=1), maps.argmax(axis=1)
    best = {}
    for i in np.flatnonzero((gains > 0) & (gains >= CLOSE * gains.max())):
        shape = str(bank.shapes[i])
        if shape not in best or gains[i] > gains[best[shape]]:
            best[shape] = i
    starts = []
    for shape, i in best.items():
        y, x = MOVED[list(divmod(int(places[i]), GRID))]
        starts.append((shape, np.array([x, y, *bank.poses[i, 2:]])))
    return starts
