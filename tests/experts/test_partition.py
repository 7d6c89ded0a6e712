"""Groups of noise levels: their edges, their sampler steps, and their training intervals."""

import itertools

import jax
import numpy as np
import pytest
from scipy import stats

from cheapscale.diffusion.denoiser import EDM, VP
from cheapscale.diffusion.noise import decibels, karras_grid, vp_schedule
from cheapscale.experts import partition
from cheapscale.experts.partition import make_groups
from cheapscale.teacher.experts import expert_of_steps

GRID = EDM().grid(40)


def snr(name, steps=1000):
    return decibels(vp_schedule(name, steps).sigmas)


def test_equal_groups_of_the_linear_schedule_have_the_published_snr():
    """The mean SNR in decibels of quarters and fifths of DDPM's schedule."""
    for count, means in ((4, (9.5, -5.1, -17.4, -33.9)), (5, (11.4, -1.8, -10.8, -21.7, -35.8))):
        np.testing.assert_allclose(make_groups(VP(), count).decibels(), means, atol=0.06)
    assert make_groups(VP(), 4).edges.tolist() == [0, 250, 500, 750, 1000]
    assert make_groups(VP(), 3).edges.tolist() == [0, 333, 667, 1000]
    with pytest.raises(ValueError, match="40 noise levels cannot make 41 groups"):
        make_groups(EDM(), 41)


def test_equal_decibels_are_useless_unclipped_on_the_cosine_schedule():
    wide = (-1e9, 1e9)

    def sizes(*args, **options):
        return np.diff(partition.equal_decibels(*args, **options)).tolist()

    assert sizes(snr("cosine", 4000), 4, clip=wide) == [534, 3305, 158, 3]
    assert sizes(snr("cosine", 4000), 5, clip=wide) == [214, 2932, 824, 29, 1]
    assert sizes(snr("linear"), 4, clip=wide) == [31, 272, 419, 278]
    clipped = sizes(snr("cosine", 4000), 4)
    assert sum(clipped) == 4000 and min(clipped) > 300
    with pytest.raises(ValueError, match="prune.partition=decibels makes groups of"):
        make_groups(EDM(sigma_min=0.002, sigma_max=0.09), 4, "decibels")


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_clustering_finds_the_least_cost_of_all_partitions(groups):
    rng = np.random.default_rng(groups)
    cost = partition.spread(rng.normal(size=9))

    def total(edges):
        return sum(cost[a, b - 1] for a, b in zip(edges, edges[1:]))

    inner = itertools.combinations(range(1, 9), groups - 1)
    least = min(total((0, *chosen, 9)) for chosen in inner)
    found = partition.cluster(cost, groups)
    assert len(found) == groups + 1 and total(found) == pytest.approx(least)


def test_the_cost_is_its_definition():
    values = np.array([1.0, 4.0, 2.0, 7.0])
    spread = partition.spread(values)
    for a in range(4):
        for b in range(a, 4):
            part = values[a : b + 1]
            assert spread[a, b] == pytest.approx(np.sum((part - part.mean()) ** 2), abs=1e-12)
    assert np.isinf(spread[2, 1])


def test_clustered_groups_follow_the_measured_curve():
    measured = np.repeat([5.0, 1.0, 0.0], [4, 16, 20])
    assert make_groups(EDM(), 3, "loss", measured).edges.tolist() == [0, 4, 20, 40]
    # a boundary lies half way between two of the 50 anchors among 1000 positions
    anchors = partition.anchor_positions(1000)
    groups = make_groups(VP(), 2, "loss", np.repeat([1.0, 0.0], [10, 40]))
    assert groups.edges[1] == (anchors[9] + anchors[10] + 1) // 2
    assert len(make_groups(VP(), 4, "snr").edges) == 5
    with pytest.raises(ValueError, match="50 measured levels cannot make 60 groups"):
        make_groups(VP(), 60, "snr")


def test_equal_groups_of_an_edm_teacher_take_equally_many_steps_of_its_grid():
    groups = make_groups(EDM(), 5)
    assert set(groups.boundaries) < set(GRID) and len(groups.boundaries) == 4
    experts = expert_of_steps(GRID, groups.boundaries)
    assert np.bincount(experts).tolist() == [8] * 5
    assert experts[0] == 4 and experts[-1] == 0  # the noisiest group first


