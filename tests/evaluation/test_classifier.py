"""The fitted classifier: learns, is cached, and keeps loss and metric apart."""

import json

import jax
import numpy as np
import pytest

from cheapscale.training import classifier


class Stripes:
    """Stripes in three directions, brighter at the top so that turns can be told."""

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
    options = {"purpose": "metric", "steps": 40, "batch_size": 64, "width": 4} | options
    return classifier.fit_classifier(source, cache_dir=cache, **options)


def test_learns_and_a_second_call_reads_the_same_weights(tmp_path, monkeypatch):
    fitted = _fit(Stripes(), tmp_path)
    assert fitted.network.name == "classifier" and fitted.report["task"] == "label"
    assert fitted.report["images"] == 300  # every second of 600
    assert fitted.report["accuracy"] > 0.6  # chance is 1/3
    monkeypatch.setattr(classifier, "_fit", lambda *_: pytest.fail("the cache was not read"))
    again = _fit(Stripes(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, fitted.network.params, again.network.params)
    assert again.report == fitted.report and again.network.sha256 == fitted.network.sha256
    x = Stripes(4).images
    out = again.network.outputs(again.network.params, x)
    assert out["features"].shape == (4, 64) and out["logits"].shape == (4, 3)
    many = again.network.outputs(again.network.params, Stripes(300).images)["features"]
    assert float((many**2).mean()) == pytest.approx(1, abs=0.1)
    assert len(again.network.apply(again.network.params, x)) == 4


def test_a_source_without_labels_is_told_by_its_turns(tmp_path):
    fitted = _fit(Stripes(labelled=False), tmp_path)
    assert fitted.network.name == "classifier(rotation)"
    assert fitted.report["task"] == "rotation" and fitted.report["num_classes"] == 4
    assert fitted.report["accuracy"] > 0.4  # chance is 1/4


def test_loss_and_metric_share_nothing(tmp_path):
    loss, metric = (_fit(Stripes(60), tmp_path, purpose=p, steps=1) for p in ("loss", "metric"))
    assert loss.network.name == "loss_classifier"
    assert loss.network.sha256 != metric.network.sha256
    assert loss.report["images"] == 60 and metric.report["images"] == 30
    defaults = classifier.PURPOSES
    assert all(defaults["loss"][k] != defaults["metric"][k] for k in ("seed", "width", "subset"))
    assert len(list((tmp_path / "classifiers").glob("*.json"))) == 2
    assert len(list((tmp_path / "classifiers").iterdir())) == 4  # no temporary file left


def test_large_images_are_seen_whole_and_in_detail():
    """Half of a batch are reductions, the other half crops: both of the view's size."""
    rng = np.random.default_rng(0)
    flat = np.repeat(np.arange(8, dtype=np.uint8), 64 * 64 * 3).reshape(8, 64, 64, 3) * 30
    checker = flat.copy()
    checker[:, ::2] = 255 - checker[:, ::2]
    x, label = classifier._augment(checker, np.arange(8), rng, False, 32)
    assert x.shape == (8, 32, 32, 3)
    np.testing.assert_array_equal(label, np.arange(8))
    assert np.all(x[:4].std(axis=(1, 2, 3)) > 0.1)  # rows alternate in a crop
    np.testing.assert_allclose(x[4:], 0, atol=1e-6)  # and average out in a reduction


def test_what_cannot_be_fitted_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown purpose"):
        _fit(Stripes(10), tmp_path, purpose="both")
    with pytest.raises(ValueError, match="too few"):
        _fit(Stripes(6), tmp_path)


def test_a_report_that_does_not_fit_its_weights_is_refused(tmp_path):
    _fit(Stripes(60), tmp_path, steps=1)
    (path,) = (tmp_path / "classifiers").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "0"}))
    with pytest.raises(ValueError, match="delete both"):
        _fit(Stripes(60), tmp_path, steps=1)
