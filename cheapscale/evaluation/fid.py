"""Distances between two sets of feature vectors: Frechet, kernel, and the classifier score.

    (1)  FD = |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)       Heusel et al. 2017, Eq. 6
    (2)  KD = MMD^2 with k(x, y) = (gamma x.y + 1)^3, gamma = 1/d, unbiased    Binkowski et al. 2018
    (3)  score = exp E_x KL(p(y|x) || p(y))                                 Salimans et al. 2016

m, S: mean and covariance (divided by n - 1) of features of dimension d. The distances are called
FID, KID and IS only for the Inception network of those papers; for other networks their names carry
the network (`naming`). KD is unbiased, so prefer it for small sets. FD is biased upwards: with l_i
the eigenvalues of S, the expected distance of n samples from their own distribution is, to first
order in 1/n,

    (4)  tr S / n + (sum_ij l_i l_j / (l_i + l_j) + tr S / 2) / (2 n)

The first term is due to the sample mean, the second to the sample covariance; it follows from the
second-order expansion of (1) and the Wishart variances l_i l_j / n. So compare sets of equal size,
and report FD together with its floor (real images against real images). For n < d, (4) is only a
rough estimate.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, logsumexp

CHUNK = 4096  # rows that are converted to float64 at a time


class Moments(NamedTuple):
    """n, mean [d] and scatter [d, d] = sum (f - mean)(f - mean)^T of n features; arrays float64."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)


class Gaussian(NamedTuple):
    """mean [d] and covariance [d, d] of a published file, whose number of images is unknown."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None = None


class Frechet(NamedTuple):
    """A distance, its expected bias (4) summed over the sets of known size, and a warning or ""."""

    distance: float
    bias: float
    warning: str


class MeanStd(NamedTuple):
    """Mean and standard deviation (without Bessel's correction) over subsets or splits."""

    mean: float
    std: float


def check_features(features: np.ndarray, name: str = "features") -> None:
    """Raise ValueError for features that are not [n, d] or not finite, with the first bad row."""
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{name} must be [n, d] with n > 0, got shape {features.shape}")
    for start in range(0, len(features), CHUNK):
        finite = np.isfinite(features[start : start + CHUNK]).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"row {start + int(np.argmin(finite))} of {len(features)} {name} is not finite: "
                "look at that image, and at the weights of the network that made it"
            )


def moments(features: np.ndarray) -> Moments:
    """Moments of features [n, d], computed in float64 one chunk at a time."""
    features = np.asarray(features)
    check_features(features)
    total = None
    for start in range(0, len(features), CHUNK):
        chunk = features[start : start + CHUNK].astype(np.float64)
        mean = chunk.mean(axis=0)
        chunk -= mean[None]
        part = Moments(len(chunk), mean, chunk.T @ chunk)
        total = part if total is None else merge(total, part)
    return total


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets (Chan et al. 1979), for streamed features."""
    # Only the difference of the means is used, so a large common mean causes no cancellation.
    n, shift = a.n + b.n, b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.n * b.n / n)
    return Moments(n, a.mean + shift * (b.n / n), scatter)


def frechet(a: Moments | Gaussian | np.ndarray, b: Moments | Gaussian | np.ndarray) -> Frechet:
    """Equation (1), its expected bias, and a warning if a set has no more samples than dimensions.

    a, b: moments, or features [n, d]. Raises ValueError for sets with fewer than 2 samples, with
    different dimensions, or with a NaN.
    """
    a, b = (m if isinstance(m, Moments | Gaussian) else moments(m) for m in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features differ in dimension: {a.mean.shape} against {b.mean.shape}")
    values, roots = zip(*(_root(m) for m in (a, b)))
    # For any A A^T = S_a and B B^T = S_b, tr (S_a S_b)^(1/2) is the sum of the singular values of
    # A^T B. This avoids the matrix square root of S_a S_b, which is not symmetric and, for few
    # samples, not of full rank.
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    shift = a.mean - b.mean
    # (1): |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)
    distance = float(shift @ shift + values[0].sum() + values[1].sum() - 2 * cross)
    # The larger set estimates the spectrum better. A published file counts as infinitely large, so
    # its own bias is taken as 0.
    sizes = [np.inf if m.n is None else m.n for m in (a, b)]
    spectrum = values[int(np.argmax(sizes))]
    bias = sum(expected_bias(spectrum, n) for n in sizes)
    dimension, fewest = len(a.mean), min(sizes)
    warning = (
        f"{fewest} samples for {dimension} dimensions: their Frechet distance reads at least "
        f"roughly {bias:.3g} too high; give {2 * dimension}, or use the kernel distance"
    )
    return Frechet(distance, bias, warning if fewest <= dimension else "")


def expected_bias(eigenvalues: np.ndarray, n: float) -> float:
    """Equation (4) for a covariance with these eigenvalues [d] and n samples."""
    trace = eigenvalues.sum()
    # l_i l_j / (l_i + l_j), and 0 where both eigenvalues are 0
    pairs = eigenvalues[:, None] + eigenvalues[None]
    harmonic = np.outer(eigenvalues, eigenvalues) / np.where(pairs > 0, pairs, 1)
    return float((trace + harmonic.sum() / 2 + trace / 4) / n)


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Equation (2) over all pairs of the features x [n, d] and y [m, d].

    It may be negative: for equal distributions its expectation is 0.
    """
    return _unbiased_mmd(*_checked_pair(x, y))


