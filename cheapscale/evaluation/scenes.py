"""Composition score of `scenes` pictures: does a picture show exactly the requested objects?

`read` finds the objects of a picture from its pixels. With v = pixel - ground, an object that
covers the share s of a pixel contributes

    v = s (mixture of the colour's body, its accent and, if outlined, ink - each minus the ground)

so s is the sum of the coefficients of a non-negative least-squares fit, for any texture. The map of
s is cut into connected pieces. To each piece, in order of decreasing area, the silhouettes of
data.scenes are fitted by Gauss-Newton; the best fit is an object, which is subtracted from the map.

`compare` compares the objects found with a Scene, a caption or a class label:

    count             the number of objects is right; for a label: one of main size, at most two
                      small ones
    shape, colour     those of every requested object are right (for a label: the main one's shape)
    main              for a caption: shape and colour of the main object are right
    position          every object is within 0.05 sides of its place; for a caption: its relations
    all               all of the above
    extra, missing    there are more or fewer objects than requested; a duplicate is extra

An object that no silhouette fits well, because it is blurred or torn, has no shape; two touching
discs of one colour count as torn. Of 150 eight-bit test scenes, "all" is true for 100 % at 32 and
64 px, 98 % at 16 px and 54 % at 8 px; the main object's shape is right for 97 % at 8 px.
"""

import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from cheapscale.data import scenes
from cheapscale.data.pixels import from_uint8
from cheapscale.data.resize import area_mean

SIDE = 64  # largest side at which pictures are read, and smallest at which silhouettes are sampled
COLOURS = tuple(scenes.COLOURS)
MIN_COVER = 0.3  # least cover of a pixel that belongs to an object
MIN_AREA = 0.006  # least area of an object, share of the picture; a bar of size 0.18 has 0.009
MAX_OBJECTS = 8
MAX_MISFIT = 0.15  # largest |cover - silhouette|^2 / |silhouette|^2 of an object with a shape
MAX_REST = 0.7  # largest share of a piece that its best silhouette may leave uncovered
MAX_ERROR = 0.15  # squared distance, for values in [-1, 1], that halves a pixel's weight
INK_PENALTY = 0.05  # added to the squared distance of fits that use ink
NUDGE = np.diag([0.005, 0.005, 0.008, 0.04])  # finite differences in x, y, size and angle
LOW, HIGH = np.array([[0, 0, 0.1, -scenes.TILT], [1, 1, 0.9, scenes.TILT]])
TILTS = np.outer((-0.2, 0.0, 0.2), (0, 0, 0, 1))
STARTS, ITERATIONS = 5, 12
POSITION = 0.05  # largest error of a position, in sides of the picture
LARGE = math.sqrt(scenes.SMALL_SIZE[1] * scenes.MAIN_SIZE[0])  # least size of a main object
MOST_SMALL = 2  # a scene has at most two small objects
NOUN = (
    rf"an? (?:small )?(?:outlined )?({'|'.join(COLOURS)})(?: (?:{'|'.join(scenes.TEXTURES)}))? "
    rf"({'|'.join(scenes.SHAPES)})"
)
PHRASE = rf"(?: and)? (left of|right of|above|below) {NOUN}"


class Found(NamedTuple):
    """One object that was found, in the coordinates of data.scenes; shape is None if none fits."""

    shape: str | None
    colour: str
    x: float
    y: float
    size: float


class Fit(NamedTuple):
    """A fitted silhouette.

    pose: (x, y, size, angle). mask: [R, R], the share of each pixel inside. misfit: squared
    difference from the cover map, divided by the squared norm of the mask.
    """

    shape: str
    pose: np.ndarray
    mask: np.ndarray
    misfit: float


def compare_images(images: np.ndarray, asked: Sequence) -> dict[str, np.ndarray]:
    """{name: bool [n]}: `compare` for each image, uint8 or float in [-1, 1] [n, R, R, 3].

    asked: a Scene, a caption or a label for each image, all of the same kind.
    """
    rows = [compare(read(image), wanted) for image, wanted in zip(images, asked, strict=True)]
    return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}


