"""Partitions: the spec's own tables, and the dynamic programme against every alternative."""

import itertools

import numpy as np
import pytest

from cheapscale.diffusion import process
from cheapscale.pruning import partition


def decibels(name, steps=1000):
    return process.decibels(process.vp_schedule(name, steps).sigmas)


def test_equal_lengths_of_the_linear_schedule_have_the_published_snr():
    """Spec 2.2: mean SNR of quarters and fifths in decibels."""
    snr = decibels("linear")
    for groups, means in ((4, (9.5, -5.1, -17.4, -33.9)), (5, (11.4, -1.8, -10.8, -21.7, -35.8))):
        edges = partition.equal_length(1000, groups)
        found = [snr[a:b].mean() for a, b in zip(edges, edges[1:])]
        np.testing.assert_allclose(found, means, atol=0.06)
    assert partition.equal_length(10, 3).tolist() == [0, 3, 7, 10]


def test_equal_decibels_are_useless_unclipped_on_the_cosine_schedule():
    """Spec 2.3: 534, 3305, 158 and 3 of 4000 steps; tolerable on the linear one."""
    wide = (-1e9, 1e9)
    cosine = partition.equal_decibels(decibels("cosine", 4000), 4, clip=wide)
    assert np.diff(cosine).tolist() == [534, 3305, 158, 3]
    assert np.diff(partition.equal_decibels(decibels("cosine", 4000), 5, clip=wide)).tolist() == [
        214, 2932, 824, 29, 1,
    ]  # fmt: skip
    linear = partition.equal_decibels(decibels("linear"), 4, clip=wide)
    assert np.diff(linear).tolist() == [31, 272, 419, 278]
    clipped = np.diff(partition.equal_decibels(decibels("cosine", 4000), 4))
    assert clipped.sum() == 4000 and clipped.min() > 300
    with pytest.raises(ValueError, match="must fall"):
        partition.equal_decibels(-decibels("linear"), 4)
    with pytest.raises(ValueError, match="groups of .* come from equal decibels"):
        partition.equal_decibels(np.linspace(60, 30, 10), 4)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_the_dynamic_programme_finds_the_least_of_all_partitions(groups):
    rng = np.random.default_rng(groups)
    for cost in (partition.spread(rng.normal(size=9)), partition.conflict(rng.normal(size=(9, 4)))):

        def total(edges, cost=cost):
            return sum(cost[a, b - 1] for a, b in zip(edges, edges[1:]))

        inner = itertools.combinations(range(1, 9), groups - 1)
        least = min(total((0, *chosen, 9)) for chosen in inner)
        found = partition.cluster(cost, groups)
        assert len(found) == groups + 1 and total(found) == pytest.approx(least)


def test_costs_are_their_definitions():
    values, gradients = np.array([1.0, 4.0, 2.0, 7.0]), np.random.default_rng(0).normal(size=(4, 6))
    spread, conflict = partition.spread(values), partition.conflict(gradients)
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    for a in range(4):
        for b in range(a, 4):
            part = values[a : b + 1]
            assert spread[a, b] == pytest.approx(np.sum((part - part.mean()) ** 2), abs=1e-12)
            cosines = unit[a : b + 1] @ unit[a : b + 1].T
            assert conflict[a, b] == pytest.approx((b - a + 1) * (1 - cosines.mean()))
    assert np.isinf(spread[2, 1]) and np.isinf(conflict[2, 1])
    # gradients of two kinds part where the kind changes
    kinds = np.repeat([[1.0, 0.0], [0.0, 1.0]], [3, 6], axis=0)
    assert partition.cluster(partition.conflict(kinds), 2).tolist() == [0, 3, 9]


def test_edges_between_anchors():
    anchors = np.array([0, 10, 20, 30])
    assert partition.from_anchors(anchors, np.array([0, 2, 4]), 40).tolist() == [0, 15, 40]
    with pytest.raises(ValueError, match="3 positions cannot be cut into 4 groups"):
        partition.equal_length(3, 4)
