"""Crops depend only on the number of the image; base images are block means."""

import numpy as np

from cheapscale.data import pixels, scenes
from cheapscale.evaluation import patches

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)


def test_real_and_generated_images_are_cropped_at_the_same_places_in_any_batch():
    ids = np.arange(100, 120)
    whole = patches.random_crops(IMAGES, ids, 5)
    assert whole.shape == (60, 5, 5, 3)
    parts = [patches.random_crops(IMAGES[i : i + 7], ids[i : i + 7], 5) for i in (0, 7, 14)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    inverted = patches.random_crops(255 - IMAGES, ids, 5)
    np.testing.assert_array_equal(255 - inverted, whole)


def test_crops_begin_at_their_corners():
    corners = patches.crop_corners(np.arange(20), 16, 5, crops=2, seed=3)
    found = patches.random_crops(IMAGES, np.arange(20), 5, crops=2, seed=3)
    row, column = corners[4, 1]
    np.testing.assert_array_equal(found[9], IMAGES[4, row : row + 5, column : column + 5])


def test_corners_are_uniform_and_differ_between_seeds():
    corners = patches.crop_corners(np.arange(1500), 8, 6)
    share = np.histogram2d(*corners.reshape(-1, 2).T, bins=3)[0] / 4500
    np.testing.assert_allclose(share, 1 / 9, atol=0.02)
    other = patches.crop_corners(np.arange(1500), 8, 6, seed=1)
    assert 0.08 < np.mean((corners == other).all(axis=2)) < 0.14


def test_base_images_are_those_of_the_small_data_set():
    """Up to one level: the large image was itself stored in eight bits."""
    picture = scenes.scene(0, "train", 3)
    large, small = (pixels.to_uint8(scenes.draw(picture, r)[None]) for r in (64, 16))
    found = patches.base_images(large, 16)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - small).max() <= 1
