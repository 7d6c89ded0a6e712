"""Procedural captioned pictures with exact ground truth: a data set that needs no download.

A scene is a plain ground and one to three objects that do not overlap. The first is the main
object: it is larger than the others, and its shape is the label. Each object has a shape, a
colour, a texture, a position, a size, a tilt and sometimes an outline. These attributes are
independent, so that only the shape itself reveals the label.

`scene(seed, split, index)` is a pure function. It draws uniform doubles only, because NumPy keeps
their stream stable over its versions.

The scales of detail are chosen so that growing a base of 8 or 16 px by 4 to 8 times adds visible
content. Silhouettes are readable from 8 px. Half of the textures are coarse: their periods are 3.0
to 3.8 px at 32 px, where they appear, and average out at 8 px. The others are fine: 3.0 to 3.8 px
at 64 px. Outlines are 1/64 of the side wide.

At every resolution R a picture is sampled on the same lattice of 512 x 512 points. Each point has
exactly one material (ground, body, accent, ink), and a pixel is the mean of its points. Coverages
are integer counts, so the picture at R is the block mean of the picture at any multiple of R, up to
float32 rounding. Objects do not overlap, so a picture is linear in the coverages:

    image = ground + sum over objects and materials of coverage * (colour of material - ground)
"""

import dataclasses
import math

import numpy as np

LATTICE = 512
SCENES_ID = "scenes/2"  # change it whenever a scene or a pixel can change

SHAPES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "bar")
TEXTURES = ("plain", "striped", "checked", "dotted")
SPLITS = {"train": 0, "test": 1}  # name -> random stream

# name -> (body, accent), 8-bit RGB. The accent is a tint of the body, so that blur keeps the hue.
COLOURS = {
    "red": ((212, 42, 46), (255, 188, 178)),
    "orange": ((241, 134, 22), (255, 226, 178)),
    "yellow": ((246, 205, 34), (255, 250, 214)),
    "green": ((40, 150, 62), (190, 238, 190)),
    "teal": ((18, 158, 172), (186, 242, 240)),
    "blue": ((40, 88, 214), (182, 206, 255)),
    "purple": ((128, 54, 182), (226, 198, 250)),
    "pink": ((236, 96, 162), (255, 214, 232)),
}
# name -> (ground, ink of outlines)
GROUNDS = {
    "ivory": ((240, 234, 218), (22, 22, 30)),
    "mist": ((196, 208, 218), (22, 22, 30)),
    "slate": ((66, 78, 94), (250, 250, 246)),
    "night": ((22, 24, 36), (250, 250, 246)),
}

MAIN_SIZE = (0.48, 0.66)  # diameters of the circumscribed circle, in sides of the image
SMALL_SIZE = (0.18, 0.27)
COARSE, FINE = (1 / 10.6, 1 / 8.5), (1 / 21.2, 1 / 17)  # ranges of periods, in sides of the image
OUTLINE = 1 / 64
TILT = math.pi / 10  # largest tilt in radians; beyond it a square looks like another shape
BORDER = 0.02  # least distance of objects from the edge; half of it separates objects


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object. Coordinates: x points right, y down, and the image is [0, 1] x [0, 1]."""

    shape: str
    colour: str
    texture: str
    outlined: bool
    x: float
    y: float
    size: float  # diameter of the circumscribed circle
    angle: float  # radians
    texture_angle: float  # radians
    texture_period: float  # fraction of the side


@dataclasses.dataclass(frozen=True)
class Scene:
    """A ground and its objects, the main object first."""

    ground: str
    objects: tuple[SceneObject, ...]


def scene(seed: int, split: str, index: int) -> Scene:
    """The index-th scene of a split: a pure function of its three arguments."""
    draws = iter(np.random.default_rng((seed, SPLITS[split], index)).random(256).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(draws)

    def choice(options):
        options = tuple(options)
        return options[int(next(draws) * len(options))]

    ground = choice(GROUNDS)
    objects: list[SceneObject] = []
    for k in range(choice((1, 2, 2, 3, 3))):
        size = between(*(SMALL_SIZE if k else MAIN_SIZE))
        x, y = _place(objects, size, between)
        objects.append(
            SceneObject(
                shape=choice(SHAPES),
                colour=choice(COLOURS),
                texture=choice(TEXTURES),
                outlined=next(draws) < 0.4,
                x=x,
                y=y,
                size=size,
                angle=between(-TILT, TILT),
                texture_angle=between(0.0, math.pi),
                texture_period=between(*choice((COARSE, FINE))),
            )
        )
    return Scene(ground, tuple(objects))


def _place(objects: list[SceneObject], size: float, between) -> tuple[float, float]:
    """A centre for a circle that touches no other: the first of 16 random ones, else a corner."""
    low = BORDER + size / 2
    tries = [(between(low, 1 - low), between(low, 1 - low)) for _ in range(16)]

    def clearance(point):
        return min(
            (math.dist(point, (o.x, o.y)) - (o.size + size) / 2 for o in objects),
            default=math.inf,
        )

    for point in tries:
        if clearance(point) >= BORDER / 2:
            return point
    # The ranges of sizes ensure that a corner is free for any position of the earlier objects.
    return max(((a, b) for a in (low, 1 - low) for b in (low, 1 - low)), key=clearance)


def label(picture: Scene) -> int:
    """The class: the main object's index in SHAPES."""
    return SHAPES.index(picture.objects[0].shape)


