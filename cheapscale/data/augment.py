"""Mirroring, and the non-leaking augmentation of EDM (Karras et al., arXiv 2206.00364, App. F.2).

The network is conditioned on nine labels that describe the transformation of an image. All are
zero for an unchanged image; sampling uses zeros, so that no augmented pictures are generated. With
n, n' ~ N(0, 1) and u ~ U(-1, 1), each transformation but the x-flip is applied with probability p:

    labels   transformation (lengths in sides of the image, about its centre)
    0        x-flip (0 or 1), with probability 1/2 for any p
    1        y-flip (0 or 1), with probability p/2
    2        scaling by 2^(0.2 n):                                    n
    3, 4     rotation by a = pi u:                                    cos a - 1, sin a
    5, 6     stretch by 2^(0.2 n) along direction r and 2^(-0.2 n) across it, where r = pi u, or
             0 with probability 1/2:                                  n cos r, n sin r
    7, 8     translation by (0.125 n, 0.125 n'):                      n, n'

The flips come first. The others are one affine map q = A x with A = translation . stretch .
rotation . scaling, and the image is resampled once: output(q) = input(A^-1 q). The published code
resamples with wavelet filters. This code uses SciPy's cubic spline, which also reproduces shifts by
whole pixels and rotations by right angles exactly. (DiffAugment, which has to be differentiable,
is part of the discriminator: cheapscale.pagoda.)
"""

import math

import numpy as np
from scipy import ndimage

AUGMENT_DIM = 9
SCALE_STD = 0.2  # standard deviation of log2 of the scaling and of the stretch
TRANSLATE_STD = 0.125  # standard deviation of the translation, in sides of the image


def flip(image: np.ndarray) -> np.ndarray:
    """The mirror image of [..., h, w, c], with left and right exchanged."""
    return np.ascontiguousarray(image[..., ::-1, :])


def random_flip(item: dict, rng: np.random.Generator) -> dict:
    """The item with its image mirrored with probability 1/2; a transform of the loader."""
    if rng.random() < 0.5:
        return {**item, "image": flip(item["image"])}
    return item


def random_augment(item: dict, rng: np.random.Generator, *, p: float = 0.12) -> dict:
    """The item with an augmented image and its nine labels in "augment"; a loader transform."""
    image, labels = augment(item["image"], rng, p)
    return {**item, "image": image, "augment": labels}


def augment(
    image: np.ndarray, rng: np.random.Generator, p: float = 0.12
) -> tuple[np.ndarray, np.ndarray]:
    """(augmented image, labels float32 [9]) of one square image, float32 [R, R, c] in [-1, 1].

    p: probability of each transformation but the x-flip.
    """
    # Every number is drawn whether it is used or not, so the stream does not depend on p.
    chance = rng.random(8)
    u = rng.uniform(-1.0, 1.0, size=2)
    n = rng.standard_normal(4)
    y_flip, scaled, rotated, stretched, moved = chance[:5] < p
    x_flip, y_flip = chance[5] < 0.5, y_flip and chance[6] < 0.5
    # A transformation that was not chosen gets the parameter 0, which is the identity.
    scale = n[0] * scaled
    angle = math.pi * u[0] * rotated
    stretch = n[1] * stretched
    direction = math.pi * u[1] * (chance[7] < 0.5)
    shift = n[2:4] * moved
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
    if scaled or rotated or stretched or moved:
        # A = stretch . rotation . scaling, with stretch = R(r) diag(s, 1/s) R(-r).
        along = 2.0 ** (SCALE_STD * stretch)
        stretching = _rotation(direction) @ np.diag([along, 1 / along]) @ _rotation(-direction)
        linear = stretching @ _rotation(angle) * 2.0 ** (SCALE_STD * scale)
        image = warp(image, linear, TRANSLATE_STD * shift)
    return np.ascontiguousarray(image), labels


def warp(image: np.ndarray, linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The image after the affine map x -> linear x + shift; the outside is filled by reflection.

    image: [R, R, c] in [-1, 1]. linear: [2, 2], acts on (right, down) about the centre. shift: [2]
    in sides of the image. The result is clipped, since a cubic spline overshoots a little.
    """
    side = image.shape[0]
    # SciPy wants the map from output to input, on (row, column): invert, and exchange the axes.
    inverse = np.linalg.inv(linear)[::-1, ::-1]
    middle = (side - 1) / 2
    offset = middle - inverse @ (middle + side * np.asarray(shift)[::-1])
    # cos(pi/2) is 6e-17 in floating point. Rounding to 0 keeps sample positions on whole pixels,
    # where the spline is exact.
    inverse, offset = inverse.round(12), offset.round(9)
    channels = [
        ndimage.affine_transform(plane, inverse, offset, order=3, mode="mirror")
        for plane in np.moveaxis(image, -1, 0)
    ]
    return np.clip(np.stack(channels, axis=-1), -1.0, 1.0)


def _rotation(angle: float) -> np.ndarray:
    """The rotation matrix [2, 2] on (right, down): it turns clockwise, since y points down."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])
