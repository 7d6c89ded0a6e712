"""The composition score: exact on real scenes, and lower for each kind of wrong picture."""

import dataclasses
import math

import numpy as np
import pytest

from cheapscale.data import pixels
from cheapscale.data import scenes as data
from cheapscale.evaluation import scenes
from cheapscale.evaluation.scenes import Found

COUNT = 24
TRUTHS = [data.scene(3, "test", i) for i in range(COUNT)]


def draw(resolution, truths=TRUTHS):
    return np.stack([data.draw(truth, resolution) for truth in truths])


def rates(images, asked):
    return {name: np.mean(hits) for name, hits in scenes.compare_images(images, asked).items()}


@pytest.fixture(scope="module")
def readings():
    return [scenes.read(image) for image in draw(32)]


def test_every_attribute_of_a_real_scene_is_read(readings):
    for found, truth in zip(readings, TRUTHS):
        assert len(found) == len(truth.objects)
        for asked in truth.objects:
            near = min(found, key=lambda o: math.dist((o.x, o.y), (asked.x, asked.y)))
            assert (near.shape, near.colour) == (asked.shape, asked.colour)
            assert math.dist((near.x, near.y), (asked.x, asked.y)) < 0.01
            assert near.size == pytest.approx(asked.size, abs=0.02)


def test_real_scenes_satisfy_their_scene_caption_and_label(readings):
    for ask in (lambda truth: truth, data.caption, data.label):
        verdicts = [scenes.compare(found, ask(truth)) for found, truth in zip(readings, TRUTHS)]
        assert all(v["all"] and not v["extra"] and not v["missing"] for v in verdicts)


@pytest.mark.parametrize(
    "resolution, count, shape, main", [(8, 0.75, 0.4, 0.9), (16, 0.9, 0.85, 0.95), (128, 1, 1, 1)]
)
def test_other_resolutions_reach_their_ceilings(resolution, count, shape, main):
    """Images have 8 bits, as samples are stored; at 8 px a small object is two pixels wide."""
    truths = TRUTHS[:12]
    images = pixels.to_uint8(draw(resolution, truths))
    found = rates(images, truths)
    assert found["count"] >= count and found["colour"] >= count and found["shape"] >= shape
    assert rates(images, [data.label(truth) for truth in truths])["shape"] >= main


def test_bytes_and_mild_noise_cost_nothing(readings):
    noise = 0.05 * np.random.default_rng(0).standard_normal((8, 64, 64, 3))
    images = pixels.to_uint8(draw(64, TRUTHS[:8]) + noise)
    assert rates(images, TRUTHS[:8])["all"] == 1


@pytest.mark.parametrize("shape", ["square", "ring", "star"])
def test_neighbours_as_close_as_scenes_allow_are_separated(shape):
    one = data.SceneObject(shape, "red", "striped", False, 0.25, 0.5, 0.24, 0, 1.0, 1 / 18)
    for colour in ("red", "blue"):
        two = dataclasses.replace(one, colour=colour, x=one.x + 0.25)
        truth = data.Scene("mist", (one, two))
        assert scenes.compare(scenes.read(data.draw(truth, 64)), truth)["all"]


def with_copies(truth, count, rng):
    """The scene with `count` more copies of its last object, or None if there is no room."""
    objects, last = list(truth.objects), truth.objects[-1]
    for _ in range(2000):
        if len(objects) == len(truth.objects) + count:
            return dataclasses.replace(truth, objects=tuple(objects))
        x, y = rng.uniform(last.size / 2 + 0.02, 1 - last.size / 2 - 0.02, 2)
        gaps = [math.dist((x, y), (o.x, o.y)) - (o.size + last.size) / 2 for o in objects]
        if min(gaps) > 0.02:
            objects.append(dataclasses.replace(last, x=x, y=y))
    return None


@pytest.mark.parametrize("resolution", [32, 64])
def test_duplicates_are_extra_objects(resolution):
    rng, checked = np.random.default_rng(1), 0
    for truth in TRUTHS[:12]:
        doubled = with_copies(truth, 1 + checked % 2, rng)
        if doubled is None:
            continue
        found = scenes.read(data.draw(doubled, resolution))
        assert len(found) == len(doubled.objects)
        verdict = scenes.compare(found, truth)
        assert verdict["extra"] and not verdict["count"] and not verdict["all"]
        assert verdict["shape"] and verdict["colour"] and verdict["position"]
        checked += 1
    assert checked >= 5


def test_a_repeated_picture_has_too_many_main_objects():
    """A base model that samples at twice its size repeats its picture."""
    for truth in TRUTHS[:4]:
        found = scenes.read(np.tile(data.draw(truth, 32), (2, 2, 1)))
        assert len(found) >= 4 and scenes.compare(found, truth)["extra"]
        assert not scenes.compare(found, data.label(truth))["count"]


