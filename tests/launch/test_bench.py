"""The comparisons, cut down to one round of something tiny."""

import json
import sys

import pytest

from cheapscale.teacher.teacher import make_generator
from launch.bench import __main__ as bench
from launch.bench import one_step

DIFFUSION = {"process": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0,
             "sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}  # fmt: skip
TINY = dict(
    resolution=8, channels=16, channel_mult=(1, 2), num_blocks=1, attention=(4,), head_dim=8,
    groups=4,
)  # fmt: skip


def test_ratios_are_paired_within_the_round():
    ours, theirs = [1.0, 4.0, 2.0], [2.0, 2.0, 2.0]
    wall, cpu = {"ours": ours, "theirs": theirs}, {"ours": theirs, "theirs": ours}
    assert bench.summary(wall, cpu)["theirs"] == {
        "seconds": 2.0, "ratio": 1.0, "range": [0.5, 2.0],
        "cpu_seconds": 2.0, "cpu_ratio": 1.0, "cpu_range": [0.5, 2.0],
    }  # fmt: skip


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


def test_a_record_keeps_the_parts_of_other_numbers_of_cores(tmp_path):
    record = tmp_path / "r.json"
    record.write_text(json.dumps({"99_cores": {"unet": {}}}))
    figures = bench.run({"pruned": lambda: {"analytic": 0.8}}, 1, record)
    (kept, new) = json.loads(record.read_text()).values()
    assert kept == {"unet": {}} and new["pruned"] == figures["pruned"] == {"analytic": 0.8}


def test_one_step_against_the_samplers_it_replaces(monkeypatch):
    fields = TINY | {"channel_mult": (1,), "attention": (), "num_classes": 3, "growth": (8,)}
    model = make_generator(None, {"networks": {"generator": fields}, "diffusion": DIFFUSION})
    model = model.replace(params=one_step.weights(model.fields))
    monkeypatch.setattr(one_step, "load", lambda _: model)
    rows = one_step.measure("G", steps=5, batch=2, rounds=1, paired=bench.paired)["rows"]
    # 2 n - 1 network calls: Heun's last step, to 0, is Euler's
    assert {name: row["calls"] for name, row in rows.items()} == {
        "one_step": 1, "teacher8": 9, "teacher8 guided": 18, "teacher16": 9, "teacher16 guided": 18,
    }  # fmt: skip
    for px in (8, 16):
        plain, guided = rows[f"teacher{px}"], rows[f"teacher{px} guided"]
        assert guided["flops"] == pytest.approx(2 * plain["flops"], rel=0.05)
    each = {name: row["flops"] / row["calls"] for name, row in rows.items()}
    assert each["teacher8"] < each["one_step"] < each["teacher16"]
    assert rows["one_step"]["ratio"] == 1 and all(row["seconds"] > 0 for row in rows.values())
    assert [t.net.config.channel_mult for t in one_step.teachers(model)] == [(1,), (1, 1)]
    monkeypatch.setattr(one_step, "load", lambda _: one_step.teachers(model)[0])
    with pytest.raises(ValueError, match="W holds no one-step generator: give --model=DIR"):
        one_step.measure("W", steps=5, batch=2, rounds=1, paired=bench.paired)


def test_a_comparison_without_the_other_package_says_what_to_install():
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="pip install diff"):
        patch.setitem(sys.modules, "diffusers", None)
        patch.delitem(sys.modules, "launch.bench.unet", raising=False)
        bench.compare("unet", 1, TINY, 2)
