"""A model is given other images with the class numbers that it was trained with."""

import pytest

from cheapscale.data.sources import open_source
from cheapscale.evaluation.image_sets import teacher_pairs
from cheapscale.teacher.data import check_model, check_teacher, match_classes
from cheapscale.teacher.teacher import make_teacher
from tests.data.test_listing import opened, write
from tests.teacher.toy_teacher import base_meta


def trained_on(source, **model):
    """A teacher without weights that names the classes of `source`."""
    meta = base_meta()
    meta["networks"]["net"] |= {"resolution": 8, "num_classes": source.num_classes} | model
    return make_teacher(None, meta | {"data": source.describe()}, 7, "base")


def test_classes_of_other_images_are_found_by_their_names(tmp_path):
    teacher = trained_on(opened(write(tmp_path / "a", *(f"{c}/1.png" for c in "abcd"))))
    other = opened(write(tmp_path / "b", "c/1.png", "b/1.png", "c/2.png"))
    assert other[1]["label"] == 0  # their own numbers, which are also in the cache of images
    check_teacher(teacher, other)
    assert other.class_names == ("a", "b", "c", "d") and other.describe()["num_classes"] == 4
    names = [other.path(i).parent.name for i in range(3)]
    assert other.labels().tolist() == ["abcd".index(name) for name in names]
    assert [other[i]["label"] for i in range(3)] == other.labels().tolist()
    check_teacher(teacher, other)  # a second time changes nothing
    assert other.labels().tolist() == ["abcd".index(name) for name in names]
    match_classes({"data": {"class_names": ["c", "b"]}}, 2, other, "another model")
    assert other.labels().tolist() == ["cb".index(name) for name in names]


def test_unknown_classes_and_images_without_labels_are_refused(tmp_path):
    teacher = trained_on(opened(write(tmp_path / "a", "ant/1.png", "cat/1.png")))
    dogs = opened(write(tmp_path / "b", "ant/1.png", "dog/1.png"))
    with pytest.raises(ValueError, match="has the class dog, which the model does not know"):
        check_teacher(teacher, dogs)
    flat = opened(write(tmp_path / "c", "1.png"))
    with pytest.raises(ValueError, match="2 classes, but folder:all has no labels"):
        check_teacher(teacher, flat)
    with pytest.raises(ValueError, match="has no labels"):
        teacher_pairs(teacher, flat, 1, nodes=2, batch_size=1)
    check_teacher(trained_on(flat), dogs)  # an unconditional teacher takes any labels
    assert dogs.class_names == ("ant", "dog")


def test_numbers_without_names_stand_where_their_count_is_right(tmp_path):
    numbered = opened(write(tmp_path / "a", "0/1.png", "1/1.png", "2/1.png"))
    named = opened(write(tmp_path / "b", "x/1.png", "y/1.png", "z/1.png"))
    before = named.labels().tolist()
    match_classes(trained_on(numbered).meta, 3, named, "base")
    assert named.labels().tolist() == before
    match_classes({}, 3, named, "a checkpoint without names")
    with pytest.raises(ValueError, match="has 3 classes .* and the model 4"):
        match_classes({}, 4, opened(tmp_path / "b"), "base")
    digits = opened(write(tmp_path / "c", "0/1.png", "2/1.png"))
    match_classes({}, 3, digits, "base")
    assert sorted(digits.labels()) == [0, 2]


def test_the_remedy_for_a_wrong_number_of_classes_can_be_typed():
    source = open_source("scenes", "train", resolution=8, size=4)
    with pytest.raises(ValueError, match="give --config.model.num_classes=8, or 0"):
        check_model({"resolution": 8, "num_classes": 1000}, source)
