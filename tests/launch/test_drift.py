"""The drift figures on pictures whose answer is known."""

import numpy as np

from launch.drift import centre, drift


def square(top, left, side=32, size=8):
    image = np.full((side, side, 3), -0.5, np.float32)
    image[top : top + size, left : left + size] = (1.0, 0.2, 0.0)
    return image


def test_the_centre_is_that_of_what_stands_out_from_the_ground():
    found = centre(np.stack([square(4, 12), square(10, 3)]))
    np.testing.assert_allclose(found, [[7.5, 15.5], [13.5, 6.5]], atol=0.05)


def test_an_enlarged_image_does_not_drift_and_a_moved_object_does():
    small = np.stack([square(4, 8, side=16, size=4)])
    large = small.repeat(2, axis=1).repeat(2, axis=2)
    still = drift(small, large, base=8)
    assert still["rms"] < 1e-6 and still["centre_shift"] < 1e-4
    moved = drift(small, np.roll(large, 8, axis=1), base=8)
    # 8 of 32 pixels are 2 of the 8 base pixels
    np.testing.assert_allclose(moved["centre_shift"], 2.0, rtol=0.02)
    assert moved["rms"] > 0.1
