"""Vocabularies of captions, and captions from folders."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from cheapscale.data.sources import open_source
from cheapscale.data.tokens import tokeniser, train_vocabulary, vocabulary_size

CAPTIONS = ["a red disc above a small blue ring", "an outlined green star"] * 5
VOCABULARY = train_vocabulary(CAPTIONS, 400)


def test_frequent_words_are_tokens_and_any_text_has_some():
    tokenise = tokeniser(VOCABULARY, 12)
    rows = tokenise([CAPTIONS[0], CAPTIONS[0].upper(), "", "  ", "zebra \u2603"])
    assert rows.dtype == np.int32 and rows.max() < vocabulary_size(VOCABULARY) <= 400
    np.testing.assert_array_equal((rows >= 0).sum(axis=1)[:4], [8, 8, 0, 0])
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0, :8] >= 0).all() and 6 < (rows[4] >= 0).sum() <= 12
    assert train_vocabulary(CAPTIONS, 400) == VOCABULARY


def test_long_captions_are_cut_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        row = tokeniser(VOCABULARY, 3)([CAPTIONS[0]])[0]
    np.testing.assert_array_equal(row, tokeniser(VOCABULARY, 12)([CAPTIONS[0]])[0, :3])
    assert "'a red disc'" in caplog.text and "larger --config.text.tokens" in caplog.text


@pytest.fixture
def folder(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.jpg"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "train" / name)
    return tmp_path


def write(path, *rows, end="\n"):
    path.write_text("\n".join(map(json.dumps, rows)) + end)


def test_captions_of_folders(folder):
    (folder / "train/a/0.txt").write_text("first\n\n  second  \n")
    write(folder / "captions.jsonl", {"file_name": "train/b/2.jpg", "text": "above"})
    write(
        folder / "train/captions.jsonl",
        {"file_name": "a/0.png", "text": "third\nline"},
        {"file_name": "a/1.png", "text": "again", "model": "m"},
        end="",
    )
    source = open_source("folder", "train", resolution=8, data_dir=str(folder))
    found = {source.path(i).name: source.captions(i) for i in range(3)}
    assert found == {
        "0.png": ("first", "second", "third line"), "1.png": ("again",), "2.jpg": ("above",),
    }  # fmt: skip
    before = source.fingerprint()
    source.use_captions(VOCABULARY, 6)
    assert source.captioned and source.num_classes == 0 and source.labels().shape == (3, 6)
    np.testing.assert_array_equal(source.read([0, 1])[1], source.labels()[:2])
    assert source.fingerprint() == before and source.describe()["tokens"] == 6
    # One caption only: what is drawn is known.
    item = next(source[i] for i in range(3) if source.path(i).name == "2.jpg")
    np.testing.assert_array_equal(item["label"], tokeniser(VOCABULARY, 6)(["above"])[0])


def test_names_of_files_are_captions_where_there_are_no_others(tmp_path):
    files = {"fruit/red_apple-02.png": ["red apple"], "fruit/042.png": [],
             "sea/boat.png": ["a boat at sea"]}  # fmt: skip
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    path.with_suffix(".txt").write_text("a boat at sea")
    options = {"data_dir": str(tmp_path), "unlabelled": True}
    named = open_source("folder", "all", resolution=8, named_by_files=True, **options)
    found = {named.path(i).name: named._captions(i) for i in range(len(named))}
    assert found == {name.split("/")[-1]: captions for name, captions in files.items()}
    plain = open_source("folder", "all", resolution=8, **options)
    assert sum((plain._captions(i) for i in range(len(plain))), []) == ["a boat at sea"]


def test_captions_that_cannot_be_read_are_refused(folder):
    options = {"resolution": 8, "data_dir": str(folder)}
    with pytest.raises(ValueError, match="has no captions: put NAME.txt beside"):
        open_source("folder", "train", **options).use_captions(VOCABULARY, 6)
    write(folder / "train/captions.jsonl", {"file": "a/0.png"}, {"file_name": "x", "text": "y"})
    with pytest.raises(ValueError, match="line 1 of .*captions.jsonl is no"):
        open_source("folder", "train", **options).caption(0)