def read(image: np.ndarray) -> list[Found]:
    """The objects of one picture, largest first.

    image: [R, R, 3], uint8 or float in [-1, 1]; R divides 512.
    """
    scenes.check_resolution(len(image))
    image = from_uint8(image) if image.dtype == np.uint8 else image
    image = area_mean(np.asarray(image, np.float64), min(len(image), SIDE))
    side = len(image)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    covers, errors = _covers(image, np.median(border, axis=0))
    # A pixel on an edge mixes colours and may match a wrong one, so it gets the colour with the
    # smallest error over its 3 x 3 neighbourhood.
    near = ndimage.uniform_filter(errors, (0, 3, 3), mode="nearest") if side >= 32 else errors
    nearest = near.argmin(axis=0)
    cover = left = np.take_along_axis(covers, nearest[None], axis=0)[0]
    own_covers, colours, fits = [], [], []  # for each object: its cover in its colour, and its fit
    while len(fits) < MAX_OBJECTS:
        pieces, count = ndimage.label(left > MIN_COVER)
        areas = ndimage.sum(left, pieces, np.arange(count) + 1) / side**2
        if not count or areas.max() < MIN_AREA:
            break
        piece = pieces == 1 + areas.argmax()
        k = int(np.bincount(nearest[piece], left[piece], len(COLOURS)).argmax())
        # Weigh down pixels that the colour explains badly; the dilation adds the faint edge.
        own = covers[k] / (1 + (errors[k] / MAX_ERROR) ** 2)
        own_covers.append(own * ndimage.binary_dilation(piece, iterations=2))
        colours.append(COLOURS[k])
        fits.append(_fit(_without(own_covers[-1], fits)))
        for i, own in enumerate(own_covers):  # fit neighbours again, each without the others
            others = fits[:i] + fits[i + 1 :]
            if any((fit.mask * own).any() for fit in others):
                fits[i] = _fit(_without(own, others))
        # A piece that no silhouette fits is removed from the map, or it would be found again.
        torn = _without(cover, fits)[piece].sum() > MAX_REST * left[piece].sum()
        cover = cover * ~(piece & torn)
        left = _without(cover, fits)
    found = [
        Found(fit.shape if fit.misfit <= MAX_MISFIT else None, colour, *fit.pose[:3].tolist())
        for colour, fit in zip(colours, fits)
        if fit.mask.mean() >= MIN_AREA
    ]
    return sorted(found, key=lambda o: -o.size)


def _without(cover: np.ndarray, fits: Sequence[Fit]) -> np.ndarray:
    """The cover map [R, R] minus the silhouettes of `fits`, clipped to [0, 1]."""
    return np.clip(cover - sum(fit.mask for fit in fits), 0, 1)


