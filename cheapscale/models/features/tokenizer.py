"""CLIP's byte-level byte-pair encoding, from a vocabulary file that the user names.

A text is lower-cased, composed (NFC) and cut into words: contractions ('s, 't, 're, 've, 'm, 'll,
'd), runs of letters, single digits, runs of anything else; white space only separates. A word's
UTF-8 bytes are written as 256 printable characters, the last of them marked "</w>", and pairs are
merged in the order of the file. The start and end marks are the two highest numbers.

Two forms of the vocabulary are read: OpenAI's bpe_simple_vocab_16e6.txt.gz, and transformers'
vocab.json with merges.txt. OpenAI's own code also repairs broken Unicode and HTML entities ahead of
all this (`ftfy`, `html.unescape`); give it text that needs no repair.
"""

import functools
import gzip
import json
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cheapscale.models.features.weights import default_paths

SIZE = 49408  # tokens of the published vocabulary
LENGTH = 77
START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class Tokenizer(NamedTuple):
    """Numbers of the tokens, and the rank of each pair that is merged, lowest first."""

    vocabulary: dict[str, int]
    ranks: dict[tuple[str, str], int]

    def __call__(
        self, texts: Sequence[str], length: int = LENGTH, truncate: bool = False
    ) -> np.ndarray:
        """Texts -> int32 [b, length], each between a start and an end mark and filled up with end
        marks (the text tower reads the first one, and nothing behind it).

        Raises ValueError where a text is longer, unless `truncate` cuts it.
        """
        if isinstance(texts, str):
            raise ValueError(f"the tokenizer takes a list of texts, got the one text {texts!r}")
        end = self.vocabulary[END]
        rows = np.full((len(texts), length), end, np.int32)
        for row, text in zip(rows, texts):
            found = self.encode(text)
            if len(found) > length - 2 and not truncate:
                raise ValueError(
                    f"{text!r} has {len(found)} tokens, more than {length - 2}: shorten it, or "
                    "let truncate=True cut it"
                )
            found = [self.vocabulary[START], *found[: length - 2]]
            row[: len(found)] = found
        return rows

    def encode(self, text: str) -> list[int]:
        """The tokens of one text without its marks."""
        tokens = []
        for word in split_words(unicodedata.normalize("NFC", text).lower()):
            if word in (START, END):
                tokens.append(self.vocabulary[word])
                continue
            symbols = [BYTES[byte] for byte in word.encode()]
            symbols[-1] += LAST
            tokens += [self.vocabulary[symbol] for symbol in merge(symbols, self.ranks)]
        return tokens


def load_tokenizer(
    path: str | pathlib.Path | Sequence[str | pathlib.Path] | None = None, *, size: int = SIZE
) -> Tokenizer:
    """The tokenizer of a .txt.gz file, or of a pair (vocab.json, merges.txt).

    Args:
      path: by default what CHEAPSCALE_WEIGHTS_CLIP_TOKENIZER names (a pair joined by "+").
      size: how many tokens there must be: as many as the text tower has embeddings.

    Raises:
      ValueError: no such file, or not a vocabulary of that size.
    """
    path = default_paths("clip_tokenizer") if path is None else path
    paths = [pathlib.Path(p) for p in ([path] if isinstance(path, str | pathlib.Path) else path)]
    for one in paths:
        if not one.is_file():
            raise ValueError(f"no vocabulary file at {one}: download it, then give its path")
    shown = " + ".join(map(str, paths))
    if len(paths) == 1 and paths[0].name.endswith(".gz"):
        merges = _read_merges(gzip.decompress(paths[0].read_bytes()).decode(), size)
        alphabet = [character + mark for mark in ("", LAST) for character in BYTES.values()]
        tokens = [*alphabet, *("".join(pair) for pair in merges), START, END]
        vocabulary = {token: number for number, token in enumerate(tokens)}
    elif len(paths) == 2:
        vocabulary = json.loads(paths[0].read_text(encoding="utf-8"))
        merges = _read_merges(paths[1].read_text(encoding="utf-8"), size)
    else:
        raise ValueError(f"{shown} is no CLIP vocabulary: give a .txt.gz or (vocab.json, merges)")
    needed = [START, END, *(c + mark for c in BYTES.values() for mark in ("", LAST))]
    missing = [token for token in (*needed, *map("".join, merges)) if token not in vocabulary]
    if len(vocabulary) != size or missing:
        raise ValueError(
            f"{shown} has {len(vocabulary)} tokens and lacks {len(missing)} of those it needs, "
            f"where {size} are expected: it is another vocabulary or is damaged"
        )
    return Tokenizer(vocabulary, {pair: rank for rank, pair in enumerate(merges)})


def _read_merges(text: str, size: int) -> list[tuple[str, str]]:
    """Pairs in order; the first line is a header, and OpenAI's file holds more than CLIP uses."""
    lines = text.split("\n")[1 : size - 2 * len(BYTES) - 2 + 1]
    return [(first, second) for first, _, second in (line.partition(" ") for line in lines if line)]


def _byte_characters() -> dict[int, str]:
    """A printable character for each byte, in the order of the vocabulary: printable bytes stand
    for themselves, the others for the characters from number 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


BYTES = _byte_characters()


def split_words(text: str) -> list[str]:
    """Lower-case text -> its words, as described above; the two marks are words too."""
    words, i = [], 0
    while i < len(text):
        kind = _kind(text[i])
        fixed = [w for w in (START, END, *CONTRACTIONS) if text.startswith(w, i)]
        if fixed:
            end = i + len(fixed[0])
        else:
            end = i + 1
            while kind != "number" and end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "space":
            words.append(text[i:end])
        i = end
    return words


@functools.lru_cache(4096)
def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge the pair of lowest rank wherever it occurs, until no pair is in `ranks`."""
    while len(symbols) > 1:
        pair = min(zip(symbols, symbols[1:]), key=lambda p: ranks.get(p, len(ranks)))
        if pair not in ranks:
            break
        merged, i = [], 0
        while i < len(symbols):
            if tuple(symbols[i : i + 2]) == pair:
                merged.append("".join(pair))
                i += 2
            else:
                merged.append(symbols[i])
                i += 1
        symbols = merged
    return symbols