def caption(picture: Scene) -> str:
    """A text such as "a red striped disc left of a small blue square and above a small pink bar".

    It gives the position of the main object relative to each other one, along the axis on which
    their centres are further apart.
    """
    main, *others = picture.objects
    text = _noun_phrase(main)
    for k, other in enumerate(others):
        text += f"{' and' if k else ''} {relation(main, other)} {_noun_phrase(other, 'small')}"
    return text


def captions(picture: Scene) -> tuple[str, ...]:
    """Several texts that are all true of a scene, the first one that of `caption`.

    They add the size of the main object or the ground, begin with another object, or leave out
    textures and outlines or all but the main object.
    """
    main, *others = picture.objects
    plain = [dataclasses.replace(o, texture="plain", outlined=False) for o in picture.objects]
    ground = f"on {_article(picture.ground)} background"
    found = [caption(picture), f"{caption(picture)} {ground}"]
    found += [caption(Scene(picture.ground, tuple(plain))), _noun_phrase(main, "large")]
    found += [f"{_noun_phrase(plain[0])} {ground}"]
    for o in others:
        found.append(
            f"{_noun_phrase(o, 'small')} {relation(o, main)} {_noun_phrase(main, 'large')}"
        )
    return tuple(found)


def relation(a: SceneObject, b: SceneObject) -> str:
    """The position of a relative to b: "left of", "right of", "above" or "below"."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _noun_phrase(o: SceneObject, *size: str) -> str:
    outline = ("outlined",) if o.outlined else ()
    texture = () if o.texture == "plain" else (o.texture,)
    return _article(" ".join((*size, *outline, o.colour, *texture, o.shape)))


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def check_resolution(resolution: int) -> None:
    """Raise ValueError for a resolution that does not divide the lattice."""
    if resolution < 1 or LATTICE % resolution:
        raise ValueError(
            f"scenes are drawn at resolutions that divide {LATTICE}, not at {resolution}: "
            f"give --config.data.resolution a power of two up to {LATTICE}"
        )


def draw(picture: Scene, resolution: int) -> np.ndarray:
    """The picture of a scene, float32 [R, R, 3] in [-1, 1]; R has to divide 512."""
    check_resolution(resolution)
    k = LATTICE // resolution
    ground, ink = (_unit(rgb) for rgb in GROUNDS[picture.ground])
    image = np.empty((resolution, resolution, 3), np.float32)
    image[:] = ground
    for o in picture.objects:
        body, accent = (_unit(rgb) for rgb in COLOURS[o.colour])
        # The bounding box is in lattice points, so it is the same at every resolution.
        columns, rows = (_points(centre, o.size / 2) for centre in (o.x, o.y))
        dx = ((np.arange(*columns, dtype=np.float32) + 0.5) / LATTICE - o.x)[None, :]
        dy = ((np.arange(*rows, dtype=np.float32) + 0.5) / LATTICE - o.y)[:, None]
        depth = _depth(o, dx, dy)
        inside = depth >= 0
        parts = [(inside, body - ground)]
        if o.outlined:
            rim = inside & (depth < OUTLINE)
            parts.append((rim, ink - body))
        if o.texture != "plain":
            pattern = inside & _pattern(o, dx, dy)
            parts.append((pattern & ~rim if o.outlined else pattern, accent - body))
        # The pixels that the box touches; -(-a // b) is a / b rounded up.
        window = image[rows[0] // k : -(-rows[1] // k), columns[0] // k : -(-columns[1] // k)]
        for mask, difference in parts:
            window += _coverage(mask, rows[0] % k, columns[0] % k, k)[..., None] * difference
    return image


def _unit(rgb: tuple[int, int, int]) -> np.ndarray:
    """An 8-bit colour as float32 in [-1, 1]."""
    return np.asarray(rgb, np.float32) / np.float32(127.5) - np.float32(1.0)


def _points(centre: float, radius: float) -> tuple[int, int]:
    """(first, last + 1): the lattice points of an interval."""
    first, last = math.floor((centre - radius) * LATTICE), math.ceil((centre + radius) * LATTICE)
    return max(first, 0), min(last, LATTICE)


def _coverage(mask: np.ndarray, top: int, left: int, k: int) -> np.ndarray:
    """The share of each pixel's k x k lattice points in the mask, by counting them exactly.

    The mask starts at (top, left) within its first pixel.
    """
    if k == 1:
        return mask.astype(np.float32)
    height, width = mask.shape
    rows, columns = -(-(top + height) // k), -(-(left + width) // k)
    padded = np.zeros((rows * k, columns * k), np.uint8)
    padded[top : top + height, left : left + width] = mask
    counts = padded.reshape(rows, k, columns * k).sum(axis=1, dtype=np.uint16)
    counts = counts.reshape(rows, columns, k).sum(axis=2, dtype=np.uint32)
    return counts.astype(np.float32) / np.float32(k * k)


def _depth(o: SceneObject, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The distance to the object's edge in sides of the image, positive inside."""
    r = np.float32(o.size / 2)
    c, s = np.float32(math.cos(o.angle)), np.float32(math.sin(o.angle))
    u, v = (c * dx + s * dy) / r, (c * dy - s * dx) / r
    return r * SHAPE_DEPTH[o.shape](u, v)


