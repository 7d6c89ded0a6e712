"""The assessment: the data that candidates are compared on, and the files that it writes."""

import json

import jax
import numpy as np
import pytest

from cheapscale.experts import assess, search
from cheapscale.experts.assess import Assessment, read_assessment
from cheapscale.experts.budget import shares
from cheapscale.experts.structure import flops, pruned_config
from cheapscale.teacher import experts
from cheapscale.teacher.load import load_teacher
from cheapscale.teacher.teacher import make_teacher
from cheapscale.training import mesh as sharding
from cheapscale.training.checkpoint import load_network
from configs import fields
from tests.experts.conftest import assessed
from tests.teacher.toy_teacher import DIFFUSION, base_meta, configured, toy_teacher, weights

VP = {"process": "linear", "prediction": "eps", "sigma_min": 0.02}


def bare(tmp_path, diffusion=VP, **changes):
    """An assessment with 40 images; the pixels of image i have a value that identifies i."""
    images = np.broadcast_to(np.arange(40, dtype="f")[:, None, None, None], (40, 8, 8, 3))
    settings = fields.defaults("assess").prune.to_dict() | {"groups": 5, "steps": 50} | changes
    teacher = make_teacher(weights(), base_meta() | {"diffusion": DIFFUSION | diffusion})
    labels = np.arange(40, dtype=np.int32) % 3
    return Assessment(teacher, images, labels, settings, seed=3, folder=str(tmp_path))


def test_all_candidates_of_a_group_have_the_same_images_levels_and_noise(tmp_path):
    calls = []

    def loss(network, masks, images, labels, sigma, key):
        calls.append((images[:, 0, 0, 0], labels, sigma, jax.random.key_data(key)))
        return np.full(len(sigma), 2.0)

    found = bare(tmp_path)
    found.loss = loss
    assert found.score({}, 3) == 2.0
    first, calls[:] = list(calls), []
    found.score({"enc_8_block0.inner": np.arange(0, 24, 2)}, 3)
    for a, b in zip(first, calls, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    sigma = np.concatenate([call[2] for call in first])
    low, high = found.groups.levels[[600, 799]]
    assert sigma.min() >= 0.999 * low and sigma.max() <= 1.001 * high
    assert len(np.unique(sigma)) == assess.PROXY_LEVELS


def test_channels_are_scored_on_the_levels_of_their_group(tmp_path):
    found = bare(tmp_path)
    low, high = found.groups.interval(1)
    sigma = np.concatenate([batch[1] for batch in found.score_batches(1)])
    assert len(sigma) == assess.SCORE_BATCHES * 40 and sigma.max() / sigma.min() > 2
    assert np.all((sigma > low) & (sigma <= high * 1.0001))


def test_the_mean_share_is_over_the_training_levels(tmp_path):
    found = bare(tmp_path, mean=0.7, partition="decibels")
    assert np.average(found.targets, weights=found.groups.sizes) == pytest.approx(0.7)
    assert found.targets[0] == 1.0 and np.all(np.diff(found.targets) <= 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"importance": "taylor", "partition": "loss", "mean": 0.85, "proposer": "uniform"},
        {"importance": "magnitude", "partition": "snr", "order": "snr_down", "remember": False},
    ],
)
def test_every_choice_makes_a_set_within_its_budgets(teacher, tmp_path, changes):
    folder, changes = tmp_path / "set", {"k": 0.6} | changes
    summary = assessed(configured("assess", teacher, folder, **changes), tmp_path / "job")
    for share, target in zip(summary["shares"], summary["targets"]):
        assert abs(share - target) <= search.TOLERANCE
    if "mean" in changes:
        sizes = np.diff(summary["edges"])
        assert np.average(summary["targets"], weights=sizes) == pytest.approx(changes["mean"])
    else:
        assert summary["targets"] == pytest.approx(shares(2, 0.6, changes["order"]).tolist())
    config = toy_teacher().net.config
    for group, share in enumerate(summary["shares"]):
        widths = read_assessment(folder, group)["widths"]
        assert flops(pruned_config(config, widths)) / flops(config) == pytest.approx(share)


def test_the_manifest_has_the_sets_identity_and_cost(teacher, toy_set):
    folder, _ = toy_set
    manifest = experts.read_manifest(folder)
    assert manifest["teacher"] == load_teacher(teacher).fingerprint
    assert manifest["targets"] == [1.0, 0.8] and manifest["shares"][0] == 1.0
    assert set(manifest["mean_shares"]) == {"positions", "40 karras steps"}
    assert sum(manifest["sampler_steps"]) == 40
    # two candidates and the chosen one, and 8 gradients, of 16 images each
    F_0 = flops(toy_teacher().net.config)
    assert manifest["ledger"]["flops"] > (3 + 8 * 2) * 16 * F_0
    memory = (folder / "memory-1.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, memory) if "score" in entry]
    best, found = min(entries, key=lambda entry: entry["score"]), read_assessment(folder, 1)
    assert found["widths"] == best["widths"] and found["score"] == pytest.approx(best["score"])


def test_a_budget_out_of_reach_is_refused_before_any_search(teacher, tmp_path):
    """The last group has the smallest share, and hours of searches would precede its own."""
    with pytest.raises(ValueError, match="raise --config.prune.k or"):
        wrong = configured("assess", teacher, tmp_path / "set", groups=8, k=0.02)
        assessed(wrong, tmp_path / "job")
    assert not list((tmp_path / "set").glob("*.json*"))


def test_shared_curves_are_measured_once_by_process_0(teacher, tmp_path, monkeypatch):
    """Measured curves may differ between processes in their last digits."""
    config = configured("assess", teacher, tmp_path, partition="loss", proposer="uniform")
    first = assess.build(config).prepare()
    assert first.flops() > 0
    monkeypatch.setattr(Assessment, "_groups", lambda self: pytest.fail("measured again"))
    again = assess.build(config).prepare()
    np.testing.assert_array_equal(again.groups.edges, first.groups.edges)
    assert again.shared == first.shared
    monkeypatch.undo()

    def from_host0(mine):  # a late process, which itself found no file
        return np.array("{}") if mine.dtype.kind == "U" else np.array([0, 25, 40])

    monkeypatch.setattr(sharding, "broadcast_from_host0", from_host0)
    assert assess.build(config).prepare().groups.edges.tolist() == [0, 25, 40]


def test_folders_of_other_runs_are_refused(teacher, toy_set, tmp_path):
    folder, _ = toy_set
    with pytest.raises(ValueError, match="is a set of experts, but .* of its base"):
        assess.build(configured("assess", str(folder), tmp_path))
    with pytest.raises(ValueError, match="holds a training run: name a new folder"):
        assess.build(configured("assess", teacher, teacher))
    other = assess.build(configured("assess", teacher, folder, k=0.7))
    with pytest.raises(ValueError, match="with other settings .settings.k: 0.6 -> 0.7.: give an"):
        other.done(0)
    with pytest.raises(ValueError, match="is no address: give --config.prune.llm_url=http"):
        assess.build(configured("assess", teacher, tmp_path, proposer="llm"))


def test_the_members_networks_are_saved_with_their_widths(toy_set):
    folder, _ = toy_set
    for group, narrower in ((0, False), (1, True)):
        meta = load_network(experts.group_folder(folder, group), "net").meta
        assert bool(meta["networks"]["net"]["overrides"]) == narrower
