"""The measure of a study on a data set: distance to held-out images of one size, in the features of
its own metric classifier."""

from typing import Any

import numpy as np

from cheapscale.evaluation import quality
from cheapscale.evaluation.fid import frechet_distance
from cheapscale.evaluation.pixels import to_uint8
from cheapscale.models.features.network import FeatureNetwork
from cheapscale.stages import data
from cheapscale.training.classifier import fit_classifier
from launch.paired import with_deviation


def metric_network(settings, resolution: int, steps: int | None) -> tuple[FeatureNetwork, Any, Any]:
    """(the classifier, training images, held-out images) of config.data at a size; steps: updates
    of the classifier, None for its default."""
    train = data.open_data(settings, resolution=resolution)
    test = data.open_data(settings, resolution=resolution, split=settings.eval_split)
    return fit_classifier(train, purpose="metric", steps=steps).network, train, test


def make_judge(
    settings, resolution: int, *, num_real: int, steps: int | None = None
) -> quality.Reference:
    """num_real: held-out images to compare with, and training images for the floor."""
    network, train, test = metric_network(settings, resolution, steps)
    return quality.reference(network, test, train_source=train, num=num_real, num_train=num_real)


def distance(judge: quality.Reference, images: np.ndarray, resamples: int) -> dict:
    """{"fd": [Frechet distance above the floor, deviation], "draws": ...} of images in [-1, 1]."""
    features = quality.embed(judge.network, to_uint8(images))
    floor = judge.floor(len(features))[0]

    def figures(rows):
        return {"fd": frechet_distance(features[rows], judge.features) - floor}

    return with_deviation(figures, len(features), resamples)