def _pattern(o: SceneObject, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The points where the texture has the accent colour; it extends beyond the object."""
    c, s = np.float32(math.cos(o.texture_angle)), np.float32(math.sin(o.texture_angle))
    period = np.float32(o.texture_period)
    u = (c * dx + s * dy) / period
    if o.texture == "striped":
        return u - np.floor(u) < 0.5
    v = (c * dy - s * dx) / period
    u, v = u - np.floor(u), v - np.floor(v)
    if o.texture == "checked":
        return (u < 0.5) ^ (v < 0.5)
    u, v = u - np.float32(0.5), v - np.float32(0.5)
    return u * u + v * v < np.float32(0.32**2)


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.minimum(np.float32(half_width) - np.abs(u), np.float32(half_height) - np.abs(v))


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Equilateral, apex up (v points down): three half planes at distance 1/2 from the centre.
    half = np.float32(math.sqrt(3) / 2)
    return np.float32(0.5) - np.maximum(v, half * np.abs(u) - np.float32(0.5) * v)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Five points. Mirror and fold the plane into one of ten sectors, where the edge is one line
    # from the tip (0, 1) to the inner corner at 36 degrees.
    inner = 0.46
    half = math.pi / 5
    u, v = np.abs(u), -v
    for axis in (3 * half, half):  # reflect across the lines through the inner corners
        nx, ny = np.float32(math.cos(axis)), np.float32(-math.sin(axis))
        over = 2 * np.maximum(u * nx + v * ny, 0)
        u, v = u - over * nx, v - over * ny
    u = np.abs(u)
    cx, cy = inner * math.sin(half), inner * math.cos(half)
    length = math.hypot(cx, 1 - cy)
    nx, ny = (1 - cy) / length, cx / length
    return np.float32(ny) - (u * np.float32(nx) + v * np.float32(ny))


# Signed depth below the edge, for shapes inscribed in the unit circle; u points right, v down.
# Inside, it is at most the Euclidean distance to the edge, and equal to it away from corners,
# which is accurate enough for drawing an outline.
SHAPE_DEPTH = {
    "disc": lambda u, v: 1 - np.hypot(u, v),
    "ring": lambda u, v: np.float32(0.24) - np.abs(np.hypot(u, v) - np.float32(0.76)),
    "square": lambda u, v: _box(u, v, 0.7071, 0.7071),
    "triangle": _triangle,
    "cross": lambda u, v: np.maximum(_box(u, v, 0.94, 0.32), _box(u, v, 0.32, 0.94)),
    "star": _star,
    "crescent": lambda u, v: np.minimum(
        1 - np.hypot(u, v), np.hypot(u - np.float32(0.42), v) - np.float32(0.78)
    ),
    "bar": lambda u, v: _box(u, v, 0.95, 0.3),
}
