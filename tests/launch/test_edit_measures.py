"""What launch.edit measures, of a search whose results are the truth with a known error."""

import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cheapscale.data.sources import open_data
from cheapscale.features.network import FeatureNetwork
from cheapscale.pagoda.edit import Found
from configs.scenes import get_config
from launch import edit_measures as measures

SIDE, OFF = 32, 0.1


@pytest.fixture(scope="module")
def held_out():
    """(pictures, classes, objects) of four scenes with one object."""
    data = get_config("stage=pretrain,size=quick").data
    source = open_data(data, split=data.eval_split, resolution=SIDE)
    return *source.read(range(4)), [source.scene(i).objects for i in range(4)]


class Oracle:
    """A search that finds each picture with every pixel in error by OFF; a picture's noise is its
    number."""

    generator = types.SimpleNamespace(resolution=16, num_classes=8, meta={})
    omega = 1.0

    def __init__(self, x):
        # Towards 0, so that no error is clipped.
        self.images = x - np.float32(OFF) * np.sign(x)

    def by(self, method, start):
        return self

    def __call__(self, seen, c):
        n = len(c)
        return Found(np.arange(n)[:, None], self.images[:n, None], np.zeros((n, 1)))


def test_an_error_of_every_pixel_is_measured_as_it_is(held_out):
    x, c, _ = held_out
    half = jnp.float32(0.5)  # features: the pixels, halved
    judge = FeatureNetwork(
        "half", None, half,
        outputs=lambda p, x: {"features": p * x.reshape(len(x), -1)},
    )  # fmt: skip
    _, arms = measures.superres(Oracle(x), x, c, judge, slice(2))
    assert [len(arms[arm]["psnr"]) for arm in arms] == [4, 4, 2, 2]
    np.testing.assert_allclose(arms["inversion"]["psnr"], 10 * np.log10(4 / OFF**2), rtol=1e-4)
    wanted = 0.5 * OFF * np.sqrt(3 * SIDE**2)
    np.testing.assert_allclose(arms["both"]["distance_half"], wanted, rtol=0.05)  # eight bits


def test_what_is_painted_is_read_and_the_rest_is_compared(held_out):
    x, c, _ = held_out
    images, arms = measures.inpaint(Oracle(x), x, c)
    np.testing.assert_allclose(arms["inpainted"]["rms_known"], OFF, rtol=1e-5)
    hole = np.zeros((SIDE, SIDE), bool)
    hole[8:24, 8:24] = True
    np.testing.assert_array_equal(images["inpainted"][:, ~hole], x[:, ~hole])
    assert np.abs(images["inpainted"] - x)[:, hole].min() > OFF / 2
    shares = {arm: np.mean(found["shape"]) for arm, found in arms.items()}
    assert shares["picture"] == 1 and shares["inpainted"] > shares["filled with the mean"]


def test_a_transfer_is_judged_by_the_new_shape_and_by_the_ground(held_out, monkeypatch):
    x, c, objects = held_out
    found = Oracle(x)
    for image, own in zip(found.images, objects):
        o = own[0]
        image[int(o.y * SIDE), int(o.x * SIDE)] = 1  # inside of the object: no background
    monkeypatch.setattr(measures.pagoda, "decode", lambda G, z, c, omega: found.images[z])
    _, arms = measures.transfer(found, x, c, objects)
    for arm in ("own class", "next class"):
        np.testing.assert_allclose(arms[arm]["rms_background"], OFF, rtol=1e-5)
    assert arms["own class"]["shape"].mean() > 0.8 and not arms["next class"]["shape"].any()
    assert arms["another's noise"]["rms_background"].mean() > 2 * OFF


def test_the_summary_has_students_intervals_of_means_and_of_paired_differences():
    control, arm = np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.0])
    found = measures.summary({"a": {"x": control}, "b": {"x": arm, "y": arm}})
    interval = functools.partial(stats.t.interval, 0.95)
    low, high = interval(2, control.mean(), stats.sem(control))
    assert found["a"]["x"] == pytest.approx([control.mean(), (high - low) / 2])
    low, high = interval(1, 0.25, stats.sem(arm - control[:2]))
    assert found["b"]["x_minus_a"] == pytest.approx([0.25, (high - low) / 2])
    assert found["b"]["pictures"] == 2 and "y_minus_a" not in found["b"]
