"""The formula of the budgets: its values, its orders, and the mean share on a sampler's grid."""

import numpy as np
import pytest

from cheapscale.diffusion.denoiser import EDM, VP
from cheapscale.experts.budget import shares, solve_k, targets
from cheapscale.experts.partition import make_groups
from cheapscale.teacher.experts import expert_of_steps

ORDERS = ("snr_up", "snr_down", "mid", "flat")


@pytest.mark.parametrize(
    "N, k, half, mean_at_half",
    [
        (2, 0.2, (0.75, 1), 0.875),
        (3, 0.4, (0.667, 0.833, 1), 0.833),
        (4, 0.467, (0.625, 0.75, 0.875, 1), 0.8125),
        (5, 0.5, (0.6, 0.7, 0.8, 0.9, 1), 0.8),
        (10, 0.556, None, 0.775),
    ],
)
def test_the_formula_by_hand(N, k, half, mean_at_half):
    """k for a mean share of 80 %; the shares at k = 0.5, from i = 1, the noisiest group."""
    assert solve_k(0.8, "snr_up", np.ones(N)) == pytest.approx(k, abs=5e-4)
    found = shares(N, 0.5)
    assert found[0] == 1.0  # the cleanest group keeps the whole network
    assert found.mean() == pytest.approx(mean_at_half, abs=5e-4)
    if half:
        np.testing.assert_allclose(found[::-1], half, atol=5e-4)
    expected = (N + 1) / (2 * N) + k * (N - 1) / (2 * N)
    assert shares(N, k).mean() == pytest.approx(expected)


def test_the_order_determines_the_group_that_stays_whole():
    up, down, mid, flat = (shares(5, 0.5, order) for order in ORDERS)
    np.testing.assert_allclose(up, [1, 0.9, 0.8, 0.7, 0.6])
    np.testing.assert_allclose(down, up[::-1])
    np.testing.assert_allclose(mid, [0.7, 0.9, 1.0, 0.8, 0.6])
    np.testing.assert_allclose(flat, [0.8] * 5)
    assert shares(4, 0.5, "mid")[1] == 1.0


@pytest.mark.parametrize("order", ORDERS)
def test_a_mean_over_groups_of_any_size_is_met(order):
    sizes = np.array([5, 1, 2, 8, 4])
    found = targets(0.1, 0.85, order, sizes)
    assert np.average(found, weights=sizes) == pytest.approx(0.85)
    np.testing.assert_array_equal(targets(0.1, 0.0, order, sizes), shares(5, 0.1, order))


def test_one_group_is_one_network_whole_or_pruned_alike():
    assert targets(0.5, 0.0, "snr_up", [40]).tolist() == [1.0]
    assert targets(0.5, 0.3, "flat", [40]).tolist() == [0.3]
    with pytest.raises(ValueError, match="no k gives 1 groups the mean share prune.mean=0.8"):
        targets(0.5, 0.8, "snr_up", [40])


@pytest.mark.parametrize(
    "process, steps, spacing, counts, mean",
    [
        (VP(), 50, "leading", (10, 10, 10, 10, 10), 0.8),
        (VP(), 100, "quadratic", (46, 21, 15, 13, 1), 0.902),
        (VP(), 10, "quadratic", (5, 2, 1, 1, 1), 0.89),
        (EDM(), 18, "karras", (7, 2, 2, 3, 4), 0.828),
        (EDM(), 40, "karras", (15, 4, 5, 8, 8), 0.825),
    ],
)
def test_the_compute_saved_depends_on_the_grid(process, steps, spacing, counts, mean):
    """N = 5, k = 0.5, boundaries at fifths of the linear schedule's time."""
    grid = process.grid(steps, spacing)
    experts = expert_of_steps(grid, make_groups(VP(), 5).boundaries)
    found = np.bincount(experts, minlength=5)
    assert abs(np.average(shares(5, 0.5), weights=found) - mean) < 0.012
    assert np.abs(found - counts).max() <= 1 and found.sum() == len(grid) - 1
