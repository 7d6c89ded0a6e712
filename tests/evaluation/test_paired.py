"""Arms against their control: paired differences, intervals, the table."""

import numpy as np
import pytest
from scipy import stats

from cheapscale.evaluation.paired import compare, paired, table


def test_the_interval_is_that_of_scipys_paired_test():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5)) + np.arange(5)  # seeds differ more than arms do
    found = paired(dict(enumerate(x)), dict(enumerate(y)))
    low, high = stats.ttest_rel(x, y).confidence_interval(0.95)
    assert found.difference - found.half == pytest.approx(low)
    assert found.difference + found.half == pytest.approx(high)
    assert found.seeds == 5 and found.mean == pytest.approx(x.mean())


def test_only_common_seeds_are_compared_and_one_has_no_interval():
    found = paired({0: 3.0, 1: 9.0}, {0: 1.0, 2: 5.0})
    assert (found.mean, found.difference, found.half, found.seeds) == (3.0, 2.0, None, 1)
    with pytest.raises(ValueError, match="seeds"):
        paired({1: 0.0}, {0: 0.0})


def test_the_table_marks_differences_whose_interval_has_no_0():
    rows = [
        {"arm": arm, "seed": seed, "figures": {"kid": seed + shift + seed * wobble}}
        for arm, shift, wobble in (("control", 0, 0), ("far", 5, 0.01), ("near", 0.1, 0.5))
        for seed in range(3)
    ]
    lines = table(compare(rows)).splitlines()
    assert lines[2] == "| control | 3 | 1 |"
    assert "**+5 ± " in lines[3] and "**" not in lines[4]
    assert table({}) == "| run | seeds |\n| --- | --- |"
