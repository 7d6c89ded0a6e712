"""Several metrics of one set of features against reference statistics, as one plain dict.

Features and logits may come from shards of a job, in order: nothing here knows of images or
networks except by name. Numbers are named by `naming`; what could not be computed as asked is
refused, and what must be read with care is said under "warnings".
"""

from collections.abc import Sequence

import numpy as np

from cheapscale.evaluation.coverage import KS, prdc
from cheapscale.evaluation.fid import (
    check_features,
    classifier_splits,
    frechet,
    kernel_distance,
    kernel_subsets,
    moments,
)
from cheapscale.evaluation.memorisation import nearest_features
from cheapscale.evaluation.naming import metric_name, suffixed
from cheapscale.evaluation.statistics import Statistics, check_match

METRICS = ("fd", "kid", "score", "prdc", "memorisation")
SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10


def scores(
    features: np.ndarray,
    reference: Statistics | None = None,
    *,
    network: str,
    sha256: str = "",
    metrics: Sequence[str] = ("fd", "kid", "prdc"),
    logits: np.ndarray | None = None,
    train_features: np.ndarray | None = None,
    ks: Sequence[int] = KS,
    variant: str = "",
    resize: str = "network",
) -> dict:
    """Metrics of generated features [n, d].

    Args:
        reference: of real images in the same network. "fd" needs its moments, "kid" and "prdc" its
            features; "score" and "memorisation" need none.
        network, sha256: of the features; with a mark in brackets ("(used in the loss)") it goes
            into the names.
        logits: [n, classes], for "score". train_features: [m, d], for "memorisation".
        ks: neighbours of precision, recall, density and coverage.
        variant: "patch" or "base", into the names of the distances. resize: how the images were
            brought to the network's input; "clean" and "tf1" go into the names.

    Returns:
        num, num_reference (None where a published file does not say), and by `naming`:
        fd, and <fd>_bias, the bias expected at these sizes; kid and <kid>_std over 100 subsets of
        1000, or on smaller sets the distance over all pairs, with <kid>_std None; score and
        <score>_std; precision_k3 ... coverage_k5; memorisation, the mean distance to the nearest
        training image. "warnings": a list of sentences.
    """
    features = np.asarray(features)
    check_features(features)
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown or not metrics:
        raise ValueError(f"unknown metrics {unknown}: choose some of {METRICS}")
    if len(features) < 2:
        raise ValueError(f"{len(features)} sample is too few to measure: give at least 2")
    _check_inputs(features, reference, network, sha256, metrics, logits, train_features, variant)

    shown = network if resize == "network" else f"{network}({resize})"

    def name(kind, suffix=""):
        return suffixed(metric_name(kind, shown, sha256, variant=variant), suffix)

    result: dict = {"num": len(features)}
    warnings = []
    if reference is not None:
        result["num_reference"] = reference.moments.n
    if "fd" in metrics:
        distance = frechet(moments(features), reference.moments)
        result[name("fd")] = distance.distance
        result[name("fd", "_bias")] = distance.bias
        warnings += [distance.warning] if distance.warning else []
    if "kid" in metrics:
        fewest = min(len(features), len(reference.features))
        if fewest >= SUBSET_SIZE:
            found = kernel_subsets(
                features, reference.features, subsets=SUBSETS, subset_size=SUBSET_SIZE
            )
            result |= {name("kid"): found.mean, name("kid", "_std"): found.std}
        else:
            result |= {
                name("kid"): kernel_distance(features, reference.features),
                name("kid", "_std"): None,
            }
            warnings.append(
                f"{name('kid')} is over all pairs: {fewest} samples are fewer than the "
                f"{SUBSET_SIZE} of a published subset"
            )
    if "score" in metrics:
        found = classifier_splits(logits, splits=min(SPLITS, len(logits)))
        result |= {name("score"): found.mean, name("score", "_std"): found.std}
    if "prdc" in metrics:
        for k, found in prdc(reference.features, features, ks=ks).items():
            result |= {name(kind, f"_k{k}"): v for kind, v in found._asdict().items()}
    if "memorisation" in metrics:
        distance = nearest_features(features, train_features).distance
        result[name("memorisation")] = float(distance.mean())
    return result | {"warnings": warnings}


def _check_inputs(features, reference, network, sha256, metrics, logits, train_features, variant):
    compared = [m for m in ("fd", "kid", "prdc") if m in metrics]
    if compared and reference is None:
        raise ValueError(f"metrics {compared} compare with real images: give a reference")
    if reference is not None:
        base = network.partition("(used")[0]
        check_match(
            reference,
            network=base,
            sha256=sha256,
            dimension=features.shape[1],
            variant=variant,
        )
        needing = [m for m in ("kid", "prdc") if m in metrics]
        if needing and reference.features is None:
            raise ValueError(
                f"metrics {needing} need the features of real images and {reference.path} holds "
                "moments only: compute a reference from the images, or ask for fd"
            )
    if "score" in metrics:
        if logits is None:
            raise ValueError(f"score needs logits and {network} gave none: choose other metrics")
        if len(logits) != len(features):
            raise ValueError(f"{len(logits)} logits for {len(features)} features: give all")
    if "memorisation" in metrics and train_features is None:
        raise ValueError("memorisation needs the features of training images: give them")
