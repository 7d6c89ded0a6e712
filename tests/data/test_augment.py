"""Augmentation: labels of unchanged images are zero, and right angles and shifts are exact."""

import numpy as np
import pytest

from cheapscale.data.augment import (
    AUGMENT_DIM,
    augment,
    flip,
    random_augment,
    random_flip,
    warp,
)

IDENTITY = np.eye(2)


@pytest.fixture
def image():
    return np.random.default_rng(0).uniform(-0.8, 0.8, (16, 16, 3)).astype(np.float32)


def draws(image, p, count=400):
    return [augment(image, np.random.default_rng(i), p) for i in range(count)]


def test_labels_are_zero_exactly_for_untouched_images(image):
    for result, labels in draws(image, 0.3):
        assert labels.shape == (AUGMENT_DIM,) and labels.dtype == np.float32
        assert (labels == 0).all() == np.array_equal(result, image)


def test_at_zero_probability_only_the_x_flip_is_left(image):
    flipped = 0
    for result, labels in draws(image, 0.0):
        assert (labels[1:] == 0).all()
        np.testing.assert_array_equal(result, flip(image) if labels[0] else image)
        flipped += labels[0]
    assert 160 < flipped < 240


def test_each_transformation_happens_with_probability_p(image):
    labels = np.stack([label for _, label in draws(image, 0.12, 3000)])
    happened = np.stack(
        [
            labels[:, 1] != 0,
            labels[:, 2] != 0,
            labels[:, 4] != 0,
            labels[:, 5] != 0,
            labels[:, 7] != 0,
        ]
    )
    np.testing.assert_allclose(happened.mean(1), [0.06, 0.12, 0.12, 0.12, 0.12], atol=0.02)
    angle_cos, angle_sin = labels[:, 3] + 1, labels[:, 4]
    np.testing.assert_allclose(angle_cos**2 + angle_sin**2, 1, atol=1e-5)


def test_normal_labels_have_unit_variance(image):
    labels = np.stack([augment(image, np.random.default_rng(i), 1.0)[1] for i in range(1500)])
    assert abs(labels[:, 2].std() - 1) < 0.08
    assert abs(np.hypot(labels[:, 5], labels[:, 6]).std() - np.sqrt(1 - 2 / np.pi)) < 0.08
    np.testing.assert_allclose(labels[:, 7:].std(0), 1, atol=0.08)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_right_angles_are_exact(image, turns):
    angle = turns * np.pi / 2
    linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(
        warp(image, linear, [0, 0]), np.rot90(image, -turns), atol=1e-6
    )  # clockwise, as the rows count downwards


def test_flips_as_maps_and_whole_translations_are_exact(image):
    np.testing.assert_allclose(warp(image, np.diag([-1, 1]), [0, 0]), flip(image), atol=1e-6)
    moved = warp(image, IDENTITY, [3 / 16, -2 / 16])  # 3 right, 2 up
    np.testing.assert_allclose(moved[:-2, 3:], image[2:, :-3], atol=1e-6)
    np.testing.assert_allclose(moved[:-2, :3], image[2:, 3:0:-1], atol=1e-6)  # reflected


def test_warping_a_linear_ramp_is_exact_inside():
    """Cubic splines reproduce straight lines: the ramp moves and turns with the map.

    The reflection at the border bends the spline by an amount that falls by 0.27 a pixel.
    """
    down, right = (np.mgrid[:32, :32] - 15.5) / 32
    ramp = np.stack([right, down, right + down], -1).astype(np.float32)
    linear = np.array([[1.1, -0.3], [0.2, 0.9]])
    inverse = np.linalg.inv(linear)
    shift = np.array([0.05, -0.02])
    x, y = right - shift[0], down - shift[1]
    expected = inverse[0, 0] * x + inverse[0, 1] * y
    found = warp(ramp, linear, shift)[10:-10, 10:-10, 0]
    np.testing.assert_allclose(found, expected[10:-10, 10:-10], atol=1e-6)


def test_the_stretch_keeps_area_and_the_scaling_changes_it():
    """A blob's mean grows by 4^(0.2 n) under scaling and is kept by a stretch."""
    down, right = (np.mgrid[:64, :64] - 31.5) / 64
    blob = np.exp(-(right**2 + down**2) / 0.004).astype(np.float32)[..., None]
    for n in (-1.0, 0.7):
        scaled = warp(blob, np.eye(2) * 2.0 ** (0.2 * n), [0, 0])
        np.testing.assert_allclose(scaled.mean() / blob.mean(), 4 ** (0.2 * n), rtol=2e-3)
        along = 2.0 ** (0.2 * n)
        stretched = warp(blob, np.diag([along, 1 / along]), [0, 0])
        np.testing.assert_allclose(stretched.mean() / blob.mean(), 1, rtol=2e-3)


def test_transforms_leave_the_source_item_alone(image):
    item = {"image": image.copy(), "label": np.int32(1)}
    for i in range(8):
        out = random_augment(
            random_flip(item, np.random.default_rng(i)), np.random.default_rng(i), p=1
        )
        assert out["augment"].shape == (9,) and np.abs(out["image"]).max() <= 1
    np.testing.assert_array_equal(item["image"], image)
    assert "augment" not in item