def kernel_subsets(
    x: np.ndarray, y: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> MeanStd:
    """Equation (2) as KID is reported: mean and standard deviation over random subsets.

    The defaults and the random draws are those of torch-fidelity: for generated features x [n, d]
    and real features y [m, d] in the same order, both compare the same subsets.
    """
    x, y = _checked_pair(x, y)
    rng = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        first = x[rng.choice(len(x), subset_size, replace=False)]
        second = y[rng.choice(len(y), subset_size, replace=False)]
        found.append(_unbiased_mmd(first, second))
    return MeanStd(float(np.mean(found)), float(np.std(found)))


def classifier_score(logits: np.ndarray) -> float:
    """Equation (3) for logits [n, classes]: between 1 and the number of classes."""
    check_features(logits, "logits")
    # (3): exp E_x KL(p(y|x) || p(y)), with p(y) the mean of p(y|x)
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    log_marginal = logsumexp(log_p, axis=0, keepdims=True) - np.log(len(log_p))
    return float(np.exp(np.mean(np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1))))


def classifier_splits(logits: np.ndarray, *, splits: int = 10, seed: int = 2020) -> MeanStd:
    """Equation (3) as IS is reported: mean and deviation over splits of the shuffled logits.

    The defaults, the shuffle and the boundaries of the splits are those of torch-fidelity.
    """
    logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    borders = np.arange(splits + 1) * len(logits) // splits
    found = [classifier_score(logits[i:j]) for i, j in zip(borders, borders[1:])]
    return MeanStd(float(np.mean(found)), float(np.std(found)))


def _root(m):
    """(eigenvalues of a covariance S clipped at 0, a matrix A with A A^T = S)."""
    values, vectors = np.linalg.eigh(m.covariance)
    values = np.maximum(values, 0)
    return values, vectors * np.sqrt(values)[None]


def _checked_pair(x, y):
    """Both feature arrays, after checks of their shapes and values."""
    check_features(x)
    check_features(y)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features are {x.shape} and {y.shape}: give at least 2 of each, alike")
    return x, y


def _unbiased_mmd(x, y):
    """Equation (2), the unbiased estimate of the squared MMD."""
    # The estimate is unbiased because means within a set leave out pairs of a vector with itself.
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _self_kernels(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _self_kernels(y)) / (m * (m - 1))
    return float(within_x + within_y - 2 * _kernel_sum(x, y) / (n * m))


def _self_kernels(x):
    """The sum of k(x_i, x_i)."""
    chunks = (x[i : i + CHUNK].astype(np.float64) for i in range(0, len(x), CHUNK))
    return sum(float(np.sum((np.einsum("nd,nd->n", c, c) / c.shape[1] + 1) ** 3)) for c in chunks)


def _kernel_sum(x, y, tile=2048):
    """The sum of k(x_i, y_j) over all i and j."""
    # Tiles avoid a 50,000 x 50,000 matrix and float64 copies of all features in memory.
    total = 0.0
    for i in range(0, len(x), tile):
        rows = x[i : i + tile].astype(np.float64) / x.shape[1]
        for j in range(0, len(y), tile):
            kernels = rows @ y[j : j + tile].astype(np.float64).T
            kernels += 1
            total += float(np.einsum("ij,ij,ij->", kernels, kernels, kernels))
    return total
