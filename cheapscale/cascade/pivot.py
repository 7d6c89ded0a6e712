"""The pivot of a self-cascade, the clean image of the previous scale: reading, enlarging, noise.

Arrays are [..., h, w, c] with any leading axes, such as the frames of a video; sizes are (height,
width).
"""

import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

from cheapscale.cascade.plan import Size, check_pivot, named
from cheapscale.data.arrays import read_npz
from cheapscale.data.pixels import from_uint8, pictures
from cheapscale.data.resize import downsample
from cheapscale.data.source import read_picture
from cheapscale.teacher.sampling import prior

KERNELS = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest", "lanczos": "lanczos3"}


def resize(x: jax.Array, size: Size, kernel: str = "bilinear") -> jax.Array:
    """U: [..., h, w, c] -> [..., *size, c], pixel centres at half integers.

    At the border, the weights inside the image are normalised, as in Pillow; reductions are
    antialiased. The paper uses "bilinear", the released code "bicubic".
    """
    return jax.image.resize(x, (*x.shape[:-3], *size, x.shape[-1]), KERNELS[kernel])


def block_mean(x: jax.Array, size: Size) -> jax.Array:
    """P: [..., H, W, c] -> [..., *size, c], block means; H and W must be multiples of `size`."""
    height, width = x.shape[-3:-1]
    if height % size[0] or width % size[1]:
        raise ValueError(
            f"{named((height, width))} px are no whole multiple of {named(size)}: block means and "
            "coupled noise need scales such as 2x,4x"
        )
    return reduce(x, "... (h i) (w j) c -> ... h w c", "mean", h=size[0], w=size[1])


def coupled_noise(small: jax.Array, fresh: jax.Array) -> jax.Array:
    """Unit noise in the shape of `fresh` whose block means, times k, are the noise `small`.

        n = enlarge(e) / k + xi - enlarge(P xi),    e, xi ~ N(0, I),   k^2 pixels to a block

    is exactly N(0, I), and k P n = e. The block means of U z0 + sigma n are then a noisy image at
    the smaller scale with the smaller scale's noise, at k^2 times the SNR.
    """
    (h, w), (height, width) = small.shape[-3:-1], fresh.shape[-3:-1]
    mean = block_mean(fresh, (h, w))
    k = math.sqrt((height // h) * (width // w))
    change = jnp.repeat(small / k - mean, height // h, axis=-3)
    return fresh + jnp.repeat(change, width // w, axis=-2)


def scale_noise(
    r: int,
    ids: jax.Array,
    *,
    seed: int,
    sizes: Sequence[Size],
    channels: int = 3,
    coupled: bool = False,
) -> jax.Array:
    """Unit noise [b, *sizes[r], channels] of scale r, for image i a function of (seed, i) alone.

    Scale 0 has the noise of plain sampling. The noise of a larger scale depends on its size alone,
    so that two stages, one jump and direct sampling to the same size share it.
    """
    shape = (*sizes[r], channels)
    if r == 0:
        return prior(seed, ids, shape, 1.0)
    fresh = prior(seed, ids, shape, 1.0, stream="cascade " + named(sizes[r]))
    if not coupled:
        return fresh
    before = scale_noise(r - 1, ids, seed=seed, sizes=sizes, channels=channels, coupled=True)
    return coupled_noise(before, fresh)


def read_pivots(
    path: str, ids: np.ndarray, resolution: int = 0, side: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """(images [n, h, w, 3] in [-1, 1], their labels or None) for the ids of a cascade.

    Args:
        path: one picture, which all ids share, turned upright as its EXIF data say; or an .npz with
            `images` (uint8, or floats in [-1, 1]), one for each id: the row with that number in
            the file's `ids`, or the row of that index if the file has no `ids`.
        resolution: shrink images to squares of this side, as the training data; 0 keeps sizes.
        side: that of the teacher's images; a picture that is much larger is refused. 0: unknown.
    """
    place, labels = pathlib.Path(path), None
    if not place.is_file():
        raise FileNotFoundError(f"there is no pivot file {path}: name a picture or an .npz")
    if place.suffix == ".npz":
        images, labels = _read_rows(place, ids)
    else:
        images = read_picture(place, path, "name a picture or an .npz")[None]
        if resolution:
            images = downsample(images[0], resolution)[None]
        elif side:
            check_pivot(images.shape[1:3], side)
        images, resolution = np.repeat(images, len(ids), axis=0), 0
    if resolution:
        return np.stack([downsample(image, resolution) for image in images]), labels
    return from_uint8(images) if images.dtype == np.uint8 else images, labels


def _read_rows(place: pathlib.Path, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    stored = read_npz(place)
    if "images" not in stored:
        raise ValueError(f"{place} holds {', '.join(stored)}, no array called images")
    images = pictures(stored["images"], f"pivots of {place}")
    held, labels = stored.get("ids", np.arange(len(images))), stored.get("labels")
    for name, numbers in (("ids", held), ("labels", labels)):
        if numbers is not None and (
            numbers.shape != images.shape[:1] or numbers.dtype.kind not in "iu"
        ):
            raise ValueError(
                f"{name} of {place} are {numbers.dtype} {numbers.shape}: give integers [n]"
            )
    absent = np.setdiff1d(ids, held)
    if len(absent):
        raise ValueError(
            f"{place} holds no pivot for image {absent[0]}: it has {len(held)}, numbered "
            f"{held.min()} to {held.max()}; choose --start and --num among them"
        )
    order = np.argsort(held)
    rows = order[np.searchsorted(held, ids, sorter=order)]
    return images[rows], None if labels is None else labels[rows]
