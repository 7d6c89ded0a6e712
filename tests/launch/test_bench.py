"""The comparisons with diffusers and torch-fidelity, cut down to one round of something tiny."""

import json
import sys

import pytest

from launch.bench import __main__ as bench
from launch.bench import statistics

TINY = dict(
    resolution=8, channels=16, channel_mult=(1, 2), num_blocks=1, attention=(4,), head_dim=8,
    groups=4,
)  # fmt: skip


def test_ratios_are_paired_within_the_round():
    ours, theirs = [1.0, 4.0, 2.0], [2.0, 2.0, 2.0]
    row = bench.summary({"ours": ours, "theirs": theirs})["theirs"]
    assert row == {"seconds": 2.0, "ratio": 1.0, "range": [0.5, 2.0]}


def test_both_u_nets_are_one_function(torchvision):
    pytest.importorskip("diffusers", reason="the comparison is with diffusers: pip install it")
    pytest.importorskip("torch")
    figures = bench.compare("unet", 1, TINY, 2)
    assert figures["parameters"]["ours"] == figures["parameters"]["theirs"]
    assert figures["output_difference"] < 1e-4
    for use in ("training", "sampling"):
        assert set(figures["uses"][use]) == {"ours", "contiguous", "channels_last"}
        ratio = figures["flops"][use]["ours"] / figures["flops"][use]["theirs"]
        assert 0.5 < ratio < 1.5


def test_an_expert_costs_what_it_was_cut_to():
    plain = dict(resolution=8, channels=16, channel_mult=(1,), groups=4)
    figures = bench.compare("pruned", 1, plain, 2, (0.8,))
    assert figures["analytic"]["80%"] == pytest.approx(0.8, abs=0.02)
    for use in ("sampling", "training"):
        compiled = figures["compiled"]["80%"][use]
        assert compiled == pytest.approx(figures["analytic"]["80%"], rel=0.05)
        assert figures["uses"][use]["80%"]["ratio"] > 0
    assert figures["parameters"]["80%"] < figures["parameters"]["base"]


def test_both_inceptions_give_the_same_features_and_distance(torchvision):
    pytest.importorskip("torch_fidelity", reason="install torch-fidelity (extra: test) to compare")
    figures = bench.compare("features", 1, 5, 4, 8, 75, 3)
    assert figures["output_difference"] < 1e-5
    assert figures["distance"]["ours"] == pytest.approx(figures["distance"]["theirs"], rel=1e-4)
    assert set(figures["uses"]) == {"extraction", "statistics"}


def test_the_record_has_the_seconds_and_memory_of_large_statistics(tmp_path):
    held = bytearray(2**28)  # the memory of this process must not count
    figures = bench.run({"statistics": lambda: statistics.measure(40, 8)}, 1, tmp_path / "r.json")
    del held
    (record,) = json.loads((tmp_path / "r.json").read_text()).values()
    assert record["statistics"] == figures["statistics"] and record["statistics"]["rows"] == 40
    for kind in ("moments", "frechet", "prdc"):
        assert record["statistics"][kind]["seconds"] >= 0
        assert 0 < record["statistics"][kind]["peak_gib"] < 0.5


def test_a_comparison_without_the_other_package_says_what_to_install():
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="pip install diff"):
        patch.setitem(sys.modules, "diffusers", None)
        patch.delitem(sys.modules, "launch.bench.unet", raising=False)
        bench.compare("unet", 1, TINY, 2)


def test_a_statistic_that_fails_says_why():
    with pytest.raises(OSError, match=r"(?s)prdc of 2 features failed.*need more than 5 images"):
        statistics.measure(2, 4)
