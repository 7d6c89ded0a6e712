"""A set of specialists through the stages, and wherever a teacher is accepted."""

import json
import shutil

import jax
import numpy as np
import pytest

from cheapscale.models.unet import unet
from cheapscale.pruning.structure import layout, prune, pruned_config
from cheapscale.stages import specialists
from cheapscale.stages.cascade_sampler import cascade_cost, cascade_plan, cascade_sampler
from cheapscale.stages.data import open_data
from cheapscale.stages.groups import make_groups
from cheapscale.stages.invert import flops_of_path, make_manifest, round_trip
from cheapscale.stages.networks import complete, fingerprint, load_model, load_teacher
from cheapscale.stages.run import build
from cheapscale.stages.sampler_cost import segment_calls
from cheapscale.stages.sampling import levels, sample
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.sharding import make_mesh
from configs import scenes
from launch.specialists import make_set, stage_config
from tests.stages.toy_teacher import DIFFUSION, LEDGER, base_meta, configured, save_teacher, weights


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def as_set(*members, models=None, borders=None):
    """A set in memory: members' weights, by default all of the base's shape."""
    meta = base_meta()
    groups = make_groups(DIFFUSION, len(members))
    chosen = {
        "base": fingerprint(weights()),
        "borders": groups.borders if borders is None else borders,
        "models": models or [meta["networks"]["net"]] * len(members),
        "paid": {},
    }
    return Loaded(members, meta | {"diffusion": DIFFUSION | {"specialists": chosen}}, 0, "set")


def test_specialists_that_are_the_base_are_the_base():
    """Sampling, inversion and self-cascade: the same ODE, cut into segments."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        one = Loaded(weights(), base_meta(), 0, "base")
        three = as_set(weights(), weights(), weights())
        ids = np.arange(3)
        for options in ({"steps": 9}, {"steps": 5, "method": "euler"}):
            a, labels = sample(one, ids, **options)
            b, _ = sample(three, ids, labels=labels, **options)
            np.testing.assert_allclose(a, b, atol=2e-5)
        z, back = round_trip(one, nodes=8)(a, labels)
        z3, back3 = round_trip(three, nodes=8)(a, labels)
        np.testing.assert_allclose(z3, z, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(back3, back, atol=1e-4)
        plan = cascade_plan(one.meta, "2x", steps=6)
        large, same = (cascade_sampler(m, plan).draw(ids, labels)[0][1] for m in (one, three))
        np.testing.assert_allclose(large, same, atol=2e-5)


def test_the_cost_of_a_set_is_the_sum_of_its_members_calls():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        one = Loaded(weights(), base_meta(), 0, "base")
        three = as_set(weights(), weights(), weights())
        grid = levels(DIFFUSION, 9, "sample")
        model = one.meta["networks"]["net"]
        (whole,) = segment_calls(model, DIFFUSION, one.params, (2, 8, 8, 3), grid)
        parts = segment_calls(model, three.meta["diffusion"], three.params, (2, 8, 8, 3), grid)
        assert len(parts) == 3 and sum(n for n, _ in parts) == whole[0] == 17
        assert {flops for _, flops in parts} == {whole[1]}
        plan = cascade_plan(one.meta, "2x", steps=9)
        ours, base = (cascade_cost(m, plan, batch_size=2) for m in (three, one))
        assert ours["nfe"] == base["nfe"]
        assert ours["flops_per_image"] == pytest.approx(base["flops_per_image"])
        settings = scenes.get_config("stage=invert,smoke").invert
        traced = [flops_of_path(m, (8, 8, 3), settings, "invert") for m in (three, one)]
        assert traced[0] == pytest.approx(traced[1]) and traced[0] > 0


def test_on_a_larger_canvas_owners_may_go_by_the_snr_of_blocks():
    """At twice the side a level sigma has the blocks' SNR of sigma / 2: cleaner members own it."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        one, other = (Loaded(weights(seed), base_meta(), 0, "one") for seed in (0, 1))
        plan = cascade_plan(one.meta, "2x", steps=6, pivot_size=(8, 8))
        (grid,) = plan.restarts
        pivots, labels = np.zeros((2, 8, 8, 3), np.float32), np.zeros(2, np.int32)
        # between half of the first level and all of it, so that only the shifted owner is the first
        both = as_set(weights(0), weights(1), borders=[0.6 * float(grid[0])])

        def draw(loaded, **options):
            return cascade_sampler(loaded, plan, **options).draw(np.arange(2), labels, pivots)[0][1]

        np.testing.assert_allclose(draw(both, owner="snr"), draw(one), atol=2e-5)
        assert np.abs(draw(both) - draw(one)).max() > 1e-3
        costs = [cascade_cost(both, plan, owner=owner)["nfe"] for owner in ("level", "snr")]
        assert costs[0] == costs[1]
        with pytest.raises(ValueError, match="owner is 'snr': choose"):
            cascade_sampler(other, plan, owner="snr")


