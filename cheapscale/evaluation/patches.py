"""Images as patch metrics and base-resolution metrics see them.

pFID and pKID (Chai et al. 2022; Guo et al. 2024, self-cascade, section 5) compare random crops at
full resolution, where resizing to a feature network's input would hide the detail. FID_b and KID_b
compare images reduced to the base resolution with the base model's own samples: did growing keep
what the base could do? A model that starts from those samples has an advantage there, which
whoever quotes the number should say.

Where image i is cropped is a function of (seed, i, crop) alone: not of the batch, and the same in
real and generated images of one size.
"""

import numpy as np

from cheapscale.data.resize import area_mean
from cheapscale.evaluation.pixels import from_uint8, to_uint8

CROPS = 3  # of each image, as in self-cascade's code
STREAM = 0x70617463  # tells these random numbers from others with the same seed


def crop_corners(
    ids: np.ndarray, resolution: int, size: int, *, crops: int = CROPS, seed: int = 0
) -> np.ndarray:
    """Top-left corners (row, column), int [n, crops, 2], of crops of images numbered `ids` [n]."""
    if not 1 <= size <= resolution:
        raise ValueError(
            f"crops of {size} pixels do not fit images of {resolution}: choose 1 to {resolution}"
        )
    return np.stack([
        np.random.default_rng((STREAM, seed, int(i))).integers(0, resolution - size + 1, (crops, 2))
        for i in ids
    ])  # fmt: skip


def random_crops(
    images: np.ndarray, ids: np.ndarray, size: int, *, crops: int = CROPS, seed: int = 0
) -> np.ndarray:
    """[n, R, R, c] -> [n crops, size, size, c], the crops of one image next to each other."""
    if len(ids) != len(images) or images.shape[1] != images.shape[2]:
        raise ValueError(
            f"random_crops takes square images and one id for each, got {images.shape} and "
            f"{len(ids)} ids"
        )
    corners = crop_corners(ids, images.shape[1], size, crops=crops, seed=seed)
    return np.stack([
        image[row : row + size, column : column + size]
        for image, places in zip(images, corners)
        for row, column in places
    ])  # fmt: skip


def base_images(images: np.ndarray, base_resolution: int) -> np.ndarray:
    """uint8 [n, R, R, c] -> uint8 [n, base, base, c]: block means, stored as samples are."""
    return to_uint8(area_mean(from_uint8(images), base_resolution))
