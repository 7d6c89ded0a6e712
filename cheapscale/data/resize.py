"""The one downsampling operator, which all modules use to make a smaller image.

PaGoDA pairs an image at high resolution with the latent of its downsampled version (arXiv
2405.14822, section 3), so both must be made from one file by one operator. For an image of short
side s and a target R:

    s = k R, k an integer   centre crop to s x s, then the mean of every k x k block, in float
    otherwise               halve with PIL's BOX while the short side is >= 2 R, then resize with
                            PIL's BICUBIC to short side R, then centre crop to R x R

Block means compose: downsample(downsample(x, 4R), R) = downsample(x, R). The second case computes
in float and rounds 8-bit input once, at its end: PIL on bytes rounds half levels up at each
halving, which makes images brighter each time.
"""

import contextlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Array = Any  # NumPy or JAX: area_mean uses methods that both have

TOO_SMALL = "ask for a lower resolution, or set --config.data.options.allow_upscale=True"
# This name of the operator is part of fingerprints and manifests: change it with any pixel.
RESIZE_ID = "area-mean|box-bicubic-crop/1"


def open_rgb(file: Any) -> np.ndarray:
    """uint8 [h, w, 3] of an encoded picture, a path or a binary stream, upright as viewers show it.

    EXIF orientation is applied here and nowhere else. Of an animation this is the first picture.
    PIL raises one of `source.UNREADABLE` for a file that does not decode.
    """
    with Image.open(file) as image:
        image.load()
        # Damaged EXIF data raise many types of errors, and say nothing about the pixels.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def to_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] from any PIL image, or from a uint8 array [h, w] or [h, w, 1 | 3 | 4].

    Transparent images are composed over white; 16-bit grey is scaled to 8 bits. Of floating-point
    pixels nobody knows the range: ValueError.
    """
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[-1] == 3:
            return pixels
        if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.shape[-1] == 4):
            raise ValueError(
                f"an image must be uint8 with 1, 3 or 4 channels, not {image.dtype} {image.shape}"
            )
        image = Image.fromarray(pixels)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 or 16 bits")
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        deep = np.asarray(image).astype(np.float64) / 257.0  # 65535 = 257 * 255
        image = Image.fromarray(np.clip(np.rint(deep), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def area_mean(x: Array, resolution: int) -> Array:
    """Block means of [..., k R, k R, c] float, as [..., R, R, c]; takes NumPy or JAX arrays."""
    *lead, height, width, channels = x.shape
    if height != width or height % resolution:
        raise ValueError(
            f"area_mean needs a square image whose side is a multiple of {resolution}, "
            f"got {height}x{width}: use downsample, which crops and takes any ratio"
        )
    k = height // resolution
    if k == 1:
        return x
    blocks = x.reshape(*lead, resolution, k, resolution, k, channels)
    if isinstance(x, np.ndarray):  # NumPy's float32 sums over large blocks err by 1e-5
        return blocks.mean(axis=(-4, -2), dtype=np.float64).astype(x.dtype)
    return blocks.mean(axis=(-4, -2))


def downsample(image: np.ndarray, resolution: int, *, allow_upscale: bool = False) -> np.ndarray:
    """float32 [R, R, c] in [-1, 1] from one image [h, w, c], uint8 or float in [-1, 1].

    Raises ValueError if the short side is below R, unless `allow_upscale` permits bicubic
    enlargement.
    """
    height, width, _ = image.shape
    short = min(height, width)
    if short < resolution and not allow_upscale:
        raise ValueError(
            f"an image of {height}x{width} is smaller than resolution {resolution}: {TOO_SMALL}"
        )
    eight_bit = image.dtype == np.uint8
    if short % resolution:
        pixels = _chain(image.astype(np.float32), resolution)
        if not eight_bit:
            return np.clip(pixels, -1.0, 1.0)
        return np.clip(np.rint(pixels), 0.0, 255.0) / np.float32(127.5) - np.float32(1.0)
    square = _centre_crop(image, short)
    if not eight_bit:
        return area_mean(square.astype(np.float32, copy=False), resolution)
    # Block sums of bytes are exact integers, so the mean is rounded to float32 only once.
    k = short // resolution
    blocks = square.reshape(resolution, k, resolution, k, -1)
    sums = blocks.sum(axis=(1, 3), dtype=np.uint32) if k > 1 else square
    return sums.astype(np.float32) / np.float32(127.5 * k * k) - np.float32(1.0)


def _centre_crop(image: np.ndarray, side: int) -> np.ndarray:
    """The central side x side part of an image [h, w, c]."""
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def _chain(image: np.ndarray, resolution: int) -> np.ndarray:
    """BOX halvings, BICUBIC and the centre crop; on float32 planes, which PIL does not round."""
    height, width, channels = image.shape
    planes = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(channels)]
    while min(width, height) >= 2 * resolution:
        width, height = width // 2, height // 2
        planes = [plane.resize((width, height), Image.Resampling.BOX) for plane in planes]
    scale = resolution / min(width, height)
    size = (round(width * scale), round(height * scale))
    planes = [plane.resize(size, Image.Resampling.BICUBIC) for plane in planes]
    return _centre_crop(np.stack([np.asarray(plane) for plane in planes], axis=-1), resolution)
