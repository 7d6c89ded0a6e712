"""Images inverted and solved back by a base and by its specialists, side by side."""

import numpy as np

from cheapscale.stages.invert import round_trip
from cheapscale.stages.sampling import levels
from cheapscale.training.checkpoint import Loaded

NODES = 40  # as `invert` has them


def round_trips(
    base: Loaded,
    specialists: Loaded,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    without_rule: bool = False,
) -> dict:
    """PSNR in dB and how Gaussian the latents are, of either; and their paired differences from the
    base [value, low, high] in dB. By Heun on Karras levels, as inversion is.

    without_rule: also with the specialist at which a step begins, whichever way it goes, so that
    the steps across a border are one's there and another's back.
    """
    ways = {"base": round_trip(base, nodes=NODES)}
    ways["specialists"] = round_trip(specialists, nodes=NODES)
    if without_rule:
        moved = owned_by_start(specialists.meta["diffusion"])
        way = round_trip(specialists, nodes=NODES, diffusion_there=moved)
        ways["specialists, steps owned where they begin"] = way
    found, decibels = {}, {}
    for title, way in ways.items():
        z, back = way(images, labels)
        scaled = z / base.meta["diffusion"]["sigma_max"]
        centred = scaled - scaled.mean(axis=0)
        decibels[title] = 10 * np.log10(4 / np.mean(np.square(back - images), axis=(1, 2, 3)))
        found[title] = {
            "psnr": float(decibels[title].mean()),
            "mean": float(np.abs(scaled.mean(axis=0)).mean()),
            "deviation": float(scaled.std()),
            "kurtosis": float(np.mean(centred**4) / np.mean(centred**2) ** 2),
        }
    for title in [*ways][1:]:
        apart = decibels[title] - decibels["base"]
        value, spread = float(apart.mean()), float(1.96 * apart.std() / np.sqrt(len(apart)))
        found[f"psnr, {title} - base"] = [value, value - spread, value + spread]
    return found


def owned_by_start(diffusion: dict) -> dict:
    """The same set for inversion whose steps belong to the specialist of their cleaner end: every
    border is moved to the next node of the grid."""
    grid = np.sort(levels(diffusion, NODES, "invert"))
    borders = np.asarray(diffusion["specialists"]["borders"])
    after = np.searchsorted(grid, borders * (1 + 1e-6), "right")
    moved = grid[np.minimum(after, len(grid) - 1)].tolist()
    return diffusion | {"specialists": diffusion["specialists"] | {"borders": moved}}
