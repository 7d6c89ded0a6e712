"""The stages that make a set: what the assessment accepts and shares, how fine-tuning starts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.models.unet import UNet, unet
from cheapscale.pruning import search
from cheapscale.pruning.structure import flops, prune, pruned_config
from cheapscale.stages import pretrain, sensitivity, specialists
from cheapscale.stages import prune as prune_stage
from cheapscale.stages.assessment import Assessment, read_proxy
from cheapscale.stages.data import open_data
from cheapscale.stages.networks import load_model, load_teacher
from cheapscale.stages.recovery import Recovery
from cheapscale.stages.run import build, run
from cheapscale.training import checkpoint, loop, sharding
from cheapscale.training.sharding import make_mesh
from configs import scenes
from tests.stages.toy_teacher import LEDGER, base_meta, configured, save_teacher, weights


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


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
    with pytest.raises(FileNotFoundError, match="groups 0 ... 1, and group 0 is not trained yet"):
        load_model(tmp_path)


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
        jax.debug.callback(lambda x: taught.extend(i.tobytes() for i in np.asarray(x)), x)
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
