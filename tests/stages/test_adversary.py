"""The judges as the stages build them: separate random projections, class table, pooling."""

import jax
import numpy as np
import pytest

from cheapscale.data.sources import SceneSource
from cheapscale.models import features
from cheapscale.models.features.network import FeatureNetwork
from cheapscale.stages import adversary
from configs.common import features as feature_settings


def network(settings, source):
    """In place of the classifier: block means at three strides, linearly mixed."""

    def apply(params, x):
        b, h, w, c = x.shape
        blocks = (x.reshape(b, h // s, s, w // s, s, c).mean((2, 4)) for s in (2, 4, 8))
        return tuple(block @ params["mix"] for block in blocks)

    mix = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    return [FeatureNetwork("blocks", apply, {"mix": mix}, sha256="b")], {}


@pytest.fixture
def judges(monkeypatch):
    monkeypatch.setattr(adversary, "load_features", network)
    source = SceneSource("train", 8, size=4)

    def make(**discriminator):
        settings = feature_settings().to_dict()
        given = {"width": 4} | discriminator
        return adversary.make_judges(
            source, settings=settings, discriminator=given, distance="feature"
        )

    return make


def test_the_discriminator_and_the_distance_project_by_draws_of_their_own(judges):
    """Section 3.2: the same backbone, other random mixing."""
    frozen, used = judges().load(jax.random.key(0))
    assert used == {"blocks": "b"}
    one, other = (frozen[judge]["blocks"] for judge in ("discriminator", "distance"))
    np.testing.assert_array_equal(one["network"]["mix"], other["network"]["mix"])
    kernels = zip(jax.tree.leaves(one["mixing"]), jax.tree.leaves(other["mixing"]), strict=True)
    assert not any(np.allclose(a, b) for a, b in kernels)


def test_the_class_table_starts_as_the_file_and_stays_trainable(judges, tmp_path):
    """Section 3.4: a given table is the discriminator's first class embedding."""
    table = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    np.save(tmp_path / "table.npy", table)
    np.savez(tmp_path / "table.npz", embed=table)
    for name in ("table.npy", "table.npz"):
        params, _ = jax.jit(judges(class_table=str(tmp_path / name)).init)(jax.random.key(0))
        for head in params["blocks"].values():
            np.testing.assert_array_equal(head["embedding"], table)
    np.save(tmp_path / "short.npy", table[:3])
    with pytest.raises(ValueError, match="give one row per class"):
        judges(class_table=str(tmp_path / "short.npy"))
    with pytest.raises(ValueError, match="there is no file"):
        judges(class_table=str(tmp_path / "none.npy"))
    np.savez(tmp_path / "two.npz", a=table, b=table)
    with pytest.raises(ValueError, match="an .npz of one array"):
        judges(class_table=str(tmp_path / "two.npz"))


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_the_loss_s_lpips_pools_as_the_config_says(monkeypatch, pooling):
    """Section 3.2: the published code averages (piq), LPIPS itself takes the maximum."""
    asked = {}

    def load(name, path, **options):
        asked[name] = options.get("pooling")
        return None

    monkeypatch.setattr(features, "load", load)
    settings = feature_settings(("vgg16_lpips", "mobilenet_v2")).to_dict()
    settings["paths"] = {"vgg16_lpips": "a+b", "mobilenet_v2": "c"}
    assert settings["lpips_pooling"] == "avg"
    adversary.load_features(settings | {"lpips_pooling": pooling}, None)
    assert asked == {"vgg16_lpips": pooling, "mobilenet_v2": None}


def test_the_weights_of_a_loss_may_lie_in_several_files(tmp_path):
    """VGG16 and LPIPS' heads, as config.features.paths names them: joined by "+"."""
    layers = zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), [3] + 12 * [4], strict=True)
    weights = {}
    for number, inputs in layers:
        weights[f"features.{number}.weight"] = np.ones((4, inputs, 3, 3), np.float32)
        weights[f"features.{number}.bias"] = np.ones(4, np.float32)
    for name in ("vgg.npz", "vgg+16.npz"):
        np.savez(tmp_path / name, **weights)
    heads = {f"lin{k}.model.1.weight": np.ones((1, 4, 1, 1), np.float32) for k in range(5)}
    np.savez(tmp_path / "heads.npz", **heads)
    settings = feature_settings(("vgg16_lpips",)).to_dict()

    def load(path):
        (found,), unfitted = adversary.load_features(
            settings | {"paths": {"vgg16_lpips": str(path)}}, None
        )
        assert not unfitted
        return found.params

    assert len(load(f"{tmp_path / 'vgg.npz'}+{tmp_path / 'heads.npz'}")["lin"]) == 5
    assert "lin" not in load(tmp_path / "vgg+16.npz")  # a "+" in a file's own name
