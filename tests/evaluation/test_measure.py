"""`scores` and `evaluate`: every number equals the result of its own function."""

import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.data.pixels import from_uint8, to_uint8
from cheapscale.evaluation import coverage, evaluate, fid, measure
from cheapscale.evaluation.embedding import embed
from cheapscale.evaluation.image_sets import choice
from cheapscale.evaluation.measure import scores
from cheapscale.evaluation.naming import INCEPTION_SHA256
from cheapscale.evaluation.statistics import Identity, Statistics, save_statistics
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


def test_metrics_without_their_inputs_are_refused():
    published = Statistics(fid.Gaussian(np.zeros(6), np.eye(6)), None, None, "edm.npz")
    cases = {
        r"unknown metrics \['psnr'\]": {"metrics": ["fd", "psnr"]},
        "1 sample is too few": {"features": FAKE[:1]},
        "row 3 of 40 features": {"features": np.where(np.arange(40)[:, None] == 3, np.inf, FAKE)},
        "compare with real images: give a reference": {"reference": None},
        "network 'resnet56', but the features are of 'clip'": {"network": "clip"},
        "sha256 'abc', but the features are of 'def'": {"sha256": "def"},
        "dimension 6, but the features are of 4": {"features": FAKE[:, :4]},
        "variant '', but the features are of 'base'": {"variant": "base"},
        "edm.npz holds moments only": {"reference": published, "network": "inception_v3"},
    }
    for message, change in cases.items():
        options = {"features": FAKE, "reference": _reference(), "network": "resnet56"}
        options |= {"sha256": "abc"} | change
        with pytest.raises(ValueError, match=message):
            scores(options.pop("features"), options.pop("reference"), **options)


def _outputs(params, x):
    """A network of 12 features: the means of the four quadrants of each channel."""
    b, h, w, c = x.shape
    pooled = x.reshape(b, 2, h // 2, 2, w // 2, c).mean((2, 4)).reshape(b, 4 * c)
    return {"features": pooled * params}


NETWORK = FeatureNetwork(
    "quadrants", lambda params, x: (x,), jnp.float32(3.0), sha256="abc", outputs=_outputs
)


class Blobs:
    """Images of constant colour plus noise."""

    name, split, resolution, num_classes = "blobs", "test", 8, 0

    def __init__(self, n, seed, spread=0.3):
        rng = np.random.default_rng(seed)
        colour = spread * rng.normal(size=(n, 1, 1, 3))
        self.images = np.clip(colour + 0.1 * rng.normal(size=(n, 8, 8, 3)), -1, 1).astype("f4")
        self.seed = seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": np.int32(0), "id": i}

    def read(self, ids):
        return self.images[ids], np.zeros(len(ids), np.int32)

    def caption(self, i):
        return ""

    def fingerprint(self):
        return f"blobs {self.seed} {len(self)}"


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHEAPSCALE_CACHE", str(tmp_path))


def test_a_perfect_generator_scores_the_floor_and_a_bad_one_does_not():
    real, train = Blobs(300, 0), Blobs(300, 1)
    good = evaluate(Blobs(250, 2).images, real, NETWORK, train=train)
    bad = evaluate(Blobs(250, 2, spread=0.05).images, real, NETWORK, train=train)
    assert good["num"] == 250 and good["num_reference"] == 300
    fd, floor = "fd_quadrants", "fd_quadrants_floor"
    assert abs(good[fd] - good[floor]) < 0.25 < 1 < bad[fd] - bad[floor]
    assert abs(good["kid_quadrants"]) < 0.1 < bad["kid_quadrants"]
    assert good["recall_quadrants_k3"] > 0.8 > 0.3 > bad["recall_quadrants_k3"]
    memorised = good["memorisation_quadrants_real"]
    assert good["memorisation_quadrants"] == pytest.approx(memorised, rel=0.2)


def test_memorised_images_stand_out():
    train = Blobs(300, 1)
    copied = evaluate(train.images[:60], Blobs(100, 0), NETWORK, train=train)
    assert copied["memorisation_quadrants"] < 1e-3 * copied["memorisation_quadrants_real"]


def test_a_reference_is_a_source_an_array_statistics_or_a_file(tmp_path):
    images, source = Blobs(70, 3).images, Blobs(100, 0)
    expected = evaluate(images, source, NETWORK)
    kept = measure.statistics_of(source, NETWORK)
    save_statistics(tmp_path / "reference.npz", kept.features, kept.identity)
    for reference in (source.images, kept, str(tmp_path / "reference.npz")):
        assert evaluate(images, reference, NETWORK) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="resolution 8, but the features are of 16"):
        evaluate(np.zeros((4, 16, 16, 3), np.uint8), source, NETWORK)


def test_three_held_out_images_are_measured():
    found = evaluate(Blobs(20, 3).images, Blobs(3, 0), NETWORK, train=Blobs(30, 1))
    assert {"fd_quadrants", "kid_quadrants"} < set(found)
    assert not any(name.startswith("precision") for name in found)  # of 5 neighbours


def test_results_do_not_depend_on_batches():
    images, real = Blobs(70, 3).images, Blobs(100, 0)
    whole = evaluate(images, real, NETWORK, batch_size=70)
    parts = (images[i : i + 20] for i in range(0, 70, 20))
    assert whole == pytest.approx(evaluate(parts, real, NETWORK, batch_size=32), rel=1e-5)
    assert whole == pytest.approx(evaluate(to_uint8(images), real, NETWORK), rel=1e-5)


def test_features_are_those_of_the_truncated_images():
    images = Blobs(9, 4).images
    seen = embed(NETWORK, to_uint8(images), batch_size=4)
    by_hand = _outputs(3.0, jnp.asarray(np.trunc((images + 1) * 127.5) / 127.5 - 1))["features"]
    # the 1e-3 added before truncation moves the features by 1.5e-3, rounding by ten times as much
    np.testing.assert_allclose(seen, by_hand, atol=3e-3)
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(from_uint8(levels)), levels)


@pytest.mark.parametrize("used", [["quadrants"], {"quadrants": ""}, {"another": "abc"}])
def test_a_network_of_the_loss_may_not_measure(used):
    images, real = Blobs(20, 5).images, Blobs(100, 0)
    with pytest.raises(ValueError, match="training loss"):
        evaluate(images, real, NETWORK, used_in_loss=used)
    insisted = evaluate(images, real, NETWORK, used_in_loss=used, insist=True)
    assert "fd_quadrants(used in the loss)" in insisted and "fd_quadrants" not in insisted
    evaluate(images, real, NETWORK, used_in_loss={"vgg": "def"})


def test_the_floor_uses_training_images_that_the_classifier_was_not_fitted_on():
    network = NETWORK._replace(name="classifier")
    real, train = Blobs(200, 0), Blobs(300, 1)
    unseen = train.images[[i for i in choice(300, 10_000) if i % 2 == 1]]
    floor = fid.frechet(
        embed(network, to_uint8(unseen[:40])), measure.statistics_of(real, network).features
    )
    found = evaluate(Blobs(40, 2).images, real, network, train=train)
    assert found["fd_classifier_floor"] == pytest.approx(floor.distance, rel=1e-5)


def test_networks_and_images_that_cannot_be_embedded_are_refused():
    with pytest.raises(ValueError, match="no pooled features"):
        embed(NETWORK._replace(outputs=None), np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="takes uint8"):
        embed(NETWORK, np.zeros((1, 8, 8, 3)))
