"""A set of specialists through the stages, and wherever a teacher is accepted."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.models.unet import UNet, unet
from cheapscale.pruning import search
from cheapscale.pruning.structure import flops, layout, prune, pruned_config
from cheapscale.stages import pretrain, sensitivity, specialists
from cheapscale.stages import prune as prune_stage
from cheapscale.stages.assessment import Assessment, read_proxy
from cheapscale.stages.cascade_sampler import cascade_cost, cascade_plan, cascade_sampler
from cheapscale.stages.data import describe, open_data
from cheapscale.stages.groups import make_groups
from cheapscale.stages.invert import flops_of_path, make_manifest, round_trip
from cheapscale.stages.networks import complete, fingerprint, load_model, load_teacher
from cheapscale.stages.recovery import Recovery
from cheapscale.stages.run import build, run
from cheapscale.stages.sampler_cost import segment_calls
from cheapscale.stages.sampling import levels, sample
from cheapscale.training import checkpoint, loop, sharding
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.sharding import make_mesh
from configs import scenes
from launch.specialists import make_set, stage_config

DIFFUSION = {"process": "edm", "prediction": "x0", "sigma_min": 0.002, "sigma_max": 80.0,
             "rho": 7.0, "sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}  # fmt: skip
LEDGER = {"flops": 5.0, "device_seconds": 1.0}


def base_meta():
    model = complete(scenes.get_config("stage=pretrain,smoke").model.to_dict() | {"groups": 4})
    return {
        "stage": "pretrain", "networks": {"net": model}, "diffusion": DIFFUSION,
        "config": {"pretrain": {"label_dropout": 0.0, "augment": 0.0}}, "ledger": LEDGER,
        "data": describe(open_data(scenes.get_config("stage=invert,smoke").data)),
    }  # fmt: skip


def weights(seed=0):
    net, rng = unet(**base_meta()["networks"]["net"]), np.random.default_rng(seed)
    shapes = jax.eval_shape(
        lambda key: net.init(key, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), label=jnp.zeros(1, int)),
        jax.random.key(0),
    )
    return jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype("f"), shapes["params"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher")
    with checkpoint.Checkpoints(workdir) as checkpoints:
        state = loop.create_state({"net": weights()}, {}, {}, ["net"])
        checkpoints.save(0, state, base_meta())
        checkpoints.wait()
    return str(workdir)


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


def configured(stage, teacher, folder, **changes):
    config = scenes.get_config(f"stage={stage},smoke")
    config.teacher, config.specialists = teacher, str(folder)
    with config.unlocked():
        config.prune.update(changes)
    return config


def test_assess_prune_and_sample_as_a_user_does(teacher, tmp_path):
    """`launch.specialists`, whose folder then is a teacher."""
    folder = tmp_path / "set"

    def configs(stage, group=0, changes=("k=0.6", "distil=0.5")):
        return stage_config("configs/scenes.py", "smoke", stage, teacher, str(folder), changes)

    with pytest.raises(ValueError, match="--set=kk=1: config.prune has no field 'kk'"):
        configs("assess", changes=["kk=1"])
    with pytest.raises(ValueError, match="--set=optim.mu=1: config.optim has no field 'mu'"):
        configs("prune", changes=["optim.mu=1"])
    with pytest.raises(ValueError, match="names a field of prune, optim, ema, not of data"):
        configs("assess", changes=["data.resolution=8"])
    changed = configs("prune", changes=["optim.lr=3e-4", "edges=10,20"])
    assert changed.optim.lr == 3e-4 and changed.prune.edges == (10, 20)
    assert "optim" not in configs("assess", changes=["optim.lr=3e-4"])
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


def test_a_specialist_starts_as_the_cut_base(teacher, tmp_path):
    folder = tmp_path / "set"
    settings = {"k": 0.6, "proposer": "uniform", "importance": "magnitude"}
    run(configured("assess", teacher, folder, **settings), tmp_path / "assess")
    stage = build(configured("prune", teacher, folder, group=1))
    keep = {n: np.array(c) for n, c in specialists.read_assessment(folder, 1)["keep"].items()}
    config = unet(**base_meta()["networks"]["net"]).config
    jax.tree.map(
        np.testing.assert_array_equal,
        stage.warm_start({})["net"],
        prune(weights(), config, keep),
    )
    scratch = build(configured("prune", teacher, folder, group=1, start="scratch"))
    assert scratch.warm_start({"net": "as drawn"}) == {"net": "as drawn"}
    assert stage.warm_optimiser is None
    whole = build(configured("prune", teacher, folder, group=0))
    jax.tree.map(np.testing.assert_array_equal, whole.warm_start({})["net"], weights())


def test_a_sliced_optimiser_starts_with_the_base_s_moments_cut_alike(tmp_path, monkeypatch):
    base, folder = scenes.get_config("stage=pretrain,smoke"), tmp_path / "set"
    base.model.groups = 4
    whole, rng = pretrain.build(base), np.random.default_rng(0)
    with checkpoint.Checkpoints(tmp_path / "base") as checkpoints:
        shapes = loop.abstract_state(whole, make_mesh(), 0)
        trained = jax.tree.map(lambda s: np.asarray(rng.normal(3, 1, s.shape), s.dtype), shapes)
        meta = whole.meta | {"config": base.to_dict(), "ledger": LEDGER}
        checkpoints.save(3, trained, json.loads(json.dumps(meta)))
        checkpoints.wait()
    settings = {"k": 0.6, "proposer": "uniform", "importance": "magnitude"}
    run(configured("assess", str(tmp_path / "base"), folder, **settings), tmp_path / "assess")
    config = configured("prune", str(tmp_path / "base"), folder, group=1, optimiser="sliced")
    config.optim.decay_steps = 40  # a rate of its own, whatever the base's was
    stage = build(config)
    keep = {n: np.array(c) for n, c in specialists.read_assessment(folder, 1)["keep"].items()}
    with jax.set_mesh(make_mesh()):
        state = loop.fresh_state(stage, make_mesh(), 0)
    # from the base's EMA weights, which are others than its last ones, and so is its own EMA
    averaged = prune(trained.ema_params["net"], unet(**whole.meta["networks"]["net"]).config, keep)
    for tree in (state.params, state.ema_params):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree["net"]), averaged)
    (adam, rate), theirs = state.opt_state["net"], trained.opt_state["net"][0]
    assert int(adam.count) == int(theirs.count) != 0 and int(rate.count) == 0
    net = unet(**whole.meta["networks"]["net"]).config
    cut = prune(theirs.nu, net, keep, power=-2.0)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(adam.nu), cut)
    config.optim.name = "sgd"
    other = build(config)
    with pytest.raises(ValueError, match="trained with adam and optim.name is sgd"):
        loop.fresh_state(other, make_mesh(), 0)
    config.prune.optimiser = "old"
    with pytest.raises(ValueError, match="prune.optimiser is 'old'"):
        build(config)
    rates, config.prune.optimiser, config.prune.whole_rate = [], "fresh", 0.5
    monkeypatch.setattr(prune_stage, "make_optimiser", lambda lr, **_: rates.append(lr))
    for config.prune.group in (0, 1):  # the first keeps the whole network
        build(config)
    assert rates == [0.5 * config.optim.lr, config.optim.lr]


@pytest.mark.parametrize(
    "changes",
    [
        {
            "plan": "all",
            "importance": "all_times",
            "budget": "snr",
            "partition": "snr",
            "mean": 0.8,
        },
        {"importance": "diff_pruning", "budget": "loss", "partition": "loss", "mean": 0.85},
        {"importance": "accumulated", "budget": "flat", "partition": "gradient", "finalists": 2},
        {"importance": "magnitude", "budget": "sensitivity", "mean": 0.8, "proposer": "uniform"},
        {
            "importance": "chance",
            "order": "snr_down",
            "partition": "scores",
            "proposer": "evolution",
        },
    ],
)
def test_every_choice_makes_a_set_within_its_budgets(teacher, tmp_path, changes):
    changes = {"k": 0.6} | changes
    summary = run(configured("assess", teacher, tmp_path / "set", **changes), tmp_path / "job")
    manifest = specialists.read_manifest(tmp_path / "set")
    for share, target in zip(summary["shares"], summary["targets"]):
        assert abs(share - target) <= 0.02 and 0.4 < target <= 1
    sizes = np.diff(manifest["edges"])
    assert set(manifest["mean_shares"]) == {"positions", "40 karras steps"}  # said of which grid
    if changes.get("budget") in ("snr", "loss"):
        assert np.average(summary["targets"], weights=sizes) == pytest.approx(changes["mean"])
    if changes.get("budget") == "sensitivity":  # never above the mean, and as near as a menu is
        mean = np.average(summary["targets"], weights=manifest["sampler_steps"])
        assert 0.7 < mean <= 0.8
    if changes.get("budget") == "flat":
        assert summary["targets"] == [0.8, 0.8]
    if changes.get("order") == "snr_down":
        assert summary["targets"] == [0.8, 1.0]
    config = unet(**base_meta()["networks"]["net"]).config
    for group in range(2):
        keep = specialists.read_assessment(tmp_path / "set", group)["keep"]
        narrow = pruned_config(config, {n: np.array(c) for n, c in keep.items()})
        assert flops(narrow) / flops(config) == pytest.approx(summary["shares"][group])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"importance": "gut"}, "prune.importance is 'gut'"),
        ({"proposer": "llm"}, "name the model's prune.llm_url"),
        ({"budget": "none"}, "prune.budget is 'none'"),
        ({"plan": "outer"}, "prune.plan is 'outer'"),
        ({"k": 1.5}, "prune.k is 1.5"),
        ({"budget": "sensitivity", "plan": "all"}, "it fine-tunes masked networks"),
        ({"finalists": 2, "plan": "all"}, "prune.finalists is 2 with prune.plan 'all'"),
        ({"finalists": 2, "proposer": "uniform"}, "they are the best candidates of a search"),
        ({"finalists": -1}, "prune.finalists is -1"),
        ({"edges": (5,)}, "prune.edges is .5,. with prune.partition 'equal'"),
        ({"partition": "edges"}, "prune.edges is .. with prune.partition 'edges'"),
        ({"proxy_levels": 0}, "prune.proxy_levels is 0: at least 1"),
        ({"spacing": "karas"}, "prune.spacing is 'karas': choose one of karras"),
        ({"threshold": 3.0}, "prune.threshold is 3.0: between 0 and 1"),
        ({"whole_rate": 0.0}, "prune.whole_rate is 0.0"),
        # what only the fine-tuning reads is refused before the search as well
        ({"start": "foo"}, "prune.start is 'foo'"),
        ({"distil": 2.0}, "prune.distil is 2.0"),
        ({"optimiser": "sliced", "start": "scratch"}, "the base's moments go with its weights"),
    ],
)
def test_choices_that_do_not_exist_are_refused(teacher, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build(configured("assess", teacher, tmp_path, **changes))


def test_a_budget_out_of_reach_is_refused_before_any_search_and_leaves_the_folder_free(
    teacher, tmp_path
):
    """The last group's share is the smallest: hours of other groups' searches come before it."""
    with pytest.raises(ValueError, match="is out of reach"):
        wrong = configured("assess", teacher, tmp_path / "set", groups=8, k=0.02)
        run(wrong, tmp_path / "set" / "assess")
    assert not list((tmp_path / "set").glob("*.json*"))
    right = configured("assess", teacher, tmp_path / "set", proposer="uniform")
    run(right, tmp_path / "set" / "assess")
    held = json.loads((tmp_path / "set" / "budgets.json").read_text())
    assert held["targets"] == specialists.read_manifest(tmp_path / "set")["targets"]
    (tmp_path / "set" / specialists.MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="set is not finished: run the same command again"):
        load_model(tmp_path / "set")


def test_what_the_groups_share_is_measured_once(teacher, tmp_path, monkeypatch):
    config = configured("assess", teacher, tmp_path, budget="loss", mean=0.8, proposer="uniform")
    job = build(config)
    first = job.prepare()
    monkeypatch.setattr(type(first), "_targets", lambda self: pytest.fail("measured again"))
    again = job.prepare()
    np.testing.assert_array_equal(again.targets, first.targets)
    np.testing.assert_array_equal(again.groups.edges, first.groups.edges)
    assert again.flops() == first.flops() > 0 and again.seconds == first.seconds


def test_processes_agree_on_groups_and_budgets(teacher, tmp_path, monkeypatch):
    """What is measured may differ in its last digits: process 0's counts for all."""
    first = {"U": None, "i": np.array([0, 25, 40]), "f": np.array([0.9, 0.75])}

    def agreed(mine):
        theirs = first[mine.dtype.kind]
        return mine if theirs is None else theirs

    monkeypatch.setattr(sharding, "agreed", agreed)
    settings = {"budget": "flat", "proposer": "uniform", "importance": "magnitude"}
    found = build(configured("assess", teacher, tmp_path, **settings)).prepare()
    assert found.groups.edges.tolist() == [0, 25, 40] and found.targets.tolist() == [0.9, 0.75]
    # a late process finds what the first one has just written, which itself found nothing
    first |= {"U": np.array("{}"), "f": np.array([0.8, 0.7])}
    again = build(configured("assess", teacher, tmp_path, **settings)).prepare()
    assert again.targets.tolist() == [0.8, 0.7]