def test_a_stitched_teacher_calls_the_base_below_its_border():
    """T-Stitch: a small network on the noisy steps, the base itself on the clean ones; the bill is
    the base's and what the small one added."""
    small = Loaded(weights(1), base_meta() | {"ledger": {"flops": 9.0, "device_seconds": 3.0}}, 4,
                   "small")  # fmt: skip
    base = Loaded(weights(), base_meta(), 7, "base")
    grid = levels(DIFFUSION, 6, "sample")
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        ids = np.arange(2)
        for border, same in ((grid[0], base), (grid[-2] / 2, small)):
            both = specialists.joined(
                base_meta(), "fp", [border], [base, small], paid={"flops": 0.5}
            )
            np.testing.assert_allclose(
                sample(both, ids, steps=6)[0], sample(same, ids, steps=6)[0], atol=2e-5
            )
    assert both.meta["ledger"] == {"flops": 9.5, "device_seconds": 3.0} and both.step == 4
    with pytest.raises(ValueError, match="give one border fewer than networks, ascending"):
        specialists.joined(base_meta(), "fp", [2.0, 1.0], [base, small, base])


def test_each_specialist_runs_its_own_steps_and_no_other():
    """Weights that are not a number show who was called."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        broken = jax.tree.map(lambda p: np.full_like(p, np.nan), weights())
        grid = levels(DIFFUSION, 6, "sample")
        above = as_set(weights(), broken, borders=[float(grid[0])])
        images, _ = sample(above, np.arange(2), steps=6)  # all steps begin at or below the border
        assert np.isfinite(images).all()
        below = as_set(weights(), broken, borders=[float(grid[1])])
        assert np.isnan(sample(below, np.arange(2), steps=6)[0]).all()


def test_pruned_specialists_of_different_widths_sample_together():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        base = unet(**base_meta()["networks"]["net"]).config
        variables = layout(base).variables
        keep = {n: np.arange(v.width) for n, v in variables.items()}
        for name, variable in variables.items():
            if variable.kind == "inner" and len(variable.menu) > 1:
                size = variable.width // variable.cells
                keep[name] = np.concatenate(
                    [np.arange(i * size, i * size + size // 2) for i in range(variable.cells)]
                )
        narrow = complete(
            base_meta()["networks"]["net"] | {"overrides": pruned_config(base, keep).overrides}
        )
        models = [base_meta()["networks"]["net"], narrow]
        mixed = as_set(weights(), prune(weights(), base, keep), models=models)
        images, _ = sample(mixed, np.arange(2), steps=6)
        assert np.isfinite(images).all()


def test_assess_prune_and_sample_as_a_user_does(teacher, tmp_path):
    """`launch.specialists`, whose folder then is a teacher."""
    folder = tmp_path / "set"

    def configs(stage, group=0, changes=("k=0.6", "distil=0.5")):
        return stage_config("configs/scenes.py", "smoke", stage, teacher, str(folder), changes)

    with pytest.raises(ValueError, match="--set=kk=1: config.prune has no field 'kk'"):
        configs("assess", changes=["kk=1"])
    with pytest.raises(ValueError, match="--set=group=1: config.prune has no field 'group'"):
        configs("assess", changes=["group=1"])  # --groups chooses which are trained
    with pytest.raises(ValueError, match="config.optim has no field 'mu' .* only .*warmup_steps$"):
        configs("prune", changes=["optim.mu=1"])
    with pytest.raises(ValueError, match="names a field of prune, optim, ema, not of data"):
        configs("assess", changes=["data.resolution=8"])
    changes = ["optim.lr=3e-4", "edges=10,20", "overlap=2"]
    tuned, searched = configs("prune", changes=changes), configs("assess", changes=changes)
    assert tuned.optim.lr == 3e-4 and tuned.prune.overlap == 2
    assert searched.prune.edges == (10, 20) and "optim" not in searched
    assert "edges" not in tuned.prune  # the set's own settings: no other can be asked for
    longer = configs("prune", changes=["total_steps=9"])
    assert longer.total_steps == longer.optim.decay_steps == 9
    assert configs("prune").optim.decay_steps == configs("prune").total_steps == 3
    summary = make_set(configs, str(folder), groups=[1])
    assert summary["targets"] == [1.0, 0.8] and summary["shares"][0] == 1.0
    assert abs(summary["shares"][1] - 0.8) <= 0.02
    manifest = specialists.read_manifest(folder)
    assert manifest["teacher"] == fingerprint(load_teacher(teacher).params)
    assert manifest["compiled_shares"] == pytest.approx(manifest["shares"], rel=0.03)
    # the search is paid for: each of its proxy losses is 16 images through the whole network
    assert manifest["ledger"]["flops"] > 3 * 16 * manifest["compiled_flops"]
    assert sum(manifest["sampler_steps"]) == 40
    assert manifest["memories"] == ["memory-1.jsonl"]
    memory = (folder / "memory-1.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, memory) if "score" in entry]
    best = min(entries, key=lambda entry: entry["score"])
    found = specialists.read_assessment(folder, 1)
    assert found["widths"] == best["widths"] and found["score"] == pytest.approx(best["score"])
    with pytest.raises(FileNotFoundError, match="group-0"):
        load_model(folder)
    again = make_set(configs, str(folder))
    assert [member["step"] for member in again["members"]] == [3, 3]
    assert all(member["ledger"]["flops"] > LEDGER["flops"] for member in again["members"])
    loaded = load_model(folder)
    sizes = [sum(map(np.size, jax.tree.leaves(params))) for params in loaded.params]
    assert sizes[1] < sizes[0]
    # group 0 was only fine-tuned, group 1 started from the base's own channels
    model = loaded.meta["diffusion"]["specialists"]["models"][1]
    assert model["overrides"] and not loaded.meta["networks"]["net"]["overrides"]
    own = [member["ledger"]["flops"] - LEDGER["flops"] for member in again["members"]]
    assert loaded.meta["ledger"]["flops"] == pytest.approx(
        LEDGER["flops"] + sum(own) + manifest["ledger"]["flops"]
    )
    images, _ = sample(loaded, np.arange(8), steps=4)
    assert images.shape == (8, 8, 8, 3) and np.isfinite(images).all()
    # the set inverts, and its latents teach a copy of the base
    source = open_data(scenes.get_config("stage=invert,smoke").data)
    held = make_manifest(loaded, source)
    assert held["teacher"] == fingerprint(weights()) != held["specialists"]
    surplus = loaded.meta["ledger"]["flops"] - LEDGER["flops"]
    assert held["paid"]["flops"] == pytest.approx(surplus)
    config = scenes.get_config("stage=distill,smoke")
    config.teacher = str(folder)
    with pytest.raises(ValueError, match="is a set of specialists, which may invert"):
        build(config)
    with pytest.raises(ValueError, match="is a set of specialists: prune its base"):
        build(configured("assess", str(folder), tmp_path / "again"))
    with pytest.raises(ValueError, match="holds one specialist, .*: name the folder of its set"):
        load_model(specialists.group_folder(folder, 0))
    with pytest.raises(ValueError, match="holds a run of its own: name a new folder"):
        build(configured("assess", teacher, teacher))
    own, aside = specialists.group_folder(folder, 0), str(tmp_path / "aside")
    shutil.move(own, aside)
    shutil.copytree(specialists.group_folder(folder, 1), own)
    with pytest.raises(ValueError, match="group-0 holds the specialist of group 1"):
        load_model(folder)
    shutil.rmtree(own)
    shutil.move(aside, own)
    other = build(configured("assess", teacher, folder, k=0.7))
    with pytest.raises(ValueError, match="is of another assessment .settings"):
        other.done(0)
    specialists.write_manifest(folder, manifest | {"identity": "another"})
    with pytest.raises(ValueError, match="was trained for another assessment"):
        load_model(folder)
