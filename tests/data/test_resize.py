"""The downsampling operator: exact block means, PIL's chain elsewhere, any colour mode in."""

import io

import numpy as np
import pytest
from PIL import Image

from cheapscale.data.resize import area_mean, downsample, open_rgb, to_rgb


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_integer_ratios_are_block_means(rng):
    image = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
    for r in (48, 24, 16, 12):
        k = 48 // r
        mean = image.reshape(r, k, r, k, 3).astype(np.float64).mean((1, 3)) / 127.5 - 1
        np.testing.assert_allclose(downsample(image, r), mean, atol=2e-7)
        assert downsample(image, r).dtype == np.float32


def test_float_and_byte_images_agree_and_the_mean_composes(rng):
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    real = downsample(image, 64)
    np.testing.assert_array_equal(real, image / np.float32(127.5) - np.float32(1))
    np.testing.assert_allclose(downsample(real, 8), downsample(image, 8), atol=3e-7)
    np.testing.assert_allclose(
        downsample(downsample(image, 32), 8), downsample(image, 8), atol=3e-7
    )
    np.testing.assert_allclose(area_mean(real[None], 8)[0], downsample(image, 8), atol=3e-7)


@pytest.mark.parametrize("size", [(50, 50), (100, 75), (75, 131)])
def test_other_ratios_follow_pils_chain(rng, size):
    """Against PIL on 8-bit images, which rounds up twice at each halving: within two levels."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    chain = image
    while min(chain.size) >= 64:
        chain = chain.resize((chain.width // 2, chain.height // 2), Image.Resampling.BOX)
    scale = 32 / min(chain.size)
    chain = chain.resize(
        (round(chain.width * scale), round(chain.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (chain.width - 32) // 2, (chain.height - 32) // 2
    expected = np.asarray(chain.crop((left, top, left + 32, top + 32)), np.float32)
    found = (downsample(np.asarray(image), 32) + 1) * 127.5
    assert np.abs(found - expected).max() <= (1.01 if size == (50, 50) else 2.01)
    np.testing.assert_allclose(found, np.rint(found), atol=1e-4)  # rounded once, at the end


def test_the_chain_in_float_is_not_rounded(rng):
    image = rng.uniform(-0.5, 0.5, (50, 50, 3)).astype(np.float32)
    found = (downsample(image, 32) + 1) * 127.5
    assert np.abs(found - np.rint(found)).max() > 0.3


def test_a_wide_image_is_cropped_at_its_centre(rng):
    image = rng.integers(0, 256, (32, 80, 3), dtype=np.uint8)
    np.testing.assert_array_equal(downsample(image, 16), downsample(image[:, 24:56], 16))
    np.testing.assert_array_equal(
        downsample(image.transpose(1, 0, 2), 16), downsample(image, 16).transpose(1, 0, 2)
    )


def test_small_images_are_refused_unless_upscaling_is_allowed(rng):
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="20x30 is smaller than resolution 32.*allow_upscale"):
        downsample(image, 32)
    assert downsample(image, 32, allow_upscale=True).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="square image.*got 20x30"):
        area_mean(image, 10)


def test_any_mode_becomes_rgb():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(to_rgb(grey), np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(to_rgb(grey[..., None]), to_rgb(grey))
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (to_rgb(clear) == 255).all()  # transparent black lies on white
    clear[..., 3] = 255
    assert (to_rgb(clear) == 0).all()
    half = np.zeros((4, 4, 4), np.uint8)
    half[..., 3] = 128
    np.testing.assert_allclose(to_rgb(half), 127, atol=1)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(to_rgb(deep), to_rgb(grey))
    with pytest.raises(ValueError, match="floating-point numbers: save it with 8 or 16 bits"):
        to_rgb(Image.fromarray(grey.astype(np.float32) / 255))
    palette = Image.fromarray(to_rgb(grey)).convert("P")
    assert to_rgb(palette).shape == (8, 8, 3)
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        to_rgb(np.zeros((4, 4, 2), np.uint8))


# Files.

STORED = {  # the array in the file for each EXIF orientation of an upright picture x
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),  # viewers turn it clockwise
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_files_are_read_as_viewers_show_them(rng, tmp_path, orientation, suffix):
    coarse = rng.integers(0, 256, (2, 3, 3), dtype=np.uint8)
    picture = coarse.repeat(16, axis=0).repeat(16, axis=1)  # JPEG keeps flat blocks
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    settings = {
        "png": {},
        "tif": {},
        "webp": {"lossless": True},
        "jpg": {"quality": 100, "subsampling": 0},
    }[suffix]
    stored = np.ascontiguousarray(STORED[orientation](picture))
    Image.fromarray(stored).save(path, exif=exif, **settings)
    read = open_rgb(path)
    assert read.shape == picture.shape
    assert np.abs(read.astype(int) - picture).max() <= (16 if suffix == "jpg" else 0)
    again = open_rgb(io.BytesIO(path.read_bytes()))  # as records of TFDS are read
    np.testing.assert_array_equal(again, read)


def test_turned_pictures_keep_their_colours(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.full((2, 3), 32768, np.uint16))
    clear = Image.new("LA", (3, 2), (0, 0))
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    for image, colour in ((deep, (128,) * 3), (clear, (255,) * 3), (palette, (255, 0, 0))):
        image.save(tmp_path / "x.png", exif=exif)
        read = open_rgb(tmp_path / "x.png")
        assert read.shape == (3, 2, 3) and (read == colour).all()


@pytest.mark.parametrize("exif", [b"Exif\x00\x00II*\x00", b"Exif\x00\x00junk", b"\x00" * 40])
def test_damaged_exif_data_do_not_spoil_a_picture(tmp_path, exif):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "x.png", exif=exif)
    assert open_rgb(tmp_path / "x.png").shape == (2, 3, 3)
