"""Reference statistics: what real images look like to a network, computed once and kept.

A statistic is known by its `Identity`: data set, split, resolution, number of images, network,
hash of its weights, resizing. It is kept in $CHEAPSCALE_CACHE/statistics (default
~/.cache/cheapscale) under a hash of that, as one .npz that holds the identity as well; a file that
says it is something else is refused.

Published files load too: ADM's (mu, sigma, mu_s, sigma_s and the images arr_0) and EDM's (mu,
sigma). Both hold features of the original Inception network, and say so nowhere.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from cheapscale.data.digest import digest
from cheapscale.data.files import whole_or_nothing
from cheapscale.evaluation.fid import Gaussian, Moments, check_features, moments

VERSION = 1  # of the file and of everything that changes the numbers but not the identity
FOREIGN_NETWORK = "inception_v3"


class Identity(NamedTuple):
    """What a statistic is of.

    data: the source's fingerprint (which images, in which order). num: how many of them.
    network, sha256: name and hash of the feature network. resize: how images were brought to its
    input ("network": by the network itself, or a mode of evaluation.resize). variant: "" or what
    was done to the images, for example "patch 64 x 3 seed 0" or "base 16".
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
    """Moments of one set, and its features [n, d] float32 where they were kept (kernel distance,
    precision and recall need them). identity: None for a published file. path: where it lies."""

    moments: Moments | Gaussian
    features: np.ndarray | None
    identity: Identity | None
    path: str


def reference_statistics(
    identity: Identity,
    compute: Callable[[], Iterable[np.ndarray]],
    *,
    cache_dir: str | pathlib.Path | None = None,
) -> Statistics:
    """The statistics `identity`, from the cache or from the batches [n_i, d] of `compute()`."""
    path = cache_path(identity, cache_dir)
    if not path.exists():
        features = np.concatenate([np.asarray(batch, np.float32) for batch in compute()])
        save_statistics(path, features, identity)
    return load_statistics(path, identity=identity)


def cache_path(identity: Identity, cache_dir: str | pathlib.Path | None = None) -> pathlib.Path:
    """Where the statistics `identity` are kept."""
    if cache_dir is None:
        cache_dir = os.environ.get("CHEAPSCALE_CACHE", "~/.cache/cheapscale")
    name = f"{identity.network}-{identity.resolution}px-{identity.digest()}.npz"
    return pathlib.Path(cache_dir).expanduser() / "statistics" / name


def save_statistics(path: str | pathlib.Path, features: np.ndarray, identity: Identity) -> None:
    """Write moments and features [n, d]; the file appears whole or not at all."""
    path = pathlib.Path(path)
    check_features(features)
    if len(features) != identity.num:
        raise ValueError(
            f"{len(features)} features were computed for statistics of {identity.num} images"
        )
    found = moments(features)
    with whole_or_nothing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            identity=json.dumps([VERSION, identity._asdict()]),
            mean=found.mean,
            scatter=found.scatter,
            features=np.asarray(features, np.float32),
        )


def load_statistics(
    path: str | pathlib.Path,
    *,
    identity: Identity | None = None,
    network: str | None = None,
    sha256: str | None = None,
    dimension: int | None = None,
    variant: str | None = None,
) -> Statistics:
    """Read our own statistics, or a published .npz.

    Args:
        identity: refuse any other.
        network, sha256, dimension, variant: of the features it will be compared with; see
            `check_match`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"no reference statistics at {path}: give a .npz file that exists")
    if path.suffix != ".npz":
        raise ValueError(f"{path} is not a .npz file: give one of ours, or ADM's or EDM's")
    with np.load(path) as stored:
        if "identity" in stored:
            found = _own(path, stored)
        elif "mu" in stored and "sigma" in stored:
            mean, covariance = (np.asarray(stored[k], np.float64) for k in ("mu", "sigma"))
            found = Statistics(Gaussian(mean, covariance), None, None, str(path))
        else:
            raise ValueError(
                f"{path} holds {', '.join(stored.files)} but no mu and sigma: it is not a file of "
                "reference statistics"
            )
    if identity is not None and found.identity != identity:
        raise ValueError(f"{path} is of {found.identity}, not of {identity}: delete it")
    check_match(found, network=network, sha256=sha256, dimension=dimension, variant=variant)
    return found


def check_match(
    statistics: Statistics,
    *,
    network: str | None = None,
    sha256: str | None = None,
    dimension: int | None = None,
    variant: str | None = None,
    resolution: int | None = None,
    resize: str | None = None,
) -> None:
    """Refuses statistics of another network, other weights, another dimension, of patches where
    whole images are compared, or of images of another size or resized in another way, by name.

    variant: the first word of the identity's, "" for whole images. A published file says nothing
    of images and weights: there the network and its dimension are all that can be checked.
    """
    own = statistics.identity
    name = own.network if own else FOREIGN_NETWORK
    size = len(statistics.moments.mean)
    if statistics.moments.covariance.shape != (size, size):
        raise ValueError(
            f"{statistics.path}: mean {(size,)} and covariance "
            f"{statistics.moments.covariance.shape} do not fit each other: it is damaged"
        )
    if network is not None and network != name:
        raise ValueError(
            f"{statistics.path} holds statistics of {name} but the features are {network}'s: give "
            f"a reference of {network}, or measure with {name}"
        )
    if own and sha256 is not None and sha256 != own.sha256:
        raise ValueError(
            f"{statistics.path} was made with {name} weights of SHA-256 {own.sha256 or 'unknown'}, "
            f"not {sha256 or 'unknown'}: compute the reference again"
        )
    if dimension is not None and dimension != size:
        raise ValueError(
            f"{statistics.path} holds {name} statistics of {size} dimensions but the features "
            f"have {dimension}: they are of another layer or network"
        )
    kind = own.variant.partition(" ")[0] if own else ""
    if variant is not None and variant != kind:
        raise ValueError(
            f"{statistics.path} holds statistics of {kind or 'whole'} images but the features are "
            f"of {variant or 'whole'} ones: compute a reference of the same"
        )
    if own is None and resize is not None and not resize.startswith("network"):
        raise ValueError(
            f"{statistics.path} is a published file, of images that the network itself resized, "
            f"but the images are resized by {resize.split()[0]!r}: use --resize=network"
        )
    for what, asked in (("resolution", resolution), ("resize", resize)):
        if own and asked is not None and asked != getattr(own, what):
            raise ValueError(
                f"{statistics.path} is of {what} {getattr(own, what)!r} but the images are of "
                f"{asked!r}: compute a reference of the same"
            )


def _own(path, stored):
    version, fields = json.loads(str(stored["identity"]))
    if version != VERSION:
        raise ValueError(
            f"{path} was written by version {version} of the statistics, this is {VERSION}: delete "
            "it and compute them again"
        )
    identity = Identity(**fields)
    found = Moments(identity.num, stored["mean"], stored["scatter"])
    return Statistics(found, stored["features"], identity, str(path))
