"""The measure of the studies."""

from types import SimpleNamespace

import numpy as np
import pytest

from cheapscale.evaluation import quality
from cheapscale.evaluation.fid import frechet_distance
from launch import judge


def test_a_distance_is_above_the_floor_of_as_many_images(monkeypatch):
    rng = np.random.default_rng(0)
    real, ours = rng.normal(size=(200, 4)), rng.normal(0.5, 1, size=(50, 4))
    monkeypatch.setattr(quality, "embed", lambda network, images: ours[: len(images)])
    reference = SimpleNamespace(network=None, features=real, floor=lambda n: (n / 200, 0.0))
    found = judge.distance(reference, np.zeros((50, 8, 8, 3)), 20)
    assert found["fd"][0] == pytest.approx(frechet_distance(ours, real) - 0.25)
    assert len(found["draws"]["fd"].split()) == 20
