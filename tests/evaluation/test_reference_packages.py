"""The same feature arrays in the implementations that published results use.

pytorch-fid and clean-fid call scipy.linalg.sqrtm with an argument that SciPy 1.18 no longer has,
hence its upper limit in the test extra.
"""

import warnings

import numpy as np
import pytest

from cheapscale.evaluation import coverage, fid
from cheapscale.evaluation.embedding import clean

pytestmark = pytest.mark.usefixtures("torchvision")
DIMENSION = 40


def frechet_distance(a, b):
    return fid.frechet(a, b).distance


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test) to compare")


@pytest.fixture(scope="module")
def sets():
    """Correlated positive features of different scales, like pooled activations; N > 2 d."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(DIMENSION, DIMENSION)) * np.geomspace(1, 0.01, DIMENSION)
    generated = np.abs(rng.normal(size=(300, DIMENSION)) @ mixing + 0.2).astype(np.float32)
    real = np.abs(rng.normal(size=(400, DIMENSION)) @ mixing).astype(np.float32)
    return generated, real


def _package(name):
    return pytest.importorskip(name, reason="install the extra test to compare")


@pytest.mark.parametrize(
    "module, function",
    [
        ("pytorch_fid.fid_score", "calculate_frechet_distance"),
        ("cleanfid.fid", "frechet_distance"),
    ],
)
def test_frechet_distance(module, function, sets):
    theirs = getattr(_package(module), function)
    moments = [(np.mean(x, 0, np.float64), np.cov(x.astype(np.float64).T)) for x in sets]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        expected = theirs(*moments[0], *moments[1])
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_torch_fidelity(sets, torch):
    metric = _package("torch_fidelity.metric_fid")
    stats = [metric.fid_features_to_statistics(torch.tensor(x, dtype=torch.float64)) for x in sets]
    expected = metric.fid_statistics_to_metric(*stats, verbose=False)
    assert frechet_distance(*sets) == pytest.approx(expected[metric.KEY_METRIC_FID], rel=1e-6)


def test_kernel_distance_draws_the_same_subsets(sets, torch):
    metric = _package("torch_fidelity.metric_kid")
    features = [torch.tensor(x, dtype=torch.float64) for x in sets]
    options = {"kid_subsets": 7, "kid_subset_size": 100, "verbose": False}
    expected = metric.kid_features_to_metric(*features, **options)
    found = fid.kernel_subsets(*sets, subsets=7, subset_size=100)
    assert found.mean == pytest.approx(expected[metric.KEY_METRIC_KID_MEAN], rel=1e-6)
    assert found.std == pytest.approx(expected[metric.KEY_METRIC_KID_STD], rel=1e-6)


def test_kernel_distance_of_everything(sets):
    theirs = _package("cleanfid.fid").kernel_distance
    x, y = (s[:300].astype(np.float64) for s in sets)
    assert fid.kernel_distance(x, y) == pytest.approx(theirs(x, y, num_subsets=1), rel=1e-9)


def test_classifier_score_uses_the_same_shuffle_and_splits(torch):
    metric = _package("torch_fidelity.metric_isc")
    logits = 3 * np.random.default_rng(1).normal(size=(203, 12))
    expected = metric.isc_features_to_metric(torch.tensor(logits))
    found = fid.classifier_splits(logits)
    assert found.mean == pytest.approx(expected[metric.KEY_METRIC_ISC_MEAN], rel=1e-10)
    assert found.std == pytest.approx(expected[metric.KEY_METRIC_ISC_STD], rel=1e-8)


def test_precision_and_recall(sets, torch):
    metric = _package("torch_fidelity.metric_prc")
    features = [torch.tensor(x, dtype=torch.float64) for x in sets]
    expected = metric.prc_features_to_metric(*features, verbose=False)
    generated, real = sets
    found = coverage.prdc(real, generated, ks=(3,))[3]
    assert found.precision == pytest.approx(expected[metric.KEY_METRIC_PRECISION], abs=1e-6)
    assert found.recall == pytest.approx(expected[metric.KEY_METRIC_RECALL], abs=1e-6)
    assert 0.1 < found.recall < 1


@pytest.mark.parametrize("shape, size", [((19, 24), 31), ((64, 50), 17), ((16, 16), 16)])
def test_resizing(shape, size, torch):
    images = np.random.default_rng(2).integers(0, 256, (2, *shape, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = _package("cleanfid.resize").make_resizer("PIL", False, "bicubic", (size, size))
        expected = np.stack([theirs(image) for image in images])
    np.testing.assert_allclose(clean(images, size), expected, atol=1e-5)
