"""Byte-pair encoding on a small vocabulary: both file formats, and transformers' tokenizer."""

import gzip
import json

import numpy as np
import pytest

from cheapscale.features.tokenizer import BYTES, END, START, load_tokenizer

CORPUS = "a photo of a red cube and the photo of three blue cubes in the there theory don't they're"
TEXTS = (
    "a photo of three cubes",
    "The  RED cube,\n\tand the\u00a0blue one!",
    "they're here, don't they'll it's 'twas i'm 'same",
    "2019 was ½ of 10²",
    "cafe\u0301 naïve straße Ελλάδα 日本語 שלום हिन्दी",
    "emoji 🙂🙃... (#hash) under_score a-b",
    "<|startoftext|> the <|endoftext|>",
    "",
)


def learned_merges(count):
    """Merges of the most frequent pair, repeatedly (the first of equally frequent pairs)."""
    words = [[*word[:-1], word[-1] + "</w>"] for word in CORPUS.replace("'", " ").split()]
    merges = []
    for _ in range(count):
        pairs = [pair for word in words for pair in zip(word, word[1:])]
        best = max(dict.fromkeys(pairs), key=pairs.count)
        merges.append(best)
        for word in words:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1], word[i]) == best:
                    word[i - 1 : i + 1] = ["".join(best)]
    return merges


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same vocabulary as OpenAI's .txt.gz and as transformers' pair, and its size."""
    folder, merges = tmp_path_factory.mktemp("vocabulary"), learned_merges(30)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    characters = BYTES
    tokens = characters + [c + "</w>" for c in characters] + ["".join(p) for p in merges]
    tokens += [START, END]
    # OpenAI's file contains more merges than CLIP uses.
    (folder / "bpe.txt.gz").write_bytes(gzip.compress("\n".join([*lines, "x y", ""]).encode()))
    (folder / "merges.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    return folder, len(tokens)


def test_both_formats_are_one_tokenizer(files):
    folder, size = files
    one = load_tokenizer(folder / "bpe.txt.gz", size=size)
    other = load_tokenizer((folder / "vocab.json", folder / "merges.txt"), size=size)
    np.testing.assert_array_equal(one(TEXTS), other(TEXTS))
    assert one([""], length=3)[0].tolist() == [size - 2, size - 1, size - 1]


def test_agrees_with_transformers(files, torchvision):
    transformers = pytest.importorskip("transformers", reason="install transformers (extra: test)")
    folder, size = files
    ours = load_tokenizer(folder / "bpe.txt.gz", size=size)
    theirs = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    expected = theirs(list(TEXTS), padding="max_length", truncation=True, max_length=77)
    np.testing.assert_array_equal(ours(TEXTS, truncate=True), expected["input_ids"])
    short = theirs(list(TEXTS), padding="max_length", truncation=True, max_length=6)
    np.testing.assert_array_equal(ours(TEXTS, length=6, truncate=True), short["input_ids"])


def test_merges_are_applied_in_their_order(files):
    tokenize = load_tokenizer(files[0] / "bpe.txt.gz", size=files[1])
    names = {n: token for token, n in json.loads((files[0] / "vocab.json").read_text()).items()}

    def tokens(text):
        return [names[n] for n in tokenize([text], length=5)[0]]

    assert tokens("THE photo") == [START, "the</w>", "photo</w>", END, END]
    assert tokens("é") == [START, "Ã", "©</w>", END, END]
    assert tokens("e\u0301") == tokens("É") == tokens("é")


def test_long_texts_and_other_vocabularies_are_refused(files, tmp_path, monkeypatch):
    folder, size = files
    tokenize = load_tokenizer(folder / "bpe.txt.gz", size=size)
    with pytest.raises(ValueError, match="'the the the' has 3 tokens, more than 2"):
        tokenize(["the the the"], length=4)
    with pytest.raises(ValueError, match="list of texts"):
        tokenize("the")
    with pytest.raises(ValueError, match=f"has {size} tokens and lacks 0 .* 49408 are expected"):
        load_tokenizer((folder / "vocab.json", folder / "merges.txt"))
    (tmp_path / "merges.txt").write_text("#\nzz yy\n")
    with pytest.raises(ValueError, match="lacks 1 of those"):
        load_tokenizer((folder / "vocab.json", tmp_path / "merges.txt"), size=size)
    with pytest.raises(ValueError, match="no vocabulary file at"):
        load_tokenizer(tmp_path / "gone.txt.gz")
    monkeypatch.delenv("CHEAPSCALE_WEIGHTS_CLIP_TOKENIZER", raising=False)
    with pytest.raises(ValueError, match="set CHEAPSCALE_WEIGHTS_CLIP_TOKENIZER"):
        load_tokenizer()
    pair = f"{folder / 'vocab.json'}+{folder / 'merges.txt'}"
    monkeypatch.setenv("CHEAPSCALE_WEIGHTS_CLIP_TOKENIZER", pair)
    np.testing.assert_array_equal(load_tokenizer(size=size)(TEXTS), tokenize(TEXTS))
