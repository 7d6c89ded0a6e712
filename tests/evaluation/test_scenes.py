"""The composition score: exact on real scenes, and it falls for what is wrong with a picture."""

import dataclasses
import math

import numpy as np
import pytest

from cheapscale.data import scenes as data
from cheapscale.evaluation import pixels, scene_shapes, scenes
from cheapscale.evaluation.scene_reader import Found, Reading

COUNT = 16
TRUTHS = [data.scene(3, "test", i) for i in range(COUNT)]


def _images(resolution, truths=TRUTHS):
    return np.stack([data.draw(truth, resolution) for truth in truths])


@pytest.fixture(scope="module")
def readings():
    return [scenes.read(image) for image in _images(64)]


def _with_copies(truth, count, rng):
    """The scene with `count` copies of its last object where there is room, or None."""
    objects, last = list(truth.objects), truth.objects[-1]
    for _ in range(2000):
        if len(objects) == len(truth.objects) + count:
            return dataclasses.replace(truth, objects=tuple(objects))
        x, y = rng.uniform(last.size / 2 + 0.02, 1 - last.size / 2 - 0.02, 2)
        gaps = [math.dist((x, y), (o.x, o.y)) - (o.size + last.size) / 2 for o in objects]
        if min(gaps) > 0.02:
            objects.append(dataclasses.replace(last, x=x, y=y))
    return None


def test_every_attribute_of_a_real_scene_is_read(readings):
    for reading, truth in zip(readings, TRUTHS):
        assert reading.ground == truth.ground and len(reading.objects) == len(truth.objects)
        for asked in truth.objects:
            found = min(reading.objects, key=lambda f: math.dist((f.x, f.y), (asked.x, asked.y)))
            assert (found.shape, found.colour) == (asked.shape, asked.colour)
            assert math.dist((found.x, found.y), (asked.x, asked.y)) < 0.01
            assert found.size == pytest.approx(asked.size, abs=0.02)
            assert 0.9 < found.sharpness < 1.1


def test_real_scenes_have_all_that_was_asked_of_them(readings):
    for ask in (lambda truth: truth, data.caption, data.label):
        rates = scenes.rates([scenes.judge(r, ask(t)) for r, t in zip(readings, TRUTHS)])
        assert rates.pop("num") == COUNT
        assert rates.pop("extra") == rates.pop("missing") == 0
        assert set(rates.values()) == {1}, rates


@pytest.mark.parametrize(
    "resolution, count, shape, main", [(8, 0.85, 0.4, 0.9), (16, 0.9, 0.85, 1), (128, 1, 1, 1)]
)
def test_other_resolutions_reach_their_ceilings(resolution, count, shape, main):
    """8 bits, as samples are stored."""
    found = [scenes.read(image) for image in pixels.to_uint8(_images(resolution))]
    rates = scenes.rates([scenes.judge(r, t) for r, t in zip(found, TRUTHS)])
    assert rates["count"] >= count and rates["colour"] >= count and rates["shape"] >= shape
    labels = scenes.rates([scenes.judge(r, data.label(t)) for r, t in zip(found, TRUTHS)])
    assert labels["shape"] >= main and labels["all"] >= count


def test_the_search_leaves_out_no_silhouette_that_comes_close(monkeypatch):
    """In one batch everything that can gain at all is tried, in small ones little of it."""
    rng = np.random.default_rng(2)
    pose = np.array([[0.4, 0.55, 0.5, 0.1]])
    for resolution in (8, 32, 64):
        cover = 0.8 * scene_shapes.silhouettes("star", pose, resolution)[0].astype(float)
        for noise in (0.0, 0.2):
            seen = np.clip(cover + noise * rng.standard_normal(cover.shape), 0, 1)
            fits = []
            for batch in (10_000, 20):
                monkeypatch.setattr(scene_shapes, "BATCH", batch)
                first = scene_shapes.best_fit(seen)
                fits += [first, scene_shapes.best_fit(seen, also=first, avoid=[first])]
            for whole, part in zip(fits[:2], fits[2:]):
                assert whole.shape == part.shape
                np.testing.assert_array_equal(whole.pose, part.pose)


def test_mild_noise_costs_nothing():
    images = _images(64)[:8]
    images += 0.05 * np.random.default_rng(0).standard_normal(images.shape)
    assert scenes.composition(np.clip(images, -1, 1), TRUTHS[:8])["all"] == 1


@pytest.mark.parametrize("shape", ["disc", "ring", "star"])
def test_neighbours_as_close_as_scenes_allow_are_told_apart(shape):
    one = data.SceneObject(shape, "red", "striped", False, 0.25, 0.5, 0.24, 0, 1.0, 1 / 18)
    for colour in ("red", "blue"):
        two = dataclasses.replace(one, colour=colour, x=one.x + 0.25)
        truth = data.Scene("mist", (one, two))
        assert scenes.judge(scenes.read(data.draw(truth, 64)), truth)["all"]


@pytest.mark.parametrize("resolution, noise", [(64, 0.05), (128, 0.0)])
def test_duplicates_are_extra_objects(resolution, noise):
    rng, checked = np.random.default_rng(1), 0
    for truth in TRUTHS[:10]:
        doubled = _with_copies(truth, 1 + checked % 2, rng)
        if doubled is None:
            continue
        image = data.draw(doubled, resolution)
        image = image + noise * rng.standard_normal(image.shape)
        reading = scenes.read(np.clip(image, -1, 1))
        assert len(reading.objects) == len(doubled.objects)
        verdict = scenes.judge(reading, truth)
        assert verdict["extra"] and not verdict["count"] and not verdict["all"]
        assert verdict["shape"] and verdict["colour"] and verdict["position"]
        checked += 1
    assert checked >= 5


