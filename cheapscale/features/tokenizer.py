"""Vocabularies of published encoders of text, from files that the user names.

Most are a tokenizer.json. CLIP's may also be OpenAI's bpe_simple_vocab_16e6.txt.gz, or
transformers' vocab.json with merges.txt; its tokens are pairs of bytes. A text is composed (NFC),
lower-cased and cut into words: contractions ('s, 't, 're, 've, 'm, 'll, 'd), runs of letters,
single digits, runs of other characters. White space only separates words. The last byte of a word
is marked "</w>". The start and end marks have the two highest numbers. OpenAI's code first repairs
broken Unicode and HTML entities (`ftfy`, `html.unescape`); this one does not, so the text must not
need repair.
"""

import gzip
import json
import pathlib

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from cheapscale.features.weights import Paths, default_paths, named_files

SIZE = 49408  # tokens of the published vocabulary
LENGTH = 77  # of CLIP's text tower
START, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each byte


def read_vocabulary(path: Paths | None = None, *, size: int = SIZE) -> str:
    """The vocabulary as `data.tokens.tokeniser` takes it, with marks around each text.

    path: a tokenizer.json, CLIP's .txt.gz file, or the pair (vocab.json, merges.txt), as a sequence
    or joined by "+"; by default the value of CHEAPSCALE_WEIGHTS_CLIP_TOKENIZER. size: the number of
    tokens of CLIP's files. Raises ValueError for files that are none of these.
    """
    paths = default_paths("clip_tokenizer")[0] if path is None else named_files(path)
    shown = " + ".join(map(str, paths))
    if not all(path.is_file() for path in paths):
        raise ValueError(f"no vocabulary file at {shown}: download it, then give its path")
    if len(paths) == 1 and paths[0].suffix == ".json":
        try:
            return tokenizers.Tokenizer.from_file(str(paths[0])).to_str()
        except Exception as error:  # tokenizers raises the bare Exception
            raise ValueError(
                f"{paths[0]} is no tokenizer.json of tokenizers ({error}): give the one that "
                "belongs to the weights"
            ) from error
    vocabulary, merges = _read(paths, shown, size)
    model = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=LAST))
    model.add_special_tokens([START, END])
    model.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    marks = [(mark, vocabulary[mark]) for mark in (START, END)]
    model.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=marks
    )
    return model.to_str()


def _read(
    paths: list[pathlib.Path], shown: str, size: int
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Number of each token, and the pairs in the order in which they are merged."""
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
