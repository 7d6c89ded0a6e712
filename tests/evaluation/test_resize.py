"""Both resizing operators against stored results of clean-fid and torch-fidelity."""

import numpy as np
import pytest

from cheapscale.evaluation import resize

PICTURE = np.array(
    [[0, 255, 10, 0], [80, 40, 255, 3], [7, 200, 90, 250], [255, 0, 1, 128]], np.uint8
)
STORED = {
    ("clean", 3): [[72.104, 145.578, 3.24], [54.117, 156.625, 147.793], [159.746, 25.872, 130.478]],
    ("tf1", 3): [[0, 173.333, 3.333], [55.667, 128.889, 123.556], [172.333, 54.667, 122.667]],
    ("clean", 6): [
        [0, 140.062, 251.823, 29.848, 0, 0.192],
        [35.2, 90.716, 150.923, 145.891, 56.031, 0],
        [74.541, 49.917, 74.473, 238.353, 147.815, 20.105],
        [0, 94.814, 190.743, 122.343, 171.592, 234.568],
        [136.005, 123.799, 91.368, 31.641, 117.325, 210.913],
        [255, 136.957, 0, 0, 61.719, 128.186],
    ],
    ("tf1", 6): [
        [0, 170, 173.333, 10, 3.333, 0],
        [53.333, 92.222, 132.222, 173.333, 59.111, 2],
        [55.667, 80.778, 128.889, 200, 123.556, 85.333],
        [7, 135.667, 163.333, 90, 196.667, 250],
        [172.333, 101.889, 54.667, 30.667, 122.667, 168.667],
        [255, 85, 0.333, 1, 85.667, 128],
    ],
}


@pytest.mark.parametrize("mode, size", STORED)
def test_stored_results(mode, size):
    images = np.stack([np.repeat(PICTURE[..., None], 3, 2), np.zeros((4, 4, 3), np.uint8)])
    found = resize.MODES[mode](images, size)
    assert found.dtype == np.float32 and found.shape == (2, size, size, 3)
    for channel in range(3):
        np.testing.assert_allclose(found[0, :, :, channel], STORED[mode, size], atol=1e-3)
    assert not found[1].any()


def test_only_clean_is_antialiased():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.ptp(resize.clean(stripes, 16)[:, 2:-2]) < 1  # clean: the stripes average out
    np.testing.assert_array_equal(resize.tf1(stripes, 16), 200)  # tf1: every fourth row


def test_flat_pictures_and_equal_sizes_are_left_alone():
    flat = np.full((1, 9, 12, 3), 77, np.uint8)
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    for operator in resize.MODES.values():
        np.testing.assert_allclose(operator(flat, 7), 77, rtol=1e-6)
        np.testing.assert_array_equal(operator(images, 8), images)
