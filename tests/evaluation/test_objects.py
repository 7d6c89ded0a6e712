"""Counting what stands out from the ground."""

import numpy as np
import pytest

from cheapscale.data.resize import area_mean
from cheapscale.data.sources import SceneSource
from cheapscale.evaluation.objects import LEAST, count_objects


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_real_single_scenes_show_one_object(resolution):
    source = SceneSource("test", resolution, size=150, single=True)
    images = np.stack([source[i]["image"] for i in range(150)])
    assert np.mean(count_objects(images) == 1) >= 0.98
    blurred = np.repeat(np.repeat(area_mean(images, resolution // 2), 2, 1), 2, 2)
    assert np.mean(count_objects(blurred) == 1) >= 0.98


def test_pieces_are_counted_whatever_their_colours():
    image = np.full((4, 32, 32, 3), -0.8, np.float32)
    image[0, 4:12, 4:12] = (1.0, 0.0, 0.0)
    image[1, 4:12, 4:12], image[1, 12:20, 12:20] = (1.0, 0, 0), (0, 0, 1.0)  # touch at a corner
    image[2, 4:12, 4:12], image[2, 20:28, 20:28] = 0.5, 0.5
    side = int((LEAST * 32 * 32) ** 0.5)
    image[2, 28 : 28 + side, 2 : 2 + side] = 0.9  # a speck
    np.testing.assert_array_equal(count_objects(image), [1, 1, 2, 0])


def test_single_scenes_are_the_main_objects_of_the_others():
    whole, single = (SceneSource("train", 16, size=20, single=only) for only in (False, True))
    for i in range(20):
        assert single.truth(i) == whole.truth(i)[:1]
        assert single[i]["label"] == whole[i]["label"]
    assert single.fingerprint() != whole.fingerprint()
