"""CLIP's vocabulary, a small one: its file formats, and transformers' tokenizer."""

import gzip
import json

import numpy as np
import pytest

from cheapscale.data.tokens import tokeniser
from cheapscale.features.tokenizer import BYTES, END, START, read_vocabulary

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


def load(path, size, length=77):
    return tokeniser(read_vocabulary(path, size=size), length, null=False)


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
    one = read_vocabulary(folder / "bpe.txt.gz", size=size)
    (folder / "tokenizer.json").write_text(one)
    for path in ((folder / "vocab.json", folder / "merges.txt"), folder / "tokenizer.json"):
        other = read_vocabulary(path, size=size)
        np.testing.assert_array_equal(tokeniser(one, 77)(TEXTS), tokeniser(other, 77)(TEXTS))
    assert tokeniser(one, 3, null=False)([""])[0].tolist() == [size - 2, size - 1, -1]
    assert tokeniser(one, 3)([""])[0].tolist() == [-1, -1, -1]


def test_agrees_with_transformers(files, torchvision):
    transformers = pytest.importorskip("transformers", reason="install transformers (extra: test)")
    folder, size = files
    theirs = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    for length in (77, 6):  # theirs fills up with end marks, which are not read
        ours = load(folder / "bpe.txt.gz", size, length)(TEXTS)
        expected = theirs(list(TEXTS), padding="max_length", truncation=True, max_length=length)
        np.testing.assert_array_equal(np.where(ours < 0, size - 1, ours), expected["input_ids"])


def test_merges_are_applied_in_their_order(files):
    tokenise = load(files[0] / "bpe.txt.gz", files[1])
    names = {n: token for token, n in json.loads((files[0] / "vocab.json").read_text()).items()}

    def tokens(text):
        return [names[n] for n in tokenise([text])[0] if n >= 0]

    assert tokens("THE photo") == [START, "the</w>", "photo</w>", END]
    assert tokens("é") == [START, "Ã", "©</w>", END]
    assert tokens("e\u0301") == tokens("É") == tokens("é")


def test_other_vocabularies_are_refused(files, tmp_path, monkeypatch):
    folder, size = files
    with pytest.raises(ValueError, match=f"has {size} tokens and lacks 0 .* 49408 are expected"):
        read_vocabulary((folder / "vocab.json", folder / "merges.txt"))
    (tmp_path / "merges.txt").write_text("#\nzz yy\n")
    with pytest.raises(ValueError, match="lacks 1 of those"):
        read_vocabulary((folder / "vocab.json", tmp_path / "merges.txt"), size=size)
    with pytest.raises(ValueError, match="no vocabulary file at"):
        read_vocabulary(tmp_path / "gone.txt.gz")
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        read_vocabulary(folder / "vocab.json")
    monkeypatch.delenv("CHEAPSCALE_WEIGHTS_CLIP_TOKENIZER", raising=False)
    with pytest.raises(ValueError, match="set CHEAPSCALE_WEIGHTS_CLIP_TOKENIZER"):
        read_vocabulary()
    pair = f"{folder / 'vocab.json'}+{folder / 'merges.txt'}"
    monkeypatch.setenv("CHEAPSCALE_WEIGHTS_CLIP_TOKENIZER", pair)
    assert read_vocabulary(size=size) == read_vocabulary(folder / "bpe.txt.gz", size=size)
