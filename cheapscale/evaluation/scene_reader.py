"""Reads the composition of a `scenes` picture from its pixels: which objects, where, what colour.

No learned parts. With g the ground, v = pixel - g, and an object of colour c that covers the share
s of a pixel, the generator paints (data/scenes)

    v = s (mixture of body_c, accent_c and, if outlined, ink - each minus g)

so s is the sum of the mixture's coefficients, at any resolution and for any texture. Reading:

1. ground: the median of the border, named after the nearest of the four.
2. cover: s of every pixel for the colour that explains its surroundings best; one map of all
   colours, and one of each colour.
3. the silhouette (shape, centre, size, tilt) that fits a map best (scene_shapes), and the colours,
   with or without outline, whose paint explains the picture under it.
4. for each of those the best silhouette on the cover of that colour alone; the one that explains
   most of the picture is an object, and what it paints is taken out. 3 and 4 repeat until nothing
   that is left is large, visible and like an object.
5. neighbours once more, each with the others taken out; and where an outline is not sharp the
   whole picture once more without that silhouette, since it may lie across two objects.

Every object that is there is found, whatever was asked for: a duplicate is one more object. Objects
smaller than about 0.14 of the side are not seen.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from cheapscale.data.resize import area_mean
from cheapscale.data.scenes import COLOURS, GROUNDS, OUTLINE, check_resolution
from cheapscale.evaluation.scene_shapes import (
    GRID,
    SIDE,
    Fit,
    around,
    best_fit,
    resampled,
    silhouettes,
)

NAMES = tuple(COLOURS)
MAX_TINT = 0.3  # a ground may be this far from its nominal colour
MIN_QUALITY = 0.4  # of a fit
MIN_AREA = 0.005  # sides squared; the smallest object there is, a bar of 0.18, has 0.009
MIN_POWER = 0.002  # squared [-1, 1] units, mean over the picture: what an object has to explain
DOUBTFUL = 0.93  # sharpness below which a picture is read again without that silhouette
HALO = 0.03  # sides around a silhouette that are empty if it is sharp
MIN_SHARPNESS = 0.5  # below it an object is there, but its shape cannot be told
MAX_OBJECTS, MAX_FAILURES = 8, 2
NEAR = 0.06  # sides: objects closer than this are fitted again without each other
LIKELY, MAX_LIKELY = 1.5, 3  # colours up to this multiple of the smallest error are tried
MAX_ERROR = 0.15  # squared distance at which a pixel counts half for a colour
INK_PENALTY = 0.05  # squared distance in [-1, 1] units that has to be gained by assuming ink


def _unit(rgb):
    return np.asarray(rgb, np.float64) / 127.5 - 1


class Found(NamedTuple):
    """One object. Unit coordinates as in data.scenes; shape is None where it cannot be told.

    sharpness: 1 where the silhouette's inside is covered and its surroundings are not; blur and
    ragged edges lower it.
    """

    shape: str | None
    colour: str
    outlined: bool
    x: float
    y: float
    size: float
    angle: float
    sharpness: float


class Reading(NamedTuple):
    """A ground and its objects, the largest first."""

    ground: str
    objects: tuple[Found, ...]


class _Object(NamedTuple):
    # paint [R, R, 3]: what the object adds to the ground; power: how much of the picture's mean
    # square that explains
    fit: Fit
    colour: str
    outlined: bool
    paint: np.ndarray
    power: float
    sharpness: float


class _Map(NamedTuple):
    # A cover map and the best silhouette on it. score: gain * quality of the fit, 0 if none gains;
    # before it is fitted, at least that: a silhouette gains no more than the sum of squares, nor
    # than the best one did when there was more to cover, and quality is hardly ever above 1.
    cover: np.ndarray
    score: float
    fit: Fit | None = None


def read_scene(image: np.ndarray) -> Reading:
    """The composition of one picture, float [R, R, 3] in [-1, 1]; R has to divide 512."""
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(f"read_scene takes one picture [R, R, 3], got shape {image.shape}")
    check_resolution(image.shape[0])
    image = area_mean(np.asarray(image, np.float64), min(image.shape[0], SIDE))
    ground, colour = _ground_of(image)
    v = image - colour
    objects = _find(v, ground)
    doubtful = [o.fit for o in objects if o.sharpness < DOUBTFUL]
    if doubtful:
        # one long object, say, or two neighbours? A second reading has to be free of doubt.
        again = _find(v, ground, doubtful)
        clear = again is not None and all(o.sharpness >= DOUBTFUL for o in again)
        if clear and _unexplained(v, again) < _unexplained(v, objects):
            objects = again
    found = [
        Found(
            o.fit.shape if o.sharpness >= MIN_SHARPNESS else None,
            o.colour,
            o.outlined,
            *map(float, o.fit.pose),
            o.sharpness,
        )
        for o in objects
    ]
    return Reading(ground, tuple(sorted(found, key=lambda o: -o.size)))


def _ground_of(image):
    """Name of the nearest ground, and the ground's colour as it is, if it is near, or should be."""
    ring = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    middle = np.median(ring, axis=0)
    distances = {name: np.linalg.norm(middle - _unit(rgb)) for name, (rgb, _) in GROUNDS.items()}
    name = min(distances, key=distances.get)
    return name, middle if distances[name] < MAX_TINT else _unit(GROUNDS[name][0])