def test_removed_objects_are_missing():
    for truth in [t for t in TRUTHS if len(t.objects) > 1][:4]:
        fewer = dataclasses.replace(truth, objects=truth.objects[:-1])
        found = scenes.read(data.draw(fewer, 32))
        verdict = scenes.compare(found, truth)
        assert verdict["missing"] and not verdict["count"] and not verdict["shape"]
        assert scenes.compare(found, data.label(truth))["all"]
    for ground in data.GROUNDS:
        empty = scenes.read(data.draw(data.Scene(ground, ()), 32))
        assert empty == []
        for asked in (TRUTHS[1], data.caption(TRUTHS[1])):
            verdict = scenes.compare(empty, asked)
            assert [name for name, value in verdict.items() if value] == ["missing"]


def test_blur_costs_shapes():
    soft = draw(64, TRUTHS[:8])
    for _ in range(12):  # a Gaussian blur of about 2.4 pixels
        for axis in (1, 2):
            soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    found = rates(soft, TRUTHS[:8])
    assert found["all"] < 0.6 and found["shape"] < 0.6


def test_pictures_of_noise_show_no_requested_object():
    noise = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3))
    assert rates(noise, TRUTHS[:3])["all"] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("row", [0, 3])
def test_pictures_without_an_object_are_read_without_a_warning(row):
    picture = np.full((8, 8, 3), 0.9, np.float32)
    assert scenes.read(picture) == []
    picture[row] = pixels.from_uint8(np.array(data.COLOURS["red"][0]))  # a line has no halves
    assert {found.colour for found in scenes.read(picture)} == {"red"}


def test_only_the_changed_attribute_is_wrong(readings):
    """The picture stays; the requested scene is changed."""
    for found, truth in zip(readings, TRUTHS):
        main, *others = truth.objects
        changes = {
            "shape": {"shape": "star" if main.shape != "star" else "disc"},
            "colour": {"colour": "red" if main.colour != "red" else "blue"},
            "position": {"x": main.x + 0.07},
        }
        for name, change in changes.items():
            wrong = data.Scene(truth.ground, (dataclasses.replace(main, **change), *others))
            verdict = scenes.compare(found, wrong)
            assert {key for key, value in verdict.items() if not value} == {
                name, "all", "extra", "missing",
            }  # fmt: skip
        assert not scenes.compare(found, (data.label(truth) + 1) % 8)["shape"]


def test_captions_are_parsed_and_their_relations_checked(readings):
    for i in range(300):
        truth = data.scene(9, "train", i)
        main, *others = scenes.parse_caption(data.caption(truth))
        assert (main.shape, main.colour) == (truth.objects[0].shape, truth.objects[0].colour)
        asked = [(o.shape, o.colour, data.relation(truth.objects[0], o)) for o in truth.objects[1:]]
        assert others == asked
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    checked = 0
    for found, truth in zip(readings, TRUTHS):
        text = data.caption(truth)
        main, *others = scenes.parse_caption(text)
        assert scenes.compare(found, text)["main"]
        repainted = text.replace(main.colour, "red" if main.colour != "red" else "blue", 1)
        assert not scenes.compare(found, repainted)["main"]
        if others:  # a wrong small object leaves the main one right
            words, last = text.rsplit(" ", 1)
            verdict = scenes.compare(found, f"{words} {'disc' if last != 'disc' else 'star'}")
            assert verdict["main"] and not verdict["shape"]
        first = next((r for r in opposite if f" {r} " in text), None)
        if len(truth.objects) == 2 and first:
            verdict = scenes.compare(found, text.replace(first, opposite[first]))
            assert not verdict["all"]
            checked += 1
    assert checked >= 2
    for text in ("a red disk", "a red disc left of", "red disc", "a red disc a blue bar"):
        with pytest.raises(ValueError, match="is not a caption"):
            scenes.parse_caption(text)


def test_a_label_asks_for_one_main_object_of_its_shape():
    disc, small = data.SHAPES.index("disc"), Found("bar", "red", 0.9, 0.5, 0.2)
    main = Found("disc", "red", 0.5, 0.5, 0.55)
    cases = [
        ([main], {}),
        ([main, small, small], {}),
        ([main, small, small, small], {"count": False, "extra": True}),
        ([main, main], {"count": False, "extra": True}),
        ([small._replace(shape="disc"), small], {"count": False, "missing": True}),
        ([main._replace(shape=None)], {"shape": False}),
        ([], {"count": False, "shape": False, "missing": True}),
    ]
    right = {"count": True, "shape": True, "extra": False, "missing": False}
    for found, change in cases:
        assert scenes.compare(found, disc) == right | change | {"all": not change}
        assert scenes.compare(found, np.int32(disc)) == right | change | {"all": not change}


def test_single_scenes_show_one_object():
    truths = [dataclasses.replace(truth, objects=truth.objects[:1]) for truth in TRUTHS]
    assert all(len(scenes.read(image)) == 1 for image in draw(16, truths))


def test_pictures_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="divide 512, not at 48"):
        scenes.read(np.zeros((48, 48, 3)))
