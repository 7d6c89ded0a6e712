"""The CLIP score depends on the angle alone, not on lengths, and is never negative."""

import numpy as np
import pytest

from cheapscale.evaluation import alignment


def test_scores_of_known_angles():
    texts = np.array([[1.0, 0, 0], [0, 2, 0], [0, 0, 1], [1, 1, 0]])
    images = np.array([[5.0, 0, 0], [0, -1, 0], [0, 3, 3], [1, 0, 0]])
    expected = [100, 0, 100 / 2**0.5, 100 / 2**0.5]
    np.testing.assert_allclose(alignment.clip_scores(images, texts), expected)
    np.testing.assert_allclose(alignment.clip_scores(images, 7 * texts), expected)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="row 0 of 1 image features is not finite"):
        alignment.clip_scores(np.full((1, 4), np.nan), np.ones((1, 4)))
