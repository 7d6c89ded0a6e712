"""The step-adaptive study: whose loss is taken, what it concludes from cells, and its arms."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.pruning.partition import step_owners
from cheapscale.stages import assess, networks
from cheapscale.stages.networks import complete
from cheapscale.stages.sampling import levels
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.sharding import make_mesh
from configs import common
from configs import pruning_study as config_file
from launch import pruning_experiment
from launch.cells import begins, check_chosen
from launch.pruning_experiment import Held, Study, cells, owned_losses
from launch.pruning_findings import findings, table
from launch.round_trips import NODES, owned_by_start
from tests.launch.shell import command

MODEL = complete({"resolution": 4, "channels": 8, "num_classes": 3})
EDM = {"process": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
VP = {"process": "linear", "prediction": "x0", "sigma_min": 0.02, "sigma_max": 80.0, "rho": 7.0,
      "sigma_data": 0.5}  # fmt: skip


def test_each_level_s_loss_is_its_owner_s(monkeypatch):
    """Members whose estimate is a constant: loss c^2 / sigma^2 of black images."""

    def apply(variables, x, noise, label):
        return jnp.full_like(x, variables["params"]["c"])

    net = SimpleNamespace(apply=apply, config=SimpleNamespace(noise_feature="edm"))
    monkeypatch.setattr(networks, "unet", lambda **model: net)
    held = Held(np.zeros((6, 4, 4, 3), np.float32), np.zeros(6, np.int32))
    sigma = np.array([0.1, 5.0, 0.5, 2.0, 1.0, 20.0], np.float32)
    members = tuple({"c": np.float32(c)} for c in (1.0, 2.0, 3.0))
    of_set = {"specialists": {"borders": [0.5, 2.0], "models": [MODEL] * 3, "base": "b"}}
    ours = Loaded(members, {"networks": {"net": MODEL}, "diffusion": VP | of_set}, 0, "")
    alone = Loaded(members[1], {"networks": {"net": MODEL}, "diffusion": VP}, 0, "")
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        found, base = (owned_losses(loaded, held, sigma) for loaded in (ours, alone))
    np.testing.assert_allclose(found, np.array([1, 9, 1, 4, 4, 9]) / sigma**2, rtol=1e-5)
    np.testing.assert_allclose(base, 4 / sigma**2, rtol=1e-5)


def row(fd, share=1.0, steps=0.0, losses=(1.0, 2.0), **more):
    draws = " ".join(f"{fd + d:.4g}" for d in (-0.1, 0.0, 0.1))
    return {"figures": {"fd": [fd, 0.1], "draws": {"fd": draws}, "share": share,
                        "steps_of_base": steps, "losses": list(losses), "parameters": share}
            | more}  # fmt: skip


def test_findings_hold_the_headline_with_its_interval_and_costs():
    config = config_file.get_config().to_dict()
    done = {
        "E3 seed 0: base": row(3.0, steps=2400),
        "E3 seed 0: specialists": row(
            2.0, 0.79, 4000, mean_shares={"positions": 0.785}, search_steps_of_base=400
        ),
        "E3 seed 0: base longer": row(2.5, 1.0, 1400, losses=(2.0, 2.0)),
        "E3 seed 0: one network": row(2.1, 1.0, 4000, losses=(1.0, 2.0)),
        "E2 seed 0: full size": row(2.2, 1.0, 1600, losses=(1.0, 3.0), before=[1.5, 2.5]),
        "E5 seed 0: flat": row(2.4, 0.8, 1600, losses=(3.0, 3.0)),
        "E1 seed 0: flat 60 %": row(2.6, 0.6, 1600, losses=(5.0, 3.0)),
        "E6 seed 0: uniform widths": row(2.2, 0.8, 1600, losses=(2.0, 2.0), before=[2.0, 8.0]),
        "E7 seed 0: magnitudes": row(2.9, 0.8, 1600, losses=(3.0, 2.0), before=[4.0, 8.0]),
        "E3 seed 1: specialists": row(1.0, 0.79, 1400, mean_shares={"positions": 0.785}),
        "E3 seed 1: base longer": row(0.9, 1.0, 1400),
        "E3 seconds": {"figures": {"over_base": 0.9}},
    }
    found = findings(config, done)
    headline = found["specialists against the base, seed 0"]
    value, low, high = headline["minus base longer"]["fd"]
    assert value == pytest.approx(-0.5) and low <= value <= high < 0
    assert headline["sampling FLOPs"] == 0.79 and headline["mean shares"] == {"positions": 0.785}
    assert headline["training FLOPs, without the search"] == 3600 / (2400 + 1600)
    assert headline["training FLOPs, with the search"] == 1
    arms = found["arms against the specialists, seed 0"]
    assert arms["full size"]["fd"][0] == pytest.approx(0.2) and "specialists" not in arms
    full = found["full-size specialists against the base, seed 0"]
    assert full["base longer"]["losses"] == [0.5, 1.5]
    assert full["one network"]["losses"] == [1.0, 1.5]
    assert full["one network"]["fd"][0] == pytest.approx(0.1)
    assert found["excess loss of an equal cut by group, seed 0"] == {
        "flat 60 %": [4.0, 0.0]
    }  # fmt: skip
    assert found["losses before fine-tuning by group, seed 0"] == {
        "full size": [1.5, 2.5], "uniform widths": [2.0, 8.0], "magnitudes": [4.0, 8.0]
    }  # fmt: skip
    (scores,) = found["other scores against the group's, at uniform widths, seed 0"].values()
    assert scores["fd"][0] == pytest.approx(0.7) and scores["losses"] == [1.5, 1.0]
    assert scores["losses before fine-tuning"] == [2.0, 1.0]
    seeds = found["fd above the specialists' over seeds"]["base longer"]
    assert seeds["mean"] == pytest.approx(0.2) and seeds["least"] == pytest.approx(-0.1)
    assert seeds["seeds"] == 2 and found["seconds"]["over_base"] == 0.9
    # differences 0.5 and -0.1: half their distance is a standard error, times t of one freedom
    assert seeds["runs"] == pytest.approx([0.2 - 12.7062 * 0.3, 0.2 + 12.7062 * 0.3], abs=1e-3)
    # the resamples of both arms move alike, so the images drawn leave nothing open
    assert seeds["images"] == pytest.approx([0.2, 0.2], abs=1e-6)
    assert not any("seed 2" in claim for claim in found)
    assert "E2 seed 0: full size" in table(done) and "seconds" not in table(done)


def test_the_study_runs_on_cifar_10_as_well(tmp_path):
    config = config_file.get_config("images=cifar10,data_dir=somewhere")
    stage = Study(config, tmp_path).stage("pretrain", 2)
    assert (stage.data.name, stage.data.data_dir, stage.seed) == ("cifar10", "somewhere", 2)
    assert stage.data.resolution == 16 and stage.diffusion.process == "linear"
    with pytest.raises(ValueError, match="images=faces is unknown: choose scenes or cifar10"):
        config_file.get_config("images=faces")


def test_without_the_rule_a_step_there_is_the_cleaner_end_s():
    diffusion = EDM | {"specialists": {"borders": [0.5, 2.0]}}
    grid = np.sort(levels(diffusion, NODES, "invert"))
    moved = owned_by_start(diffusion)["specialists"]["borders"]
    ruled, free = (step_owners(grid, borders) for borders in ([0.5, 2.0], moved))
    np.testing.assert_array_equal(ruled, np.searchsorted([0.5, 2.0], grid[1:]))
    np.testing.assert_array_equal(free, np.searchsorted([0.5, 2.0], grid[:-1]))
    assert np.sum(ruled != free) == 2


def test_every_section_of_the_protocol_has_cells_with_names_of_their_own(tmp_path):
    planned = list(cells(Study(config_file.get_config(), tmp_path)))
    names = [f"{cell.section} {cell.name}" for cell in planned]
    assert len(set(names)) == len(names)
    assert {cell.section for cell in planned} == {f"E{i}" for i in range(1, 14)}
    for seed in (0, 1, 2):
        assert f"E3 seed {seed}: base longer" in names and f"E11 seed {seed}: T-Stitch" in names
    check_chosen(["E3 seed 0", "E8"], names)
    with pytest.raises(ValueError, match="--only names E14, with which no cell begins"):
        check_chosen(["E14"], names)
    chosen = [name for name in names if begins(name, "E1")]
    assert len(chosen) == 2 and all(name.startswith("E1 ") for name in chosen)


def test_every_arm_trains_as_its_name_says(tmp_path, monkeypatch):
    """What the stages would be given: nothing is trained."""
    config, given = config_file.get_config(), {}
    study = Study(config, tmp_path)
    monkeypatch.setattr(study, "teacher", lambda seed: SimpleNamespace(workdir=f"base-{seed}"))
    monkeypatch.setattr(Study, "assessed_alike", lambda *_: None)
    monkeypatch.setattr(Study, "equal_steps", lambda *_, **__: 50)
    monkeypatch.setattr(pruning_experiment, "load_model", lambda folder: folder)
    monkeypatch.setattr(pruning_experiment.specialists, "read_manifest", lambda folder: {})

    def make_set(configured, folder):
        given[folder] = configured("assess", 0), configured("prune", 1)

    monkeypatch.setattr(pruning_experiment, "make_set", make_set)
    default, changed = common.prune().to_dict(), {}
    for name, (_, changes) in (config.arms.to_dict() | config.choices.to_dict()).items():
        study.arm(0, name, changes)
        assess_config, train_config = given.pop(next(iter(given)))
        settings = assess_config.prune.to_dict()
        assess.check_settings(settings)
        changed[name] = {k: v for k, v in settings.items() if v != default[k]}
        rate = train_config.optim
        as_many = name == "specialists" or name.startswith("flat ")
        steps = 320 if as_many else 50
        assert train_config.total_steps == rate.decay_steps == steps
        assert rate.warmup_steps <= steps // 5 and train_config.teacher == "base-0"
        assert rate.lr == (2e-3 if name == "single stage" else 1e-3)
        assert train_config.seed == (1000 if name == "specialists again" else 0)
        assert assess_config.seed == 0
        assert rate.decay == ("tail" if "last fifth" in name else "cosine")
    ours = {"mean": 0.79, "steps": 50, "spacing": "leading", "rounds": 6, "proxy_images": 256}
    assert changed["specialists"] == changed["specialists again"] == ours
    assert changed["flipped"] == ours | {"order": "snr_down"}
    assert changed["full size"] == ours | {"budget": "flat", "mean": 1.0}
    assert changed["one network"] == changed["full size"] | {"groups": 1}
    assert changed["single stage"] == ours | {"start": "scratch"}
    fixed = ours | {"proposer": "uniform"}
    assert changed["magnitudes"] == fixed | {"importance": "magnitude"}
    assert changed["uniform widths"] == fixed
    assert changed["sliced moments"] == ours | {"optimiser": "sliced"}
    assert changed["rate falls in the last fifth"] == ours
    assert changed["half the rate where nothing is cut"] == ours | {"whole_rate": 0.5}
    assert changed["k 50 %"] == {k: v for k, v in ours.items() if k != "mean"}


def test_arms_of_one_bill_take_updates_by_what_a_group_costs_and_how_long_it_is(monkeypatch):
    study = Study(config_file.get_config(), "nowhere")
    monkeypatch.setattr(study, "teacher", lambda seed: SimpleNamespace(step=2400))
    monkeypatch.setattr(Study, "main", lambda *_: (None, {}))
    monkeypatch.setattr(Study, "bill", lambda *_: 1500.0)
    monkeypatch.setattr(Study, "search", lambda *_: 300.0)
    manifest = {"edges": [0, 100, 400, 1000], "shares": [1.0, 0.8, 0.5]}
    steps = np.array([study.equal_steps(0, manifest, group) for group in range(3)])
    assert np.dot(steps, manifest["shares"]) == pytest.approx(1200, abs=3)
    np.testing.assert_allclose(steps / steps.sum(), [0.1, 0.3, 0.6], atol=0.002)
    scratch = [study.equal_steps(0, manifest, group, scratch=True) for group in range(3)]
    assert np.dot(scratch, manifest["shares"]) == pytest.approx(3600, abs=3)
    taught = [study.equal_steps(0, manifest, group, distil=True) for group in range(3)]
    assert np.dot(taught, np.add(manifest["shares"], 1 / 3)) == pytest.approx(1200, abs=3)
    half = [study.equal_steps(0, manifest, group, part=0.5) for group in range(3)]
    assert np.dot(half, manifest["shares"]) == pytest.approx(450, abs=3)
    monkeypatch.setattr(Study, "search", lambda *_: 1600.0)
    with pytest.raises(ValueError, match="the search alone costs 1600 steps of the base"):
        study.equal_steps(0, manifest, 0)


def test_the_whole_study_runs_and_bills_its_arms_alike(tmp_path):
    record = tmp_path / "record.json"
    lines, _, _ = command(
        "launch.pruning_study", "--config=configs/pruning_study.py:smoke",
        f"--workdir={tmp_path / 'runs'}", f"--record={record}",
    )  # fmt: skip
    summary, held = json.loads(lines[-1]), json.loads(record.read_text())["cells"]
    assert summary["cells"] == summary["of"] == len(held)
    arm = {name.partition(": ")[2]: cell["figures"] for name, cell in held.items()}
    ours = arm["specialists"]
    assert arm["base"]["share"] == 1 and arm["base"]["steps_of_base"] == 3
    assert ours["share"] < 0.85 and ours["search_steps_of_base"] > 0
    steps = ours["steps_of_base"]
    alike = ("base longer", "one network", "single stage", "T-Stitch", "no overlap", "distilled")
    for control in alike:
        # to the nearest update of a network
        assert arm[control]["steps_of_base"] == pytest.approx(steps, abs=1.5)
    assert arm["T-Stitch"]["share"] == pytest.approx(ours["share"], abs=0.1)
    # of its four steps so many are the small network's, whose share is about 0.7
    stitched = arm["T-Stitch"]
    assert 4 * (1 - stitched["share"]) / stitched["steps_of_small"] == pytest.approx(0.3, abs=0.06)
    assert len(ours["losses"]) == len(ours["before"]) == 2
    assert "before" not in arm["single stage"]
    assert [ours[f"loss {group}"][0] for group in (0, 1)] == pytest.approx(ours["losses"])
    assert ours["losses"][0] > ours["losses"][1]  # of predicted noise: the cleanest is the worst
    assert 0 < held["E10 jumps"]["figures"]["borders"][0]["overlap"]
    inversion = held["E12 inversion"]["figures"]
    assert inversion["base"]["psnr"] > 20 and inversion["specialists"]["psnr"] > 20
    lost = inversion["psnr, specialists, steps owned where they begin - base"][0]
    assert lost < inversion["psnr, specialists - base"][0]
