"""The step-adaptive study: whose loss is taken, what it concludes from cells, and its arms."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.stages import networks
from cheapscale.stages.networks import complete
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.sharding import make_mesh
from configs import pruning_study as config_file
from launch.cells import check_chosen
from launch.pruning_experiment import Held, Study, cells, owned_losses
from launch.pruning_findings import findings, table
from tests.launch.shell import command

MODEL = complete({"resolution": 4, "channels": 8, "num_classes": 3})
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
        "E3 seed 0: base": row(3.0),
        "E3 seed 0: specialists": row(2.0, 0.79, 1400, mean_shares={"positions": 0.785}),
        "E3 seed 0: base longer": row(2.5, 1.0, 1400, losses=(2.0, 2.0)),
        "E3 seed 0: base longer, annealed": row(2.1, 1.0, 1400, losses=(1.0, 2.0)),
        "E2 seed 0: full size": row(2.2, 1.0, 1600, losses=(1.0, 3.0), before=[1.5, 2.5]),
        "E5 seed 0: flat": row(2.4, 0.8, 1600, losses=(3.0, 3.0)),
        "E3 seed 1: specialists": row(1.0, 0.79, 1400, mean_shares={"positions": 0.785}),
        "E3 seed 1: base longer": row(0.9, 1.0, 1400),
        "E3 seconds": {"figures": {"over_base": 0.9}},
    }
    found = findings(config, done)
    headline = found["specialists against the base, seed 0"]
    value, low, high = headline["fd minus base longer"]
    assert value == pytest.approx(-0.5) and low <= value <= high < 0
    assert headline["sampling FLOPs"] == 0.79 and headline["mean shares"] == {"positions": 0.785}
    arms = found["arms against the specialists, seed 0"]
    assert arms["full size"]["fd"][0] == pytest.approx(0.2) and "specialists" not in arms
    full = found["full-size specialists against the base, seed 0"]
    assert full["base longer"]["losses"] == [0.5, 1.5]
    assert full["base longer, annealed"]["losses"] == [1.0, 1.5]
    assert full["base longer, annealed"]["fd"][0] == pytest.approx(0.1)
    assert found["excess loss of an equal cut by group, seed 0"] == [3.0, 1.0]
    assert found["losses before fine-tuning by group, seed 0"] == {"full size": [1.5, 2.5]}
    seeds = found["fd above the specialists' over seeds"]["base longer"]
    assert seeds["mean"] == pytest.approx(0.2) and seeds["least"] == pytest.approx(-0.1)
    assert seeds["seeds"] == 2 and found["seconds"]["over_base"] == 0.9
    assert not any("seed 2" in claim for claim in found)
    assert "E2 seed 0: full size" in table(done) and "seconds" not in table(done)


def test_every_section_of_the_protocol_has_cells_with_names_of_their_own(tmp_path):
    planned = list(cells(Study(config_file.get_config(), tmp_path)))
    names = [f"{cell.section} {cell.name}" for cell in planned]
    assert len(set(names)) == len(names)
    assert {cell.section for cell in planned} == {f"E{i}" for i in range(2, 14)}  # E1: the losses
    for seed in (0, 1, 2):
        assert f"E3 seed {seed}: base longer" in names and f"E11 seed {seed}: T-Stitch" in names
    check_chosen(["E3 seed 0", "E8"], names)
    with pytest.raises(ValueError, match="--only names E1, with which no cell begins"):
        check_chosen(["E1"], names)


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
    for control in ("base longer", "base longer, annealed", "single stage", "T-Stitch"):
        # to the nearest update of a network
        assert arm[control]["steps_of_base"] == pytest.approx(steps, abs=1.5)
    assert arm["T-Stitch"]["share"] == pytest.approx(ours["share"], abs=0.1)
    assert len(ours["losses"]) == len(ours["before"]) == 2
    assert 0 < held["E10 jumps"]["figures"]["borders"][0]["overlap"]
    inversion = held["E12 inversion"]["figures"]
    assert inversion["base"]["psnr"] > 20 and inversion["specialists"]["psnr"] > 20
