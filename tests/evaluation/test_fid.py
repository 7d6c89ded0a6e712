"""Feature distances against closed forms, SciPy and a plain float64 reference."""

import numpy as np
import pytest
import scipy.linalg

from cheapscale.evaluation import fid


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
    assert fid.frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert fid.frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_of_arbitrary_covariances_agrees_with_sqrtm():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    y = rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=(1, 12))
    s, t = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(s @ t).real
    shift = x.mean(0) - y.mean(0)
    expected = shift @ shift + np.trace(s + t - 2 * root)
    assert fid.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_stable_with_fewer_samples_than_dimensions():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(20, 64)).astype(np.float32)
    assert abs(fid.frechet_distance(x, x)) < 1e-5
    turned, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    y = rng.normal(size=(20, 64))
    assert fid.frechet_distance(x @ turned, y @ turned) == pytest.approx(
        fid.frechet_distance(x, y), rel=1e-6
    )


def test_streamed_moments_equal_moments_of_everything():
    x = (np.random.default_rng(3).normal(size=(101, 5)) + 1e4).astype(np.float32)
    streamed = fid.streamed_moments(x[i : i + 17] for i in range(0, 101, 17))
    assert streamed.n == 101 and streamed.mean.dtype == np.float64
    np.testing.assert_allclose(streamed.mean, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(streamed.covariance, np.cov(x.astype(np.float64).T), rtol=1e-9)


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
    same = fid.kernel_distance(x, y[:23], num_subsets=3, subset_size=23)
    assert same == pytest.approx(fid.kernel_distance(x, y[:23]), rel=1e-10)


def test_kernel_distance_has_zero_mean_on_equal_distributions_and_frechet_has_not():
    rng = np.random.default_rng(5)
    pairs = [(rng.normal(size=(12, 4)), rng.normal(size=(12, 4))) for _ in range(600)]
    values = np.array([fid.kernel_distance(x, y) for x, y in pairs])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert np.mean([fid.frechet_distance(x, y) for x, y in pairs[:50]]) > 0.5


def test_tiles_do_not_change_the_kernel_sum():
    x = np.random.default_rng(6).normal(size=(50, 3))
    assert fid._kernel_sum(x, x, tile=7) == pytest.approx(fid._kernel_sum(x, x), rel=1e-12)


def test_classifier_score_runs_from_one_to_the_number_of_classes():
    assert fid.classifier_score(np.zeros((30, 5))) == pytest.approx(1)
    assert fid.classifier_score(1e3 * np.eye(5)) == pytest.approx(5)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="differ in dimension"):
        fid.frechet_distance(np.ones((3, 2)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        fid.frechet_distance(np.ones((1, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        fid.kernel_distance(np.ones((1, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="iterable of batches is empty"):
        fid.streamed_moments([])
