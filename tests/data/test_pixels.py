"""Structural similarity against scikit-image's formula in SciPy, and images that are refused."""

import numpy as np
import pytest
from scipy import ndimage

from cheapscale.data import pixels


def _pairs():
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(size=(3, 20, 17, 3)), axis=1) / 6
    x = np.clip(x, -1, 1).astype(np.float32)
    y = np.clip(0.8 * x + 0.1 * rng.normal(size=x.shape) + 0.1, -1, 1).astype(np.float32)
    return x, y


def test_ssim_is_the_published_one():
    """skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5, data_range=2,
    use_sample_covariance=False, channel_axis=-1), written out."""
    x, y = (v.astype(np.float64) for v in _pairs())

    def window(image):
        return ndimage.gaussian_filter(image, 1.5, truncate=3.5)

    expected = []
    for a, b in zip(x, y):
        channels = []
        for c in range(3):
            u, v = a[..., c], b[..., c]
            mu, mv = window(u), window(v)
            variances = window(u * u) - mu**2 + window(v * v) - mv**2
            covariance = window(u * v) - mu * mv
            s = (2 * mu * mv + 0.02**2) * (2 * covariance + 0.06**2)
            s /= (mu**2 + mv**2 + 0.02**2) * (variances + 0.06**2)
            channels.append(s[5:-5, 5:-5].mean())
        expected.append(np.mean(channels))
    np.testing.assert_allclose(pixels.ssim(x, y), expected, rtol=1e-10)


def test_ssim_closed_forms():
    x, y = _pairs()
    np.testing.assert_allclose(pixels.ssim(x, x), 1)
    np.testing.assert_allclose(pixels.ssim(x, y), pixels.ssim(y, x))
    # two flat images differ in luminance alone
    a, b, c1 = 0.5, -0.25, 0.02**2
    flat = np.ones((1, 11, 11, 3))
    expected = (2 * a * b + c1) / (a**2 + b**2 + c1)
    np.testing.assert_allclose(pixels.ssim(a * flat, b * flat), expected, rtol=1e-9)
    noise = np.random.default_rng(1).normal(size=x.shape)
    found = [pixels.ssim(x, x + s * noise).mean() for s in (0, 0.01, 0.05, 0.2)]
    assert found == sorted(found, reverse=True) and found[-1] < 0.9


def test_pairs_that_do_not_match_are_refused():
    x, y = _pairs()
    with pytest.raises(ValueError, match="ssim compares image by image"):
        pixels.ssim(x, y[:2])
    with pytest.raises(ValueError, match="at least 11 pixels a side"):
        pixels.ssim(x[:, :10], y[:, :10])


def test_unusable_images_are_named():
    images = np.zeros((6, 4, 4, 3), np.float32)
    assert pixels.check_images(images) is images
    images[2, 1, 1, 1] = np.nan
    images[5] = np.inf
    with pytest.raises(ValueError, match="image 2 of 6 images holds a NaN .* 2 in all"):
        pixels.check_images(images)
    with pytest.raises(ValueError, match="images have 4 channels: give RGB"):
        pixels.check_images(np.zeros((2, 4, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"must be \[n, h, w, 3\]"):
        pixels.check_images(np.zeros((4, 4, 3)))
