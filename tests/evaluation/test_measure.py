"""`scores`: every number equals the result of its own function."""

import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.data.pixels import from_uint8, to_uint8
from cheapscale.evaluation import coverage, fid, measure
from cheapscale.evaluation.embedding import embed
from cheapscale.evaluation.measure import scores
from cheapscale.evaluation.naming import INCEPTION_SHA256
from cheapscale.evaluation.statistics import Identity, Statistics
from cheapscale.features.network import FeatureNetwork

RNG = np.random.default_rng(0)
REAL, FAKE, TRAIN = (RNG.normal(size=(n, 6)).astype(np.float32) for n in (60, 40, 80))
LOGITS = RNG.normal(size=(40, 5))


def _reference(features=REAL, **identity):
    fields = {"data": "d", "split": "test", "resolution": 8, "num": len(features)}
    fields |= {"network": "resnet56", "sha256": "abc"}
    return Statistics(fid.moments(features), features, Identity(**(fields | identity)), "real.npz")


def test_every_number_equals_its_own_function():
    found, warnings = scores(
        FAKE, _reference(), network="resnet56", sha256="abc", metrics=measure.METRICS,
        logits=LOGITS, train=TRAIN, unseen=TRAIN[:50],
    )  # fmt: skip
    frechet, is_like = fid.frechet(FAKE, REAL), fid.classifier_splits(LOGITS)
    floor = fid.frechet(TRAIN[:40], REAL)  # as many as were generated
    expected = {
        "num": 40,
        "num_reference": 60,
        "fd_resnet56": frechet.distance,
        "fd_resnet56_bias": frechet.bias,
        "kid_resnet56": fid.kernel_distance(FAKE, REAL),
        "score_resnet56": is_like.mean,
        "score_resnet56_std": is_like.std,
        "memorisation_resnet56": coverage.nearest(FAKE, TRAIN)[0].mean(),
        "memorisation_resnet56_real": coverage.nearest(REAL, TRAIN)[0].mean(),
        "fd_resnet56_floor": floor.distance,
        "fd_resnet56_bias_floor": floor.bias,
        "kid_resnet56_floor": fid.kernel_distance(TRAIN[:40], REAL),
    }
    for k, values in coverage.prdc(REAL, FAKE, ks=(3, 5)).items():
        expected |= {f"{name}_resnet56_k{k}": v for name, v in values._asdict().items()}
    (warning,) = warnings
    assert warning.startswith("kid_resnet56 is over all pairs: 40 samples are fewer than")
    assert found == pytest.approx(expected)


def test_kernel_distance_uses_subsets_of_large_sets(monkeypatch):
    monkeypatch.setattr(measure, "SUBSET_SIZE", 30)
    found, warnings = scores(FAKE, _reference(), network="resnet56", sha256="abc", metrics=["kid"])
    expected = fid.kernel_subsets(FAKE, REAL, subsets=100, subset_size=30)
    assert (found["kid_resnet56"], found["kid_resnet56_std"]) == expected
    assert not warnings


def test_names_depend_on_the_weights_and_carry_marks():
    moments = fid.moments(REAL)
    published = Statistics(fid.Gaussian(moments.mean, moments.covariance), None, None, "edm.npz")
    options = {"sha256": INCEPTION_SHA256, "metrics": ["fd"]}
    found, _ = scores(FAKE, published, network="inception_v3", **options)
    assert {"fid", "fid_bias"} < set(found) and found["num_reference"] is None
    marked, _ = scores(FAKE, published, network="inception_v3(used in the loss)", **options)
    assert "fid(used in the loss)" in marked and "fid" not in marked
    assert marked["fid(used in the loss)"] == found["fid"]
    patches = _reference(variant="patch 4 x 3 seed 0")
    found, _ = scores(
        FAKE, patches, network="resnet56", sha256="abc", metrics=["fd"], variant="patch"
    )
    assert "pfd_resnet56" in found


def test_too_few_samples_are_warned_about():
    _, (warning,) = scores(FAKE[:5], _reference(), network="resnet56", sha256="abc", metrics=["fd"])
    assert "5 samples for 6 dimensions" in warning


def _outputs(params, x):
    """A network of 12 features: the means of the four quadrants of each channel."""
    b, h, w, c = x.shape
    pooled = x.reshape(b, 2, h // 2, 2, w // 2, c).mean((2, 4)).reshape(b, 4 * c)
    return {"features": pooled * params}


NETWORK = FeatureNetwork(
    "quadrants", lambda params, x: (x,), jnp.float32(3.0), sha256="abc", outputs=_outputs
)


def test_features_are_those_of_the_truncated_images():
    images = RNG.uniform(-1, 1, (9, 8, 8, 3)).astype(np.float32)
    seen = embed(NETWORK, to_uint8(images), batch_size=4)
    by_hand = _outputs(3.0, jnp.asarray(np.trunc((images + 1) * 127.5) / 127.5 - 1))["features"]
    # the 1e-3 added before truncation moves the features by 1.5e-3, rounding by ten times as much
    np.testing.assert_allclose(seen, by_hand, atol=3e-3)
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(from_uint8(levels)), levels)


@pytest.mark.parametrize("used", [{"quadrants": ""}, {"another": "abc"}])
def test_a_network_of_the_loss_may_not_measure(used):
    with pytest.raises(ValueError, match="training loss"):
        measure.checked_name(NETWORK, used)
    assert measure.checked_name(NETWORK, used, insist=True) == "quadrants(used in the loss)"
    assert measure.checked_name(NETWORK, {"vgg": "def"}) == "quadrants"


def test_networks_and_images_that_cannot_be_embedded_are_refused():
    with pytest.raises(ValueError, match="no pooled features"):
        embed(NETWORK._replace(outputs=None), np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="takes uint8"):
        embed(NETWORK, np.zeros((1, 8, 8, 3)))
