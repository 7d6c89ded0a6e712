"""Named metrics of generated images against real images, in the features of one network.

`evaluate` takes images, embeds them and calls `scores`. The job behind launch.evaluate
(evaluation.job) embeds shard by shard and calls the same `scores`. `naming` names the numbers: fid,
kid and is if the published Inception weights computed the features, else fd_<network>,
kid_<network>, score_<network>, precision_<network>_k3 ...
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from cheapscale.data.pixels import pictures, to_uint8
from cheapscale.evaluation.coverage import KS, nearest, prdc
from cheapscale.evaluation.embedding import embed, outputs
from cheapscale.evaluation.fid import (
    check_features,
    classifier_splits,
    frechet,
    kernel_distance,
    kernel_subsets,
    moments,
)
from cheapscale.evaluation.image_sets import choice, chosen_images
from cheapscale.evaluation.naming import metric_name, suffixed
from cheapscale.evaluation.statistics import (
    Identity,
    Statistics,
    check_match,
    load_statistics,
    reference_statistics,
)
from cheapscale.features.network import FeatureNetwork

METRICS = ("fd", "kid", "score", "prdc", "memorisation", "floor")
SUBSETS, SUBSET_SIZE = 100, 1000  # the usual protocol of KID (torch-fidelity's defaults)
SPLITS = 10  # the usual protocol of the inception score


def evaluate(
    images: np.ndarray | jax.Array | Iterable[Any],
    reference: Any,
    network: FeatureNetwork,
    *,
    train: Any = None,
    metrics: Sequence[str] = (),
    used_in_loss: Iterable[str] | Mapping[str, str] = (),
    insist: bool = False,
    num_reference: int = 5000,
    num_train: int = 10_000,
    batch_size: int = 250,
    resize: str = "network",
) -> dict[str, float]:
    """{metric: number} of generated images; warnings are logged.

    Args:
        images: uint8 or float in [-1, 1] [n, R, R, 3], or an iterable of such batches. Floats are
            truncated to eight bits, as real images are stored.
        reference: real images (an array or a source of data.sources, preferably a held-out split),
            or statistics of them (see `statistics_of`).
        network: must not have been part of a training loss; see `checked_name`.
        train: source or array of training images, for "memorisation" and "floor".
        metrics: some of METRICS; default: all but "score" whose inputs are given, and "prdc" for
            more images than its neighbours.
        used_in_loss, insist: see `checked_name`.
        num_reference, num_train: limits of the number of images read from a source; a larger source
            is reduced to a fixed random choice. A copy of a training image outside the choice is
            not detected.

    Returns the numbers that `scores` describes.
    """
    name = checked_name(network, used_in_loss, insist=insist)
    images = gather(images)
    options = {"batch_size": batch_size, "resize": resize}
    real = statistics_of(reference, network, num=num_reference, **options)
    if not metrics:
        metrics = ("fd", "kid") if real.features is not None else ("fd",)
        if real.features is not None and min(len(images), len(real.features)) > max(KS):
            metrics += ("prdc",)
        metrics = (*metrics, *(("memorisation", "floor") if train is not None else ()))
    resolution = images.shape[1]
    check_match(real, network=network.name, sha256=network.sha256, resolution=resolution)
    known = unseen = None
    if {"memorisation", "floor"} & set(metrics):
        known = statistics_of(train, network, num=num_train, **options).features
        # An array has no ids, so all of it counts as unseen by the network.
        given = hasattr(train, "ndim")
        unseen = known if given else known[unseen_rows(network, len(train), num_train)]
    found = outputs(network, images, logits="score" in metrics, **options)
    numbers, warnings = scores(
        found["features"],
        real,
        network=name,
        sha256=network.sha256,
        metrics=metrics,
        logits=found.get("logits"),
        train=known,
        unseen=unseen,
        resize=resize,
    )
    for warning in warnings:
        logging.warning(warning)
    return numbers


def scores(
    features: np.ndarray,
    reference: Statistics | None = None,
    *,
    network: str,
    sha256: str = "",
    metrics: Sequence[str] = ("fd", "kid", "prdc"),
    logits: np.ndarray | None = None,
    train: np.ndarray | None = None,
    unseen: np.ndarray | None = None,
    variant: str = "",
    resize: str = "network",
) -> tuple[dict[str, Any], list[str]]:
    """(numbers by name, warnings) of generated features [n, d].

    Args:
        reference: statistics of real images in the same network. "fd" needs moments; "kid", "prdc"
            and "floor" also need features; "score" and "memorisation" need no reference.
        network, sha256: name and hash of the feature network. A mark in brackets behind the name
            ("(used in the loss)") becomes part of the metric names.
        logits: [n, classes], for "score".
        train: features of training images [m, d], for "memorisation".
        unseen: features of those training images that the network was not fitted on, for "floor".
        variant, resize: "patch" or "base", and "clean" or "tf1", become part of the metric names.

    Returns num, num_reference (None for a published file), and by name
        fd, fd_bias              Frechet distance, and its expected bias at these set sizes
        kid, kid_std             kernel distance over 100 subsets of 1000; for smaller sets over all
                                 pairs, without kid_std
        score, score_std         classifier score over 10 splits
        precision_k3 ... coverage_k5
        memorisation             mean distance of the samples to their nearest training images
        memorisation_real        the same for the real images; a generator that memorises has a far
                                 smaller memorisation
        fd_floor, kid_floor ...  the distances of real training images, as many as were generated,
                                 from the reference: the values of a perfect generator
    """
    _check_needs(features, reference, network, sha256, metrics, variant)
    shared = {"network": network, "sha256": sha256, "variant": variant, "resize": resize}

    def name(kind: str, suffix: str = "") -> str:
        shown = network if resize == "network" else f"{network}({resize})"
        return suffixed(metric_name(kind, shown, sha256, variant=variant), suffix)

    result: dict[str, Any] = {"num": len(features)}
    warnings = []
    if reference is not None:
        result["num_reference"] = reference.moments.n
    if "fd" in metrics:
        found = frechet(moments(features), reference.moments)
        result |= {name("fd"): found.distance, name("fd", "_bias"): found.bias}
        warnings += [found.warning] if found.warning else []
    if "kid" in metrics:
        numbers = kernel_numbers(features, reference.features)
        result |= {name("kid", suffix): value for suffix, value in numbers.items()}
        if "_std" not in numbers:
            warnings.append(
                f"{name('kid')} is over all pairs: {min(len(features), len(reference.features))} "
                f"samples are fewer than the {SUBSET_SIZE} of a published subset"
            )
    if "score" in metrics:
        mean, std = classifier_splits(logits, splits=min(SPLITS, len(logits)))
        result |= {name("score"): mean, name("score", "_std"): std}
    if "prdc" in metrics:
        for k, found in prdc(reference.features, features, ks=KS).items():
            result |= {name(kind, f"_k{k}"): value for kind, value in found._asdict().items()}
    if "memorisation" in metrics:
        result[name("memorisation")] = float(nearest(features, train)[0].mean())
        if reference is not None and reference.features is not None:
            distance, _ = nearest(reference.features, train)
            result[name("memorisation", "_real")] = float(distance.mean())
    if "floor" in metrics:
        # The bias of a Frechet distance depends on n, so the floor uses as many images as were
        # generated.
        floor, _ = scores(unseen[: len(features)], reference, metrics=("fd", "kid"), **shared)
        counts = ("num", "num_reference")
        result |= {suffixed(key, "_floor"): v for key, v in floor.items() if key not in counts}
        if len(unseen) < len(features):
            warnings.append(
                f"the floor in {network} uses {len(unseen)} training images, the score "
                f"{len(features)} samples: subtract the bias of each before comparing them"
            )
    return result, warnings


def kernel_numbers(features: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """{"": kernel distance, "_std": its deviation over subsets}; small sets have no "_std"."""
    if min(len(features), len(real)) < SUBSET_SIZE:
        return {"": kernel_distance(features, real)}
    mean, std = kernel_subsets(features, real, subsets=SUBSETS, subset_size=SUBSET_SIZE)
    return {"": mean, "_std": std}


def _check_needs(features, reference, network, sha256, metrics, variant) -> None:
    """Raise ValueError if an input of `scores` is missing or does not fit the others."""
    check_features(features)
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise ValueError(f"unknown metrics {unknown}: choose some of {METRICS}")
    if len(features) < 2:
        raise ValueError(f"{len(features)} sample is too few to measure: give at least 2")
    compared = [kind for kind in ("fd", "kid", "prdc", "floor") if kind in metrics]
    if compared and reference is None:
        raise ValueError(f"metrics {compared} compare with real images: give a reference")
    if reference is not None:
        check_match(
            reference,
            network=network.partition("(used")[0],
            sha256=sha256,
            dimension=features.shape[1],
            variant=variant,
        )
        needing = [kind for kind in ("kid", "prdc", "floor") if kind in metrics]
        if needing and reference.features is None:
            raise ValueError(
                f"metrics {needing} need the features of real images and {reference.path} holds "
                "moments only: compute a reference from the images, or ask for fd"
            )


def checked_name(
    network: FeatureNetwork,
    used_in_loss: Iterable[str] | Mapping[str, str],
    *,
    insist: bool = False,
) -> str:
    """The network's name in metrics; raises ValueError if a training loss used the network.

    Training against a network lowers distances in its features without better images.

    used_in_loss: names, or {name: sha256} as in "frozen_networks" of a run's summary. insist: mark
    such a network in the name instead of raising an error.
    """
    hashes = dict(used_in_loss) if isinstance(used_in_loss, Mapping) else {}
    same_weights = network.sha256 and network.sha256 in hashes.values()
    if network.name not in set(used_in_loss) and not same_weights:
        return network.name
    if insist:
        return f"{network.name}(used in the loss)"
    raise ValueError(
        f"{network.name} was part of this run's training loss, so it cannot measure it: use "
        "another network, or insist=True (--insist), which marks the name of the metric"
    )


def statistics_of(
    reference: Any,
    network: FeatureNetwork,
    *,
    num: int = 5000,
    batch_size: int = 250,
    resize: str = "network",
) -> Statistics:
    """Statistics of real images in the features of a network.

    reference: Statistics; the path of an .npz, published or written by this package; images, uint8
    or float [n, R, R, 3]; or a source of data.sources. Of a source at most `num` images are read, a
    fixed random choice, and the statistics are cached.
    """
    options = {"batch_size": batch_size, "resize": resize}
    if isinstance(reference, Statistics):
        return reference
    if isinstance(reference, str | pathlib.Path):
        return load_statistics(reference)
    if hasattr(reference, "ndim"):
        images = gather(reference)
        features = embed(network, images, **options)
        identity = identity_of(None, len(images), images.shape[1], network, resize=resize)
        return Statistics(moments(features), features, identity, "the reference")
    chosen = chosen_images(reference, choice(len(reference), num))

    def batches():
        for start in range(0, chosen.num, 1000):
            ids = np.arange(start, min(start + 1000, chosen.num))
            yield embed(network, chosen.read(ids)[0], **options)

    identity = identity_of(reference, chosen.num, chosen.resolution, network, resize=resize)
    return reference_statistics(identity, batches)


def identity_of(
    source: Any,
    num: int,
    resolution: int,
    network: FeatureNetwork,
    *,
    resize: str = "network",
    variant: str = "",
) -> Identity:
    """The identity of the statistics of `num` images of a source; source is None for an array."""
    return Identity(
        data=source.fingerprint() if source is not None else "",
        split=source.split if source is not None else "",
        resolution=resolution,
        num=num,
        network=network.name,
        sha256=network.sha256,
        resize=resize_name(network, resize),
        variant=variant,
    )


def resize_name(network: FeatureNetwork, resize: str) -> str:
    """The entry `resize` of an identity: the resizing, the network's variant and input size."""
    return f"{resize} {network.variant} {network.input_size or ''}".strip()


def unseen_rows(network: FeatureNetwork, length: int, num: int) -> np.ndarray:
    """The rows of `choice(length, num)` whose training images the network was not fitted on.

    The fitted classifier (features.fitted) was trained on the images with even ids. Its features
    separate them from held-out images, so a floor computed from them would be too high.
    """
    ids = choice(length, num)
    fitted_here = network.name.startswith("classifier")
    return np.flatnonzero(ids % 2 == 1) if fitted_here else np.arange(len(ids))


def gather(images: np.ndarray | jax.Array | Iterable[Any]) -> np.ndarray:
    """Images as `pixels.pictures` takes them, or an iterable of batches, as one uint8 array."""
    batches = [images] if hasattr(images, "ndim") else images
    checked = [pictures(batch) for batch in batches]
    return np.concatenate([b if b.dtype == np.uint8 else to_uint8(b) for b in checked])
