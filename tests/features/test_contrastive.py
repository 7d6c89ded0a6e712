"""The fitted image-text network: finds the caption of an image, and keeps loss and metric apart."""

import numpy as np
import pytest

from cheapscale.data.scenes import COLOURS
from cheapscale.evaluation.alignment import clip_scores
from cheapscale.features import contrastive as module


class Colours:
    """Plain pictures in eight colours, with the colour's name as the caption."""

    name, split, resolution = "colours", "train", 8

    def __init__(self, captioned=True):
        self.captioned = captioned

    def __len__(self):
        return 400

    def __getitem__(self, i):
        rgb = np.asarray([*COLOURS.values()][i // 2 % 8][0], np.float32) / 127.5 - 1
        noise = np.random.default_rng(i).normal(0, 0.05, (8, 8, 3))
        return {"image": np.clip(rgb + noise, -1, 1).astype(np.float32)}

    def captions(self, i):
        return (f"a {[*COLOURS][i // 2 % 8]} picture",) if self.captioned else ()

    def caption(self, i):
        return next(iter(self.captions(i)), "")

    def fingerprint(self):
        return "colours"


def test_an_image_is_nearest_to_its_caption_and_the_cache_is_read(tmp_path, monkeypatch):
    options = {"steps": 50, "batch_size": 8, "cache_dir": tmp_path}
    source = Colours()
    found = module.fit_contrastive(source, purpose="metric", **options)
    x = np.stack([source[i]["image"] for i in range(1, 17, 2)])  # the metric was fitted on even ids
    features = found.network.outputs(found.network.params, x)["features"]
    texts = found.texts([source.caption(i) for i in range(1, 17, 2)])
    scores = [clip_scores(np.asarray(features), np.roll(texts, n, axis=0)) for n in range(8)]
    assert np.mean(np.argmax(scores, axis=0) == 0) >= 0.75  # chance is 1/8
    other = module.fit_contrastive(source, purpose="loss", **options | {"steps": 1})
    assert other.network.sha256 != found.network.sha256
    assert (found.network.name, other.network.name) == ("contrastive", "loss_contrastive_8px")
    monkeypatch.setattr(module, "_fit", lambda *_: pytest.fail("the cache was not read"))
    again = module.fit_contrastive(source, purpose="metric", **options)
    assert again.network.sha256 == found.network.sha256
    np.testing.assert_array_equal(again.texts(["a red picture"]), found.texts(["a red picture"]))
    with pytest.raises(ValueError, match="no captions to fit on"):
        module.fit_contrastive(Colours(captioned=False), purpose="metric", **options)
