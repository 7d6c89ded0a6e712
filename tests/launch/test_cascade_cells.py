"""Cells of the self-cascade study, run on teachers of three steps: is each what its name says?"""

import json

import pytest

from tests.launch.shell import command

CHOSEN = (
    "E1", "E2", "E6 edm seed 0: ft after", "E6 edm seed 0: ft direct after 2",
    "E6 edm seed 0: gain after 0", "E9", "E12 windows", "E10 photographs: lora of", "E13",
)  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    command(
        "launch.cascade_study", "--config=configs/cascade_study.py:smoke",
        f"--workdir={workdir / 'work'}", f"--record={workdir / 'record.json'}",
        f"--only={','.join(CHOSEN)}",
    )  # fmt: skip
    held = json.loads((workdir / "record.json").read_text())
    return {name.partition(" ")[2]: cell["figures"] for name, cell in held["cells"].items()}


def of(cells, name, metric="pivot_mse"):
    return cells[f"edm seed 0: {name}"][metric][0]


def test_the_base_is_its_own_pivot_and_the_more_is_drawn_anew_the_further_away(cells):
    assert of(cells, "base") == 0 < of(cells, "enlarged pivot") < of(cells, "K t0.7")
    assert of(cells, "K t0.7") < of(cells, "direct")


def test_tuned_cells_use_their_weights_their_step_and_the_pivot_or_none(cells):
    free, started = (cells[f"edm seed 0: {name}"] for name in ("K t0.7", "gain after 0"))
    assert started["fd"] == free["fd"] and started["pivot_mse"] == free["pivot_mse"]
    scores = {name: of(cells, name, "fd") for name in ("K t0.7", "ft after 1", "ft after 2")}
    assert len(set(scores.values())) == 3
    assert of(cells, "ft direct after 2") > of(cells, "ft after 2")
    assert of(cells, "ft direct after 2", "fd") != of(cells, "direct", "fd")


def test_a_baseline_alone_has_no_pivot_and_on_top_it_has(cells):
    alone, added = (cells[f"windows, {kind}"] for kind in ("alone", "on top of the cascade"))
    assert alone["pivot_mse"][0] > 1.1 * added["pivot_mse"][0]
    assert alone["fd"] != cells["edm seed 0: direct"]["fd"]


def test_photographs_as_pivots_and_for_tuning(cells):
    real = cells["photographs: real pivots"]
    assert real["psnr_to_pivot"][0] > real["psnr_to_photograph"][0]
    assert real["psnr_of_enlarged_pivot"][0] > 15 and real["psnr_between_seeds"][0] < 40
    few = cells["photographs: lora of 8 images after 2"]
    assert few["memorised"] > 0 and "kd" in few and "single" not in few


def test_seconds_are_relative_to_what_they_are_named_after(cells):
    found = cells["seconds"]
    assert found["over_direct"]["direct"] == found["over_tuning_free"]["tuning-free"] == 1
    assert 0.9 < found["C"] * found["over_direct"]["base"] < 2  # medians of ratios
    assert found["model"] == pytest.approx(1 / found["C"] + found["share"])
    assert set(found["training_step"]) == {"gain", "ft"} and "gain" in found["seconds"]
