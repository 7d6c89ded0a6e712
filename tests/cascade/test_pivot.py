"""Pivots: enlarging, block means, coupled noise, and images from files."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cheapscale.cascade import pivot
from cheapscale.cascade.pivot import read_pivots


def test_resizing_keeps_constants_and_ramps_and_agrees_with_pillow(key):
    x = np.asarray(jax.random.normal(key, (2, 5, 6, 3)))
    pillow = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
              "lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}  # fmt: skip
    size = (10, 14)  # scales 2 and 7/3, at which no pixel lies midway between neighbours
    for kernel in pivot.KERNELS:
        y = np.asarray(pivot.resize(x, size, kernel))
        assert y.shape == (2, *size, 3)
        constant = pivot.resize(np.full((1, 5, 6, 3), 0.3, np.float32), size, kernel)
        np.testing.assert_allclose(constant, 0.3, atol=1e-6)
        plane = Image.fromarray(x[1, :, :, 2]).resize(size[::-1], pillow[kernel])
        np.testing.assert_allclose(y[1, :, :, 2], np.asarray(plane), atol=2e-6)
        np.testing.assert_array_equal(pivot.resize(x, (5, 6), kernel), x)
    ramp = np.broadcast_to(np.arange(6, dtype=np.float32)[None, :, None], (5, 6, 1))
    inside = pivot.resize(ramp, (10, 12), "bilinear")[3, 1:-1, 0]
    np.testing.assert_allclose(inside, (np.arange(1, 11) + 0.5) / 2 - 0.5, atol=1e-6)
    # frames of a video are resized one by one
    np.testing.assert_allclose(pivot.resize(x[None], size)[0], pivot.resize(x, size), atol=1e-6)


@pytest.mark.parametrize("small, large", [((2, 2), (4, 4)), ((1, 2), (3, 4)), ((2, 2), (2, 2))])
def test_coupled_noise_is_white_and_its_block_mean_is_the_small_noise(small, large, key):
    """n = A (e, xi) with A A' = I, exactly up to rounding, so n is white if e and xi are."""
    e, xi = math.prod(small), math.prod(large)

    def flat(v):
        n = pivot.coupled_noise(v[:e].reshape(1, *small, 1), v[e:].reshape(1, *large, 1))
        return n.reshape(-1)

    A = jax.vmap(flat)(jnp.eye(e + xi)).T
    np.testing.assert_allclose(A @ A.T, np.eye(xi), atol=1e-6)
    given = jax.random.normal(key, (3, 5, *small, 2))  # for example a video
    fresh = jax.random.normal(jax.random.key(1), (3, 5, *large, 2))
    n = pivot.coupled_noise(given, fresh)
    k = math.sqrt(xi / e)
    np.testing.assert_allclose(k * pivot.block_mean(n, small), given, atol=1e-5)
    if small == large:
        np.testing.assert_allclose(n, given, atol=1e-6)


def test_coupling_needs_whole_ratios():
    with pytest.raises(ValueError, match="6x6 px are no whole multiple of 4x4"):
        pivot.coupled_noise(jnp.zeros((4, 4, 1)), jnp.zeros((6, 6, 1)))


def test_pivots_are_read_from_a_picture_or_an_npz(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "one.png")
    one, labels = read_pivots(str(tmp_path / "one.png"), np.arange(3))
    assert one.shape == (3, 6, 8, 3) and labels is None and one.dtype == np.float32
    np.testing.assert_allclose(one[2], pixels[0] / 127.5 - 1, atol=1e-6)
    # a photograph taken with the camera on its side: EXIF orientation 6 turns it clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[0]).save(tmp_path / "turned.png", exif=exif)
    turned, _ = read_pivots(str(tmp_path / "turned.png"), np.arange(1))
    np.testing.assert_array_equal(turned[0], np.rot90(one[0], -1))
    # launch.sample writes this .npz; rows are found by the number of the image
    order = np.array([12, 10, 14, 11, 13])
    np.savez(tmp_path / "many.npz", images=pixels, labels=order % 3, ids=order)
    many, labels = read_pivots(str(tmp_path / "many.npz"), np.array([11, 14]))
    np.testing.assert_allclose(many, pixels[[3, 2]] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(labels, [2, 2])
    small, _ = read_pivots(str(tmp_path / "many.npz"), np.array([10]), resolution=3)
    square = pixels[1, :, 1:7].reshape(3, 2, 3, 2, 3).mean((1, 3)) / 127.5 - 1
    np.testing.assert_allclose(small[0], square, atol=1e-6)
    np.savez(tmp_path / "floats.npz", images=np.full((2, 4, 4, 3), -0.5))
    assert read_pivots(str(tmp_path / "floats.npz"), np.arange(2))[0].max() == -0.5


def test_a_photograph_at_full_size_is_refused_before_it_is_copied_for_every_image(tmp_path):
    """4000 px x 64 images of floats would take 9 GB."""
    Image.new("RGB", (4000, 3000)).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="3000x4000 px .* the 32 px.*--pivot_resolution=32"):
        read_pivots(str(tmp_path / "photo.png"), np.arange(10**6), side=32)
    small, _ = read_pivots(str(tmp_path / "photo.png"), np.arange(3), resolution=32, side=32)
    assert small.shape == (3, 32, 32, 3)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.png", None, "no pivot file"),
        ("text.png", b"not a picture", "text.png does not decode .*: name a picture"),
        ("other.npz", {"x": np.zeros(3)}, "no array called images"),
        ("few.npz", {"images": np.zeros((2, 4, 4, 3), np.uint8)}, "no pivot for image 2: .*0 to 1"),
        ("grey.npz", {"images": np.zeros((3, 4, 4, 1))}, "1 channels"),
        (
            "bytes.npz",
            {"images": np.full((3, 4, 4, 3), 200.0)},
            "from 200 to 200: give x / 127.5 - 1",
        ),
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
