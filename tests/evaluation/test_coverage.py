"""Precision and recall against brute force, and on sets with known results."""

import numpy as np
import pytest

from cheapscale.evaluation import coverage


def precision_recall(real, fake, *, k=3, **options):
    return coverage.prdc(real, fake, ks=(k,), **options)[k][:2]


def _brute_force(real, fake, k):
    def radius(points, i):
        return sorted(np.linalg.norm(points - points[i], axis=1))[k]

    def share(points, centres):
        return np.mean([
            any(np.linalg.norm(p - c) <= radius(centres, i) for i, c in enumerate(centres))
            for p in points
        ])  # fmt: skip

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k, tile", [(3, 1024), (1, 7)])
def test_equals_brute_force_whatever_the_tile(k, tile):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), 0.6 * rng.normal(size=(25, 3)) + 0.8
    result = precision_recall(real, fake, k=k, tile=tile)
    assert result == pytest.approx(_brute_force(real, fake, k))
    assert 0 < result[1] < 1


def test_density_and_coverage_are_those_of_their_paper_whatever_the_tile():
    rng = np.random.default_rng(4)
    real, fake = rng.normal(size=(50, 3)), 0.8 * rng.normal(size=(30, 3)) + 0.4
    across = np.linalg.norm(real[:, None] - fake[None], axis=2)
    within = np.sort(np.linalg.norm(real[:, None] - real[None], axis=2), axis=1)
    for tile in (2048, 7):
        found = coverage.prdc(real, fake, ks=(3, 5), tile=tile)
        for k in (3, 5):
            inside = across < within[:, k, None]
            assert found[k].density == pytest.approx(inside.sum(0).mean() / k)
            assert found[k].coverage == pytest.approx(inside.any(1).mean())
            assert found[k][:2] == pytest.approx(_brute_force(real, fake, k))


def test_an_outlier_of_the_real_set_raises_precision_but_not_density():
    rng = np.random.default_rng(5)
    cluster = rng.normal(size=(200, 2))
    same = coverage.prdc(cluster, rng.normal(size=(200, 2)), ks=(5,))[5]
    assert same.density == pytest.approx(1, abs=0.1) and same.coverage > 0.9
    outlier = np.array([[30.0, 0.0]])  # its ball reaches the distant cluster
    between = np.array([[15.0, 0.0]]) + 0.1 * rng.normal(size=(50, 2))
    found = coverage.prdc(np.concatenate([cluster, outlier]), between, ks=(5,))[5]
    assert found.precision == 1 and found.density == pytest.approx(1 / 5)
    assert found.coverage == pytest.approx(1 / 201)


def test_dropped_modes_cost_recall_and_outliers_cost_precision():
    rng = np.random.default_rng(1)
    modes = np.array([[0.0, 0.0], [100.0, 0.0]])
    real = np.concatenate([rng.normal(size=(50, 2)) + m[None] for m in modes])
    one_mode = rng.normal(size=(50, 2))
    result = precision_recall(real, one_mode)
    assert result[0] > 0.85 and 0.4 < result[1] <= 0.5
    result = precision_recall(one_mode, real)
    assert result[1] > 0.85 and 0.4 < result[0] <= 0.5
    assert precision_recall(real, real + 1000) == (0, 0)
    assert precision_recall(real, real) == (1, 1)


def test_precision_survives_features_far_from_the_origin():
    rng = np.random.default_rng(2)
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) + 0.5
    moved = precision_recall(real + 1e6, fake + 1e6)
    assert moved == precision_recall(real, fake)


def test_nearest_finds_copies_and_their_index():
    rng = np.random.default_rng(3)
    references = rng.integers(0, 255, (60, 12), np.uint8)
    queries = references[[7, 41]].copy()
    queries[1, 0] ^= 4
    distance, index = coverage.nearest(queries, references, tile=16)
    np.testing.assert_array_equal(index, [7, 41])
    np.testing.assert_allclose(distance, [0, 4], atol=1e-5)


def test_features_that_are_not_finite_are_refused():
    holed = np.ones((9, 2))
    holed[4] = np.nan
    with pytest.raises(ValueError, match="row 4 of 9 generated features"):
        coverage.prdc(np.ones((9, 2)), holed)
