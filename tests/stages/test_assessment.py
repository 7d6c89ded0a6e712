"""What an assessment measures: on which levels, images and noise."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cheapscale.pruning import importance, search
from cheapscale.pruning.budget import by_difficulty, mean_share
from cheapscale.stages.assessment import Assessment, Proxy
from cheapscale.stages.groups import Groups, make_groups
from configs import common

VP = {"process": "linear", "sigma_min": 0.02, "sigma_max": 80.0, "rho": 7.0, "sigma_data": 0.5}


def bare(loss=None, **changes):
    """An assessment that has made nothing yet."""
    found = object.__new__(Assessment)
    found.groups = make_groups(VP, 5)
    found.levels, found.diffusion, found.seed, found.loss = found.groups.levels, VP, 3, loss
    images = np.arange(40 * 4 * 4 * 3, dtype=np.float32).reshape(40, 4, 4, 3)
    found.proxy = Proxy(images, np.arange(40, dtype=np.int32) % 3)
    found.settings = common.prune().to_dict() | {
        "proxy_images": 100, "score_images": 30, "score_batches": 3, "steps": 50,
        "spacing": "leading",
    } | changes  # fmt: skip
    found.net = SimpleNamespace(config=None)
    found.teacher = SimpleNamespace(params=None)
    found.grad = None
    return found


def test_all_candidates_meet_the_same_images_levels_and_noise_of_their_group():
    calls = []

    def loss(variables, images, labels, sigma, key):
        calls.append((images[:, 0, 0, 0], labels, sigma, jax.random.key_data(key)))
        return np.full(len(sigma), variables["c"])

    found = bare(loss)
    assert found.proxy_loss({"c": 2.0}, 3) == 2.0
    first, calls[:] = list(calls), []
    found.proxy_loss({"c": 5.0}, 3)
    for a, b in zip(first, calls, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    sigma = np.concatenate([call[2] for call in first])
    low, high = found.levels[[600, 799]]
    assert sigma.min() >= 0.999 * low and sigma.max() <= 1.001 * high
    assert len(np.unique(sigma)) == found.settings["proxy_levels"]
    unseen = Proxy(found.proxy.images + 1e5, found.proxy.labels)
    calls.clear()
    found.proxy_loss({"c": 5.0}, 3, proxy=unseen)
    assert min(call[0].min() for call in calls) >= 1e5


@pytest.mark.parametrize("kind, inside", [("taylor", True), ("all_times", False)])
def test_channels_are_scored_on_the_levels_of_their_group_or_on_all(monkeypatch, kind, inside):
    seen = []
    monkeypatch.setattr(
        importance, "gradients", lambda grad, params, batches: [seen.append(b[2]) for b in batches]
    )
    monkeypatch.setattr(importance, "taylor", lambda grads, params, config, accumulated: "scores")
    found = bare(importance=kind)
    assert found.scores(1) == "scores" and len(seen) == 3
    assert found.scores(1) == "scores" and len(seen) == (6 if inside else 3)  # shared: paid once
    low, high = found.levels[[200, 399]]
    sigma = np.concatenate(seen)
    assert np.all((sigma >= 0.999 * low) & (sigma <= 1.001 * high)) == inside
    assert sigma.max() / sigma.min() > 2


def test_a_trial_is_of_the_finalists_and_of_no_others():
    memory = [search.Entry(0, {"a": width}, 0.8, score) for width, score in
              ((4, 3.0), (5, 1.0), (6, 2.0), (7, 9.0))]  # fmt: skip
    after = {4: 0.2, 5: 0.4, 6: 0.3, 7: 0.1}
    found, task = bare(finalists=3), SimpleNamespace(keep=lambda widths: widths)
    found.trial = lambda group, keep: after[keep["a"]] + group
    rows = [{"widths": {"a": 5}, "loss": 1.4}, {"widths": {"a": 6}, "loss": 1.3},
            {"widths": {"a": 4}, "loss": 1.2}]  # fmt: skip
    assert found.tried(memory, task, 1) == rows
    after[6] = np.nan  # the worst there is
    found.settings["finalists"] = 2
    assert found.tried(memory, task, 1) == [rows[0], {"widths": {"a": 6}, "loss": np.inf}]


@pytest.mark.parametrize("weigh", ["positions", "steps"])
def test_a_mean_is_over_training_times_or_over_the_sampler_s_steps(weigh):
    found = bare(mean=0.7, weigh=weigh, partition="decibels")
    found.groups = make_groups(VP, 5, "decibels")
    targets, sizes = found._targets(), np.diff(found.groups.edges)
    means = {"positions": mean_share(targets, sizes),
             "steps": mean_share(targets, found.sampler_steps())}  # fmt: skip
    assert means.pop(weigh) == pytest.approx(0.7, abs=1e-4)
    if weigh == "positions":
        assert targets[0] == 1.0 and np.all(np.diff(targets) <= 0)


def test_a_group_between_two_anchors_is_as_hard_as_they_are():
    found = bare(budget="loss", mean=0.8)
    found.groups = Groups(found.levels, np.array([0, 501, 511, 1000]))
    found.anchors = np.array([0, 200, 400, 600, 800, 999])
    found.anchor_losses = np.exp(-found.anchors / 500.0)
    difficulty = [-200 / 500, -505.5 / 500, -np.mean([600, 800, 999]) / 500]
    np.testing.assert_allclose(
        found._targets(), by_difficulty(np.array(difficulty), 0.8, np.array([501, 10, 489]))
    )
