"""Scenes: exact across resolutions, determined by their index, with true labels and captions."""

import math

import numpy as np
import pytest

from cheapscale.data import scenes
from cheapscale.data.resize import area_mean, downsample
from cheapscale.data.sources import open_source

COUNT = 24


@pytest.fixture(scope="module")
def pictures():
    return [scenes.scene(7, "train", i) for i in range(COUNT)]


def unit(rgb):
    return np.asarray(rgb, np.float32) / 127.5 - 1


def pixel(image, point):
    side = image.shape[0]
    return image[int(point[1] * side), int(point[0] * side)]


def test_every_resolution_is_the_area_mean_of_every_finer_one(pictures):
    for picture in pictures[:6]:
        images = {r: scenes.draw(picture, r) for r in (8, 16, 32, 64, 128, 512)}
        for high in images:
            for low in (r for r in images if r < high):
                np.testing.assert_allclose(
                    area_mean(images[high], low), images[low], rtol=0, atol=1e-6
                )
                np.testing.assert_allclose(
                    downsample(images[high], low), images[low], rtol=0, atol=1e-6
                )


def test_a_scene_is_a_function_of_seed_split_and_index():
    again = scenes.scene(3, "train", 5)
    assert again == scenes.scene(3, "train", 5)
    others = [scenes.scene(4, "train", 5), scenes.scene(3, "test", 5), scenes.scene(3, "train", 6)]
    assert again not in others
    np.testing.assert_array_equal(scenes.draw(again, 32), scenes.draw(again, 32))


def test_golden_scene():
    """If this fails, pictures have changed: raise scenes.SCENES_ID, then update the numbers."""
    picture = scenes.scene(0, "train", 0)
    assert scenes.SCENES_ID == "scenes/2"
    assert scenes.caption(picture) == "a green dotted square left of a small pink dotted cross"
    mean = scenes.draw(picture, 8).mean((0, 1))
    np.testing.assert_allclose(mean, [-0.430954, -0.284082, -0.237914], atol=1e-5)


def test_splits_share_no_scene():
    train = {scenes.scene(0, "train", i) for i in range(2000)}
    test = {scenes.scene(0, "test", i) for i in range(2000)}
    assert len(train) == len(test) == 2000
    assert not train & test


def test_objects_stay_inside_and_apart_and_the_main_one_is_the_largest():
    counts = np.zeros(4, int)
    for i in range(3000):
        objects = scenes.scene(11, "train", i).objects
        counts[len(objects)] += 1
        assert all(o.size < objects[0].size for o in objects[1:])
        for k, o in enumerate(objects):
            assert o.size / 2 <= min(o.x, o.y) and max(o.x, o.y) <= 1 - o.size / 2
            for other in objects[:k]:
                assert math.dist((o.x, o.y), (other.x, other.y)) > (o.size + other.size) / 2
    assert counts[0] == 0 and (counts[1:] > 300).all()


def test_attributes_are_independent_of_the_label():
    mains = [scenes.scene(0, "train", i).objects[0] for i in range(6000)]
    shapes = np.array([scenes.SHAPES.index(o.shape) for o in mains])
    assert (np.abs(np.bincount(shapes) / 6000 - 1 / 8) < 0.02).all()
    for attribute, options in (("colour", scenes.COLOURS), ("texture", scenes.TEXTURES)):
        values = np.array([list(options).index(getattr(o, attribute)) for o in mains])
        table = np.histogram2d(shapes, values, bins=(8, len(options)))[0] / 6000
        np.testing.assert_allclose(table, 1 / (8 * len(options)), atol=0.012)


def body_point(o):
    """A point well inside an object: its centre, or a point of its band if it is hollow."""
    left = {"ring": 0.76, "crescent": 0.68}.get(o.shape, 0.0) * o.size / 2
    return o.x - left * math.cos(o.angle), o.y - left * math.sin(o.angle)


