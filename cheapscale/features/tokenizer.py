"""CLIP's byte-level byte-pair encoding, from a vocabulary file that the user names.

A text is composed (NFC), lower-cased and cut into words: contractions ('s, 't, 're, 've, 'm, 'll,
'd), runs of letters, single digits, runs of other characters. White space only separates words. The
last byte of a word is marked "</w>". The start and end marks have the two highest numbers.

The vocabulary may be OpenAI's bpe_simple_vocab_16e6.txt.gz, or transformers' vocab.json with
merges.txt. OpenAI's code first repairs broken Unicode and HTML entities (`ftfy`, `html.unescape`);
this one does not, so the text must not need repair.
"""

import gzip
import json
import pathlib
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from cheapscale.features.weights import Paths, default_paths, named_files

SIZE = 49408  # tokens of the published vocabulary
LENGTH = 77
START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each byte


def load_tokenizer(path: Paths | None = None, *, size: int = SIZE) -> Callable[..., np.ndarray]:
    """The function tokenize(texts, length=77, truncate=False) -> int32 [b, length].

    Each row begins with a start mark and ends with one or more end marks; the text tower reads the
    first end mark and nothing after it. A longer text raises ValueError, unless `truncate` cuts it.

    path: a .txt.gz file, or the pair (vocab.json, merges.txt), as a sequence or joined by "+"; by
    default the value of the environment variable CHEAPSCALE_WEIGHTS_CLIP_TOKENIZER. size: the
    number of tokens, equal to the text tower's number of embeddings. ValueError for another size.
    """
    paths = default_paths("clip_tokenizer")[0] if path is None else named_files(path)
    vocabulary, merges = _read(paths, size)
    model = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=LAST))
    model.add_special_tokens([START, END])
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])

    def tokenize(texts: Sequence[str], length: int = LENGTH, truncate: bool = False) -> np.ndarray:
        if isinstance(texts, str):
            raise ValueError(f"the tokenizer takes a list of texts, got the one text {texts!r}")
        rows = np.full((len(texts), length), vocabulary[END], np.int32)
        for row, text in zip(rows, texts):
            found = model.encode(unicodedata.normalize("NFC", text).lower()).ids
            if len(found) > length - 2 and not truncate:
                raise ValueError(
                    f"{text!r} has {len(found)} tokens, more than {length - 2}: shorten it, or "
                    "let truncate=True cut it"
                )
            found = [vocabulary[START], *found[: length - 2]]
            row[: len(found)] = found
        return rows

    return tokenize


def _read(paths: list[pathlib.Path], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Number of each token, and the pairs in the order in which they are merged."""
    shown = " + ".join(map(str, paths))
    if not all(path.is_file() for path in paths):
        raise ValueError(f"no vocabulary file at {shown}: download it, then give its path")
    zipped = paths[-1].read_bytes()
    text = (gzip.decompress(zipped) if paths[-1].suffix == ".gz" else zipped).decode()
    # The first line is a header, and OpenAI's file holds more merges than CLIP uses.
    lines = text.split("\n")[1 : size - 2 * len(BYTES) - 2 + 1]
    merges = [tuple(line.split(" ")) for line in lines if line]
    tokens = [*BYTES, *(c + LAST for c in BYTES), *map("".join, merges), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(paths) == 2:
        vocabulary = json.loads(paths[0].read_text(encoding="utf-8"))
    missing = len(set(tokens) - vocabulary.keys())
    if len(vocabulary) != size or missing:
        raise ValueError(
            f"{shown} has {len(vocabulary)} tokens and lacks {missing} of those it needs, where "
            f"{size} are expected: give CLIP's .txt.gz, or its vocab.json and merges.txt"
        )
    return vocabulary, merges
