"""Reference statistics: computed once, read from the cache, and matched by their identity."""

import numpy as np
import pytest

from cheapscale.evaluation import fid, statistics
from cheapscale.evaluation.statistics import (
    Identity,
    check_match,
    load_statistics,
    reference_statistics,
)

FEATURES = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
IDENTITY = Identity("abc123", "test", 16, 30, "resnet56", "f" * 64)


def frechet_distance(a, b):
    return fid.frechet(a, b).distance


def test_a_second_call_reads_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHEAPSCALE_CACHE", str(tmp_path))
    first = reference_statistics(IDENTITY, lambda: FEATURES)
    again = reference_statistics(IDENTITY, lambda: pytest.fail("the cache was not read"))
    assert first.path.startswith(str(tmp_path / "statistics" / "resnet56-16px-"))
    for found in (first, again):
        np.testing.assert_array_equal(found.features, FEATURES)
        assert found.identity == IDENTITY and found.moments.n == 30
        assert frechet_distance(found.moments, FEATURES) == pytest.approx(0, abs=1e-10)
    assert len(list((tmp_path / "statistics").iterdir())) == 1  # no temporary file left


def test_every_field_of_the_identity_counts():
    others = [
        {"data": "abd123"}, {"split": "train"}, {"resolution": 32}, {"num": 29},
        {"network": "resnet20"}, {"sha256": "e" * 64}, {"resize": "clean"},
        {"variant": "patch 8 x 3 seed 0"},
    ]  # fmt: skip
    assert [set(o) for o in others] == [{name} for name in Identity._fields]
    digests = {IDENTITY._replace(**other).digest() for other in others} | {IDENTITY.digest()}
    assert len(digests) == 9


def test_a_file_with_another_identity_is_refused(tmp_path):
    path = tmp_path / "reference.npz"
    statistics.save_statistics(path, FEATURES, IDENTITY)
    found = load_statistics(path, identity=IDENTITY)
    with pytest.raises(ValueError, match="not Identity.*delete it"):
        load_statistics(path, identity=IDENTITY._replace(split="train"))
    own = {"sha256": "f" * 64, "resolution": 16, "resize": "network"}
    check_match(found, **own)
    for change in ({"sha256": "e" * 64}, {"resolution": 64}, {"resize": "clean"}):
        ((what, value),) = change.items()
        with pytest.raises(ValueError, match=f"of {what} .*, but the features are of '?{value}"):
            check_match(found, **own | change)


def test_published_files_of_both_kinds(tmp_path):
    mean, covariance = FEATURES.mean(0), np.cov(FEATURES.T)
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), np.uint8)
    edm, adm = tmp_path / "edm.npz", tmp_path / "adm.npz"
    np.savez(edm, mu=mean, sigma=covariance)
    np.savez(
        adm, mu=mean, sigma=covariance, mu_s=np.zeros(7), sigma_s=np.zeros((7, 7)), arr_0=images
    )
    for path in (edm, adm):
        found = load_statistics(path)
        own = {"sha256": "any", "resolution": 64}
        check_match(found, resize="network torch_fidelity 299", **own)
        assert found.features is None and found.identity is None
        assert frechet_distance(FEATURES, found.moments) == pytest.approx(0, abs=1e-6)
        with pytest.raises(ValueError, match="resize 'network', but .* 'clean 299'"):
            check_match(found, resize="clean 299", **own)


def test_files_that_hold_no_statistics_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no reference statistics at"):
        load_statistics(tmp_path / "none.npz")
    (tmp_path / "reference.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="no reference statistics at"):
        load_statistics(tmp_path / "reference.pkl")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match="holds images but no mu and sigma"):
        load_statistics(tmp_path / "other.npz")


@pytest.mark.parametrize(
    "mean, covariance, said",
    [
        (np.zeros(3), np.zeros((4, 4)), "do not fit each other"),
        (np.zeros((1, 4)), np.eye(4), "do not fit each other"),
        (np.zeros(0), np.zeros((0, 0)), "do not fit each other"),
        (np.full(4, np.nan), np.eye(4), "not finite"),
        (np.zeros(4), np.full((4, 4), np.inf), "not finite"),
        (np.zeros(4), np.triu(np.ones((4, 4))), "not symmetric"),
        (np.zeros(4), -np.eye(4), "negative variance"),
        (np.zeros(4), np.eye(4) * 1j, "complex128: get a file of real numbers"),
        (np.asarray(["a"] * 4), np.eye(4), "<U1 and float64: get a file of real"),
    ],
)
def test_arrays_that_are_no_mean_and_covariance_are_refused(tmp_path, mean, covariance, said):
    path = tmp_path / "reference.npz"
    np.savez(path, mu=mean, sigma=covariance)
    with pytest.raises(ValueError, match=f"reference.npz .*{said}"):
        load_statistics(path)


def test_features_that_are_not_finite_are_not_written(tmp_path):
    path = tmp_path / "reference.npz"
    holed = np.where(np.arange(30)[:, None] == 7, np.nan, FEATURES)
    with pytest.raises(ValueError, match="row 7 of 30 features"):
        statistics.save_statistics(path, holed, IDENTITY)
    assert not path.exists()
