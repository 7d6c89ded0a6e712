"""The corruption study, whole, on invented images and a network of known features."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cheapscale.models.features.network import FeatureNetwork
from launch import corruptions
from launch.corruptions import Counts, Study

PROJECTION = np.random.default_rng(0).normal(size=(8 * 8 * 3, 6)).astype(np.float32) / 6
STUDY = Study(
    resolution=8, blur=(4, 2), noise=(0.2, 0.6), modes=(2, 1), copies=(0.5, 1.0), counts={}
)
COUNTS = Counts(reference=120, pool=180, num=40, batch_size=40)


def _outputs(params, x):
    features = x.reshape(len(x), -1) @ params
    return {"features": features, "logits": 3 * features[:, :3]}


NETWORK = FeatureNetwork("pixels", None, jnp.asarray(PROJECTION), sha256="abc", outputs=_outputs)


class Blobs:
    """Three classes of one colour each, with texture."""

    name, resolution, num_classes, split = "blobs", 8, 3, "train"

    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 3, n)
        colour = 0.4 * np.eye(3)[self.labels][:, None, None]
        self.images = np.clip(colour + 0.3 * rng.normal(size=(n, 8, 8, 3)), -1, 1).astype("f4")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": np.int32(self.labels[i]), "id": i}

    def caption(self, i):
        return ""

    def fingerprint(self):
        return "blobs"


@pytest.fixture(scope="module")
def row():
    shared = Blobs(400, 0), Blobs(60, 1), STUDY, COUNTS, 3
    return corruptions.one_network("blobs", NETWORK, *shared)


def test_the_record_holds_every_set_and_metric(row):
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    kinds = ("blur", "noise", "modes", "copies")
    sets = {"test", "real"} | {name for kind in kinds for name in STUDY.sets(kind)}
    assert set(row["sets"]) == sets
    judged = ("fd", "kid", "score", "precision", "density", "recall", "coverage", "memorisation")
    names = [corruptions.name_of(kind, NETWORK) for kind in judged]
    assert set(row["sets"]["real"]) == set(names) == set(row["ordered"])
    assert set(row["sets"]["real"]["fd_pixels"]) == {"mean", "sd"}
    assert set(row["sets"]["test"]["fd_pixels"]) == {"mean"}
    assert set(row["sets"]["copies 1.0"]) == {"memorisation_pixels"}


def test_the_distances_order_what_was_made_worse(row):
    for metric in ("fd_pixels", "kid_pixels"):
        for kind in ("blur", "noise", "modes"):
            assert row["ordered"][metric][kind]["ordered"], (metric, kind, row["sets"])
    assert row["ordered"]["memorisation_pixels"]["copies"]["ordered"]
    assert row["sets"]["copies 1.0"]["memorisation_pixels"]["mean"] < 1e-6
    assert row["test_split_nearest"] == {"fd_pixels": True, "kid_pixels": True}


def test_what_is_out_of_order_is_said():
    found = {"real": {"fd_pixels": [1.0, 1.0]}}
    for kind in ("blur", "noise", "modes"):
        found |= {n: {"fd_pixels": [2.0 + i, 2.0]} for i, n in enumerate(STUDY.sets(kind))}
    found["noise 0.2"]["fd_pixels"] = [0.5, 0.5]
    judged, failures = corruptions.verdicts(found, NETWORK, STUDY)
    assert judged["fd_pixels"]["blur"] == {"ordered": True, "worse_than_real": True, "draws": 1}
    assert not judged["fd_pixels"]["noise"]["worse_than_real"]
    assert failures == ["fd_pixels does not rise with noise: real 1, noise 0.2 0.5, noise 0.6 2.5"]


def test_known_figures_are_compared_only_where_they_can_be():
    resnet = NETWORK._replace(name="resnet56")
    study = corruptions.STUDIES["cifar10"]
    found = {"real": [0.2, 0.2], "test": [0.46], "blur 16": [12.0, 12.8]}
    # 100 sigma above the floor: 4.5 is read at 0.043, below the weakest strength
    found |= {name: [0.2 + 100 * s] for name, s in zip(study.sets("noise"), study.noise)}
    found = {name: {"fd_resnet56": values} for name, values in found.items()}
    real, test, blur, noise = corruptions.sanity(found, "cifar10", resnet, study)
    assert (real["ratio"], real["within"]) == (1, True)
    assert test["ratio"] == pytest.approx(2) and not test["within"]
    assert blur["ratio"] == pytest.approx(12.4 / 13.4) and blur["within"]
    assert noise["within"] is None and "does not read it" in noise["note"]
    assert corruptions.equal_noise(found, "fd_resnet56", study, 7.2) == pytest.approx(0.07)
    mobilenet, study = NETWORK._replace(name="mobilenet_v2"), corruptions.STUDIES["clothing"]
    found = {"real": [-0.0003, 0.0005], "blur 64": [0.1], "blur 32": [0.8]}
    found = {name: {"kid_mobilenetv2": values} for name, values in found.items()}
    rows = corruptions.sanity(found, "clothing", mobilenet, study)
    assert [row["within"] for row in rows] == [None, True, False]


def test_the_picture_has_a_row_for_every_strength(tmp_path):
    corruptions.draw(tmp_path / "rows.png", Blobs(400, 0), STUDY, columns=5)
    wide, high = Image.open(tmp_path / "rows.png").size
    assert high * (5 * 10 + 2) == wide * (7 * 10 + 2)  # 8 px and a margin of 2 each, 7 rows


def test_unusable_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown data sets"):
        corruptions.run(["imagenet"], "", [], str(tmp_path))
    with pytest.raises(ValueError, match="measures none of clothing"):
        corruptions.run(["clothing"], "", ["resnet56=file.th"], str(tmp_path))
    with pytest.raises(ValueError, match="need 300 training images of blobs, which has 200"):
        corruptions.measure(NETWORK, Blobs(200, 0), Blobs(60, 1), STUDY, COUNTS, 3)
