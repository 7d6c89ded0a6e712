"""The self-cascade study: measures, what it concludes from cells, and that it resumes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.data.resize import area_mean
from cheapscale.data.sources import SceneSource
from cheapscale.diffusion.pivot import restart_sigma
from cheapscale.evaluation.corruptions import blurred
from cheapscale.evaluation.pixels import from_uint8, to_uint8
from cheapscale.models.features.network import FeatureNetwork
from cheapscale.training.sharding import make_mesh
from configs import cascade_study as config_file
from launch import cascade_experiment, cascade_findings
from launch.cascade_experiment import Study, cells
from launch.cascade_findings import findings, seconds_of, steps_to_reach, table
from launch.cascade_measures import make_judge, measure
from launch.cells import Cell, run_cells
from launch.paired import difference, with_deviation


def test_the_deviation_is_that_of_the_mean():
    x = np.random.default_rng(0).normal(3.0, 2.0, 400)
    value, deviation = with_deviation(lambda rows: {"mean": x[rows].mean()}, 400, 500)["mean"]
    assert value == pytest.approx(x.mean()) and deviation == pytest.approx(2 / 20, rel=0.12)


def test_differences_are_paired():
    """Two cells of the same images differ by what was done to them, not by which were drawn."""
    rng = np.random.default_rng(0)
    x, change = rng.normal(3.0, 2.0, 400), rng.normal(0.1, 0.02, 400)
    first, second = (
        with_deviation(lambda rows, y=y: {"fd": y[rows].mean()}, 400, 200) for y in (x, x + change)
    )
    value, low, high = difference(second, first)["fd"]
    assert value == pytest.approx(change.mean()) and low < value < high
    assert high - low < 0.02 < first["fd"][1]  # one mean alone is not known as well
    assert difference(first, {}) == {}


def sharpness(params, x):
    """Two features without a fit: how far pixels are from the line through their neighbours."""
    bends = [jnp.abs(jnp.diff(x, 2, axis=axis)).mean((1, 2, 3)) for axis in (1, 2)]
    return {"features": 10 * jnp.stack(bends, -1)}


def test_real_scenes_measure_as_real_and_blurred_ones_do_not():
    network = FeatureNetwork("sharpness", lambda params, x: (x,), {}, outputs=sharpness)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        top, base = (
            make_judge(
                network,
                SceneSource("train", side, size=150, single=True),
                SceneSource("test", side, size=150, single=True),
                num=50, num_real=150, crop=16,
            )
            for side in (32, 16)
        )  # fmt: skip
        items = [SceneSource("test", 32, size=250, single=True)[i] for i in range(200, 250)]
        images = np.stack([item["image"] for item in items])
        pivots = np.asarray(area_mean(images, 16))
        own = base.reference.features

        def of(images):
            return measure(images, pivots, top, base, own, counted=True, resamples=5)

        real, soft = of(images), of(from_uint8(blurred(to_uint8(images), 16)))
    assert real["single"][0] > 0.95 and real["objects"][0] < 1.05 and real["pivot_mse"][0] < 1e-10
    assert abs(real["contrast"][0] - 1) < 0.15 and soft["contrast"][0] < real["contrast"][0]
    for metric in ("fd", "patch_fd"):
        assert abs(real[metric][0]) < soft[metric][0] / 3
    # of the base's own features even the blur keeps most
    assert real["base_fd"][0] < 0.1 and soft["base_fd"][0] < soft["fd"][0]


def figures(plain=None, **values):
    draws = {k: " ".join(f"{v + d:.4g}" for d in (-0.1, 0.1)) for k, v in values.items()}
    found = {name: [value, 0.1] for name, value in values.items()} | {"draws": draws}
    return {"figures": found | (plain or {})}


def restarted(k, **values):
    return figures({"restart_sigma": restart_sigma(k, area_ratio=4, sigma_data=0.5)}, **values)


def test_findings_name_the_best_k_and_the_steps_to_reach_the_tuned_score():
    config = config_file.get_config().to_dict() | {"ks": ("t0.5", "t0.7"), "vp": ("linear",)}
    done = {
        "E1 edm seed 0: base": figures(single=0.8),
        "E1 edm seed 0: direct": figures(single=0.1),
        "E2 edm seed 0: enlarged pivot": figures(single=0.7),
        "E3 edm seed 0: K t0.5": restarted("t0.5", single=0.78, fd=2.0, patch_fd=1.0, base_fd=0.1),
        "E2 edm seed 0: K t0.7": restarted("t0.7", single=0.6, fd=1.0, patch_fd=2.0, base_fd=0.2),
        "E4 linear seed 0: K t0.5": restarted("t0.5", fd=3.0, patch_fd=1.0, base_fd=0.3),
        "E4 linear seed 0: K t0.7": restarted("t0.7", fd=4.0, patch_fd=2.0, base_fd=0.2),
        "E6 edm seed 0: neck after 50": figures(patch_fd=1.5),
        "E6 edm seed 0: neck after 400": figures(patch_fd=1.0),
        "E6 edm seed 0: ft direct after 100": figures(patch_fd=1.5),
        "E6 edm seed 0: ft direct after 200": figures(patch_fd=1.7),
        "E6 edm seed 0: ft direct after 400": figures(patch_fd=0.9),
        "E6 edm seed 0: ft after 100": figures(patch_fd=0.8),
        "E6 edm seed 0: neck M after 400": figures(patch_fd=0.7),
        "E9 seconds": {"figures": {"training_step": {"neck": 0.5, "ft": 1.0}}},
        "E5 edm seed 0: 4x two stages": figures(single=0.9, base_fd=2.0),
        "E5 edm seed 0: 4x one jump": figures(single=0.8, base_fd=0.5),
        "E5 edm seed 0: 4x direct": figures(single=0.1, base_fd=9.0),
        "E5 edm seed 0: 4x enlarged pivot": figures(single=0.7, base_fd=0.1),
        "E11 code: all times after 400": figures(fd=5.0),
        "E11 identity start after 400": figures(fd=3.5),
        "E12 windows, alone": figures(single=0.5, fd=2.5),
        "E12 windows, on top of the cascade": figures(single=0.65, fd=1.25),
        "E10 photographs: enlarged pivot": figures(kd=0.5),
        "E10 photographs: tuning-free": figures(kd=0.25),
        "E10 photographs: ft direct of 16 images after 400": figures(kd=1.0),
    }
    # resamples that move apart: 0.3 is not surely above 0.2
    done["E4 linear seed 0: K t0.5"]["figures"]["draws"]["base_fd"] = "0.1 0.5"
    found = findings(config, done)
    right = found["composition, seed 0"]
    assert right["best K by fd"] == "t0.7" and right["points below the base"] == pytest.approx(20)
    best = found["best K by schedule"]
    assert best["edm"]["fd"]["k"] == "t0.7" and best["linear"]["fd"]["k"] == "t0.5"
    assert best["edm"]["fd"]["not surely worse"] == ["t0.7"]
    assert best["linear"]["base_fd"]["not surely worse"] == ["t0.5", "t0.7"]
    assert best["edm"]["fd"]["decibels"] == pytest.approx(-10.42, abs=0.01)
    # SNR 0.0907 lies at 0.493 T of the linear schedule (spec 2.2)
    assert best["linear"]["base_fd"]["own_time"] == pytest.approx(0.493, abs=0.002)
    reached = found["tuning, seed 0"]["steps to reach"]

    def steps(design, name="steps"):
        return {method: row[name] for method, row in reached[design]["patch_fd"].items()}

    assert steps("neck after 400") == {"neck": 400, "neck M": 400, "ft direct": 400, "ft": 100}
    # after 100 steps it only touched the target: after 200 it was above again
    assert steps("neck after 50") == {"neck": 50, "neck M": 400, "ft direct": 400, "ft": 100}
    assert steps("neck after 50", "earliest")["ft direct"] == 100
    for method, seconds in (("ft slow direct", 1.0), ("neck M", None), ("neck", 0.5)):
        assert seconds_of(method, {"ft": 1.0, "neck": 0.5}) == seconds
    assert steps("neck after 50", "seconds") == {
        "neck": 25.0, "neck M": None, "ft direct": 400.0, "ft": 100.0
    }  # fmt: skip
    # every difference is against what its name says
    cascade = {
        kind: right[f"K t0.7 minus {kind}"]["single"] for kind in ("direct", "enlarged pivot")
    }
    for row, value in (
        (cascade["direct"], 0.5),
        (cascade["enlarged pivot"], -0.1),
        (found["two stages against one jump"]["two stages - one jump"]["base_fd"], 1.5),
        (found["designs"]["neck M - neck after 400"]["patch_fd"], -0.3),
        (found["tuning, seed 0"]["by steps"]["neck"]["400"]["minus tuning-free"]["patch_fd"], -1),
    ):
        assert row[0] == pytest.approx(value)
    compared = {
        (name, against): next(row[metric][0] for metric in ("kd", "fd", "single") if metric in row)
        for name, rows in found["variants, baselines, photographs"].items()
        for against, row in rows.items()
    }
    assert compared == pytest.approx({
        ("windows, alone", "minus direct"): 0.4,
        ("windows, alone", "minus tuning-free"): 1.5,
        ("windows, on top of the cascade", "minus tuning-free"): 0.25,
        ("code: all times after 400", "minus tuning-free"): 1.0,  # of the linear teacher
        ("identity start after 400", "minus tuning-free"): -0.5,
        ("code: all times after 400", "minus plain"): 1.5,
        ("photographs: ft direct of 16 images after 400", "minus tuning-free"): 0.75,
        ("photographs: ft direct of 16 images after 400", "minus its pivot"): 0.5,
        ("photographs: tuning-free", "minus its pivot"): -0.25,
    })  # fmt: skip
    of_another = {
        name.replace("seed 0", "seed 1").replace("E1", "E2"): cell for name, cell in done.items()
    }
    again = findings(config, of_another)  # the further seeds' cells are E2's
    assert again["composition, seed 1"] == right
    both = findings(config | {"seeds": (0, 1)}, done | of_another)["over seeds"]
    assert both["direct, minus tuning-free"]["single"] == pytest.approx([-0.5, -0.5])
    assert both["neck after 400, minus tuning-free"]["patch_fd"] == pytest.approx([-1, -1])
    assert "E1 edm seed 0: direct" in table(done)


def test_every_section_of_the_protocol_has_cells_with_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(cascade_experiment.data, "open_data", lambda *_, **__: None)
    planned = list(cells(Study(config_file.get_config(), tmp_path)))
    sections = {cell.section for cell in planned}
    assert sections == {f"E{i}" for i in range(1, 14)} - {"E7", "E8"}  # these read E6's cells
    names = [f"{cell.section} {cell.name}" for cell in planned]
    assert len(set(names)) == len(names)


def test_the_study_goes_on_where_it_stopped_also_from_its_record(tmp_path, monkeypatch):
    ran = []

    def cell(name):
        return Cell("E1", name, lambda: (ran.append(name), {"fd": [1.0, 0.1]})[1])

    monkeypatch.setattr(cascade_experiment, "cells", lambda study: iter([cell("a"), cell("b")]))
    config, record = config_file.get_config("smoke"), str(tmp_path / "record.json")

    def go(workdir, **changes):
        options = {"record": record, "only": [], "minutes": 0.0} | changes
        place = str(tmp_path / workdir)
        return run_cells(config, place, cascade_experiment, cascade_findings, **options)

    assert go("one", minutes=1e-9)["cells"] == 0 and ran == []
    assert go("one")["cells"] == 2 and ran == ["a", "b"]
    assert go("one")["cells"] == go("two")["cells"] == 2 and ran == ["a", "b"]
    held = json.loads((tmp_path / "record.json").read_text())
    assert list(held) == ["findings", "config", "cells"] and list(held["cells"]) == ["E1 a", "E1 b"]
    assert held["cells"]["E1 a"]["provenance"]["jax"]
    with pytest.raises(ValueError, match="--only names E, with which no cell begins: choose .*E1"):
        go("one", only=["E"])
    assert go("four", only=["E1 b"], record="")["cells"] == 1 and ran == ["a", "b", "b"]
    config.num = 99
    with pytest.raises(ValueError, match="was started with another config .*num: 12 -> 99"):
        go("one")
    with pytest.raises(ValueError, match=r"measured under another config \(num: 12 -> 99\)"):
        go("three")


def test_what_only_seems_to_be_reached_has_a_range():
    def cell(value, *draws):
        return {"patch_fd": [value, 0.1], "draws": {"patch_fd": " ".join(map(str, draws))}}

    target = cell(1.0, 0.9, 1.1)
    by_steps = {
        "50": cell(1.5, 1.4, 1.6),  # surely above
        "150": cell(1.05, 1.15, 0.95),  # above, but not surely
        "400": cell(0.98, 1.1, 0.9),  # below, but not surely
        "800": cell(0.5, 0.4, 0.6),  # surely below
    }
    found = steps_to_reach(by_steps, target, "patch_fd")
    assert (found["earliest"], found["steps"], found["latest"]) == (150, 400, 800)
    assert steps_to_reach({"50": by_steps["50"]}, target, "patch_fd")["steps"] is None
