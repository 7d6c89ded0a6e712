"""Named metrics of generated images against real images, in the features of one network.

`naming` names the numbers: fid, kid and is if the published Inception weights computed the
features, else fd_<network>, kid_<network>, score_<network>, precision_<network>_k3 ...
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cheapscale.evaluation.coverage import KS, nearest, prdc
from cheapscale.evaluation.fid import (
    classifier_splits,
    frechet,
    kernel_distance,
    kernel_subsets,
    moments,
)
from cheapscale.evaluation.naming import metric_name, suffixed
from cheapscale.evaluation.statistics import Statistics
from cheapscale.features.network import FeatureNetwork

METRICS = ("fd", "kid", "score", "prdc", "memorisation", "floor")
SUBSETS, SUBSET_SIZE = 100, 1000  # the usual protocol of KID (torch-fidelity's defaults)
SPLITS = 10  # the usual protocol of the inception score


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
        network, sha256, variant, resize: of the features, for the metrics' names, see `naming`.
        logits: [n, classes], for "score".
        train: features of training images [m, d], for "memorisation".
        unseen: features of those training images that the network was not fitted on, for "floor".

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


def checked_name(
    network: FeatureNetwork, used_in_loss: Mapping[str, str], *, insist: bool = False
) -> str:
    """The network's name in metrics; raises ValueError if a training loss used the network.

    Training against a network lowers distances in its features without better images.

    used_in_loss: {name: sha256}, "frozen_networks" of a run's summary. insist: mark such a network
    in the name instead of raising an error.
    """
    same_weights = network.sha256 and network.sha256 in used_in_loss.values()
    if network.name not in used_in_loss and not same_weights:
        return network.name
    if insist:
        return f"{network.name}(used in the loss)"
    raise ValueError(
        f"{network.name} was part of this run's training loss, so it cannot measure it: name "
        "another network (launch.evaluate also takes --insist, which marks the name of the metric)"
    )
