"""The images and classes that a folder's structure means, as people lay folders out."""

import json
import logging
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from cheapscale.data.listing import list_images
from cheapscale.data.sources import open_data, open_source


def write(root, *names):
    """Save a small picture under every name; returns the root."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (9, 8, 3), np.uint8)
        Image.fromarray(pixels).save(root / name, format="PNG")
    return root


def opened(root, split="all", **options):
    return open_source("folder", split, resolution=8, data_dir=str(root), **options)


def by_class(root):
    return {
        name: [path.relative_to(root).as_posix() for path in files]
        for name, files in list_images(root).classes.items()
    }


def test_hidden_folders_and_those_of_programs_are_no_classes(tmp_path):
    write(tmp_path, "ant/1.png", "cat/1.png", "cat/._1.png")
    litter = (".ipynb_checkpoints", ".Trash", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")
    for name in litter:
        write(tmp_path, f"{name}/1.png", f"cat/{name}/2.png")
    (tmp_path / "bear").mkdir()
    (tmp_path / "ant" / "Thumbs.db").write_bytes(b"x")
    found = list_images(tmp_path)
    assert by_class(tmp_path) == {"ant": ["ant/1.png"], "cat": ["cat/1.png"]}
    assert found.left_out == {**dict.fromkeys(litter, 2), "hidden files": 1, ".db": 1}
    assert found.empty == ["bear"]
    assert opened(tmp_path).class_names == ("ant", "cat")


def test_linked_folders_and_files_are_followed_and_loops_end(tmp_path):
    far = write(tmp_path / "far", "dog/1.png", "dog/old/2.png", "3.png")
    root = write(tmp_path / "set", "ant/1.png")
    (root / "dog").symlink_to(far / "dog")
    (root / "dog2").symlink_to(root / "dog")  # a second class of the same files
    (root / "ant" / "up").symlink_to(root)
    (root / "ant" / "here").symlink_to(".")
    (root / "ant" / "again.png").symlink_to("1.png")  # twice in one class
    (root / "ant" / "3.png").symlink_to(far / "3.png")
    (root / "self").symlink_to("self")
    (root / "ant" / "gone.png").symlink_to("nowhere.png")
    assert by_class(root) == {
        "ant": ["ant/1.png", "ant/3.png"],
        "dog": ["dog/1.png", "dog/old/2.png"],
        "dog2": ["dog2/1.png", "dog2/old/2.png"],
    }
    assert list_images(root).left_out == {
        "broken links": 2,
        "links to folders or files read before": 3,
    }
    (far / "4.png").symlink_to("3.png")
    assert list_images(far, labelled=False).classes[""] == [far / "3.png"]


def test_names_and_suffixes_of_all_kinds_are_read(tmp_path):
    names = ["A.JPG", "b.Jpeg", "c.PNG", "d e 'f' [g].png", "no_suffix", "ü.png", "deep/er/x.png"]
    write(tmp_path, *(f"k/{name}" for name in names))
    (tmp_path / "k" / "LICENSE").write_text("text")
    (tmp_path / "k" / "notes.txt").write_text("text")
    found = list_images(tmp_path)
    assert sorted(by_class(tmp_path)["k"]) == sorted(f"k/{name}" for name in names)
    assert found.left_out == {"without a suffix": 1, ".txt": 1}
    Image.new("RGB", (9, 9), "red").save(
        tmp_path / "k" / "z.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "blue")]
    )
    source = opened(tmp_path)
    (last,) = (i for i in range(len(source)) if source.path(i).name == "z.gif")
    assert source[last]["image"][0, 0, 0] > 0.9  # the first picture of an animation


def test_accents_are_compared_in_one_form(tmp_path):
    composed, split = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(tmp_path, f"train/{composed}/1.png", "train/tea/1.png", f"val/{split}/1.png")
    train, val = (opened(tmp_path, split) for split in ("train", "val"))
    assert train.class_names == val.class_names == (composed, "tea")
    mac = write(tmp_path / "mac", f"train/{split}/1.png", "train/tea/1.png")
    (mac / "train" / split / "1.png").write_bytes(train.path(0).read_bytes())
    (mac / "train" / "tea" / "1.png").write_bytes(train.path(1).read_bytes())
    assert opened(mac, "train").fingerprint() == train.fingerprint()


def test_the_training_split_numbers_the_classes_of_every_split(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png", "val/a/1.png")
    (tmp_path / "train" / "_").mkdir()  # without an image it is no class
    val = opened(tmp_path, "val")
    assert val.class_names == ("a", "b", "c") and sorted(val.labels()) == [0, 2]
    write(tmp_path, "val/d/1.png")
    with pytest.raises(ValueError, match="has the class d, which the training images"):
        opened(tmp_path, "val")
    write(tmp_path, "fit/c/1.png", "fit/d/1.png", "dev/d/1.png")
    data = dict(name="folder", split="fit", resolution=8, data_dir=str(tmp_path), options={})
    assert open_data(data, split="dev").labels().tolist() == [1]


def test_a_label_file_of_edms_tool_gives_the_labels(tmp_path):
    names = [f"00000/img0000000{i}.png" for i in range(3)]
    write(tmp_path, *names)
    given = [[names[0], 6], [names[1].replace("/", "\\"), 0], [names[2], 6], ["gone.png", 7]]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": given}))
    source = opened(tmp_path)
    assert source.num_classes == 7  # a missing file gives no class
    assert list_images(tmp_path).left_out["labels of missing files in dataset.json"] == 1
    labels = {source.path(i).name: source[i]["label"] for i in range(3)}
    assert [labels[os.path.basename(name)] for name in names] == [6, 0, 6]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    assert opened(tmp_path).num_classes == 0
    (tmp_path / "dataset.json").write_text(json.dumps({"author": "somebody"}))
    assert opened(tmp_path).class_names == ("00000",)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"labels": [["a/1.png", 0]]}', "no label for 1 images .a/2.png"),
        ('{"labels": [["a/1.png", 0], ["a/2.png", -1]]}', "the label -1, which is no number"),
        ('{"labels": [["a/1.png", 0], ["a/2.png", [0, 1]]]}', "the label .0, 1., which is no"),
        ('{"labels": [["a/1.png", 0], ["a/2.png", 1e99]]}', "the label 1e.99, which is no"),
        ('{"labels": {"a/1.png": 0}}', "is no label file"),
        ('{"a/1.png": 0, "a/2.png": 1}', "is no label file"),
        ('{"labels": [["a/1.png", 0], ["a/2.png", 0], ["a/1.png", 1]]}', "the labels 0 and 1"),
        ('{"labels": 5}', "is no label file"),
        ("{", "is no label file"),
        ("[" * 100_000, "is no label file"),
    ],
)
def test_a_label_file_that_labels_no_images_is_refused(tmp_path, text, message):
    write(tmp_path, "a/1.png", "a/2.png")
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=message + ".*data.options.unlabelled=True"):
        opened(tmp_path)
    assert len(opened(tmp_path, unlabelled=True)) == 2


def test_a_label_file_beside_the_splits_gives_the_labels_of_each(tmp_path):
    write(tmp_path, *(f"{split}/0/{i}.png" for split in ("train", "val") for i in range(3)))
    given = [[f"train/0/{i}.png", i] for i in range(3)] + [["val/0/0.png", 2]]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": given}))
    train = opened(tmp_path, "train")
    assert [train.class_names[train[i]["label"]] for i in range(3)] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="no label for 2 images .0/1.png"):
        opened(tmp_path, "val")
    (tmp_path / "dataset.json").write_text('{"labels": ["cat", "dog"]}')  # of another program
    assert opened(tmp_path, "train").class_names == ("0",)
    (tmp_path / "train" / "dataset.json").mkdir()
    with pytest.raises(ValueError, match="dataset.json is a folder, not a label file: rename it"):
        opened(tmp_path, "train")


def test_class_folders_with_numbers_are_in_their_order(tmp_path):
    write(tmp_path, *(f"{number}/1.png" for number in range(12)))
    source = opened(tmp_path)
    assert source.class_names == tuple(map(str, range(12)))
    for i in range(12):
        assert source[i]["label"] == int(source.path(i).parent.name)
    write(tmp_path, "x/1.png")
    assert opened(tmp_path).class_names[:3] == ("0", "1", "10")


@pytest.mark.parametrize(
    "folders, said",
    [
        (["training", "validation"], "which are splits .*rename them to train and val"),
        (["Train", "Test"], "which are splits .*--config.data.split"),
        (["val"], "which are splits"),
        (["images"], "has only the folder images, which would be its one class: move"),
    ],
)
def test_splits_and_a_folder_around_the_classes_are_no_classes(tmp_path, folders, said):
    write(tmp_path, *(f"{folder}/{name}/1.png" for folder in folders for name in "ab"))
    with pytest.raises(ValueError, match=said):
        opened(tmp_path)
    assert len(opened(tmp_path, unlabelled=True)) == 2 * len(folders)
    assert opened(tmp_path, folders[0]).class_names == ("a", "b")


def test_results_of_this_project_in_the_folder_are_no_classes(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png")
    before = opened(tmp_path).fingerprint()
    write(tmp_path, "run/previews/1.png", "a/drawn/samples.png", "pipe/data.png", "ev/samples.png")
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "checkpoints").mkdir()
    for name in ("a/drawn/sample.json", "pipe/pipeline.json", "ev/evaluate.json"):
        (tmp_path / name).write_text("{}")
    assert opened(tmp_path).fingerprint() == before
    assert list_images(tmp_path).left_out["work directories"] == 4


def test_the_labels_of_a_label_file_are_part_of_the_fingerprint(tmp_path):
    write(tmp_path, "a/1.png", "a/2.png")
    prints = set()
    for label in (0, 1):
        given = [["a/1.png", label], ["a/2.png", 1]]
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": given}))
        prints.add(opened(tmp_path).fingerprint())
    assert len(prints) == 2


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match="no images under .*it is empty"):
        opened(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="1 .txt.*: give .png"):
        opened(tmp_path)
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="unpack its archive first"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="set.zip is an archive: unpack it"):
        opened(tmp_path / "set.zip")


def test_unlabelled_images_may_lie_anywhere(tmp_path):
    write(tmp_path, "1.png", "a/2.png")
    with pytest.raises(ValueError, match="mixes images .1.png"):
        opened(tmp_path)
    assert len(opened(tmp_path, unlabelled=True)) == 2


def test_an_empty_file_is_named(tmp_path):
    write(tmp_path, "a/1.png", "a/2.png")
    (tmp_path / "a" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="a/1.png is not a readable image"):
        opened(tmp_path)
    assert len(opened(tmp_path, skip_corrupt=True)) == 1


def test_a_cut_picture_names_the_option_that_leaves_it_out(tmp_path):
    write(tmp_path, "a/1.png", "a/2.png")
    whole = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    source = opened(tmp_path)
    with pytest.raises(ValueError, match="1.png does not.*--config.data.options.skip_corrupt=True"):
        source.read(range(2))
    kept = opened(tmp_path, skip_corrupt=True)
    assert len(kept) == 1 and kept.fingerprint() != source.fingerprint()


def test_the_log_says_once_what_was_read(tmp_path, caplog):
    write(tmp_path, "a/1.png", "b/1.png", "b/.hidden.png")
    (tmp_path / "c").mkdir()
    with caplog.at_level(logging.INFO, logger="absl"):
        opened(tmp_path), opened(tmp_path)
    (said,) = [record.getMessage() for record in caplog.records]
    for part in ("2 images of 2 classes", "8 to 8 px", "1 hidden files", "no class: c"):
        assert part in said
