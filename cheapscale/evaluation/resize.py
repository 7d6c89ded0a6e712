"""The two resizing operators before a feature network that published FIDs were computed with.

    clean   Pillow's bicubic on float planes: antialiased, not rounded to integers, clipped to
            0..255 (Parmar et al. 2022, clean-fid, arXiv 2104.11222)
    tf1     TensorFlow 1's bilinear: output pixel i samples the input at i * in / out, without
            antialiasing (the original FID)

They differ by several FID on the same images, so statistics record which one was used. Training
images are resized by another operator: `data.resize`.
"""

import numpy as np
from PIL import Image

from cheapscale.features.resampling import bilinear_tf1


def clean(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 or float [n, h, w, c] in 0..255 -> float32 [n, size, size, c] in 0..255."""
    planes = np.asarray(images, np.float32).transpose(0, 3, 1, 2)
    out = np.empty((*planes.shape[:2], size, size), np.float32)
    for index in np.ndindex(planes.shape[:2]):
        plane = Image.fromarray(np.ascontiguousarray(planes[index]))
        out[index] = np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC))
    return out.clip(0, 255).transpose(0, 2, 3, 1)


def tf1(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 or float [n, h, w, c] in 0..255 -> float32 [n, size, size, c] in 0..255."""
    rows, columns = (bilinear_tf1(side, size) for side in images.shape[1:3])
    images = np.asarray(images, np.float32)
    return np.einsum("ih,jw,nhwc->nijc", rows, columns, images, optimize=True)


MODES = {"clean": clean, "tf1": tf1}
