"""clean-fid's resizing against stored results of its package."""

import numpy as np
import pytest

from cheapscale.evaluation.embedding import clean

PICTURE = np.array(
    [[0, 255, 10, 0], [80, 40, 255, 3], [7, 200, 90, 250], [255, 0, 1, 128]], np.uint8
)
STORED = {
    3: [[72.104, 145.578, 3.24], [54.117, 156.625, 147.793], [159.746, 25.872, 130.478]],
    6: [
        [0, 140.062, 251.823, 29.848, 0, 0.192],
        [35.2, 90.716, 150.923, 145.891, 56.031, 0],
        [74.541, 49.917, 74.473, 238.353, 147.815, 20.105],
        [0, 94.814, 190.743, 122.343, 171.592, 234.568],
        [136.005, 123.799, 91.368, 31.641, 117.325, 210.913],
        [255, 136.957, 0, 0, 61.719, 128.186],
    ],
}


@pytest.mark.parametrize("size", STORED)
def test_stored_results(size):
    images = np.stack([np.repeat(PICTURE[..., None], 3, 2), np.zeros((4, 4, 3), np.uint8)])
    found = clean(images, size)
    assert found.dtype == np.float32 and found.shape == (2, size, size, 3)
    for channel in range(3):
        np.testing.assert_allclose(found[0, :, :, channel], STORED[size], atol=1e-3)
    assert not found[1].any()


def test_it_is_antialiased_and_leaves_flat_pictures_and_equal_sizes_alone():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.ptp(clean(stripes, 16)[:, 2:-2]) < 1
    flat = np.full((1, 9, 12, 3), 77, np.uint8)
    np.testing.assert_allclose(clean(flat, 7), 77, rtol=1e-6)
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(clean(images, 8), images)
