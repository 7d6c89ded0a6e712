"""Inputs of the patch metrics and of the base-resolution metrics.

pFID and pKID (Chai et al. 2022; self-cascade, Guo et al. 2024, arXiv 2402.10491, section 5) compare
random crops at full resolution, because resizing to a feature network's input would hide detail.
FID_b and KID_b compare images reduced to the base resolution, which shows whether a larger model
keeps the quality of the base model. A model that starts from the base's samples has an advantage
there.

The crops of image i depend only on (seed, i), not on the batch, so real and generated images of the
same size are cropped at the same places.
"""

import numpy as np

from cheapscale.data.pixels import from_uint8, to_uint8
from cheapscale.data.resize import area_mean

CROPS = 3  # per image, as in self-cascade's code
STREAM = 0x70617463  # separates these random numbers from others with the same seed


def crop_corners(
    ids: np.ndarray, resolution: int, size: int, *, crops: int = CROPS, seed: int = 0
) -> np.ndarray:
    """The top-left corners (row, column), int [n, crops, 2], of the crops of images `ids` [n]."""
    return np.stack([
        np.random.default_rng((STREAM, seed, int(i))).integers(0, resolution - size + 1, (crops, 2))
        for i in ids
    ])  # fmt: skip


def random_crops(
    images: np.ndarray, ids: np.ndarray, size: int, *, crops: int = CROPS, seed: int = 0
) -> np.ndarray:
    """Crops [n crops, size, size, c] of images [n, R, R, c] with the numbers `ids` [n], grouped by
    image."""
    corners = crop_corners(ids, images.shape[1], size, crops=crops, seed=seed)
    return np.stack([
        image[row : row + size, column : column + size]
        for image, places in zip(images, corners, strict=True)
        for row, column in places
    ])  # fmt: skip


def base_images(images: np.ndarray, base_resolution: int) -> np.ndarray:
    """Block means, uint8 [n, base, base, c], of uint8 images [n, R, R, c]."""
    return to_uint8(area_mean(from_uint8(images), base_resolution))
