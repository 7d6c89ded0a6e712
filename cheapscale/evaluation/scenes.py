"""The exact composition score of `scenes` pictures: is what was asked for there, and nothing else?

A picture is read from its pixels alone (scene_reader) and compared with what its model was given:

    the whole truth      data.scenes.Scene or its objects
    a caption            as data.scenes.caption writes it
    a class label        the shape of the main object; nothing else was asked for

    count      as many objects as asked; for a label, one of main size and at most two small ones
    shape, colour      of every object asked for (for a label: the main one's shape)
    position   every object within 0.05 sides of its place; for a caption, its stated relations
    all        all of these
    extra, missing     more or fewer objects than asked: duplicates count as extra

An object whose outline is too soft to tell its shape has none, so blur costs `shape`, and objects
that fade are missing; textures and outlines are not scored. What the reader makes of real pictures
is the ceiling of these rates. Of 500 test scenes (seed 5, 8 bits), in percent:

    px             count  shape  colour  position    all    label: shape    all
    8               97.4   64.8    96.4      95.0   63.6            99.0   98.0
    16              99.4   97.8    99.2      99.6   97.2           100.0   99.8
    32, 64, 128    100.0  100.0   100.0     100.0  100.0           100.0  100.0

Noise of deviation 0.05 on [-1, 1] costs nothing at 64 and 128 px, 0.1 costs 1 percent of `all`. A
copy of an object 0.01 to 0.03 sides beside it was counted in 149 of 150 pictures at 64 px with
noise of up to 0.05. Blur at 64 and 128 px made objects go missing, but none appear. At 8 and 16 px
the smudges of a weak model count as extra objects too. A picture takes about 0.03 s of one core,
blurred or with objects across each other 0.1 to 0.2 s.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cheapscale.data.scenes import (
    COLOURS,
    MAIN_SIZE,
    SHAPES,
    SMALL_SIZE,
    TEXTURES,
    Scene,
    SceneObject,
    relation,
)
from cheapscale.evaluation.pixels import check_images, from_uint8
from cheapscale.evaluation.scene_reader import Found, Reading, read_scene

POSITION = 0.05  # sides of the image
LARGE = math.sqrt(SMALL_SIZE[1] * MAIN_SIZE[0])  # from this size on an object is a main one
MOST_SMALL = 2
RELATIONS = ("left of", "right of", "above", "below")

_NOUN = (
    r"an? (small )?(outlined )?({colours})( (?:{textures}))? ({shapes})".format(
        colours="|".join(COLOURS), textures="|".join(TEXTURES), shapes="|".join(SHAPES)
    )
)  # fmt: skip
_PHRASE = rf"(?: and)? ({'|'.join(RELATIONS)}) {_NOUN}"


class Named(NamedTuple):
    """An object of a caption; `where` is the main object's relation to it, "" for the main one."""

    shape: str
    colour: str
    where: str = ""


def composition(images: np.ndarray, asked: Sequence[Any]) -> dict[str, float]:
    """Rates of the metrics above over images, uint8 or float in [-1, 1] [n, R, R, 3].

    asked: for each image a Scene (or its objects), a caption or a label, all of one kind.
    """
    check_images(images)
    if len(asked) != len(images):
        raise ValueError(f"{len(images)} images but {len(asked)} compositions asked for")
    return rates([judge(read(image), wanted) for image, wanted in zip(images, asked)])


def read(image: np.ndarray) -> Reading:
    """The composition of one picture, uint8 or float in [-1, 1] [R, R, 3]."""
    return read_scene(from_uint8(image) if image.dtype == np.uint8 else image)


def judge(reading: Reading, asked: Any) -> dict[str, bool]:
    """One picture against what was asked for; see `composition`."""
    if isinstance(asked, str):
        verdict = _against_caption(reading.objects, parse_caption(asked))
    elif isinstance(asked, int | np.integer):
        verdict = _against_label(reading.objects, int(asked))
    else:
        objects = asked.objects if isinstance(asked, Scene) else tuple(asked)
        verdict = _against_truth(reading.objects, objects)
    right = all(value for name, value in verdict.items() if name not in ("extra", "missing"))
    return verdict | {"all": right}


def rates(verdicts: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Means of verdicts of one kind, and their number."""
    if not verdicts or any(v.keys() != verdicts[0].keys() for v in verdicts):
        raise ValueError("rates takes at least one verdict, all against the same kind of request")
    means = {name: float(np.mean([v[name] for v in verdicts])) for name in verdicts[0]}
    return {"num": len(verdicts)} | means


def parse_caption(text: str) -> tuple[Named, ...]:
    """The objects of a caption, the main one first."""
    match = re.fullmatch(rf"{_NOUN}((?:{_PHRASE})*)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a caption that data.scenes.caption writes")
    objects = [Named(match[5], match[3])]
    for phrase in re.finditer(_PHRASE, match[6]):
        objects.append(Named(phrase[6], phrase[4], phrase[1]))
    return tuple(objects)


def _against_truth(found: tuple[Found, ...], asked: Sequence[SceneObject]) -> dict[str, bool]:
    def apart(pairing):
        return sum(1.0 if f is None else _distance(f, a) for f, a in zip(pairing, asked))

    pairs = list(zip(min(_pairings(found, len(asked)), key=apart), asked))
    return {
        "count": len(found) == len(asked),
        "shape": all(f is not None and f.shape == a.shape for f, a in pairs),
        "colour": all(f is not None and f.colour == a.colour for f, a in pairs),
        "position": all(f is not None and _distance(f, a) <= POSITION for f, a in pairs),
        "extra": len(found) > len(asked),
        "missing": len(found) < len(asked),
    }


def _against_caption(found: tuple[Found, ...], asked: tuple[Named, ...]) -> dict[str, bool]:
    """The largest object is the main one; the others are paired so that most fits."""
    main, others = found[:1], asked[1:]

    def verdicts(pairing):
        pairs = list(zip((*main, *pairing) if main else (None, *pairing), asked))
        return {
            "shape": [f is not None and f.shape == a.shape for f, a in pairs],
            "colour": [f is not None and f.colour == a.colour for f, a in pairs],
            "position": [f is not None and relation(main[0], f) == a.where for f, a in pairs[1:]],
        }

    def hits(pairing):
        return sum(map(sum, verdicts(pairing).values()))

    best = verdicts(max(_pairings(found[1:], len(others)), key=hits))
    return {
        "count": len(found) == len(asked),
        **{name: all(values) for name, values in best.items()},
        "extra": len(found) > len(asked),
        "missing": len(found) < len(asked),
    }


def _against_label(found: tuple[Found, ...], label: int) -> dict[str, bool]:
    if not 0 <= label < len(SHAPES):
        raise ValueError(f"label {label} is not one of the {len(SHAPES)} shapes of scenes")
    large = sum(f.size >= LARGE for f in found)
    small = len(found) - large
    return {
        "count": large == 1 and small <= MOST_SMALL,
        "shape": bool(found) and found[0].shape == SHAPES[label],
        "extra": large > 1 or small > MOST_SMALL,
        "missing": large < 1,
    }


def _pairings(found, count):
    """Every way to give `count` objects one of those found each, None where there are too few."""
    padded = (*found, *[None] * max(0, count - len(found)))
    return itertools.permutations(padded, count)


def _distance(a, b):
    return math.dist((a.x, a.y), (b.x, b.y))
