"""Images made worse on purpose, and whether a metric noticed as it must.

    blur     only what a smaller image holds: block means, enlarged again (bicubic)
    noise    Gaussian noise of a stated deviation
    modes    images of some of the classes only: each is perfect, the set is not
    copies   training images among the others, as a generator that memorises would give

A metric is judged only where its definition says which way it must go (`MUST`): dropped modes, for
example, leave precision as it was, and are for recall and coverage to find.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cheapscale.data.resize import area_mean
from cheapscale.evaluation.pixels import check_images
from cheapscale.evaluation.resize import clean

RISES, FALLS = 1, -1
WORSE = {"blur": RISES, "noise": RISES, "modes": RISES}  # of a distance, under every corruption
MUST = {
    "fd": WORSE,
    "kid": WORSE,
    "score": {"blur": FALLS, "noise": FALLS, "modes": FALLS},
    "precision": {"blur": FALLS, "noise": FALLS},
    "density": {"blur": FALLS, "noise": FALLS},
    "recall": {"modes": FALLS},
    "coverage": {"blur": FALLS, "noise": FALLS, "modes": FALLS},
    "memorisation": {"copies": FALLS},
}


class Verdict(NamedTuple):
    """Of one metric under one corruption.

    ordered: every strength reads worse than the one before it, the weakest worse than real images,
    in the mean over the draws. worse_than_real: every strength reads worse than real images.
    draws: in how many of the draws the whole order holds.
    """

    ordered: bool
    worse_than_real: bool
    draws: int


def blurred(images: np.ndarray, through: int) -> np.ndarray:
    """uint8 [n, R, R, 3] reduced to `through` px, by the data's own block means, and enlarged."""
    _check(images)
    small = area_mean(images.astype(np.float32), through)
    return _levels(clean(small, images.shape[1]))


def noised(images: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 [n, R, R, 3] with white noise of deviation `sigma` in units of [-1, 1] (127.5 levels),
    rounded and clipped to 0..255."""
    _check(images)
    if not sigma >= 0:
        raise ValueError(f"sigma is {sigma}: give the noise's deviation, 0 or more")
    noise = rng.standard_normal(images.shape, np.float32)
    return _levels(images.astype(np.float32) + np.float32(127.5 * sigma) * noise)


def of_classes(
    labels: np.ndarray, kept: Sequence[int], num: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows [num] of `labels` [n] that are of the classes `kept`: a random choice, none twice.

    As many images as the complete set has, so that sizes do not tell the two apart; the kept
    classes stand to each other as in `labels`.
    """
    rows = np.flatnonzero(np.isin(labels, kept))
    if len(rows) < num:
        raise ValueError(
            f"classes {sorted(int(k) for k in kept)} have {len(rows)} of {len(labels)} images but "
            f"{num} are wanted: keep more classes, or choose from more images"
        )
    return rng.permutation(rows)[:num]


def judge(values: np.ndarray, direction: int) -> Verdict:
    """A metric's values [1 + strengths, draws]: of real images, then of a corruption, the weakest
    first. direction: RISES or FALLS.

    Two strengths may read the same only at 0, below which no share of images can fall.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"values must be [1 + strengths, draws], got shape {values.shape}")

    def right(chain):
        steps = direction * np.diff(chain, axis=0) > 0
        return (steps | ((chain[1:] == 0) & (chain[:-1] == 0))).all(axis=0)

    mean = values.mean(axis=1)
    return Verdict(
        ordered=bool(right(mean)),
        worse_than_real=bool((direction * (mean[1:] - mean[0]) > 0).all()),
        draws=int(right(values).sum()),
    )


def _check(images):
    check_images(images)
    if images.dtype != np.uint8:
        raise ValueError(f"corruptions take uint8 images, got {images.dtype}: apply to_uint8")


def _levels(pixels):
    return np.rint(pixels).clip(0, 255).astype(np.uint8)