def _unexplained(v, objects):
    """Mean square of what no object explains, and a price for every object."""
    rest = v - sum((o.paint for o in objects), np.zeros_like(v))
    return np.mean(np.sum(rest**2, axis=2)) + MIN_POWER * len(objects)


def _find(v, ground, avoid=()):
    """Objects one by one, the most obvious first; neighbours twice. Where silhouettes are to be
    avoided, None as soon as one is found that is too blurred for a reading free of doubt."""
    side = min(len(v), GRID)
    # Two neighbours look like one long object to the map of all colours, and in a map of one
    # colour mixed pixels are missing: whichever shows the better fit leads.
    maps = [_Map(cover, _power(cover)) for cover in _covers(area_mean(v, side), ground)]
    left, objects, failures = v, [], 0
    while len(objects) < MAX_OBJECTS and failures <= MAX_FAILURES:
        rough = _lead(maps, avoid)
        if rough is None:
            break
        known = _fit_colour(left, ground, resampled(rough, len(v)), avoid)
        if known is None:
            failures += 1
            taken = rough.mask
        else:
            if avoid and known.sharpness < MIN_SHARPNESS:
                return None
            objects.append(known)
            left = left - known.paint
            taken = area_mean(known.fit.mask[..., None], side)[..., 0]
        maps = [_without(m, taken) for m in maps]
    for k, known in enumerate(objects):
        # what was found later was still there when this one was fitted
        near = around(known.fit, len(v), NEAR) > 0
        if any((o.fit.mask[near] > 0).any() for o in objects[k + 1 :]):
            others = sum(o.paint for o in objects[:k] + objects[k + 1 :])
            objects[k] = _fit_colour(v - others, ground, known.fit, avoid) or known
    return objects


def _lead(maps, avoid):
    """The best fit of all maps, None if there is none. Only maps that may hold it are fitted; the
    list keeps those fits."""
    while True:
        i = max(range(len(maps)), key=lambda i: maps[i].score)
        if maps[i].fit is not None or maps[i].score <= 0:
            return maps[i].fit
        fit = best_fit(maps[i].cover, avoid=avoid)
        maps[i] = _Map(maps[i].cover, 0.0 if fit is None else fit.gain * fit.quality, fit)


def _without(known, taken):
    """The map without a silhouette, to be fitted again if they overlap."""
    if np.minimum(known.cover, taken).sum() <= 1e-3:
        return known
    cover = np.maximum(known.cover - taken, 0)
    bound = known.score if known.fit is None else known.fit.gain
    return _Map(cover, min(bound, _power(cover)))