@pytest.mark.parametrize("process", [EDM(), VP()])
def test_steps_belong_to_the_same_group_in_both_directions(process):
    groups = make_groups(process, 4)
    for grid in (karras_grid(18), karras_grid(7)):
        down, up = (expert_of_steps(g, groups.boundaries) for g in (grid, grid[::-1]))
        np.testing.assert_array_equal(down, up[::-1])
        assert np.all(np.diff(down) <= 0)
    # a step that begins on a boundary belongs to the cleaner group
    boundary = groups.boundaries[1]
    assert expert_of_steps(np.array([boundary, boundary / 2]), groups.boundaries)[0] == 1
    assert expert_of_steps(np.array([boundary * 1.01, boundary]), groups.boundaries)[0] == 2


def test_an_overlap_reaches_the_next_levels_of_the_sampler_on_either_side():
    """50 "leading" times are 1, 21, ... 981; fifths of the table begin at 0, 200, ... 800."""
    groups, grid = make_groups(VP(), 5), VP().grid(50, "leading")
    levels = groups.levels

    def positions(group, overlap):
        low, high = groups.interval(group, overlap, grid)
        return np.flatnonzero((levels > low) & (levels <= high))[[0, -1]].tolist()

    assert positions(2, 0) == [400, 599]
    assert positions(2, 1) == [381, 601] and positions(2, 2) == [361, 621]
    assert positions(0, 1) == [0, 201] and positions(4, 1) == [781, 999]
    edm = make_groups(EDM(), 5)  # its positions are the nodes of the grid
    low, high = edm.interval(2, 1, GRID)
    assert low == edm.levels[14] and high == edm.levels[24]
    assert edm.interval(0, 1, GRID) == (0.0, edm.levels[8])


@pytest.mark.parametrize("process", [EDM(), VP()])
@pytest.mark.parametrize("steps", [40, 17, 4])
def test_with_an_overlap_of_one_heun_stays_within_what_each_expert_was_trained_on(process, steps):
    groups, grid = make_groups(process, 5), process.grid(steps)
    for step, group in enumerate(expert_of_steps(grid, groups.boundaries)):
        low, high = groups.interval(group, 1, grid)
        assert all(low < level <= high or level == 0 for level in grid[step : step + 2])


@pytest.mark.parametrize("count", [5, 20])
def test_an_edm_group_is_drawn_by_the_teachers_density_cut_to_it(count):
    """This includes the noisiest of many groups, where float32 quantiles near 1 are coarse."""
    groups, n = make_groups(EDM(), count), 20000
    for group in (0, count // 2, count - 1):
        low, high = groups.interval(group)
        sigma = EDM().draw_sigma(jax.random.key(group), n, low, high, antithetic=True)
        sigma = np.asarray(sigma, np.float64)
        assert len(np.unique(sigma)) > 0.9 * n
        a, b = ((np.log(edge) + 1.2) / 1.2 if edge else -np.inf for edge in (low, high))
        law = stats.truncnorm(a, b, loc=-1.2, scale=1.2)
        # antithetic draws are pairs of quantiles, so only the first half is independent
        assert stats.kstest(np.log(sigma[: n // 2]), law.cdf).pvalue > 1e-3
        quantiles = law.cdf(np.log(sigma))
        np.testing.assert_allclose(quantiles[: n // 2] + quantiles[n // 2 :], 1, atol=0.01)


@pytest.mark.parametrize("group", [0, 1, 3])
def test_a_vp_group_is_drawn_uniformly_and_mirrored_inside_it(group):
    groups, n = make_groups(VP(), 4), 20000
    interval = groups.interval(group, 1, GRID)
    sigma = VP().draw_sigma(jax.random.key(group), n, *interval, antithetic=True)
    t = np.searchsorted(groups.levels, np.asarray(sigma) * (1 - 1e-5))
    inside = np.flatnonzero((groups.levels > interval[0]) & (groups.levels <= interval[1]))
    first, last = inside[[0, -1]]
    assert t.min() == first and t.max() == last
    np.testing.assert_array_equal(t[n // 2 :], first + last - t[: n // 2])
    counts, _ = np.histogram(t, bins=8, range=(first, last + 1))
    assert np.abs(counts / n - 1 / 8).max() < 0.012
