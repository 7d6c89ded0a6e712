"""The comparison with diffusers, cut down to one round of a tiny network."""

import json

import pytest

from launch import bench

TINY = bench.Size(
    dict(resolution=8, channels=16, channel_mult=(1, 2), attention=(4,), head_dim=8, groups=4), 2
)


def test_a_run_without_rounds_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--rounds=0 measures nothing"):
        bench.run({"tiny": TINY}, 0, str(tmp_path))


def test_medians_are_those_of_the_rounds_and_ratios_are_paired():
    ours = {"wall": [1.0, 4.0, 2.0], "cpu": [1.0, 1.0, 1.0]}
    theirs = {"wall": [2.0, 2.0, 2.0], "cpu": [3.0, 3.0, 3.0]}
    row = bench.summary({"ours": ours, "contiguous": theirs})["contiguous"]
    assert row["wall_ratio"] == 1.0 and row["wall_ratio_range"] == [0.5, 2.0]
    assert row["cpu_ratio"] == 3.0 and row["wall_seconds"] == 2.0


def test_both_sides_are_one_function_and_the_record_says_where_time_goes(tmp_path):
    pytest.importorskip("diffusers", reason="the comparison is with diffusers: pip install it")
    pytest.importorskip("torch")
    summary = bench.run({"tiny": TINY}, 1, str(tmp_path), str(tmp_path / "bench.json"))
    record = json.loads((tmp_path / "bench.json").read_text())
    (record,) = record.values()  # one run, under its number of cores
    figures = record["sizes"]["tiny"]
    assert figures["parameters"]["ours"] == figures["parameters"]["theirs"]
    assert figures["output_difference"] < 1e-4
    assert {"torch", "diffusers", "commit"} <= set(record["provenance"])
    for use in ("training", "sampling"):
        for side in ("ours", *bench.FORMATS):
            assert figures["uses"][use][side]["wall_seconds"] > 0
        assert summary["theirs_over_ours"]["tiny"][use] > 0
        ratio = figures["uses"][use]["flops"]["ours"] / figures["uses"][use]["flops"]["theirs"]
        assert 0.5 < ratio < 1.5
    profile = figures["profile_ms"]
    assert set(profile) == {kind for kind, _ in bench.CLASSES}
    assert all(profile[kind] > 0 for kind in profile if kind.startswith("convolution"))
