"""Groups of noise levels: who owns a step, and what a group trains on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cheapscale.diffusion import process
from cheapscale.pruning.partition import step_owners
from cheapscale.stages.groups import NODES, draw_levels, levels_of, make_groups, weight
from cheapscale.stages.prune import group_loss

EDM = {"process": "edm", "prediction": "x0", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0,
       "sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}  # fmt: skip
VP = EDM | {"process": "linear", "prediction": "eps"}
GRID = process.sampling_grid(NODES, 0.002, 80.0, 7.0)


def test_an_edm_teachers_borders_are_nodes_of_its_own_grid():
    groups = make_groups(EDM, 5)
    grid = process.sampling_grid(NODES, 0.002, 80.0, 7.0)
    assert set(groups.borders) < set(grid) and len(groups.borders) == 4
    owners = step_owners(grid, groups.borders)
    assert np.bincount(owners).tolist() == [8] * 5  # as many steps each
    assert owners[0] == 4 and owners[-1] == 0  # the noisiest group first


@pytest.mark.parametrize("diffusion, steps", [(EDM, 40), (EDM, 20), (VP, 20)])
def test_borders_on_the_nodes_of_a_sampler_give_every_group_as_many_steps(diffusion, steps):
    grid = process.sampling_grid(steps, 0.02, 80.0, 7.0)
    if diffusion is EDM:
        grid = process.sampling_grid(steps, 0.002, 80.0, 7.0)
    groups = make_groups(diffusion, 4, "nodes", grid=grid)
    assert np.bincount(step_owners(grid, groups.borders)).tolist() == [steps // 4] * 4
    if steps == NODES:
        np.testing.assert_array_equal(groups.edges, make_groups(EDM, 4).edges)


@pytest.mark.parametrize("diffusion", [EDM, VP])
def test_steps_belong_to_the_same_group_in_both_directions(diffusion):
    groups = make_groups(diffusion, 4)
    for grid in (process.karras_grid(18), process.karras_grid(7)):
        down, up = (step_owners(g, groups.borders) for g in (grid, grid[::-1]))
        np.testing.assert_array_equal(down, up[::-1])
        assert np.all(np.diff(down) <= 0)
    # a step that begins on a border belongs to the cleaner group
    border = groups.borders[1]
    assert step_owners(np.array([border, border / 2]), groups.borders)[0] == 1
    assert step_owners(np.array([border * 1.01, border]), groups.borders)[0] == 2


def test_vp_groups_are_intervals_of_time():
    groups = make_groups(VP, 4)
    assert groups.edges.tolist() == [0, 250, 500, 750, 1000]
    np.testing.assert_array_equal(levels_of(VP), process.vp_schedule("linear").sigmas)
    np.testing.assert_allclose(groups.decibels(), (9.5, -5.1, -17.4, -33.9), atol=0.06)
    assert groups.positions(1) == (250, 499)


def test_an_overlap_is_a_step_of_the_sampler_on_either_side():
    """DDIM's 50 uniform times lie 20 apart; the first and last group end where the table does."""
    grid = process.vp_schedule("linear").grid(50, spacing="leading")
    groups = make_groups(VP, 5)
    assert groups.positions(2, 1, grid) == (400 - 20, 599 + 20)
    assert groups.positions(2, 2, grid) == (400 - 40, 599 + 40)
    assert groups.positions(0, 1, grid) == (0, 199 + 20)
    assert groups.positions(4, 1, grid) == (800 - 20, 999)
    nodes = make_groups(EDM, 5)  # whose positions are the nodes
    assert nodes.positions(2, 1, GRID) == (15, 24) and nodes.positions(0, 1, GRID) == (0, 8)


