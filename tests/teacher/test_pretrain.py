"""The record that stage 1 keeps of its data."""

import numpy as np
import pytest

from cheapscale.data.sources import open_data
from cheapscale.teacher.pretrain import build, deviation
from configs import scenes


def test_the_deviation_of_the_training_images_travels_with_the_teacher():
    config = scenes.get_config("stage=pretrain,smoke")
    source = open_data(config.data)
    images, _ = source.read(range(len(source)))
    assert build(config).meta["data"]["std"] == pytest.approx(images.std(), rel=1e-4)
    few = images[np.unique(np.linspace(0, len(source) - 1, 5).astype(int))]
    assert deviation(source, most=5) == pytest.approx(few.std(), rel=1e-4)
