"""The three methods in one command."""

import json

import pytest

from cheapscale.training.checkpoint import read_meta
from tests.launch.shell import command


def test_specialists_invert_a_grown_network_gives_the_pivot_and_the_cascade_goes_on(tmp_path):
    record = tmp_path / "record.json"
    lines, _, _ = command(
        "launch.compose", "--arg=smoke", "--num=8", "--num_real=24",
        f"--workdir={tmp_path / 'runs'}", f"--record={record}",
    )  # fmt: skip
    found = json.loads(record.read_text())
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
    billed = read_meta(tmp_path / "runs" / "grow16")[1]["ledger"]["flops"]
    assert billed == pytest.approx(total)
