"""Whole numbers in range: what is accepted as it is, and what is refused with the range."""

import numpy as np
import pytest

from cheapscale.data.numbers import LARGEST, consecutive, image_ids, real, whole


@pytest.mark.parametrize("value", [0, 5, np.int64(5), np.uint32(LARGEST), LARGEST, np.array(7)])
def test_whole_numbers_of_any_type_stay_what_they_are(value):
    assert whole(value, "seed") == int(value) and type(whole(value, "seed")) is int


@pytest.mark.parametrize(
    "value", [-1, 2**32, 4294967301, 2**63, 10**30, True, np.True_, 5.0, np.nan, "5", None, [5]]
)
def test_other_values_are_refused_and_not_turned_into_a_number(value):
    with pytest.raises(ValueError, match="^seed is .*: give a whole number from 0 to 4294967295$"):
        whole(value, "seed")


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, True, "2", None, 10**400])
def test_numbers_that_are_not_finite_are_refused(value):
    assert real(np.float32(2), "scale", 0) == 2.0
    with pytest.raises(ValueError, match="scale is .*: give a finite number of at least 0"):
        real(value, "scale", 0)


def test_numbers_of_images_are_32_bits_and_never_wrapped():
    np.testing.assert_array_equal(image_ids([3, LARGEST]), np.asarray([3, LARGEST], np.uint32))
    for ids in ([2**32], [-1], [1.0], [True], 3, [[1]]):
        with pytest.raises(ValueError, match="^ids "):
            image_ids(ids)


def test_consecutive_numbers_end_within_32_bits_and_within_the_memory():
    ids = consecutive(LARGEST - 1, 2, (8, 8, 3))
    np.testing.assert_array_equal(ids, [LARGEST - 1, LARGEST])
    for start, num in ((LARGEST, 2), (2**32, 1), (-1, 1), (0.0, 1)):
        with pytest.raises(ValueError, match=f"start, for {num} images, is .*: give a whole"):
            consecutive(start, num, (8, 8, 3))
    for num in (0, -3, 10**12, 2.0, True):
        with pytest.raises(ValueError, match="num is .*: give a whole number from 1"):
            consecutive(0, num, (8, 8, 3))
    with pytest.raises(ValueError, match="the memory has .*: give num="):
        consecutive(0, LARGEST, (1024, 1024, 3))
