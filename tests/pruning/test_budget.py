"""Budgets: the spec's table, orientation, and the allocation against every alternative."""

import itertools

import numpy as np
import pytest

from cheapscale.diffusion import process
from cheapscale.pruning import budget, partition


@pytest.mark.parametrize(
    "groups, k, targets, mean_at_half",
    [
        (2, 0.2, (0.75, 1), 0.875),
        (3, 0.4, (0.667, 0.833, 1), 0.833),
        (4, 0.467, (0.625, 0.75, 0.875, 1), 0.8125),
        (5, 0.5, (0.6, 0.7, 0.8, 0.9, 1), 0.8),
        (8, 0.543, None, 0.781),
        (10, 0.556, None, 0.775),
    ],
)
def test_the_formula_gives_the_published_table(groups, k, targets, mean_at_half):
    """Spec 3.1, 3.2: from the noisiest, i = 1, to the cleanest, which keeps the whole network."""
    assert budget.solve_k(groups, 0.8) == pytest.approx(k, abs=5e-4)
    half = budget.shares(groups, 0.5)
    assert half[0] == 1.0  # the highest SNR first
    assert budget.mean_share(half) == pytest.approx(mean_at_half, abs=5e-4)
    if targets:
        np.testing.assert_allclose(half[::-1], targets, atol=5e-4)
    N = groups
    expected = (N + 1) / (2 * N) + k * (N - 1) / (2 * N)
    assert budget.mean_share(budget.shares(N, k)) == pytest.approx(expected)


def test_the_order_says_which_group_stays_whole():
    up, down, mid = (budget.shares(5, 0.5, order) for order in budget.ORDERS)
    np.testing.assert_allclose(up, [1, 0.9, 0.8, 0.7, 0.6])
    np.testing.assert_allclose(down, up[::-1])
    np.testing.assert_allclose(mid, [0.7, 0.9, 1.0, 0.8, 0.6])
    assert budget.shares(4, 0.5, "mid")[1] == 1.0
    with pytest.raises(ValueError, match="order is 'up'"):
        budget.shares(5, 0.5, "up")
    with pytest.raises(ValueError, match="k is 1.5"):
        budget.shares(5, 1.5)


@pytest.mark.parametrize(
    "grid, counts, mean",
    [
        ("uniform", (10, 10, 10, 10, 10), 0.8),
        ("quadratic", (50, 21, 15, 13, 1), 0.906),
        ("quadratic 10", (5, 2, 1, 1, 1), 0.89),
        ("edm 18", (7, 2, 2, 3, 4), 0.828),
        ("edm 40", (15, 4, 5, 8, 8), 0.825),
    ],
)
def test_the_compute_saved_depends_on_the_grid(grid, counts, mean):
    """Spec 6.4, N = 5, k = 0.5, borders at fifths of the linear schedule's time."""
    schedule = process.vp_schedule("linear")
    if grid.startswith("edm"):
        nodes = int(grid.split()[1])
        sigmas = np.append(process.karras_grid(nodes), 0.0)
    else:
        n = 50 if grid == "uniform" else int((grid.split() + ["100"])[1])
        if grid == "uniform":
            times = np.arange(n) * 1000 // n
        else:
            times = (np.linspace(0, np.sqrt(800), n) ** 2).astype(int)
        sigmas = np.append(schedule.sigmas[times[::-1]], 0.0)
    edges = partition.equal_length(1000, 5)
    owners = partition.step_owners(sigmas, schedule.sigmas[edges[1:-1] - 1])
    found = np.bincount(owners, minlength=5)
    assert abs(budget.mean_share(budget.shares(5, 0.5), found) - mean) < 0.012
    assert np.abs(found - counts).max() <= 1 and found.sum() == len(sigmas) - 1
    # 3.4d: the same line, solved for that sampler
    k = budget.solve_k(5, 0.85, weights=found)
    assert budget.mean_share(budget.shares(5, k), found) == pytest.approx(0.85)


def test_shares_by_difficulty_have_the_mean_and_the_order():
    snr = np.clip([15.0, 3.5, -3.7, -60.0], -20, 20)
    share = budget.by_difficulty(snr, 0.8)
    assert share.mean() == pytest.approx(0.8) and share[0] == 1.0
    slope = np.diff(share) / np.diff(snr)
    np.testing.assert_allclose(slope, slope[0])
    weights = [1, 2, 3, 4]
    weighted = budget.by_difficulty(snr, 0.8, weights)
    assert np.average(weighted, weights=weights) == pytest.approx(0.8)
    np.testing.assert_array_equal(budget.by_difficulty([2.0, 2.0], 0.7), [0.7, 0.7])
    with pytest.raises(ValueError, match="no share of the easiest group gives the mean 0.2"):
        budget.by_difficulty(snr, 0.2)
    with pytest.raises(ValueError, match="no k gives 5 groups the mean share 0.3"):
        budget.solve_k(5, 0.3)


def test_the_allocation_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = np.sort(rng.uniform(0.3, 1.0, 4))
        excess = np.sort(rng.exponential(size=(3, 4)), axis=1)[:, ::-1]
        weights, steps = rng.uniform(0.5, 2, 3), rng.integers(1, 9, 3)
        mean = rng.uniform(cost[0] + 0.05, 1.0)

        def spent(chosen, steps=steps, cost=cost):
            return np.sum(steps * cost[list(chosen)]) / steps.sum()

        def lost(chosen, weights=weights, excess=excess):
            return sum(w * e[r] for w, e, r in zip(weights, excess, chosen))

        every = [c for c in itertools.product(range(4), repeat=3) if spent(c) <= mean]
        chosen, value = budget.allocate(excess, cost, weights, steps, mean)
        assert value == pytest.approx(min(map(lost, every)))
        assert spent(chosen) <= mean and lost(chosen) == pytest.approx(value)
    with pytest.raises(ValueError, match="cheapest choice has the mean share 0.500, above 0.4"):
        budget.allocate([[1, 0]], [0.5, 1.0], [1], [1], 0.4)
