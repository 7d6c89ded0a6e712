"""Feature distances against closed forms, SciPy and a plain float64 reference."""

import functools

import numpy as np
import pytest
import scipy.linalg

from cheapscale.evaluation import fid


def frechet_distance(a, b):
    return fid.frechet(a, b).distance


def _gaussian_features(rng, n, covariance, mean):
    """Features whose sample mean and covariance are exactly those given."""
    x = rng.normal(size=(n, len(mean)))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ np.linalg.cholesky(covariance).T + np.asarray(mean)[None]


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    rng, a, b = np.random.default_rng(0), np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    mean = np.array([0.5, -1.0, 2.0])
    x = _gaussian_features(rng, 60, np.diag(a), np.zeros(3))
    y = _gaussian_features(rng, 90, np.diag(b), mean)
    expected = mean @ mean + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_of_arbitrary_covariances_agrees_with_sqrtm():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    y = rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=(1, 12))
    s, t = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(s @ t).real
    shift = x.mean(0) - y.mean(0)
    expected = shift @ shift + np.trace(s + t - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_stable_with_fewer_samples_than_dimensions():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(20, 64)).astype(np.float32)
    assert abs(frechet_distance(x, x)) < 1e-5
    turned, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    y = rng.normal(size=(20, 64))
    assert frechet_distance(x @ turned, y @ turned) == pytest.approx(
        frechet_distance(x, y), rel=1e-6
    )


def test_merged_moments_equal_moments_of_everything():
    x = (np.random.default_rng(3).normal(size=(101, 5)) + 1e4).astype(np.float32)
    parts = (fid.moments(x[i : i + 17]) for i in range(0, 101, 17))
    merged = functools.reduce(fid.merge, parts)
    assert merged.n == 101 and merged.mean.dtype == np.float64
    np.testing.assert_allclose(merged.mean, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, np.cov(x.astype(np.float64).T), rtol=1e-9)


def test_chunks_and_shards_of_any_size_give_the_moments_of_everything(monkeypatch):
    x = np.random.default_rng(7).normal(size=(300, 4)) + 1e6
    monkeypatch.setattr(fid, "CHUNK", 37)
    shards = [fid.moments(part) for part in np.split(x, [1, 50, 290])]
    merged = fid.merge(fid.merge(shards[3], shards[0]), fid.merge(shards[2], shards[1]))
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-15)
    centred = x - x.mean(0)
    np.testing.assert_allclose(merged.covariance, centred.T @ centred / 299, atol=1e-9)
    np.testing.assert_allclose(fid.moments(x).covariance, merged.covariance, atol=1e-9)


def test_the_expected_bias_is_the_distance_of_equal_distributions():
    rng, spread = np.random.default_rng(8), np.array([3.0, 1.0, 0.3, 0.1])
    pairs = [rng.normal(size=(2, 200, 4)) * spread for _ in range(300)]
    found = [fid.frechet(*pair) for pair in pairs]
    measured = np.array([f.distance for f in found])
    error = measured.std() / np.sqrt(len(measured))
    assert abs(measured.mean() - np.mean([f.bias for f in found])) < 3 * error + 0.02 * error
    assert not found[0].warning
    # against exact moments only one side has a sampling error
    exact = fid.Gaussian(np.zeros(4), np.diag(spread**2))
    one = np.array([fid.frechet(pair[0], exact).distance for pair in pairs])
    bias = fid.frechet(pairs[0][0], exact).bias
    assert abs(one.mean() - bias) < 4 * one.std() / np.sqrt(len(one))


def test_too_few_samples_for_the_dimension_carry_a_warning_with_the_bias():
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(40, 40)), rng.normal(size=(60, 40))
    few = fid.frechet(x, y)
    assert "40 samples for 40 dimensions" in few.warning and f"{few.bias:.3g}" in few.warning
    assert few.distance > few.bias > 0.4 * few.distance  # both sets sample the same distribution
    assert not fid.frechet(y, y).warning


def test_kernel_distance_is_the_unbiased_estimator():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(23, 6)), rng.normal(size=(31, 6)) + 0.3

    def k(a, b):
        return (a @ b / 6 + 1) ** 3

    within_x = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    assert fid.kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-10)
    # all of the samples as one "subset" is the full estimator
    same = fid.kernel_subsets(x, y[:23], subsets=3, subset_size=23)
    assert same == pytest.approx((fid.kernel_distance(x, y[:23]), 0), rel=1e-10, abs=1e-12)
    assert fid.kernel_subsets(x, y, subsets=3, subset_size=9).std > 0


def test_kernel_distance_has_zero_mean_on_equal_distributions_and_frechet_has_not():
    rng = np.random.default_rng(5)
    pairs = [(rng.normal(size=(12, 4)), rng.normal(size=(12, 4))) for _ in range(600)]
    values = np.array([fid.kernel_distance(x, y) for x, y in pairs])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert np.mean([frechet_distance(x, y) for x, y in pairs[:50]]) > 0.5


def test_tiles_do_not_change_the_kernel_sum():
    x = np.random.default_rng(6).normal(size=(50, 3))
    whole = np.sum((x @ x.T / 3 + 1) ** 3)
    assert fid._kernel_sum(x, x, tile=7) == pytest.approx(whole, rel=1e-12)
    assert fid._kernel_sum(x, x) == pytest.approx(whole, rel=1e-12)


def test_classifier_score_runs_from_one_to_the_number_of_classes():
    assert fid.classifier_score(np.zeros((30, 5))) == pytest.approx(1)
    assert fid.classifier_score(1e3 * np.eye(5)) == pytest.approx(5)
    assert fid.classifier_splits(np.zeros((30, 5)), splits=4) == pytest.approx((1, 0))
    logits = np.random.default_rng(0).normal(size=(50, 5))
    one = fid.classifier_splits(logits, splits=1)
    assert one == pytest.approx((fid.classifier_score(logits), 0))


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="differ in dimension"):
        frechet_distance(np.ones((3, 2)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(np.ones((1, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="at least 2 of each"):
        fid.kernel_distance(np.ones((1, 2)), np.ones((3, 2)))
    holed = np.ones((9, 2))
    holed[6, 1] = np.nan
    for measure in (frechet_distance, fid.kernel_distance):
        with pytest.raises(ValueError, match="row 6 of 9 features is not finite"):
            measure(np.ones((5, 2)), holed)
    with pytest.raises(ValueError, match="row 6 of 9 logits"):
        fid.classifier_score(holed)
