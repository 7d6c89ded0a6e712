"""Experts as a teacher: which network takes which step. Sets are made in memory, untrained."""

import jax
import numpy as np
import pytest

from cheapscale.diffusion.denoiser import EDM
from cheapscale.teacher import experts
from cheapscale.teacher.cost import segment_calls
from cheapscale.teacher.sampling import levels, round_trip, sample
from tests.teacher.toy_teacher import base_meta, toy_teacher

BOUNDARIES = [float(EDM().levels()[i]) for i in (12, 25)]  # thirds of the 40 nodes


@pytest.fixture(scope="module")
def base():
    return toy_teacher()


def as_set(*members, boundaries=BOUNDARIES, **options):
    """A set in memory."""
    return experts.join(base_meta(), "base", boundaries, members, **options)


def test_experts_that_are_the_base_are_the_base(base):
    """A set whose members are all the base samples and inverts like the base."""
    both = as_set(base, base, boundaries=BOUNDARIES[1:])
    a, labels = sample(base, np.arange(3), steps=5, method="euler")
    b, _ = sample(both, np.arange(3), labels=labels, steps=5, method="euler")
    np.testing.assert_allclose(a, b, atol=2e-5)
    z, back = round_trip(base, nodes=8)(a, labels)
    z2, back2 = round_trip(both, nodes=8)(a, labels)
    np.testing.assert_allclose(z2, z, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(back2, back, atol=1e-4)


def test_the_cost_of_a_set_is_the_sum_of_its_members_calls(base):
    grid = levels(base.process, 9, "sample")
    (whole,) = segment_calls(base, (2, 8, 8, 3), grid)
    parts = segment_calls(as_set(base, base, base), (2, 8, 8, 3), grid)
    assert len(parts) == 3 and sum(n for n, _ in parts) == whole[0] == 17
    assert {flops for _, flops in parts} == {whole[1]}


def test_a_shift_looks_up_the_expert_of_a_lower_level(base):
    """At twice the side, 2x2 block means at level sigma have the SNR of sigma / 2."""
    other = toy_teacher(1)
    grid = levels(base.process, 6, "sample")
    both = as_set(base, other, boundaries=[0.6 * float(grid[0])])
    assert [member for member, _ in both.parts(grid)] == [other, base]
    assert [member for member, _ in both.parts(grid, shift=2.0)] == [base]


def test_a_stitched_teacher_calls_the_base_below_its_boundary(base):
    """T-Stitch (arXiv 2402.14167): a small network takes the noisy steps, the base the clean ones.
    The ledger holds the base's cost and the additional cost of the small network."""
    small = toy_teacher(1, ledger={"flops": 9.0, "device_seconds": 3.0})
    grid, ids = levels(base.process, 6, "sample"), np.arange(2)
    for boundary, same in ((grid[0], base), (grid[-2] / 2, small)):
        both = as_set(base, small, boundaries=[boundary], cost={"flops": 0.5})
        np.testing.assert_allclose(
            sample(both, ids, steps=6)[0], sample(same, ids, steps=6)[0], atol=2e-5
        )
    assert both.meta["ledger"] == {"flops": 9.5, "device_seconds": 3.0} and both.step == 7
    with pytest.raises(ValueError, match="give one boundary fewer than networks, ascending"):
        as_set(base, small, base, boundaries=[2.0, 1.0])


def test_each_expert_runs_its_own_steps_and_no_other(base):
    """NaN weights reveal which expert was called."""
    broken = base.replace(params=jax.tree.map(lambda p: np.full_like(p, np.nan), base.params))
    grid = levels(base.process, 6, "sample")
    above = as_set(base, broken, boundaries=[float(grid[0])])  # no step begins above it
    assert np.isfinite(sample(above, np.arange(2), steps=6)[0]).all()
    below = as_set(base, broken, boundaries=[float(grid[1])])
    with pytest.raises(ValueError, match="image 7 of 2 samples holds a NaN .* 2 in all"):
        sample(below, np.arange(7, 9), steps=6)


@pytest.mark.parametrize("method, steps, fits", [
    ("heun", 40, True), ("heun", 60, True), ("heun", 10, False), ("euler", 10, True),
])  # fmt: skip
def test_experts_are_not_called_outside_of_the_levels_they_were_trained_on(
    base, method, steps, fits
):
    """Two groups of 20 nodes, each trained on one step of 40 beyond its own levels."""
    nodes = base.process.levels()
    trained = ((0.0, nodes[20]), (nodes[18], nodes[39]))
    members = [
        toy_teacher(expert={"group": group, "trained": range_, "steps": 40})
        for group, range_ in enumerate(trained)
    ]
    both = as_set(*members, boundaries=[nodes[19]], workdir="set")
    grid = levels(base.process, steps, "sample")
    if fits:
        both.check_levels(grid, method)
    else:
        with pytest.raises(ValueError, match="group 1 of set at sigma .* use --steps=40"):
            both.check_levels(grid, method)
