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


GREY = np.linspace(-1, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
BYTES = pixels.to_uint8(GREY)


@pytest.mark.parametrize("kind", ["u1", "i8", "u2", ">i4", "f2", "f4", "f8", ">f4"])
def test_arrays_of_any_type_in_the_right_range_are_the_same_pictures(kind):
    given = GREY if np.dtype(kind).kind == "f" else BYTES
    found = pixels.pictures(given.astype(kind))
    assert found.dtype in (np.uint8, np.float32)
    found = found if found.dtype == np.uint8 else pixels.to_uint8(found)
    assert np.abs(found.astype(int) - BYTES).max() <= (1 if kind == "f2" else 0)


@pytest.mark.parametrize(
    "values, said",
    [
        ((GREY + 1) / 2, r"from 0 to 1: give 2 \* x - 1 .* pixels.to_uint8"),
        (BYTES.astype("f"), r"from 0 to 255: give x / 127.5 - 1"),
        (GREY * 2, "from -2 to 2: give floats in"),
        (BYTES.astype(int) * 257, "int64 from 0 to 65535: scale integers"),
        (BYTES.astype(int) - 128, "from -128 to 127: scale integers to 0"),
        (BYTES > 100, "are bool: give uint8, or floats"),
        ((BYTES > 100).astype(np.uint8), "uint8 from 0 to 1: scale integers"),
        (0 * GREY, r"from 0 to 0: give 2 \* x - 1"),
        ((GREY + 1) / 2 - 5e-4, r"from -0.0005 to 0.9995: give 2 \* x - 1"),
        (BYTES.astype(object), "are object: give uint8"),
        (np.asarray(["photo.png"]), "give uint8, or floats"),
        (GREY + 0j, "are complex128: give uint8"),
        (np.where(GREY > 0.9, np.nan, GREY), "image 1 of 2 .* holds a NaN"),
        (np.where(GREY < -0.9, -np.inf, GREY), "image 0 of 2 .* holds a NaN or an inf"),
        (BYTES.transpose(0, 3, 1, 2), r"transpose \(2, 3, 4, 4\) by \(0, 2, 3, 1\)"),
        (BYTES[..., :1], "1 channels"),
        (np.concatenate([BYTES, BYTES[..., :1]], 3), "4 channels"),
        (BYTES[0], r"must be \[n, h, w, 3\] with n > 0, got shape \(4, 4, 3\)"),
        (BYTES[:0], "n > 0"),
        (BYTES[:, :0], "n > 0"),
    ],
)
def test_other_arrays_are_refused_with_what_was_found(values, said):
    with pytest.raises(ValueError, match=said):
        pixels.pictures(values)


def test_a_nan_never_becomes_a_pixel():
    with pytest.raises(ValueError, match="image 1 of 2 images holds a NaN"):
        pixels.to_uint8(np.where(GREY > 0.9, np.nan, GREY))