def _power(cover):
    return float(np.sum(cover**2))


def _fit_colour(v, ground, fit, avoid):
    """The object at `fit` with its colour, its silhouette fitted again to the cover of that colour
    alone; None if there is none. Twice, since a rough fit may lie across two objects."""
    known, tried = None, []
    for _ in range(2):
        likely = [case for case in _likely(v, ground, fit) if case not in tried]
        found = [_object(v, ground, *case, fit, avoid) for case in likely]
        known = max(filter(None, [known, *found]), key=lambda o: o.power, default=None)
        if known is None:
            return None
        tried, fit = tried + likely, known.fit
    return known


def _object(v, ground, colour, outlined, rough, avoid):
    """The best silhouette in one colour, or None if it explains too little."""
    fit = best_fit(_cover_of(v, ground, colour, outlined), also=rough, avoid=avoid)
    if fit is None or fit.quality < MIN_QUALITY or fit.mask.mean() < MIN_AREA:
        return None
    paint = _paint(v, ground, colour, outlined, fit)
    power = np.mean(np.sum(v**2 - (v - paint) ** 2, axis=2))
    if power < MIN_POWER:
        return None
    return _Object(fit, colour, outlined, paint, power, _sharpness(v, paint, fit))


@functools.cache
def _vertices(ground):
    """Body, accent and ink of every colour, minus the ground: [colours, 3, rgb]."""
    base, ink = GROUNDS[ground]
    return np.stack([[_unit(c) for c in (*rgb, ink)] for rgb in COLOURS.values()]) - _unit(base)


@functools.cache
def _solvers(ground, colour, ink):
    """Least squares v = sum_i a_i vertex_i with a_i >= 0, sum a_i <= 1, by cases, for one colour or
    all of them (None): for every subset of vertices, with the sum free and with it equal to 1,
    (vertices [k, 3, n], matrix [k, n, 3], offset [k, n, 1]): a = matrix v + offset."""
    vertices, cases = _vertices(ground)[_rows(colour)], []
    for count in range(1, 3 + ink):
        for subset in itertools.combinations(range(2 + ink), count):
            chosen = vertices[:, list(subset)].swapaxes(1, 2)
            cases.append((chosen, np.linalg.pinv(chosen), np.zeros((1, count, 1))))
            # the last coefficient is the rest
            free = np.linalg.pinv(chosen[..., :-1] - chosen[..., -1:])
            matrix = np.concatenate([free, -free.sum(axis=1, keepdims=True)], axis=1)
            offset = np.eye(count)[None, :, -1:] - matrix @ chosen[..., -1:]
            cases.append((chosen, matrix, offset))
    return cases


def _rows(colour):
    """Those of _vertices for one colour, or for all (None)."""
    return slice(None) if colour is None else [NAMES.index(colour)]


def _mixture(v, cases):
    """Cover and squared error [k, n] of the best mixture of each colour for pixels v [3, n]."""
    error = np.sum(v * v, axis=0)[None]
    cover = np.zeros_like(error)
    for vertices, matrix, offset in cases:
        share = matrix @ v[None] + offset
        total = share.sum(axis=1)
        missed = v[None] - vertices @ share
        missed = np.einsum("kcn,kcn->kn", missed, missed)
        better = (missed < error) & (share >= -1e-9).all(axis=1) & (total <= 1 + 1e-9)
        error, cover = np.where(better, missed, error), np.where(better, total, cover)
    return cover, error


