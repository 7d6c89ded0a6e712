"""Images inverted and solved back by a base and by its specialists, side by side."""

import numpy as np

from cheapscale.stages.invert import round_trip
from cheapscale.training.checkpoint import Loaded

NODES = 40  # as `invert` has them


def round_trips(base: Loaded, specialists: Loaded, images: np.ndarray, labels: np.ndarray) -> dict:
    """PSNR in dB and how Gaussian the latents are, of either; and their paired difference [value,
    low, high] in dB. By Heun on Karras levels, as inversion is."""
    found, decibels = {}, {}
    for title, loaded in (("base", base), ("specialists", specialists)):
        z, back = round_trip(loaded, nodes=NODES)(images, labels)
        scaled = z / loaded.meta["diffusion"]["sigma_max"]
        centred = scaled - scaled.mean(axis=0)
        decibels[title] = 10 * np.log10(4 / np.mean(np.square(back - images), axis=(1, 2, 3)))
        found[title] = {
            "psnr": float(decibels[title].mean()),
            "mean": float(np.abs(scaled.mean(axis=0)).mean()),
            "deviation": float(scaled.std()),
            "kurtosis": float(np.mean(centred**4) / np.mean(centred**2) ** 2),
        }
    apart = decibels["specialists"] - decibels["base"]
    value, spread = float(apart.mean()), float(1.96 * apart.std() / np.sqrt(len(apart)))
    return found | {"psnr, specialists - base": [value, value - spread, value + spread]}
