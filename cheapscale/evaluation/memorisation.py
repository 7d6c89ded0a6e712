"""Has the generator copied? The nearest training image of every generated one.

The distance means something beside the same of held-out images: a generator that memorises falls
far below it. Features find copies that were shifted or recoloured, pixels find plain ones.
"""

from typing import NamedTuple

import numpy as np

from cheapscale.evaluation.coverage import nearest
from cheapscale.evaluation.fid import check_features


class Neighbours(NamedTuple):
    """Of each query: distance [n] to, and index [n] of, its nearest training image."""

    distance: np.ndarray
    index: np.ndarray


def nearest_features(features: np.ndarray, train_features: np.ndarray) -> Neighbours:
    """Nearest neighbours of features [n, d] among [m, d]; Euclidean distances."""
    check_features(features)
    check_features(train_features, "training features")
    return Neighbours(*nearest(features, train_features))


def nearest_pixels(images: np.ndarray, train_images: np.ndarray) -> Neighbours:
    """Nearest neighbours of uint8 images [n, h, w, c] among [m, h, w, c]; the distance is the root
    mean square over pixels and channels, in units of [-1, 1]."""
    if images.dtype != np.uint8 or train_images.dtype != np.uint8:
        raise ValueError(
            f"nearest_pixels compares uint8 images, got {images.dtype} and {train_images.dtype}: "
            "apply pixels.to_uint8"
        )
    if images.shape[1:] != train_images.shape[1:]:
        raise ValueError(
            f"images are {images.shape[1:]}, training images {train_images.shape[1:]}: compare at "
            "one resolution"
        )
    distance, index = nearest(
        images.reshape(len(images), -1), train_images.reshape(len(train_images), -1)
    )
    return Neighbours(distance / 127.5 / images[0].size ** 0.5, index)


def closest_pairs(
    images: np.ndarray, train_images: np.ndarray, found: Neighbours, count: int = 8
) -> np.ndarray:
    """The `count` most suspicious pairs, for a picture of two rows: first the generated images,
    the closest to the training set first, then their neighbours. [2 count, h, w, c]."""
    order = np.argsort(found.distance)[:count]
    return np.concatenate([images[order], train_images[found.index[order]]])
