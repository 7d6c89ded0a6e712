"""Pivots from files: pictures and what launch.sample leaves."""

import numpy as np
import pytest
from PIL import Image

from cheapscale.stages.pivot_images import read_pivots


def test_pivots_are_read_from_a_picture_or_an_npz(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "one.png")
    one, labels = read_pivots(str(tmp_path / "one.png"), np.arange(3))
    assert one.shape == (3, 6, 8, 3) and labels is None and one.dtype == np.float32
    np.testing.assert_allclose(one[2], pixels[0] / 127.5 - 1, atol=1e-6)
    # an .npz as launch.sample leaves it: rows are found by number
    order = np.array([12, 10, 14, 11, 13])
    np.savez(tmp_path / "many.npz", images=pixels, labels=order % 3, ids=order)
    many, labels = read_pivots(str(tmp_path / "many.npz"), np.array([11, 14]))
    np.testing.assert_allclose(many, pixels[[3, 2]] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(labels, [2, 2])
    small, _ = read_pivots(str(tmp_path / "many.npz"), np.array([10]), resolution=3)
    square = pixels[1, :, 1:7].reshape(3, 2, 3, 2, 3).mean((1, 3)) / 127.5 - 1
    np.testing.assert_allclose(small[0], square, atol=1e-6)
    np.savez(tmp_path / "floats.npz", images=np.full((2, 4, 4, 3), 0.5))
    assert read_pivots(str(tmp_path / "floats.npz"), np.arange(2))[0].max() == 0.5


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.png", None, "no pivot file"),
        ("text.png", b"not a picture", "is not a picture"),
        ("other.npz", {"x": np.zeros(3)}, "no array called images"),
        ("few.npz", {"images": np.zeros((2, 4, 4, 3))}, "no pivot for image 2: .* 0 to 1"),
        ("grey.npz", {"images": np.zeros((3, 4, 4, 1))}, "1 channels"),
        ("bytes.npz", {"images": np.full((3, 4, 4, 3), 200.0)}, "reach 200"),
    ],
)
def test_pivots_that_cannot_be_used_are_refused(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        np.savez(path, **content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_pivots(str(path), np.arange(3))
