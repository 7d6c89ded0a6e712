"""Flips, and the non-leaking augmentation of EDM (Karras et al. 2022, Appendix F.2).

The network sees what was done to an image as nine numbers, all zero for an untouched one; at
sampling time it is given zeros, so augmented pictures do not leak into the samples. With
n ~ N(0, 1) and u ~ U(-1, 1), transformations other than the x-flip happen with probability p each:

    labels   transformation (distances in sides of the image, about its centre)
    0        x-flip (0 or 1), an even chance whatever p
    1        y-flip (0 or 1), an even chance where chosen
    2        scaling by 2^(0.2 n):                                    n
    3, 4     rotation by a = pi u:                                    cos a - 1, sin a
    5, 6     stretch by 2^(0.2 n) along direction r, 2^(-0.2 n) across, where r = pi u or, with
             probability 1/2, 0:                                      n cos r, n sin r
    7, 8     translation by (0.125 n, 0.125 n'):                      n, n'

Flips come first. The others are one affine map q = A x, A = translation . stretch . rotation .
scaling, resampled once: output(q) = input(A^-1 q), by cubic convolution (Keys 1981, a = -1/2) on
the image continued by reflection. That kernel reproduces the pixels at whole positions, so that
right angles and whole translations are exact; it stands in for the wavelet resampling of the
published code. DiffAugment, which has to be differentiable, lives beside the discriminator.
"""

import math

import numpy as np

AUGMENT_DIM = 9
SCALE_STD = 0.2  # log2, isotropic and anisotropic
TRANSLATE_STD = 0.125  # sides of the image


def flip(image: np.ndarray) -> np.ndarray:
    """Mirror left and right: [..., h, w, c]."""
    return np.ascontiguousarray(image[..., ::-1, :])


def random_flip(item: dict, rng: np.random.Generator) -> dict:
    """A loader transform: mirrors the image with an even chance."""
    if rng.random() < 0.5:
        return {**item, "image": flip(item["image"])}
    return item


def random_augment(item: dict, rng: np.random.Generator, *, p: float = 0.12) -> dict:
    """A loader transform: EDM's augmentation; adds "augment", the nine labels."""
    image, labels = augment(item["image"], rng, p)
    return {**item, "image": image, "augment": labels}


def augment(
    image: np.ndarray, rng: np.random.Generator, p: float = 0.12
) -> tuple[np.ndarray, np.ndarray]:
    """One square image, float32 [R, R, c] -> (image, labels float32 [9]).

    Draws the same count of random numbers whatever happens.
    """
    chance = rng.random(8)
    uniform = rng.uniform(-1.0, 1.0, size=2)
    normal = rng.standard_normal(4)
    chosen = chance[:5] < p  # y-flip, scaling, rotation, stretch, translation
    x_flip = chance[5] < 0.5
    y_flip = chosen[0] and chance[6] < 0.5
    scale = normal[0] * chosen[1]
    angle = math.pi * uniform[0] * chosen[2]
    stretch = normal[1] * chosen[3]
    direction = math.pi * uniform[1] * (chance[7] < 0.5)
    shift = normal[2:4] * chosen[4]
    labels = np.array(
        [
            x_flip,
            y_flip,
            scale,
            math.cos(angle) - 1,
            math.sin(angle),
            stretch * math.cos(direction),
            stretch * math.sin(direction),
            *shift,
        ],
        np.float32,
    )
    if x_flip:
        image = image[:, ::-1]
    if y_flip:
        image = image[::-1]
    if chosen[1:].any():
        along = 2.0 ** (SCALE_STD * stretch)
        linear = (
            _rotation(direction)
            @ np.diag([along, 1 / along])
            @ _rotation(-direction)
            @ _rotation(angle)
            * 2.0 ** (SCALE_STD * scale)
        )
        image = warp(image, linear, TRANSLATE_STD * shift)
    return np.ascontiguousarray(image), labels


def warp(image: np.ndarray, linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Move the content of a square image [R, R, c] by x -> linear x + shift.

    linear: [2, 2] on (right, down) about the centre. shift: [2] in sides of the image. The result
    is held to the range [-1, 1] that the cubic kernel may leave by a little.
    """
    side = image.shape[0]
    middle = (side - 1) / 2
    down, right = np.mgrid[:side, :side] - middle
    output = np.stack([right, down], axis=-1) - np.asarray(shift) * side
    position = output @ np.linalg.inv(linear).T + middle  # [R, R, (right, down)]
    first = np.floor(position + 1e-9)  # a whole position may arrive as 2.999...
    weights = _cubic(position - first).astype(np.float32)  # [R, R, 2, 4]
    taps = _reflect(first.astype(np.int64)[..., None] + np.arange(-1, 3), side)
    patches = image[taps[..., 1, :, None], taps[..., 0, None, :]]  # [R, R, 4 down, 4 right, c]
    columns = np.einsum("hwijc,hwj->hwic", patches, weights[..., 0, :])
    return np.clip(np.einsum("hwic,hwi->hwc", columns, weights[..., 1, :]), -1.0, 1.0)


def _rotation(angle: float) -> np.ndarray:
    """Clockwise as seen, since y points down."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])


def _cubic(t: np.ndarray) -> np.ndarray:
    """Weights of the neighbours at -1, 0, 1, 2 for a position t in [0, 1) past the one at 0."""
    t2, t3 = t * t, t * t * t
    weights = (2 * t2 - t3 - t, 3 * t3 - 5 * t2 + 2, 4 * t2 - 3 * t3 + t, t3 - t2)
    return np.stack(weights, axis=-1) / 2


def _reflect(index: np.ndarray, side: int) -> np.ndarray:
    """Mirror about the outermost pixels, which are not repeated."""
    period = max(2 * (side - 1), 1)
    return side - 1 - np.abs(side - 1 - index % period)
