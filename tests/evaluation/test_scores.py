"""All metrics at once: the same numbers as one by one, under the names they have earned."""

import numpy as np
import pytest

from cheapscale.evaluation import coverage, fid, scores
from cheapscale.evaluation.memorisation import nearest_features
from cheapscale.evaluation.naming import INCEPTION_SHA256
from cheapscale.evaluation.statistics import Identity, Statistics

RNG = np.random.default_rng(0)
REAL, FAKE, TRAIN = (RNG.normal(size=(n, 6)).astype(np.float32) for n in (60, 40, 80))
LOGITS = RNG.normal(size=(40, 5))


def _reference(features=REAL, **identity):
    fields = {"data": "d", "split": "test", "resolution": 8, "num": len(features)}
    fields |= {"network": "resnet56", "sha256": "abc"}
    return Statistics(fid.moments(features), features, Identity(**(fields | identity)), "real.npz")


def test_every_number_is_that_of_its_own_function():
    found = scores.scores(
        FAKE, _reference(), network="resnet56", sha256="abc", metrics=scores.METRICS,
        logits=LOGITS, train_features=TRAIN,
    )  # fmt: skip
    frechet, is_like = fid.frechet(FAKE, REAL), fid.classifier_splits(LOGITS)
    prdc = coverage.prdc(REAL, FAKE, ks=(3, 5))
    expected = {
        "num": 40,
        "num_reference": 60,
        "fd_resnet56": frechet.distance,
        "fd_resnet56_bias": frechet.bias,
        "kid_resnet56": fid.kernel_distance(FAKE, REAL),
        "score_resnet56": is_like.mean,
        "score_resnet56_std": is_like.std,
        "memorisation_resnet56": nearest_features(FAKE, TRAIN).distance.mean(),
    }
    for k in (3, 5):
        expected |= {f"{name}_resnet56_k{k}": v for name, v in prdc[k]._asdict().items()}
    assert found.pop("kid_resnet56_std") is None
    (warning,) = found.pop("warnings")
    assert warning.startswith("kid_resnet56 is over all pairs: 40 samples are fewer than")
    assert found == pytest.approx(expected)


def test_kernel_distance_takes_published_subsets_where_there_are_enough(monkeypatch):
    monkeypatch.setattr(scores, "SUBSET_SIZE", 30)
    found = scores.scores(FAKE, _reference(), network="resnet56", sha256="abc", metrics=["kid"])
    expected = fid.kernel_subsets(FAKE, REAL, subsets=100, subset_size=30)
    assert (found["kid_resnet56"], found["kid_resnet56_std"]) == expected
    assert found["warnings"] == []


def test_names_are_earned_and_marked():
    moments = fid.moments(REAL)
    published = Statistics(fid.Gaussian(moments.mean, moments.covariance), None, None, "edm.npz")
    options = {"sha256": INCEPTION_SHA256, "metrics": ["fd"]}
    found = scores.scores(FAKE, published, network="inception_v3", **options)
    assert {"fid", "fid_bias"} < set(found) and found["num_reference"] is None
    marked = scores.scores(FAKE, published, network="inception_v3(used in the loss)", **options)
    assert "fid(used in the loss)" in marked and "fid" not in marked
    assert marked["fid(used in the loss)"] == found["fid"]
    patches = _reference(variant="patch 4 x 3 seed 0")
    found = scores.scores(
        FAKE, patches, network="resnet56", sha256="abc", metrics=["fd"], variant="patch"
    )
    assert "pfd_resnet56" in found


def test_too_few_samples_are_warned_about():
    found = scores.scores(FAKE[:5], _reference(), network="resnet56", sha256="abc", metrics=["fd"])
    assert "5 samples for 6 dimensions" in found["warnings"][0]


def test_what_cannot_be_computed_as_asked_is_refused():
    published = Statistics(fid.Gaussian(np.zeros(6), np.eye(6)), None, None, "edm.npz")
    cases = {
        r"unknown metrics \['psnr'\]": {"metrics": ["fd", "psnr"]},
        "1 sample is too few": {"features": FAKE[:1]},
        "row 3 of 40 features": {"features": np.where(np.arange(40)[:, None] == 3, np.inf, FAKE)},
        "compare with real images: give a reference": {"reference": None},
        "statistics of resnet56 but the features are clip's": {"network": "clip"},
        "not def: compute the reference again": {"sha256": "def"},
        "6 dimensions but the features have 4": {"features": FAKE[:, :4]},
        "of whole images but the features are of base ones": {"variant": "base"},
        "edm.npz holds moments only": {"reference": published, "network": "inception_v3"},
        "score needs logits": {"metrics": ["score"]},
        "39 logits for 40 features": {"metrics": ["score"], "logits": LOGITS[1:]},
        "memorisation needs the features of training images": {"metrics": ["memorisation"]},
    }
    for message, change in cases.items():
        options = {"features": FAKE, "reference": _reference(), "network": "resnet56"}
        options |= {"sha256": "abc"} | change
        with pytest.raises(ValueError, match=message):
            scores.scores(options.pop("features"), options.pop("reference"), **options)
