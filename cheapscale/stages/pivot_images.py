"""Real images as the pivots of a self-cascade: read from a picture or an .npz."""

import pathlib

import numpy as np
from PIL import Image

from cheapscale.data.resize import downsample, to_rgb
from cheapscale.evaluation.pixels import check_images, from_uint8


def read_pivots(
    path: str, ids: np.ndarray, resolution: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """(images [n, h, w, 3] in [-1, 1], their labels or None) for the ids of a cascade.

    From one picture, which all ids share; or from the `images` of an .npz (uint8, or floats in
    [-1, 1]), each id its own, by the file's `ids` where it has them, by row otherwise. resolution:
    shrinks each to a square of that side by the data's own operator; 0 leaves them as they are.
    """
    place = pathlib.Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"there is no pivot file {path}: name a picture or an .npz")
    labels = None
    if place.suffix == ".npz":
        with np.load(place) as stored:
            if "images" not in stored:
                raise ValueError(f"{path} holds {', '.join(stored)}, no array called images")
            images = check_images(stored["images"], f"pivots of {path}")
            held = stored["ids"] if "ids" in stored else np.arange(len(images))
            labels = stored["labels"] if "labels" in stored else None
        absent = np.setdiff1d(ids, held)
        if len(absent):
            raise ValueError(
                f"{path} holds no pivot for image {absent[0]}: it has {len(held)}, numbered "
                f"{held.min()} to {held.max()}; choose --start and --num among them"
            )
        order = np.argsort(held)
        rows = order[np.searchsorted(held, ids, sorter=order)]
        images, labels = images[rows], None if labels is None else labels[rows]
    else:
        try:
            with Image.open(place) as picture:
                images = np.repeat(to_rgb(picture)[None], len(ids), axis=0)
        except OSError as error:
            raise ValueError(f"{path} is not a picture that can be read ({error})") from error
    if images.dtype != np.uint8 and np.abs(images).max() > 1:
        raise ValueError(
            f"pivots of {path} reach {np.abs(images).max():.4g}: floats must lie in [-1, 1]"
        )
    if resolution:
        return np.stack([downsample(image, resolution) for image in images]), labels
    if images.dtype == np.uint8:
        return from_uint8(images), labels
    return images.astype(np.float32), labels