def test_a_repeated_picture_has_too_many_main_objects():
    """What a base model does when it is asked for twice its size."""
    for truth in TRUTHS[:3]:
        tiled = np.tile(data.draw(truth, 32), (2, 2, 1))
        reading = scenes.read(tiled)
        assert len(reading.objects) >= 4
        assert scenes.judge(reading, truth)["extra"]
        assert not scenes.judge(reading, data.label(truth))["count"]


def test_removed_objects_are_missing():
    for truth in [t for t in TRUTHS if len(t.objects) > 1][:4]:
        fewer = dataclasses.replace(truth, objects=truth.objects[:-1])
        verdict = scenes.judge(scenes.read(data.draw(fewer, 64)), truth)
        assert verdict["missing"] and not verdict["count"] and not verdict["shape"]
        assert scenes.judge(scenes.read(data.draw(fewer, 64)), data.label(truth))["all"]
    for ground in data.GROUNDS:
        empty = scenes.read(data.draw(data.Scene(ground, ()), 64))
        assert empty == Reading(ground, ())
        assert scenes.judge(empty, TRUTHS[0]) == scenes.judge(empty, data.caption(TRUTHS[0])) == {
            "count": False, "shape": False, "colour": False, "position": False,
            "extra": False, "missing": True, "all": False,
        }  # fmt: skip


def test_blur_costs_shapes_and_objects_but_adds_none():
    soft = _images(64)[:8]
    for _ in range(12):  # about a Gaussian of 2.4 pixels
        for axis in (1, 2):
            soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    rates = scenes.composition(soft, TRUTHS[:8])
    assert rates["all"] < 0.6 and rates["shape"] < 0.6 and rates["extra"] == 0


def test_what_differs_is_what_is_marked_wrong(readings):
    """The picture is right; what is asked for is changed."""
    for reading, truth in zip(readings, TRUTHS):
        main, *others = truth.objects
        changes = {
            "shape": {"shape": "star" if main.shape != "star" else "disc"},
            "colour": {"colour": "red" if main.colour != "red" else "blue"},
            "position": {"x": main.x + 0.07},
        }
        for name, change in changes.items():
            wrong = [dataclasses.replace(main, **change), *others]
            verdict = scenes.judge(reading, wrong)
            false = {key for key, value in verdict.items() if not value}
            assert false == {name, "all", "extra", "missing"}
        label = (data.label(truth) + 1) % 8
        assert not scenes.judge(reading, label)["shape"]


def test_captions_are_understood_and_their_relations_checked(readings):
    for i in range(300):
        truth = data.scene(9, "train", i)
        main, *others = scenes.parse_caption(data.caption(truth))
        assert (main.shape, main.colour) == (truth.objects[0].shape, truth.objects[0].colour)
        asked = [(o.shape, o.colour, data.relation(truth.objects[0], o)) for o in truth.objects[1:]]
        assert others == asked
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    checked = 0
    for reading, truth in zip(readings, TRUTHS):
        text = data.caption(truth)
        first = next((r for r in opposite if f" {r} " in text), None)
        if len(truth.objects) == 2 and first:
            verdict = scenes.judge(reading, text.replace(first, opposite[first]))
            assert verdict["shape"] and not verdict["position"] and not verdict["all"]
            checked += 1
    assert checked >= 2
    for text in ("a red disk", "a red disc left of", "red disc", "a red disc a blue bar"):
        with pytest.raises(ValueError, match="is not a caption"):
            scenes.parse_caption(text)


def _found(shape, size, x=0.5):
    return Found(shape, "red", False, x, 0.5, size, 0.0, 1.0)


def test_a_label_asks_for_one_main_object_of_its_shape():
    disc, small = data.SHAPES.index("disc"), _found("bar", 0.2, 0.9)
    cases = [
        ((_found("disc", 0.55),), {}),
        ((_found("disc", 0.55), small, small), {}),
        ((_found("disc", 0.55), small, small, small), {"count": False, "extra": True}),
        ((_found("disc", 0.55), _found("disc", 0.5, 0.9)), {"count": False, "extra": True}),
        ((_found("disc", 0.2), small), {"count": False, "missing": True}),
        ((_found(None, 0.55),), {"shape": False}),
        ((), {"count": False, "shape": False, "missing": True}),
    ]
    right = {"count": True, "shape": True, "extra": False, "missing": False}
    for objects, change in cases:
        expected = right | change | {"all": not change}
        assert scenes.judge(Reading("mist", objects), disc) == expected
        assert scenes.judge(Reading("mist", objects), np.int32(disc)) == expected


def test_bytes_and_floats_are_the_same_picture():
    images = _images(32)[:2]
    assert scenes.composition(pixels.to_uint8(images), TRUTHS[:2]) == scenes.composition(
        images, TRUTHS[:2]
    )


def test_requests_that_make_no_sense_are_refused():
    images = np.zeros((2, 32, 32, 3))
    with pytest.raises(ValueError, match="2 images but 1 compositions"):
        scenes.composition(images, [0])
    with pytest.raises(ValueError, match="image 1 of 2 images holds a NaN"):
        scenes.composition(np.stack([images[0], images[1] * np.nan]), [0, 1])
    with pytest.raises(ValueError, match="label 8 is not one of the 8 shapes"):
        scenes.judge(Reading("mist", ()), 8)
    with pytest.raises(ValueError, match="divide 512, not at 48"):
        scenes.read(np.zeros((48, 48, 3)))
    with pytest.raises(ValueError, match="at least one verdict"):
        scenes.rates([])
