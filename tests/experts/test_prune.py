"""Fine-tuning of one group's expert: its loss, its initial weights, and the resulting set."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.diffusion.denoiser import EDM, VP
from cheapscale.diffusion.noise import over_pixels
from cheapscale.experts import prune
from cheapscale.experts.assess import read_assessment
from cheapscale.experts.partition import make_groups
from cheapscale.experts.structure import prune as pruned
from cheapscale.teacher import experts
from cheapscale.teacher.load import load
from cheapscale.teacher.sampling import inverter, sample
from cheapscale.teacher.teacher import Teacher
from tests.teacher.toy_teacher import LEDGER, base_meta, configured, toy_teacher, weights


class Linear(Teacher):
    """A denoiser with the output D = c sigma."""

    null = 8

    def denoise(self, x, sigma, label=None, **options):
        return self.params["c"] * over_pixels(sigma, x) * (0 * x + 1)


@pytest.mark.parametrize("base_target", [0.0, 0.25])
@pytest.mark.parametrize("process", [EDM(), VP()])
def test_the_loss_has_its_closed_form(process, base_target):
    """It is w(sigma) ((1 - b) (c sigma - x)^2 + b (c sigma - c_base sigma)^2), in the group."""
    linear = Linear(None, None, process, None)
    groups = make_groups(process, 5)
    loss, sigma = prune.group_loss(
        {"c": 0.5},
        {"base": {"c": 0.2}},
        {"image": jnp.full((6, 2, 2, 3), -0.3), "label": jnp.zeros(6, jnp.int32)},
        jax.random.key(0),
        expert=linear,
        base=linear,
        interval=groups.interval(2),
        base_target=base_target,
        label_dropout=0.0,
    )
    expected = (1 - base_target) * (0.5 * sigma + 0.3) ** 2 + base_target * (0.3 * sigma) ** 2
    np.testing.assert_allclose(loss, process.weight(sigma) * expected, rtol=1e-5)
    low, high = groups.boundaries[1:3]
    assert low * (1 - 1e-5) < sigma.min() < sigma.max() < high * 1.0001


def test_an_expert_starts_as_the_cut_base(teacher, toy_set):
    folder, _ = toy_set
    keep = {name: np.array(c) for name, c in read_assessment(folder, 1)["keep"].items()}
    expected = pruned(weights(), toy_teacher().net.config, keep)
    stage = prune.build(configured("prune", teacher, folder, group=1))
    jax.tree.map(np.testing.assert_array_equal, stage.warm_start({"net": {}})["net"], expected)
    scratch = prune.build(configured("prune", teacher, folder, group=1, start="scratch"))
    drawn = {"net": {"as": "drawn"}}
    assert scratch.warm_start(drawn) == drawn
    whole = prune.build(configured("prune", teacher, folder, group=0))
    jax.tree.map(np.testing.assert_array_equal, whole.warm_start({"net": {}})["net"], weights())


def test_a_set_samples_inverts_and_adds_up_its_costs(toy_set):
    folder, tuned = toy_set
    model = load(folder)
    sizes = [sum(map(np.size, jax.tree.leaves(params))) for params in model.params]
    assert sizes[1] < sizes[0] and [summary["step"] for summary in tuned] == [3, 3]
    own = [summary["ledger"]["flops"] - LEDGER["flops"] for summary in tuned]
    searched = experts.read_manifest(folder)["ledger"]["flops"]
    assert min(own) > 0
    assert model.meta["ledger"]["flops"] == pytest.approx(LEDGER["flops"] + sum(own) + searched)
    images, labels = sample(model, np.arange(8), steps=40)
    assert images.shape == (8, 8, 8, 3) and np.isfinite(images).all()
    assert np.isfinite(inverter(model)(images, labels)).all()


def test_a_sampler_whose_steps_leave_the_trained_range_is_refused(toy_set):
    """Heun's corrector would call an expert far below its group; Euler's method never does."""
    model = load(toy_set[0])
    with pytest.raises(ValueError, match="4 steps calls the expert of group 1 .* use --steps=40"):
        sample(model, np.arange(2), steps=4)
    images, _ = sample(model, np.arange(2), steps=4, method="euler")
    assert np.isfinite(images).all()


def test_an_incomplete_set_and_another_base_are_refused(teacher, tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage 'assess' into that folder first"):
        prune.build(configured("prune", teacher, tmp_path))
    manifest = {"teacher": "another", "edges": [0, 20, 40], "base": base_meta(),
                "boundaries": [1.0], "identity": "x", "ledger": {}}  # fmt: skip
    experts.write_manifest(tmp_path, manifest)
    with pytest.raises(ValueError, match="was assessed on the teacher another"):
        prune.build(configured("prune", teacher, tmp_path))
    with pytest.raises(ValueError, match="prune.group is 2, but .* has groups 0 ... 1"):
        prune.build(configured("prune", teacher, tmp_path, group=2))
    with pytest.raises(ValueError, match="picks a checkpoint of one run"):
        load(tmp_path, step=3)
    with pytest.raises(FileNotFoundError, match="groups 0 ... 1, and group 0 is not trained yet"):
        load(tmp_path)


def test_members_of_another_group_or_assessment_are_refused(toy_set, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(toy_set[0], folder)
    manifest = json.loads((folder / experts.MANIFEST).read_text())
    with pytest.raises(ValueError, match="holds one expert, .*: name the folder of its set"):
        load(experts.group_folder(folder, 0))
    shutil.rmtree(experts.group_folder(folder, 0))
    shutil.copytree(experts.group_folder(folder, 1), experts.group_folder(folder, 0))
    with pytest.raises(ValueError, match="group-0 was trained for another group, 1"):
        load(folder)
    experts.write_manifest(folder, manifest | {"identity": "another"})
    with pytest.raises(ValueError, match="was trained for another assessment"):
        load(folder)
    (folder / experts.MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="set is not finished: run the same command again"):
        load(folder)