def test_a_set_that_is_not_whole_or_of_another_base_is_refused(teacher, tmp_path):
    with pytest.raises(FileNotFoundError, match="run stage=assess into that folder first"):
        build(configured("prune", teacher, tmp_path))
    manifest = {"teacher": "another", "edges": [0, 20, 40], "base": base_meta(), "borders": [1.0],
                "identity": "x", "ledger": {}}  # fmt: skip
    specialists.write_manifest(tmp_path, manifest)
    with pytest.raises(ValueError, match="was assessed on the teacher another"):
        build(configured("prune", teacher, tmp_path))
    with pytest.raises(ValueError, match="prune.group is 2, but .* has groups 0 ... 1"):
        build(configured("prune", teacher, tmp_path, group=2))
    with pytest.raises(ValueError, match="picks a checkpoint of one run"):
        load_model(tmp_path, step=3)


def test_a_group_s_weight_is_how_far_its_steps_move():
    """Half a decade below the border, one and a half above it; the last step, to 0, is left out."""
    grid = np.array([100.0, 10.0, 10**0.5, 1.0, 0.0])
    found = sensitivity.travelled(grid, [10**0.5], 2)
    np.testing.assert_allclose(found, 2 * np.log(10) * np.array([0.5, 1.5]))


def test_recovery_trains_the_pruned_network_and_no_other(teacher, tmp_path):
    """After some steps the masked network still computes what the sliced one does."""
    base = load_teacher(teacher)
    source = open_data(scenes.get_config("stage=invert,smoke").data)
    config = configured("assess", teacher, tmp_path)
    settings = config.prune.to_dict() | {"k": 0.6}
    found = Assessment(base, read_proxy(source, 16), settings, 0, str(tmp_path))
    task = search.make_task(found.net.config, 0.8, found.scores(1), "inner")
    keep = task.keep(search.uniform(task))
    kept, taught = {}, []
    level_loss = found.level_loss

    def proxy_loss(variables, group, proxy):
        kept.update(variables)
        assert not {image.tobytes() for image in proxy.images} & set(taught)
        return 1.0

    def taught_on(variables, x, label, sigma, key):
        jax.debug.callback(lambda x: taught.extend(image.tobytes() for image in x), x)
        return level_loss(variables, x, label, sigma, key)

    found.level_loss = taught_on

    found.proxy_loss = proxy_loss
    assert Recovery(found, 3)(1, keep) == 1.0
    assert len(set(taught)) == 8  # one half of the proxy's images, measured on the other
    narrow = UNet(pruned_config(found.net.config, keep))
    x, label = jnp.ones((2, 8, 8, 3)), jnp.zeros(2, jnp.int32)
    full = found.net.apply(kept, x, jnp.ones(2), label)
    cut = prune(kept["params"], found.net.config, keep)
    np.testing.assert_allclose(
        full, narrow.apply({"params": cut}, x, jnp.ones(2), label), atol=2e-5
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), cut, prune(base.params, found.net.config,
                                                                      keep))  # fmt: skip
    assert 1e-3 < max(jax.tree.leaves(moved)) < 1e-2  # three steps of Adam
