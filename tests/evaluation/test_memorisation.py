"""Nearest training images: found, measured in units of [-1, 1], and shown in pairs."""

import numpy as np
import pytest

from cheapscale.evaluation import memorisation


def test_pixel_distance_is_the_rms_and_the_index_is_the_copy():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (40, 6, 6, 3), np.uint8)
    images = train[[31, 4]].copy()
    images[1] = np.where(images[1] < 128, images[1] + 20, images[1] - 20)
    found = memorisation.nearest_pixels(images, train)
    np.testing.assert_array_equal(found.index, [31, 4])
    np.testing.assert_allclose(found.distance, [0, 20 / 127.5], atol=1e-6)


def test_pairs_start_with_the_most_suspicious():
    train = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((1, 2, 2, 3), 50, np.uint8)
    images = np.array([57, 101, 180], np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), "u1")
    found = memorisation.nearest_pixels(images, train)
    pairs = memorisation.closest_pairs(images, train, found, count=2)
    assert pairs[:, 0, 0, 0].tolist() == [101, 57, 100, 50]


def test_feature_distance_is_euclidean():
    train = np.eye(4)
    found = memorisation.nearest_features(np.array([[0, 3.0, 0, 4.0]]), train)
    assert found.index[0] == 3 and found.distance[0] == pytest.approx(18**0.5)


def test_bad_sets_are_refused():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="apply pixels.to_uint8"):
        memorisation.nearest_pixels(images.astype(float), images)
    with pytest.raises(ValueError, match="compare at one resolution"):
        memorisation.nearest_pixels(images, images[:, :2])
    with pytest.raises(ValueError, match="row 1 of 2 training features"):
        memorisation.nearest_features(np.ones((1, 2)), np.array([[1, 2], [np.nan, 1]]))