def _covers(v, ground):
    """Share of each pixel that is not ground, by the colour of its surroundings: one map [R, R] of
    all colours, and one of each colour that covers as much as an object."""
    side, pixels = len(v), v.reshape(-1, 3).T
    covers, errors = _mixture(pixels, _solvers(ground, None, False))
    # ink, where it explains enough
    odd = np.flatnonzero((errors > INK_PENALTY).any(axis=0))
    inked, inked_errors = _mixture(pixels[:, odd], _solvers(ground, None, True))
    better = inked_errors + INK_PENALTY < errors[:, odd]
    covers[:, odd] = np.where(better, inked, covers[:, odd])
    errors[:, odd] = np.where(better, inked_errors + INK_PENALTY, errors[:, odd])
    covers, errors = covers.reshape(-1, side, side), errors.reshape(-1, side, side)
    if side >= GRID:
        errors = _box(errors)
    colours = errors.argmin(axis=0)
    cover = np.take_along_axis(covers, colours[None], axis=0)[0]
    parts = [np.where(colours == i, cover, 0) for i in range(len(NAMES))]
    return [cover] + [part for part in parts if part.mean() >= MIN_AREA]


def _box(x):
    """Sums over 3 x 3 pixels of [n, R, R], the border repeated."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
    x = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    return x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]


def _cover_of(v, ground, colour, outlined):
    """Share [R, R] of each pixel in one colour: less where that does not explain the pixel."""
    cover, error = _mixture(v.reshape(-1, 3).T, _solvers(ground, colour, outlined))
    return (cover / (1 + (error / MAX_ERROR) ** 2)).reshape(v.shape[:2])


def _likely(v, ground, fit):
    """(colour, outlined) by the paint's error under the silhouette: the best and, where others
    come close, those too."""
    under, costs = fit.mask > 0, {}
    weights = np.where(fit.mask > 0.2, fit.mask, 0)[under]
    for outlined in (False, True):
        missed = v[under].T - _paints(v, ground, None, outlined, fit, under)
        errors = np.einsum("kcn,kcn->kn", missed, missed)
        cost = np.minimum(errors, 1) @ weights
        if outlined:
            cost = 1.1 * cost  # the simpler one, if in doubt
        costs |= {(name, outlined): c for name, c in zip(NAMES, cost.tolist())}
    order = sorted(costs, key=costs.get)[:MAX_LIKELY]
    return [case for case in order if costs[case] <= LIKELY * costs[order[0]]]


def _paint(v, ground, colour, outlined, fit):
    """What an object of that colour adds to the ground, its texture read off v: [R, R, 3]."""
    paint, under = np.zeros_like(v), fit.mask > 0
    paint[under] = _paints(v, ground, colour, outlined, fit, under)[0].T
    return paint


def _paints(v, ground, colour, outlined, fit, under):
    """The paint of one colour, or of all (None), on n pixels `under` a silhouette: [k, 3, n]."""
    body, accent, ink = _vertices(ground)[_rows(colour)].swapaxes(0, 1)[..., None]
    v, mask = v[under].T, fit.mask[under]
    area, fixed = mask, 0.0
    if outlined:
        area = silhouettes(fit.shape, fit.pose[None], len(fit.mask), inset=OUTLINE)[0][under]
        fixed = (mask - area) * ink
    fixed = fixed + area * body
    along = accent - body
    length = np.sum(along**2, axis=1)
    share = np.einsum("kcn,kc->kn", v - fixed, along[..., 0]) / np.maximum(area * length, 1e-9)
    share = np.clip(share, 0, 1)
    mean = share @ area / max(np.sum(area), 1e-9)
    # where the object does not fill the pixel a neighbour may shine through
    share = np.where(area > 0.9, share, mean[:, None]) * area
    return fixed + share[:, None] * along


def _sharpness(v, paint, fit):
    """How much of the paint is there, less what is around it and should not be: by projections on
    the paint, whose mean noise does not move."""
    halo = around(fit, len(v), HALO) > 0
    colour = paint.sum(axis=(0, 1)) / fit.mask.sum()
    inside = np.sum(v * paint) / np.sum(paint**2)
    spill = np.sum(((v - paint) @ colour * (1 - fit.mask))[halo])
    return float(inside - spill / (colour @ colour * fit.mask.sum()))
