"""The real MobileNetV2 file: shapes, the plain evaluation of its graph, and what features know."""

import collections

import jax
import numpy as np
import pytest

from cheapscale import features


@pytest.fixture(scope="module")
def network(shared):
    path = shared / "data" / "nets" / "imagenet_mobilenet_v2" / "mobilenet_v2_int8.npz"
    if not path.is_file():
        pytest.skip(f"no weight file at {path}")
    return features.load("mobilenet_v2", path, input_size=128)


def test_maps_and_outputs(network):
    x = np.zeros((1, 32, 32, 3), np.float32)
    maps = jax.eval_shape(network.apply, network.params, x)
    assert [m.shape[1:] for m in maps] == [(32, 32, 24), (16, 16, 32), (8, 8, 96), (4, 4, 320)]
    outputs = jax.eval_shape(network.outputs, network.params, x)
    assert outputs["features"].shape == (1, 1280) and outputs["logits"].shape == (1, 1001)


def clothing(shared, split, per_class):
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = shared / "data" / "tfds" / "clothing" / "1.0.0"
    if not folder.is_dir():
        pytest.skip(f"no clothing images at {folder}")
    source = tfds.builder_from_directory(str(folder)).as_data_source(split)
    images, labels, seen = [], [], collections.Counter()
    for i in range(len(source)):
        item = source[i]
        label = int(item["label"])
        if seen[label] < per_class:
            seen[label] += 1
            images.append(np.asarray(item["image"], np.float32) / 127.5 - 1.0)
            labels.append(label)
    return np.stack(images), np.asarray(labels)


def test_features_separate_clothes_and_logits_recognise_t_shirts(network, shared):
    """The nearest class mean in feature space is right for about 0.6 of the images (chance: 0.1).
    T-shirts get ImageNet's class 610, "jersey, T-shirt", at index 611 because class 0 is the
    background."""
    outputs = jax.jit(network.outputs)

    def embed(images):
        found = [outputs(network.params, batch) for batch in images.reshape(-1, 20, 128, 128, 3)]
        return [np.concatenate([f[name] for f in found]) for name in ("features", "logits")]

    x, y = clothing(shared, "train", 10)
    z, w = clothing(shared, "test", 6)
    (f, _), (g, logits) = embed(x), embed(z)
    means = np.stack([f[y == c].mean(0) for c in range(10)])
    nearest = ((g[:, None, :] - means[None, :, :]) ** 2).sum(2).argmin(1)
    assert (nearest == w).mean() > 0.4
    t_shirt = 9
    assert (logits[w == t_shirt].argmax(1) == 611).mean() >= 0.5
