"""Distances between two sets of feature vectors: Frechet, kernel, and the classifier score.

    (1)  FD = |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)       Heusel et al. 2017, Eq. 6
    (2)  KD = MMD^2 with k(x, y) = (x.y / d + 1)^3, unbiased               Binkowski et al. 2018
    (3)  score = exp E_x KL(p(y|x) || p(y))                                Salimans et al. 2016

m, S: mean and covariance (divided by n - 1) of features of dimension d. FD is biased upwards by
roughly d / n, so sets of equal size are compared and a real-against-real floor is printed beside
it; KD is not biased, and is the one to use on small sets. They are FID, KID and IS only on the
Inception network of those papers; elsewhere they are named after their network.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """n, mean [d] and scatter [d, d] = sum (f - mean)(f - mean)^T, all float64."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.scatter / (self.n - 1)


def moments(features: np.ndarray) -> Moments:
    """Moments of features [n, d]."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must be [n, d] with n > 0, got shape {features.shape}")
    mean = features.mean(axis=0)
    centred = features - mean[None]
    return Moments(len(features), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union: sets of any size can be streamed batch by batch."""
    n, shift = a.n + b.n, b.mean - a.mean
    return Moments(
        n,
        a.mean + shift * (b.n / n),
        a.scatter + b.scatter + np.outer(shift, shift) * (a.n * b.n / n),
    )


def streamed_moments(batches: Iterable[np.ndarray]) -> Moments:
    """Moments of all features in an iterable of [n_i, d] batches."""
    total = None
    for batch in batches:
        total = moments(batch) if total is None else merge(total, moments(batch))
    if total is None:
        raise ValueError("no features: the iterable of batches is empty")
    return total


def frechet_distance(a: Moments | np.ndarray, b: Moments | np.ndarray) -> float:
    """Equation (1) between two sets, given as moments or as features [n, d]."""
    a, b = (m if isinstance(m, Moments) else moments(m) for m in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features differ in dimension: {a.mean.shape} against {b.mean.shape}")
    # tr (S_a S_b)^(1/2) is the nuclear norm of A B, A = S_a^(1/2), B = S_b^(1/2): no square root
    # of a product that is neither symmetric nor, for few samples, of full rank
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def kernel_distance(
    x: np.ndarray,
    y: np.ndarray,
    *,
    num_subsets: int | None = None,
    subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Equation (2) between features [n, d] and [m, d]; can be negative, zero in expectation.

    By default over all pairs; with `num_subsets`, the average over random subsets drawn without
    replacement, as KID is published (100 subsets of 1000).
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be [n, d] and [m, d], got {x.shape} and {y.shape}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"need at least 2 samples of each, got {len(x)} and {len(y)}")
    if num_subsets is None:
        return _unbiased_mmd(x, y)
    rng, size = np.random.default_rng(seed), min(subset_size, len(x), len(y))
    return float(
        np.mean([
            _unbiased_mmd(rng.choice(x, size, replace=False), rng.choice(y, size, replace=False))
            for _ in range(num_subsets)
        ])
    )  # fmt: skip


def classifier_score(logits: np.ndarray) -> float:
    """Equation (3) of logits [n, classes]: between 1 and the number of classes."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    log_marginal = np.log(np.exp(log_p).mean(axis=0, keepdims=True))
    return float(np.exp(np.mean(np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1))))


def _root(covariance):
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))[None]) @ vectors.T


def _unbiased_mmd(x, y):
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _self_kernels(x).sum()) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _self_kernels(y).sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * _kernel_sum(x, y) / (n * m))


def _self_kernels(x):
    return (np.einsum("nd,nd->n", x, x) / x.shape[1] + 1) ** 3


def _kernel_sum(x, y, tile=2048):
    # tiles keep 50,000 x 50,000 kernels out of memory
    return sum(
        float(np.sum((x[i : i + tile] @ y.T / x.shape[1] + 1) ** 3)) for i in range(0, len(x), tile)
    )
