"""Distances between reconstructions and their targets, for each pair: PSNR, SSIM and LPIPS.

LPIPS (Zhang et al. 2018, arXiv 1801.03924) needs a network; the others are in data.pixels.
"""

from collections.abc import Callable

import numpy as np

from cheapscale.data.pixels import WINDOW, check_images, psnr, ssim
from cheapscale.features.distances import lpips_distance
from cheapscale.features.network import FeatureNetwork
from cheapscale.training.mesh import in_batches

LPIPS_SIDE = 16  # smallest side in pixels: VGG16 halves its input four times


def reconstruction(network: FeatureNetwork | None = None, *, batch_size: int = 64) -> Callable:
    """measure(images, targets) -> {"psnr", "ssim", "lpips"} of each pair, float64 [n].

    images, targets: float32 [n, h, w, 3] in [-1, 1]. network: "vgg16_lpips", or None to leave LPIPS
    out; load it with input_size=0 for the published LPIPS, which does not resize. Images below
    16 px have no "lpips", and images below SSIM's window of 11 px have no "ssim". Create `measure`
    once for many calls: then its network is compiled once.
    """
    lpips = lpips_distance(network) if network else None

    def by_pixels(images: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        found = {"psnr": psnr(images, targets)}
        if min(images.shape[1:3]) >= WINDOW:
            found["ssim"] = ssim(images, targets)
        return found

    def measure(images: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        check_images(images)
        check_images(targets, "targets")
        batches = (slice(i, i + batch_size) for i in range(0, len(images), batch_size))
        parts = [by_pixels(images[rows], targets[rows]) for rows in batches]
        found = {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}
        if lpips and min(images.shape[1:3]) >= LPIPS_SIDE:
            pairs = (np.asarray(v, np.float32) for v in (images, targets))
            distance = in_batches(lpips, network.params, *pairs, batch_size=batch_size)
            found["lpips"] = distance.astype(np.float64)
        return found

    return measure