def _covers(image: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cover, error), both [colours, R, R]: the share of each pixel of image [R, R, 3] that the
    tones of a colour cover in the best fit, and the squared error of that fit."""
    grounds = from_uint8(np.asarray(list(scenes.GROUNDS.values())))  # [grounds, (plain, ink), rgb]
    ink = grounds[np.linalg.norm(grounds[:, 0] - ground, axis=1).argmin(), 1]
    tones = from_uint8(np.asarray(list(scenes.COLOURS.values())))  # [colours, (body, accent), rgb]
    tones = np.concatenate([tones, np.tile(ink, (len(tones), 1, 1))], axis=1) - ground
    v = image - ground
    cover = np.zeros((len(tones), *v.shape[:2]))
    error = np.broadcast_to(np.sum(v**2, axis=-1), cover.shape)
    # Non-negative least squares by enumeration: the best of all subsets of (body, accent, ink)
    # whose unconstrained solution is non-negative.
    for chosen in ([0], [1], [0, 1], [2], [0, 2], [1, 2], [0, 1, 2]):
        tone = tones[:, chosen]
        share = np.einsum("hwc,nck->nhwk", v, np.linalg.pinv(tone))
        share = share / np.maximum(share.sum(axis=-1, keepdims=True), 1)
        missed = np.sum((v - np.einsum("nhwk,nkc->nhwc", share, tone)) ** 2, axis=-1)
        missed = missed + INK_PENALTY * (2 in chosen)
        better = (missed < error) & (share >= 0).all(axis=-1)
        cover = np.where(better, share.sum(axis=-1), cover)
        error = np.where(better, missed, error)
    return cover, error


def _fit(cover: np.ndarray) -> Fit:
    """The silhouette with the least squared difference from a cover map [R, R].

    The fits of each shape start at the area and centroid of the cover and of its two halves, as two
    touching objects form one piece. Gauss-Newton improves the STARTS best of them.
    """
    if not cover.any():  # the fits of its neighbours cover all of it
        return Fit(scenes.SHAPES[0], np.zeros(4), cover, np.inf)
    side = len(cover)
    (window,) = ndimage.find_objects(ndimage.binary_dilation(cover > 0, iterations=3).astype(int))
    axis = int(np.ptp(np.r_[window[1]]) > np.ptp(np.r_[window[0]]))
    after = np.indices(cover.shape)[axis] > ndimage.center_of_mass(cover)[axis]
    # A line of pixels has no second half.
    parts = [part for part in (cover, cover * after, cover * ~after) if part.any()]
    starts = []
    for shape, part in itertools.product(scenes.SHAPES, parts):
        area, offset = _unit_shape(shape)
        size = 2 * math.sqrt(part.mean() / area)
        y, x = (np.asarray(ndimage.center_of_mass(part)) + 0.5) / side
        pose = np.array([x - offset[0] * size / 2, y - offset[1] * size / 2, size, 0])
        poses = np.clip(pose + TILTS, LOW, HIGH)
        rest = cover[window] - silhouettes(shape, poses, side, window)
        starts += zip(np.sum(rest**2, axis=(1, 2)), itertools.repeat(shape), poses)
    nearest = sorted(starts, key=lambda start: start[0])[:STARTS]
    return min((_descend(cover, window, *start[1:]) for start in nearest), key=lambda f: f.misfit)


def _descend(cover: np.ndarray, window: tuple, shape: str, pose: np.ndarray) -> Fit:
    """The best iterate of Gauss-Newton on the pose."""
    lowest, best, seen = np.inf, (pose, 0.0), cover[window]
    for _ in range(ITERATIONS):
        poses = pose + np.concatenate([np.zeros((1, 4)), NUDGE])
        mask, *nudged = silhouettes(shape, poses, len(cover), window)
        misfit = float(np.sum((seen - mask) ** 2) / max(np.sum(mask**2), 1e-9))
        if misfit < lowest:
            lowest, best = misfit, (pose, mask)
        slopes = (np.stack(nudged) - mask).reshape(4, -1)
        normal = slopes @ slopes.T
        # Levenberg's damping: the angle of a disc has no gradient, which makes `normal` singular.
        normal += np.diag(0.02 * np.diag(normal) + 1e-6)
        step = np.linalg.solve(normal, slopes @ (seen - mask).ravel())
        pose = np.clip(pose + NUDGE @ np.clip(step, -8, 8), LOW, HIGH)
    mask = np.zeros_like(cover)
    mask[window] = best[1]
    return Fit(shape, best[0], mask, lowest)


@functools.cache
def _unit_shape(shape: str) -> tuple[float, np.ndarray]:
    """(area, centroid (x, y)) of a shape inscribed in the unit circle."""
    u = np.linspace(-1, 1, 201)
    inside = scenes.SHAPE_DEPTH[shape](u[None, :], u[:, None]) >= 0
    rows, columns = np.nonzero(inside)
    return inside.mean() * 4, np.array([u[columns].mean(), u[rows].mean()])


def silhouettes(shape: str, poses: np.ndarray, side: int, window: tuple) -> np.ndarray:
    """[m, height, width]: the share of each pixel of a window that lies inside a shape, for poses
    [m, 4] (x, y, size, angle). side: pixels of the whole picture."""
    k = max(1, SIDE // side)
    points = (np.arange(side * k).reshape(side, k) + 0.5) / (side * k)
    rows, columns = (points[slices].ravel() for slices in window)
    x, y, size, angle = poses.T[:, :, None, None]
    u, v = 2 * (columns[None, None, :] - x) / size, 2 * (rows[None, :, None] - y) / size
    c, s = np.cos(angle), np.sin(angle)
    depth = scenes.SHAPE_DEPTH[shape](c * u + s * v, c * v - s * u) * size / 2
    # A linear ramp one sample wide across the edge makes the mask differentiable in the pose.
    share = np.clip(depth * (side * k) + 0.5, 0, 1)
    return share.reshape(len(poses), len(rows) // k, k, len(columns) // k, k).mean(axis=(2, 4))


def compare(found: Sequence[Found], asked: scenes.Scene | str | int) -> dict[str, bool]:
    """{name: whether it is right} for the objects of one picture against a scene, caption or label.

    found: the objects, largest first. The names are those of the module's docstring.
    """
    if isinstance(asked, int | np.integer):
        large = sum(o.size >= LARGE for o in found)
        small = len(found) - large
        right = {"count": large == 1 and small <= MOST_SMALL}
        right["shape"] = bool(found) and found[0].shape == scenes.SHAPES[asked]
        counts = {"extra": large > 1 or small > MOST_SMALL, "missing": large < 1}
    else:
        named = isinstance(asked, str)
        wanted = parse_caption(asked) if named else asked.objects
        padded = (*found, *[None] * (len(wanted) - len(found)))
        # Take the assignment of objects with the most right attributes. A caption begins with the
        # main object, which has to be the largest.
        hits = [
            _hits(paired, wanted, named)
            for paired in itertools.permutations(padded, len(wanted))
            if not named or paired[0] is padded[0]
        ]
        best = max(hits, key=lambda hit: sum(map(sum, hit.values())))
        right = {"count": len(found) == len(wanted)} | {name: all(v) for name, v in best.items()}
        if named:
            right["main"] = bool(found) and found[0][:2] == wanted[0][:2]
        counts = {"extra": len(found) > len(wanted), "missing": len(found) < len(wanted)}
    return right | counts | {"all": all(right.values())}


def _hits(found: Sequence[Found | None], wanted: Sequence, named: bool) -> dict[str, list[bool]]:
    """{attribute: whether it is right, for each wanted object}; a missing object has it wrong."""
    pairs = [(f, w) for f, w in zip(found, wanted) if f is not None]
    lost = [False] * (len(wanted) - len(pairs))
    if named:
        places = [scenes.relation(found[0], f) == w.where for f, w in pairs[1:]]
    else:
        places = [math.dist((f.x, f.y), (w.x, w.y)) <= POSITION for f, w in pairs]
    return {
        "shape": [f.shape == w.shape for f, w in pairs] + lost,
        "colour": [f.colour == w.colour for f, w in pairs] + lost,
        "position": places + lost,
    }


class Named(NamedTuple):
    """An object of a caption; `where` is the main object's position relative to it, "" for the main
    object itself."""

    shape: str
    colour: str
    where: str = ""


def parse_caption(text: str) -> tuple[Named, ...]:
    """The objects of a caption that data.scenes.caption wrote, the main object first."""
    match = re.fullmatch(rf"{NOUN}((?:{PHRASE})*)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a caption that data.scenes.caption writes")
    others = re.finditer(PHRASE, match[3])
    return Named(match[2], match[1]), *(Named(m[3], m[2], m[1]) for m in others)
