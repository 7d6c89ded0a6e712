"""The fitted classifier: learns, is cached, and keeps loss and metric apart."""

import json

import jax
import numpy as np
import pytest

from cheapscale import features
from cheapscale.features import fitted as classifier
from cheapscale.features.classifier import param_shapes


class Stripes:
    """Stripes in three directions, brighter at the top, so that quarter turns are recognisable."""

    name, split, resolution = "stripes", "train", 8

    def __init__(self, n=600, labelled=True):
        rng = np.random.default_rng(0)
        self.labels = rng.integers(0, 3, n).astype(np.int32)
        self.num_classes = 3 if labelled else 0
        row, column = np.mgrid[:8, :8]
        phase = np.stack([row, column, row + column])[self.labels]
        wave = np.sin(phase * 1.8 + rng.uniform(0, 6, (n, 1, 1)))
        images = 0.4 * wave + 0.5 - row / 7 + 0.2 * rng.normal(size=(n, 8, 8))
        self.images = np.clip(images[..., None].repeat(3, 3), -1, 1).astype(np.float32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        label = self.labels[i] if self.num_classes else np.int32(0)
        return {"image": self.images[i], "label": label, "id": i}

    def fingerprint(self):
        return f"stripes-{self.num_classes}"


def _fit(source, cache, **options):
    """(network, report)."""
    options = {"purpose": "metric", "steps": 40, "batch_size": 64, "width": 4} | options
    network = classifier.fit_classifier(source, cache_dir=cache, **options)
    reports = [json.loads(path.read_text()) for path in cache.glob("classifiers/*.json")]
    return network, next(r for r in reports if r["sha256"] == network.sha256)


def drawn(source, spec, seed=0):
    """A stand-in for the fit: random weights of the classifier of `spec`, and a report."""
    rng = np.random.default_rng((seed, spec["seed"]))
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), param_shapes(spec))
    return params, {"accuracy": 0.5, "feature_rms": 0.1, "images": len(source)}


def test_learns_and_a_second_call_reads_the_same_weights(tmp_path, monkeypatch):
    network, report = _fit(Stripes(), tmp_path)
    assert network.name == "classifier" and report["task"] == "label"
    assert report["images"] == 300  # every second of 600
    assert report["accuracy"] > 0.6  # chance is 1/3
    monkeypatch.setattr(classifier, "_fit", lambda *_: pytest.fail("the cache was not read"))
    again, _ = _fit(Stripes(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, network.params, again.params)
    assert again.sha256 == network.sha256
    out = again.outputs(again.params, Stripes(300).images)
    assert out["features"].shape == (300, 64) and out["logits"].shape == (300, 3)
    assert float((out["features"] ** 2).mean()) == pytest.approx(1, abs=0.3)


def test_the_file_is_the_network_that_was_fitted(tmp_path, monkeypatch):
    """The cached and the fitted network have equal names, hashes and outputs."""
    monkeypatch.setattr(classifier, "_fit", drawn)
    networks = {}
    for purpose, labelled in (("metric", True), ("loss", False)):
        fitted, _ = _fit(Stripes(60, labelled), tmp_path, purpose=purpose)
        (path,) = (tmp_path / "classifiers").glob(f"{purpose}*.npz")
        loaded = features.load("classifier", path)
        assert (loaded.name, loaded.sha256) == (fitted.name, fitted.sha256)
        networks[loaded.name] = fitted, loaded
    assert list(networks) == ["classifier", "loss_classifier_8px(rotation)"]
    made, read = (
        jax.jit(network.outputs)(network.params, Stripes(4).images)
        for network in networks["classifier"]
    )
    assert read["features"].shape == (4, 64) and read["logits"].shape == (4, 3)
    jax.tree.map(np.testing.assert_array_equal, made, read)
    for network in networks["classifier"]:  # matrix products are full float32 on any machine
        jaxpr = jax.make_jaxpr(network.outputs)(network.params, Stripes(4).images)
        assert "HIGHEST" in str(jaxpr) and "precision=None" not in str(jaxpr)

    with np.load(path) as stored:
        np.savez(path, **{name: 2 * array for name, array in stored.items()})
    with pytest.raises(ValueError, match="does not describe"):
        features.load("classifier", path)
    with pytest.raises(ValueError, match="delete both"):
        _fit(Stripes(60, labelled), tmp_path, purpose=purpose)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="there is no report"):
        features.load("classifier", path)


def test_without_labels_the_task_is_to_predict_quarter_turns(tmp_path):
    network, report = _fit(Stripes(labelled=False), tmp_path)
    assert network.name == "classifier(rotation)"
    assert report["task"] == "rotation" and report["num_classes"] == 4
    assert report["accuracy"] > 0.4  # chance is 1/4


def test_loss_and_metric_share_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "_fit", drawn)
    networks, reports = zip(*(_fit(Stripes(60), tmp_path, purpose=p) for p in ("loss", "metric")))
    assert [n.name for n in networks] == ["loss_classifier_8px", "classifier"]
    keys = ("seed", "subset", "degradation_weight", "sha256")
    assert all(reports[0][key] != reports[1][key] for key in keys)
    assert classifier.PURPOSES["loss"]["width"] != classifier.PURPOSES["metric"]["width"]
    assert len(list((tmp_path / "classifiers").iterdir())) == 4  # no temporary file left


def test_large_images_are_seen_whole_and_in_detail():
    """Half of a batch are crops at a random scale, the other half reductions of the whole image."""
    checker = np.zeros((8, 64, 64, 3), np.uint8)
    checker[:, ::2] = 255  # row stripes, which any reduction averages away
    checker[:, :, 32:] //= 2  # one half is darker; every reduction of the image shows the edge
    detail = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x, label = classifier._augment(checker, np.arange(8), rng, rotation=False, view=16)
        assert x.shape == (8, 16, 16, 3) and x.dtype == np.float32
        np.testing.assert_array_equal(label, np.arange(8))
        sides = np.stack([x[4:, :, :8].mean((1, 2, 3)), x[4:, :, 8:].mean((1, 2, 3))])
        np.testing.assert_allclose(np.sort(sides, 0), [[-0.5] * 4, [0.0] * 4], atol=0.01)
        np.testing.assert_allclose(np.diff(x[4:], axis=1), 0, atol=1e-6)
        detail.add(bool(np.abs(np.diff(x[:4], axis=1)).max() > 0.5))
    assert detail == {True, False}


def test_degraded_images_are_marked():
    rng = np.random.default_rng(0)
    x = np.sign(rng.normal(size=(400, 8, 8, 3))).astype(np.float32) * 0.5
    out, marks = classifier._degrade(x, rng)
    variance = out.var(axis=(1, 2, 3))
    blurred, noisy = marks.astype(bool).T
    assert 0.2 < blurred.mean() < 0.3 and 0.2 < noisy.mean() < 0.3 and not (blurred & noisy).any()
    assert variance[blurred].max() < 0.2 and variance[noisy].min() > 0.22
    intact = ~(blurred | noisy)
    np.testing.assert_array_equal(out[intact], x[intact])
    assert not classifier._degrade(x, rng, half=False)[1].any()


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="too few"):
        _fit(Stripes(6), tmp_path)


def test_a_fit_that_diverges_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier.optax, "warmup_cosine_decay_schedule", lambda *_: 1e4)
    with pytest.raises(ValueError, match="fitted on 12 images .* has diverged: give more images"):
        _fit(Stripes(24), tmp_path, steps=3, batch_size=8)
    assert not list(tmp_path.rglob("*.npz"))
