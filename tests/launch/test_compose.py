"""The three methods in one command, and what it leaves for other commands."""

import json

import numpy as np
import pytest

from cheapscale.stages.networks import load_model
from cheapscale.stages.sampler_cost import sampler_cost
from cheapscale.training.checkpoint import read_meta
from tests.launch.shell import command


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """(where everything is, lines of the output)"""
    place = tmp_path_factory.mktemp("composed")
    lines, _, _ = command(
        "launch.compose", "--arg=smoke,levels=1", "--num=8", "--num_real=24",
        f"--workdir={place / 'runs'}", f"--record={place / 'record.json'}",
    )  # fmt: skip
    return place, lines


def test_specialists_invert_a_grown_network_gives_the_pivot_and_the_cascade_goes_on(composed):
    place, lines = composed
    found = json.loads((place / "record.json").read_text())
    assert found == json.loads(lines[-1]) and lines[0].startswith("| | px | calls | MFLOPs")
    rows = found["rows"]
    sizes = {title: row["size"] for title, row in rows.items()}
    cascaded = "one step, grown, then cascade by the specialists"
    assert sizes["teacher"] == sizes["one step"] == 8 and sizes["one step, grown"] == 16
    assert sizes[cascaded] == sizes["control, directly"] == 32
    assert rows["specialists"]["flops"] < rows["teacher"]["flops"]
    assert rows["one step"]["calls"] == 1 and rows["control, directly"]["calls"] == 79
    assert rows[cascaded]["flops"] < rows["control, directly"]["flops"]
    value, low, high = found["specialists - control"]["sampling"]["fd"]
    assert low <= value <= high
    assert value == pytest.approx(rows["specialists"]["fd"][0] - rows["control"]["fd"][0])
    control = rows["one step, control"]
    assert control["flops"] == rows["one step"]["flops"] and control["fd"] != rows["one step"]["fd"]
    assert found["specialists - control"]["one step"]["fd"][0] == pytest.approx(
        rows["one step"]["fd"][0] - control["fd"][0]
    )
    apart = found["inversion"]["psnr, specialists - base"][0]
    both = [found["inversion"][title]["psnr"] for title in ("specialists", "base")]
    assert apart == pytest.approx(both[0] - both[1], abs=1e-3) and min(both) > 10
    parts = {name: part["flops"] for name, part in found["ledger"].items()}
    total = parts.pop("all")
    assert all(flops > 0 for flops in parts.values())
    assert sum(parts.values()) == pytest.approx(total)
    alone = {name: part["flops"] for name, part in found["ledger of the control"].items()}
    assert alone["pretrain"] == parts["pretrain"]
    an_update = parts["pretrain"] / 3  # to the nearest of which both have cost as much
    assert alone["training on"] == pytest.approx(parts["specialists"], abs=0.51 * an_update)
    assert rows["control"]["flops"] == pytest.approx(rows["teacher"]["flops"])
    # a whole network's calls cost more than the specialists'
    assert alone["inversion and distillation"] > parts["inversion and distillation"]
    # the generator was made with the specialists' latents, so it has paid for them
    billed = read_meta(place / "runs" / "grow16")[1]["ledger"]["flops"]
    assert billed == pytest.approx(total)


def test_a_set_s_folder_is_a_model_for_sampling_and_evaluation(composed, tmp_path):
    folder = composed[0] / "runs" / "specialists"
    ledger = load_model(folder).meta["ledger"]
    command("launch.sample", f"--model={folder}", "--num=3", "--steps=4", f"--out={tmp_path}")
    images = np.load(tmp_path / "samples.npz")["images"]
    assert images.shape == (3, 8, 8, 3) and len(np.unique(images)) > 100
    lines, _, _ = command(
        "launch.evaluate", f"--model={folder}", "--num=8", "--steps=4", "--metrics=reconstruction",
        f"--workdir={tmp_path / 'scored'}",
    )  # fmt: skip
    found = json.loads(lines[-1])
    cost = sampler_cost(load_model(folder), steps=4, batch_size=8, repeats=1)
    assert found["num"] == 8 and found["cost"]["nfe"] == cost["nfe"] == 2 * 4 - 1
    assert found["reconstruction_psnr"] > 10  # there and back through noise by the specialists
    assert found["cost"]["flops_per_image"] == pytest.approx(cost["flops_per_image"], rel=0.02)
    assert found["cost"]["training_flops"] == ledger["flops"]
