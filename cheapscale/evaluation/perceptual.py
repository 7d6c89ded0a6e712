"""How near reconstructions are to their images, pair by pair: PSNR, SSIM and LPIPS.

LPIPS is Zhang et al. 2018 (arXiv 1801.03924); the other two need no network (see pixels.py).
"""

import functools
from collections.abc import Callable

import numpy as np

from cheapscale.evaluation.pixels import WINDOW, check_images, psnr, ssim
from cheapscale.models.distances import lpips_distance
from cheapscale.models.features.network import FeatureNetwork
from cheapscale.training.sharding import in_batches


def reconstruction(network: FeatureNetwork | None = None, *, batch_size: int = 64) -> Callable:
    """measure(images, targets) -> {"psnr", "ssim", "lpips"} of each pair, float64 [n].

    images, targets: float32 [n, h, w, 3] in [-1, 1]. network: one loaded as "vgg16_lpips"; LPIPS is
    left out without it, and SSIM where images are smaller than its window of 11 pixels. Many calls
    of one `measure` compile once.
    """
    # LPIPS draws nothing, so it needs no key
    lpips = functools.partial(lpips_distance(network).apply, key=None) if network else None

    def measure(images: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        found = {"psnr": psnr(check_images(images), check_images(targets, "targets"))}
        if min(images.shape[1:3]) >= WINDOW:
            found["ssim"] = ssim(images, targets)
        if lpips:
            pairs = (np.asarray(v, np.float32) for v in (images, targets))
            distance = in_batches(lpips, network.params, *pairs, batch_size=batch_size)
            found["lpips"] = distance.astype(np.float64)
        return found

    return measure
