"""Metrics of a set of images, end to end on a feature network whose features are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.evaluation import fid, pixels, quality
from cheapscale.models.features.network import FeatureNetwork


def _outputs(params, x):
    """Means of the four quadrants of each channel: 12 features."""
    b, h, w, c = x.shape
    pooled = x.reshape(b, 2, h // 2, 2, w // 2, c).mean((2, 4)).reshape(b, 4 * c)
    return {"features": pooled * params, "logits": None}


NETWORK = FeatureNetwork(
    "quadrants", lambda params, x: (x,), jnp.float32(3.0), sha256="abc", outputs=_outputs
)


class Blobs:
    """Images of constant colour plus noise."""

    name = "blobs"

    def __init__(self, n, seed, spread=0.3):
        rng = np.random.default_rng(seed)
        colour = spread * rng.normal(size=(n, 1, 1, 3))
        self.images = np.clip(colour + 0.1 * rng.normal(size=(n, 8, 8, 3)), -1, 1).astype("f4")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": np.int32(0), "id": i}


@pytest.fixture(scope="module")
def reference():
    return quality.reference(
        NETWORK, Blobs(300, 0), train_source=Blobs(300, 1), num=250, batch_size=100
    )


def test_uint8_truncates_and_reals_survive_the_round_trip():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(pixels.to_uint8(pixels.from_uint8(levels)), levels)
    np.testing.assert_array_equal(pixels.to_uint8(np.array([-7, -1, 1, 7.0])), [0, 0, 255, 255])
    assert pixels.to_uint8(np.array([10.7 / 127.5 - 1])) == 10


def test_psnr_is_peak_to_peak_two():
    x = np.zeros((2, 4, 4, 3))
    y = np.stack([x[0] + 0.2, x[1]])
    np.testing.assert_allclose(pixels.psnr(x, y), [20.0, np.inf])
    with pytest.raises(ValueError, match="image by image"):
        pixels.psnr(x, y[:1])


def test_a_perfect_generator_scores_the_floor_and_a_bad_one_does_not(reference):
    good = quality.quality(reference, Blobs(250, 2).images, k=3)
    bad = quality.quality(reference, Blobs(250, 2, spread=0.05).images)
    assert good["num"] == good["num_real"] == 250
    # the subtraction takes as many generated images as the floor has real ones
    num = len(reference.floor_features[0])
    few = quality.quality(reference, Blobs(250, 2).images[:num])
    assert num < 250
    assert good["fd_minus_floor"] == pytest.approx(few["fd_quadrants"] - few["floor"])
    assert abs(good["fd_minus_floor"]) < 0.25 < 1 < bad["fd_minus_floor"]
    assert abs(good["kd_quadrants"]) < 0.1 < bad["kd_quadrants"]
    assert good["recall"] > 0.8 > 0.3 > bad["recall"]
    assert good["nn_features"] == pytest.approx(good["nn_features_real"], rel=0.2)
    assert all(np.isfinite(v) for v in good.values())


def test_memorised_images_stand_out_as_nearest_neighbours(reference):
    copied = quality.quality(reference, pixels.from_uint8(reference.train_images[:60]))
    assert copied["nn_features"] < 1e-3 * copied["nn_features_real"]
    assert copied["nn_pixels"] < 1e-3 < copied["nn_pixels_real"]


def test_batches_and_batch_size_do_not_matter(reference):
    images = Blobs(70, 3).images
    whole = quality.quality(reference, images, batch_size=70)
    parts = quality.quality(
        reference, (images[i : i + 20] for i in range(0, 70, 20)), batch_size=32
    )
    assert whole == pytest.approx(parts, rel=1e-5)


def test_features_are_those_of_the_truncated_images():
    images = Blobs(9, 4).images
    seen = quality.embed(NETWORK, pixels.to_uint8(images), batch_size=4)
    by_hand = _outputs(3.0, jnp.asarray(np.trunc((images + 1) * 127.5) / 127.5 - 1))["features"]
    # up to the guard's rare level (1.5e-3 here); rounding instead would differ by ten times as much
    np.testing.assert_allclose(seen, by_hand, atol=3e-3)


def test_without_training_images_the_floor_is_half_against_half():
    held_out = quality.reference(NETWORK, Blobs(200, 0), num=200)
    features = held_out.features
    halves = fid.frechet_distance(features[:50], features[100:])
    assert held_out.floor(50)[0] == pytest.approx(halves)
    assert "nn_features" not in quality.quality(held_out, Blobs(50, 1).images)


@pytest.mark.parametrize("used", [["quadrants"], {"quadrants": ""}, {"another": "abc"}])
def test_a_network_of_the_loss_may_not_measure(reference, used):
    images = Blobs(20, 5).images
    with pytest.raises(ValueError, match="training loss"):
        quality.quality(reference, images, used_in_loss=used)
    insisted = quality.quality(reference, images, used_in_loss=used, insist=True)
    assert "fd_quadrants(used in the loss)" in insisted and "fd_quadrants" not in insisted
    quality.quality(reference, images, used_in_loss={"vgg": "def"})


def test_the_floor_is_taken_on_training_images_the_classifier_did_not_see(reference):
    _, ids = quality.read_images(Blobs(300, 1), 10_000)
    unseen = reference.train_features[ids % 2 == 1]
    assert len(unseen) == 150
    assert reference.floor(40)[0] == fid.frechet_distance(unseen[:40], reference.features)


def test_unusable_input_is_refused(reference):
    with pytest.raises(ValueError, match="one resolution"):
        quality.quality(reference, np.zeros((4, 16, 16, 3)))
    with pytest.raises(ValueError, match="no pooled features"):
        quality.embed(NETWORK._replace(outputs=None), np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="takes uint8"):
        quality.embed(NETWORK, np.zeros((1, 8, 8, 3)))
