"""All four stages on images without labels."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.data.pairs import PairStore
from cheapscale.features import fitted as classifier
from cheapscale.features.classifier import param_shapes
from cheapscale.teacher.load import load
from cheapscale.teacher.sampling import labels_for, sample
from cheapscale.training import checkpoint
from configs.scenes import get_config
from launch import train as run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{stage: (config, workdir, summary)}: 8 px grown to 16, with little to compile.

    A U-Net of one level, distances of pixels; and the discriminator's classifier is drawn, not
    fitted: what it knows plays no part here.
    """
    root = tmp_path_factory.mktemp("unlabelled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHEAPSCALE_CACHE", str(root / "cache"))
        patch.setattr(classifier, "_fit", drawn)
        return all_stages(root)


def drawn(source, spec):
    """Weights of the classifier that `spec` describes, without a fit."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), param_shapes(spec))
    return params, {"accuracy": 0.25, "feature_rms": 1.0, "images": 0}


def all_stages(root):
    finished = {}
    for stage in ("pretrain", "invert", "distill", "grow,resolution=16"):
        config = get_config(f"smoke,unlabelled,levels=1,stage={stage}")
        if "model" in config:
            config.model.channels = 8
        if "grow" in config:
            config.base, config.grow.widths = str(root / "distill"), (8,)
        if "discriminator" in config:
            config[config.stage].feature_weight = 0.0
        if stage == "distill":  # growth has the discriminator
            config.distill.adversarial_weight = 0.0
        if "teacher" in config:
            config.teacher = str(root / "pretrain")
        if "latents" in config:
            config.latents = str(root / "latents")
        workdir = str(root / config.stage)
        summary = run.run(config, workdir)
        finished[config.stage] = types.SimpleNamespace(
            config=config, workdir=workdir, summary=summary
        )
    return finished


def paths(tree):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_every_stage_runs_to_its_end_and_no_network_has_a_class(runs):
    for name in ("pretrain", "distill", "grow"):
        finished = runs[name]
        assert finished.summary["step"] == 3
        assert all(np.isfinite(v) for v in finished.summary["metrics"].values())
        loaded = checkpoint.load_network(finished.workdir)
        (model,) = loaded.meta["networks"].values()
        assert model["num_classes"] == loaded.meta["data"]["num_classes"] == 0
        assert loaded.meta["data"]["class_names"] == []
        assert not any("label" in path for path in paths(loaded.params))
    # the network of the losses was fitted to predict quarter turns, and its name says so
    networks = runs["grow"].summary["frozen_networks"]
    assert list(networks) == [f"loss_classifier_{side}px(rotation)" for side in (8, 16)]
    assert all(len(sha) == 64 for sha in networks.values())


def test_the_label_that_is_passed_along_changes_nothing_bit_for_bit(runs):
    """After training, D(x; sigma, y) = D(x; sigma) and G(z, y) = G(z) for any label y."""
    some, other = jnp.zeros(4, jnp.int32), jnp.arange(4) + 3
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    teacher, grown = (load(runs[name].workdir) for name in ("pretrain", "grow"))
    denoise = jax.jit(teacher.denoise)
    np.testing.assert_array_equal(denoise(x, 2.0, some), denoise(x, 2.0, other))
    generate = jax.jit(grown.__call__)
    np.testing.assert_array_equal(generate(80 * x, some), generate(80 * x, other))


def test_the_discriminator_has_no_class_projection(runs):
    stage = run.build(runs["grow"].config)
    params, _ = jax.eval_shape(stage.init_params, jax.random.key(0))
    heads = params["discriminator"]["loss_classifier_16px(rotation)"]
    assert not any("condition" in path or "embedding" in path for path in paths(heads))
    assert {head["out"]["kernel"].shape[-1] for head in heads.values()} == {1}


def test_labels_are_zero_in_pairs_latents_and_samples_and_others_are_refused(runs):
    store = PairStore.open(runs["invert"].config.latents)
    assert {int(store.record(i, f)["label"]) for i in range(24) for f in (0, 1)} == {0}
    batch = next(run.build(runs["distill"].config).batches(0))
    assert not batch["pair"]["label"].any() and not batch["real"]["label"].any()
    assert not labels_for(0, np.arange(5), 0).any()
    loaded = load(runs["grow"].workdir)
    with pytest.raises(ValueError, match="label 2 was asked for, but the model is unconditional"):
        sample(loaded, np.arange(2), labels=np.array([0, 2]))
