"""Distances of reconstructions: LPIPS in closed form, and the distances of small images."""

import numpy as np
import pytest

from cheapscale.evaluation import perceptual
from cheapscale.features.network import FeatureNetwork


def _pairs():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (3, 20, 17, 3)).astype(np.float32)
    return x, np.clip(0.8 * x + 0.1 * rng.normal(size=x.shape), -1, 1).astype(np.float32)


def test_lpips_of_many_images_is_that_of_each():
    """With the pixels as feature maps, LPIPS is the weighted squared distance of unit vectors."""
    weights = np.array([1.0, 2.0, 0.5], np.float32)
    network = FeatureNetwork("toy", lambda params, x: (x,), {"lin": [weights]})
    x, y = _pairs()
    u, v = (z.astype(np.float64) / np.linalg.norm(z, axis=3, keepdims=True) for z in (x, y))
    expected = ((u - v) ** 2 @ weights).mean((1, 2))
    for batch_size in (2, 64):
        found = perceptual.reconstruction(network, batch_size=batch_size)(x, y)
        np.testing.assert_allclose(found["lpips"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="needs linear heads"):
        perceptual.reconstruction(network._replace(params={}))
    assert set(perceptual.reconstruction()(x, y)) == {"psnr", "ssim"}
    assert set(perceptual.reconstruction()(x[:, :8], y[:, :8])) == {"psnr"}  # below SSIM's window