@pytest.mark.parametrize("resolution", [128, 256])
def test_pixels_show_the_true_colours(pictures, resolution):
    plain = 0
    for picture in pictures:
        image = scenes.draw(picture, resolution)
        ground, ink = (unit(rgb) for rgb in scenes.GROUNDS[picture.ground])
        np.testing.assert_allclose(image[0, 0], ground, atol=1e-6)
        for o in picture.objects:
            body, accent = (unit(rgb) for rgb in scenes.COLOURS[o.colour])
            found = pixel(image, body_point(o))
            if o.texture == "plain":
                np.testing.assert_allclose(found, body, atol=1e-6)
                plain += 1
            else:  # a mixture of the two colours of its texture
                share = np.dot(found - body, accent - body) / np.dot(accent - body, accent - body)
                np.testing.assert_allclose(found, body + share * (accent - body), atol=1e-5)
                assert -1e-6 <= share <= 1 + 1e-6
    assert plain >= 5


def test_outlines_are_as_wide_as_stated():
    base = scenes.SceneObject("square", "red", "plain", True, 0.5, 0.5, 0.6, 0.0, 0.0, 0.06)
    row = scenes.draw(scenes.Scene("ivory", (base,)), 512)[256]
    ink = np.abs(row - unit(scenes.GROUNDS["ivory"][1])).max(-1) < 1e-6
    assert ink.sum() == 2 * round(scenes.OUTLINE * 512)


@pytest.mark.parametrize("period, side", [(scenes.COARSE, 32), (scenes.FINE, 64)])
@pytest.mark.parametrize("texture", ["striped", "checked", "dotted"])
def test_textures_vanish_at_a_quarter_of_the_side_where_they_resolve(texture, period, side):
    """Contrast in the middle of a textured square, against that of its two colours."""
    assert min(period) * side >= 3
    middle = sum(period) / 2
    o = scenes.SceneObject("square", "blue", texture, False, 0.5, 0.5, 0.9, 0.0, 0.7, middle)
    body, accent = (unit(rgb) for rgb in scenes.COLOURS["blue"])

    def contrast(resolution):
        image = scenes.draw(scenes.Scene("night", (o,)), resolution)
        middle = slice(3 * resolution // 8, 5 * resolution // 8)
        return np.ptp(image[middle, middle, 0]) / (accent - body)[0]

    assert contrast(side // 4) < 0.3
    assert contrast(side) > 0.75
    assert contrast(2 * side) > 0.95


def test_captions_and_labels_describe_the_objects(pictures):
    source = open_source("scenes", "train", resolution=16, size=COUNT, seed=7)
    for i, picture in enumerate(pictures):
        text, (main, *others) = source.caption(i), source.scene(i).objects
        assert source.scene(i) == picture
        assert source[i]["label"] == scenes.SHAPES.index(main.shape)
        head = text.split(" left of ")[0].split(" right of ")[0].split(" above ")[0]
        head = head.split(" below ")[0]
        assert head.endswith(main.shape) and main.colour in head
        assert ("outlined" in head) == main.outlined
        assert (main.texture in head) == (main.texture != "plain")
        assert text.count("small") == len(others)
        for other in others:
            words = {
                "left of": other.x - main.x,
                "right of": main.x - other.x,
                "above": other.y - main.y,
                "below": main.y - other.y,
            }
            best = max(words, key=words.get)
            assert any(
                phrase.startswith("a") and other.colour in phrase and other.shape in phrase
                for phrase in text.split(f"{best} ")[1:]
            )


def test_every_phrasing_is_true(pictures):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    kinds = set()
    for picture in pictures:
        main, *others = picture.objects
        allowed = {"a", "an", "and", "large", "small", "on", "background", picture.ground}
        for o in picture.objects:
            allowed |= (
                {o.shape, o.colour}
                | {o.texture} - {"plain"}
                | ({"outlined"} if o.outlined else set())
            )
        texts = scenes.captions(picture)
        assert texts[0] == scenes.caption(picture) and len(set(texts)) == len(texts)
        for text in texts:
            words = text
            for name in opposite:
                words = words.replace(name, "")
            assert set(words.split()) <= allowed
            assert f"{main.shape}" in text and main.colour in text
            assert ("on a" in text) == (picture.ground in text)
        for other, text in zip(others, texts[5:], strict=True):
            kinds.add(name := scenes.relation(main, other))
            first, second = text.split(f" {opposite[name]} ")
            assert first.startswith("a small") and first.endswith(other.shape)
            assert second.startswith("a large") and second.endswith(main.shape)
    assert kinds == set(opposite)


def test_refuses_a_resolution_that_does_not_divide_the_lattice():
    with pytest.raises(ValueError, match="divide 512, not at 48"):
        open_source("scenes", "train", resolution=48)
