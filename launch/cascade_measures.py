"""What the self-cascade study measures of a set of images, with intervals."""

from typing import NamedTuple

import numpy as np

from cheapscale.data.resize import area_mean
from cheapscale.evaluation import quality
from cheapscale.evaluation.fid import frechet_distance, kernel_distance
from cheapscale.evaluation.objects import count_objects
from cheapscale.evaluation.patches import random_crops
from cheapscale.evaluation.pixels import to_uint8
from cheapscale.models.features.network import FeatureNetwork
from launch.paired import with_deviation


class Judge(NamedTuple):
    """Real images of one data set and resolution in the features of its metric classifier.

    crop_features: of random crops of the real images; crop_floor: Frechet distance of as many real
    crops as a cell has to them.
    """

    reference: quality.Reference
    crop: int
    crop_features: np.ndarray
    crop_floor: float


def make_judge(network: FeatureNetwork, train, test, *, num: int, num_real: int, crop: int):
    """num: images of a cell. num_real: real images to compare with."""
    real = quality.reference(network, test, train_source=train, num=num_real, num_train=num_real)
    unseen = real.train_images[quality.unseen_by_classifier(quality.choice(len(train), num_real))]
    features = [
        quality.embed(network, random_crops(images, np.arange(len(images)), crop))
        for images in (real.images, unseen[:num])
    ]
    floor = frechet_distance(features[1], features[0])
    return Judge(real, crop, features[0], floor)


def measure(
    images: np.ndarray,
    pivots: np.ndarray,
    top: Judge,
    base: Judge,
    base_features: np.ndarray,
    *,
    counted: bool,
    resamples: int,
) -> dict:
    """{name: [value, standard deviation]} of images [n, R, R, 3] in [-1, 1].

    fd           Frechet distance to real images of that size, minus the real floor
    patch_fd     the same of random crops at full size
    base_fd      of the images reduced to the base size, to the base's own samples (biased towards
                 methods that start from a pivot)
    pivot_mse    mean square between the block means and the pivot
    kd           kernel distance to real images of that size (photographs, of which there are few)
    contrast     standard deviation of all pixels over that of real images
    single       share of pictures of exactly one object (scenes, `counted`)
    objects      objects in a picture

    The deviation is the bootstrap's over images: value +- 1.96 of it is an interval. "draws" holds
    what the resamples gave: the same of them in every cell of as many images, which start from the
    same pivots and noise, so that differences between cells have paired intervals.
    """
    small = area_mean(images, pivots.shape[1])
    eight = to_uint8(images)
    features = quality.embed(top.reference.network, eight)
    crops = quality.embed(
        top.reference.network, random_crops(eight, np.arange(len(eight)), top.crop)
    ).reshape(len(eight), -1, features.shape[1])
    reduced = quality.embed(base.reference.network, to_uint8(small))
    error = np.mean((small - pivots) ** 2, axis=(1, 2, 3))
    spread = (
        np.std(images, axis=(1, 2, 3))
        / np.std(top.reference.images / 127.5 - 1.0, (1, 2, 3)).mean()
    )
    floor = top.reference.floor(len(features))[0]
    counts = count_objects(images) if counted else None

    def figures(rows):
        flat = crops[rows].reshape(-1, crops.shape[-1])
        found = {
            "fd": frechet_distance(features[rows], top.reference.features) - floor,
            "patch_fd": frechet_distance(flat, top.crop_features) - top.crop_floor,
            "base_fd": frechet_distance(reduced[rows], base_features),
            "pivot_mse": error[rows].mean(),
            "contrast": spread[rows].mean(),
        }
        if counts is not None:
            found |= {"single": np.mean(counts[rows] == 1), "objects": counts[rows].mean()}
        else:
            found["kd"] = kernel_distance(features[rows], top.reference.features)
        return found

    return with_deviation(figures, len(images), resamples)
