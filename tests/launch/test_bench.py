"""The comparisons with diffusers and torch-fidelity, cut down to one round of something tiny."""

import json

import pytest

from launch import bench, bench_statistics

TINY = bench.Size(
    dict(resolution=8, channels=16, channel_mult=(1, 2), attention=(4,), head_dim=8, groups=4), 2
)


def recorded(name, part, folder):
    """What the record and the closing line say of one part."""
    summary = bench.run({name: part}, 1, str(folder), str(folder / "bench.json"))
    record = json.loads((folder / "bench.json").read_text())
    (record,) = record.values()  # one run, under its number of cores
    return record, summary


def test_a_run_without_rounds_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--rounds=0 measures nothing"):
        bench.run({}, 0, str(tmp_path))


def test_medians_are_those_of_the_rounds_and_ratios_are_paired():
    ours = {"wall": [1.0, 4.0, 2.0], "cpu": [1.0, 1.0, 1.0]}
    theirs = {"wall": [2.0, 2.0, 2.0], "cpu": [3.0, 3.0, 3.0]}
    seconds = {"ours": ours, "contiguous": theirs}
    row = bench.summary(seconds)["contiguous"]
    assert row["wall_ratio"] == 1.0 and row["wall_ratio_range"] == [0.5, 2.0]
    assert row["cpu_ratio"] == 3.0 and row["wall_seconds"] == 2.0
    both = bench.total(seconds, {"ours": theirs, "contiguous": ours})
    assert both["ours"] == both["contiguous"]
    assert both["ours"] == {"wall": [3.0, 6.0, 4.0], "cpu": [4.0, 4.0, 4.0]}


def test_both_u_nets_are_one_function_and_the_record_says_where_time_goes(tmp_path):
    pytest.importorskip("diffusers", reason="the comparison is with diffusers: pip install it")
    pytest.importorskip("torch")
    from launch.bench_diffusers import CLASSES, FORMATS

    record, summary = recorded("unet", lambda: bench.against_diffusers({"tiny": TINY}, 1), tmp_path)
    figures = record["sizes"]["tiny"]
    assert figures["parameters"]["ours"] == figures["parameters"]["theirs"]
    assert figures["output_difference"] < 1e-4
    assert {"torch", "diffusers", "commit"} <= set(record["provenance"])
    for use in ("training", "sampling"):
        for side in ("ours", *FORMATS):
            assert figures["uses"][use][side]["wall_seconds"] > 0
        assert summary["theirs_over_ours"]["tiny"][use] > 0
        ratio = figures["uses"][use]["flops"]["ours"] / figures["uses"][use]["flops"]["theirs"]
        assert 0.5 < ratio < 1.5
    profile = figures["profile_ms"]
    assert set(profile) == {kind for kind, _ in CLASSES}
    assert all(profile[kind] > 0 for kind in profile if kind.startswith("convolution"))


def test_a_specialist_costs_what_it_was_cut_to(tmp_path):
    plain = bench.Size(dict(resolution=8, channels=16, channel_mult=(1,), groups=4), 2)
    record, summary = recorded("pruned", lambda: bench.pruned(plain, (0.8,), 1), tmp_path)
    figures = record["pruned"]
    assert figures["analytic"]["80 %"] == pytest.approx(0.8, abs=0.02)
    for use in ("sampling", "training"):
        compiled = figures["compiled"]["80 %"][use]
        assert compiled == pytest.approx(figures["analytic"]["80 %"], rel=0.05)
        assert summary["specialist_over_base"][use]["80 %"] > 0
    assert figures["parameters"]["80 %"] < figures["parameters"]["ours"]


def test_both_inceptions_give_the_same_features_and_distance(torchvision, tmp_path):
    pytest.importorskip("torch_fidelity", reason="install torch-fidelity (extra: test) to compare")
    tiny = {"num": 5, "batch": 4, "resolution": 8, "side": 75, "dimension": 3}
    record, summary = recorded("features", lambda: bench.against_torch_fidelity(tiny, 1), tmp_path)
    figures = record["features"]
    assert figures["output_difference"] < 1e-5
    assert figures["distance"]["ours"] == pytest.approx(figures["distance"]["theirs"], rel=1e-4)
    assert {"torch", "torch_fidelity", "commit"} <= set(record["provenance"])
    assert set(figures["uses"]) == {"extraction", "statistics", "both"}
    assert all(ratio > 0 for ratio in summary["features_theirs_over_ours"].values())
    parts = [figures["uses"][use]["ours"]["wall_seconds"] for use in ("extraction", "statistics")]
    both = figures["uses"]["both"]["ours"]
    assert both["wall_seconds"] == pytest.approx(sum(parts), abs=1e-4)
    assert both["images_per_second"] == pytest.approx(5 / both["wall_seconds"], rel=0.1)
    profile = figures["profile_ms"]
    convolutions = sum(v for kind, v in profile.items() if kind.startswith("convolutions"))
    assert convolutions > sum(profile.values()) / 2


def test_every_large_statistic_has_its_seconds_and_memory(tmp_path):
    held = bytearray(2**28)  # what this process holds must not count
    record, summary = recorded("statistics", lambda: bench.large_statistics(40, 8), tmp_path)
    del held
    figures = record["statistics"]
    assert figures["rows"] == 40 and figures == summary["statistics"]
    for kind in bench_statistics.KINDS:
        assert figures[kind]["wall_seconds"] >= 0
        assert 0 < figures[kind]["before_gib"] <= figures[kind]["peak_gib"] < 0.25


def test_a_statistic_that_fails_says_why():
    with pytest.raises(OSError, match=r"(?s)prdc of 2 features ended with 1.*more than k vectors"):
        bench_statistics.measure(2, 4)
