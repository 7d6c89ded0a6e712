"""Captions as token numbers, by a vocabulary that is stored as the JSON text of `tokenizers`."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tokenizers
from absl import logging
from tokenizers import models, normalizers, pre_tokenizers, trainers

NO_TOKEN = -1
Tokenise = Callable[[Sequence[str]], np.ndarray]


def train_vocabulary(captions: Iterable[str], size: int) -> str:
    """A vocabulary of at most `size` tokens of the captions: byte pairs of lower-case text.

    All bytes are tokens, so that any text has token numbers. Few captions give a smaller one.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE())
    model.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    return model.to_str()


def vocabulary_size(vocabulary: str) -> int:
    """The number of tokens, special ones too."""
    return tokenizers.Tokenizer.from_str(vocabulary).get_vocab_size()


def vocabulary_tokens(vocabulary: str) -> set[str]:
    """The tokens, special ones too."""
    return set(tokenizers.Tokenizer.from_str(vocabulary).get_vocab())


def tokeniser(vocabulary: str, length: int, null: bool = True) -> Tokenise:
    """The function tokenise(captions) -> int32 [n, length], rows that end in -1 where captions are
    shorter. Longer captions are cut, with a warning. null: the empty caption is -1 alone; otherwise
    it has the marks that the vocabulary gives to every caption."""
    model = tokenizers.Tokenizer.from_str(vocabulary)
    model.no_padding()
    model.enable_truncation(length)

    def tokenise(captions: Sequence[str]) -> np.ndarray:
        rows = np.full((len(captions), length), NO_TOKEN, np.int32)
        for row, caption in zip(rows, captions):
            if null and not caption.strip():
                continue
            found = model.encode(caption)
            row[: len(found.ids)] = found.ids
            if found.overflowing:
                kept = max(end for _, end in found.offsets)
                logging.log_first_n(
                    logging.WARNING,
                    "a caption has more than %d tokens: the model sees %r of %r; shorten it, or "
                    "train with a larger --config.text.tokens",
                    10, length, caption[:kept], caption[: kept + 40],
                )  # fmt: skip
        return rows

    return tokenise