@pytest.mark.parametrize("group", [0, 1, 3])
def test_vp_draws_are_uniform_in_the_interval_and_mirrored_inside_it(group):
    groups, n = make_groups(VP, 4), 20000
    sigma = np.asarray(
        draw_levels(jax.random.key(group), n, VP, groups, groups.positions(group, 1, GRID))
    )
    t = np.searchsorted(groups.levels, sigma * (1 - 1e-5))
    first, last = groups.positions(group, 1, GRID)
    assert t.min() == first and t.max() == last
    np.testing.assert_array_equal(t[n // 2 :], first + last - t[: n // 2])
    counts, _ = np.histogram(t, bins=8, range=(first, last + 1))
    assert np.abs(counts / n - 1 / 8).max() < 0.012


@pytest.mark.parametrize("group", [0, 2, 4])
def test_edm_draws_follow_the_teachers_own_density_cut_to_the_group(group):
    groups, n = make_groups(EDM, 5), 20000
    sigma = np.asarray(
        draw_levels(jax.random.key(0), n, EDM, groups, groups.positions(group, 1, GRID)), np.float64
    )
    first, last = groups.positions(group, 1, GRID)
    low = np.log(groups.levels[first - 1]) if first else -np.inf
    high = np.log(groups.levels[last]) if last < NODES - 1 else np.inf
    assert np.all(np.log(sigma) >= low - 1e-3) and np.all(np.log(sigma) <= high + 1e-3)
    a, b = ((edge + 1.2) / 1.2 for edge in (low, high))
    law = stats.truncnorm(a, b, loc=-1.2, scale=1.2)
    # mirrored draws are pairs of quantiles: the first half alone is independent
    assert stats.kstest(np.log(sigma[: n // 2]), law.cdf).pvalue > 1e-3
    quantiles = law.cdf(np.log(sigma))
    np.testing.assert_allclose(quantiles[: n // 2] + quantiles[n // 2 :], 1, atol=0.01)


@pytest.mark.parametrize("count", [5, 10, 20])
def test_the_noisiest_group_of_many_is_drawn_finely_and_by_its_law(count):
    """Near 1 float32 has few probabilities: the upper tail must not collapse on a few levels."""
    groups, n = make_groups(EDM, count), 4096
    positions = groups.positions(count - 1)
    sigma = draw_levels(jax.random.key(1), n, EDM, groups, positions)
    assert len(np.unique(sigma)) > 0.9 * n
    low = (np.log(groups.levels[positions[0] - 1]) + 1.2) / 1.2
    law = stats.truncnorm(low, np.inf, loc=-1.2, scale=1.2)
    assert stats.kstest(np.log(np.asarray(sigma, np.float64)[: n // 2]), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("diffusion", [EDM, VP])
def test_groups_cover_all_levels_and_both_ends_of_their_own_steps(diffusion):
    """Without overlap nothing lies between two groups; with one step of it, the corrector at the
    cleaner end of a specialist's last step meets a level that it was trained on."""
    groups = make_groups(diffusion, 5)

    def trained(group, overlap):
        sigma = np.asarray(
            draw_levels(
                jax.random.key(0), 40000, diffusion, groups, groups.positions(group, overlap, GRID)
            ),
            np.float64,
        )
        return sigma.min(), sigma.max()

    bare = [trained(group, 0) for group in range(5)]
    for (_, top), (bottom, _) in zip(bare, bare[1:]):
        assert abs(np.log(bottom / top)) < 0.05
    owners = step_owners(GRID, groups.borders)
    for step, owner in enumerate(owners):
        low, high = trained(owner, 1)
        for level in (GRID[step], GRID[step + 1]):
            if level > 0.01:  # below, an EDM teacher's density is empty
                assert low * 0.97 <= level <= high * 1.03 or level > high > 40


def test_groups_may_begin_where_they_are_told_to():
    groups = make_groups(VP, 3, "edges", edges=(40, 500))
    assert groups.edges.tolist() == [0, 40, 500, 1000]
    for edges in ((40,), (500, 40), (0, 40), (40, 1000)):
        with pytest.raises(ValueError, match="do not cut 1000 positions into 3 groups: give 2 inc"):
            make_groups(VP, 3, "edges", edges=edges)


def test_clustered_groups_need_their_measurement_and_follow_it():
    with pytest.raises(ValueError, match="prune.partition 'loss' needs a measurement"):
        make_groups(EDM, 3, "loss")
    with pytest.raises(ValueError, match="prune.partition is 'odd'"):
        make_groups(EDM, 3, "odd")
    anchors = np.arange(NODES)
    measured = np.repeat([5.0, 1.0, 0.0], [4, 16, 20])
    groups = make_groups(EDM, 3, "loss", anchors=anchors, measured=measured)
    assert groups.edges.tolist() == [0, 4, 20, 40]
    assert len(make_groups(VP, 4, "snr").edges) == 5
    assert len(make_groups(VP, 4, "decibels").edges) == 5


def test_the_weight_is_the_teachers_own():
    sigma = np.array([0.1, 2.0])
    np.testing.assert_allclose(weight(VP, sigma), 1 / sigma**2)
    np.testing.assert_allclose(weight(EDM, sigma), (sigma**2 + 0.25) / (0.5 * sigma) ** 2)


@pytest.mark.parametrize("distil", [0.0, 0.25])
@pytest.mark.parametrize("diffusion", [EDM, VP])
def test_a_specialist_s_loss_has_its_closed_form(diffusion, distil):
    """Estimates c sigma: w(sigma) ((1 - d) (c sigma - x)^2 + d (c sigma - b sigma)^2), in the
    group, and the level itself is what the network is told."""

    def linear(params, **options):
        return lambda x, sigma, label: params["c"] * process.over_pixels(sigma, x) * (0 * x + 1)

    groups = make_groups(diffusion, 5)
    loss, sigma = group_loss(
        {"c": 0.5},
        {"base": {"c": 0.2}},
        {"image": jnp.full((6, 2, 2, 3), -0.3), "label": jnp.zeros(6, jnp.int32)},
        jax.random.key(0),
        bind=linear,
        bind_base=linear,
        diffusion=diffusion,
        groups=groups,
        positions=groups.positions(2),
        distil=distil,
        null_label=8,
        label_dropout=0.0,
    )
    expected = (1 - distil) * (0.5 * sigma + 0.3) ** 2 + distil * (0.3 * sigma) ** 2
    np.testing.assert_allclose(loss, weight(diffusion, sigma) * expected, rtol=1e-5)
    assert groups.borders[1] * (1 - 1e-5) < sigma.min() < sigma.max() < groups.borders[2] * 1.0001
