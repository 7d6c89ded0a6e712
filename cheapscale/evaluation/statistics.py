"""Reference statistics: moments and features of real images, computed once and cached.

`Identity` lists everything that statistics depend on: data set, split, resolution, number of
images, network, hash of its weights, and resizing. The cache is $CHEAPSCALE_CACHE/statistics
(default ~/.cache/cheapscale). The name of an .npz contains a hash of the identity, and the file
contains the identity itself; loading a file with another identity raises ValueError.

Published files can be loaded too: ADM's (mu, sigma, mu_s, sigma_s and the images arr_0) and EDM's
(mu, sigma). They do not record it, but both use the features of the original Inception network.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cheapscale.data.arrays import read_npz
from cheapscale.data.digest import digest
from cheapscale.data.files import atomic_write, cache_folder, damaged
from cheapscale.evaluation.fid import Gaussian, Moments, moments

VERSION = 1  # change it with the format of the file, or with code that changes the numbers


class Identity(NamedTuple):
    """Everything that statistics depend on.

    data: the source's fingerprint (images and their order). num: number of images. network, sha256:
    name and hash of the feature network. resize: how images were resized to its input size
    (request.resize_name). variant: "" for whole images, or their transformation, for example
    "patch 64 x 3 seed 0" or "base 16".
    """

    data: str
    split: str
    resolution: int
    num: int
    network: str
    sha256: str
    resize: str = "network"
    variant: str = ""

    def digest(self) -> str:
        """A short hash of all fields."""
        return digest([VERSION, *self])


class Statistics(NamedTuple):
    """Statistics of real images.

    features: [n, d] float32, needed for kernel distance, precision and recall. features and
    identity are None for a published file. path: the file.
    """

    moments: Moments | Gaussian
    features: np.ndarray | None
    identity: Identity | None
    path: str


def reference_statistics(identity: Identity, compute: Callable[[], np.ndarray]) -> Statistics:
    """The statistics `identity`, from the cache or from the features [n, d] of `compute()`."""
    path = cache_path(identity)
    if not path.exists():
        save_statistics(path, compute(), identity)
    return load_statistics(path, identity=identity)


def cache_path(identity: Identity) -> pathlib.Path:
    """The path of the statistics `identity` in the cache."""
    name = f"{identity.network}-{identity.resolution}px-{identity.digest()}.npz"
    return cache_folder() / "statistics" / name


def save_statistics(path: str | pathlib.Path, features: np.ndarray, identity: Identity) -> None:
    """Write moments and features [n, d] atomically."""
    found = moments(features)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            identity=json.dumps([VERSION, identity._asdict()]),
            mean=found.mean,
            scatter=found.scatter,
            features=np.asarray(features, np.float32),
        )


def load_statistics(path: str | pathlib.Path, *, identity: Identity | None = None) -> Statistics:
    """The statistics in an .npz, cached or published.

    Raises ValueError if `identity` is given and the file has another one.
    """
    path = pathlib.Path(path)
    if not path.is_file() or path.suffix != ".npz":
        raise ValueError(f"no reference statistics at {path}: give an .npz of ours, ADM's or EDM's")
    stored = read_npz(path)
    if "identity" in stored:
        with damaged(path):
            found = _own(path, stored)
    elif "mu" in stored and "sigma" in stored:
        arrays = stored["mu"], stored["sigma"]
        if any(array.dtype.kind not in "fiu" for array in arrays):
            kinds = " and ".join(str(array.dtype) for array in arrays)
            raise ValueError(f"{path} holds mu and sigma as {kinds}: get a file of real numbers")
        mean, covariance = (array.astype(np.float64) for array in arrays)
        found = Statistics(Gaussian(mean, covariance), None, None, str(path))
    else:
        raise ValueError(f"{path} holds {', '.join(stored)} but no mu and sigma: give statistics")
    if fault := _fault(found.moments):
        raise ValueError(f"{path} holds no statistics ({fault}): get or compute the file again")
    if identity is not None and found.identity != identity:
        raise ValueError(f"{path} holds {found.identity}, not {identity}: delete it")
    return found


def check_match(statistics: Statistics, *, sha256: str, resolution: int, resize: str) -> None:
    """Raise ValueError unless the statistics are of whole images, and of the same weights,
    resolution and resizing as the features that are compared with them.

    A published file records none of these: it is taken to hold images that the network resized.
    """
    asked = {"sha256": sha256, "resolution": resolution, "resize": resize, "variant": ""}
    if statistics.identity is not None:
        recorded = statistics.identity._asdict()
    else:
        recorded = asked | ({} if resize.startswith("network") else {"resize": "network"})
    for field, value in asked.items():
        if recorded[field] != value:
            raise ValueError(
                f"{statistics.path} holds statistics of {field} {recorded[field]!r}, but the "
                f"features are of {value!r}: give or compute a reference with the same {field}"
            )


def _fault(moments: Moments | Gaussian) -> str:
    """Why these are no mean [d] and covariance [d, d] of features, or ""."""
    mean, covariance = moments.mean, moments.covariance
    if mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
        return f"a mean {mean.shape} and a covariance {covariance.shape} do not fit each other"
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        return "some numbers are not finite"
    if not np.allclose(covariance, covariance.T, atol=1e-6 * np.abs(covariance).max()):
        return "the covariance is not symmetric"
    if (covariance.diagonal() < 0).any():
        return "the covariance has a negative variance"
    return ""


def _own(path: pathlib.Path, stored: Any) -> Statistics:
    """The statistics in a file that `save_statistics` wrote."""
    version, fields = json.loads(str(stored["identity"]))
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, this is {VERSION}: compute it again")
    identity = Identity(**fields)
    found = Moments(identity.num, stored["mean"], stored["scatter"])
    return Statistics(found, stored["features"], identity, str(path))
