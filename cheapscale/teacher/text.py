"""The encoder of captions with which a new teacher begins: one that trains with it, or a published
one, whose weights stay as they are. Either becomes a part of the network and of its checkpoints."""

import re
from typing import Any

import numpy as np

from cheapscale.data.source import Source
from cheapscale.data.tokens import (
    NO_TOKEN,
    tokeniser,
    train_vocabulary,
    vocabulary_size,
    vocabulary_tokens,
)
from cheapscale.features.text_encoders import load_text_encoder
from cheapscale.models.text import TextConfig

MOST_READ = 10_000  # images whose captions make the vocabulary
HEAD = 32  # channels of a head of the encoder that trains


def text_fields(settings: Any, source: Source) -> tuple[dict, dict]:
    """({field of the U-Net: value}, {"text": published weights} or {}); without captions both are
    empty.

    The labels of `source` become the token numbers of its captions. settings: config.text. Raises
    ValueError for images without captions and for unfit files.
    """
    if not settings.encoder:
        return {}, {}
    params = {}
    if settings.encoder == "transformer":
        fields = _new_encoder(settings, source)
    else:
        encoder = load_text_encoder(settings.encoder, settings.files, settings.tokens)
        fields, params = encoder.fields, {"text": encoder.params}
    source.use_captions(fields["tokenizer"], fields["length"])
    return {"text": fields, "caption_dim": fields["width"], "num_classes": 0}, params


def tokenise(text: TextConfig, captions: list[str]) -> np.ndarray:
    """Token numbers int32 [n, length] of captions, by a network's own vocabulary.

    Raises ValueError for the name of a learned embedding, <name>, that the vocabulary lacks.
    """
    tokens = tokeniser(text.tokenizer, text.length, null=text.pad == NO_TOKEN)
    if text.pad != NO_TOKEN:  # of a published network, for which people share embeddings
        known = vocabulary_tokens(text.tokenizer)
        for name in re.findall(r"<[^<>\s]+>", " ".join(captions)):
            if name not in known:
                raise ValueError(
                    f"the prompt names the embedding {name}, which this model's vocabulary lacks: "
                    "describe it in words"
                )
    return tokens(captions)


def _new_encoder(settings: Any, source: Source) -> dict[str, Any]:
    """The fields of a small transformer, with a vocabulary of the captions of the first images."""
    if settings.files:
        raise ValueError(
            f"text.files is {settings.files!r}, but the encoder transformer has no files: leave it "
            "out, or give --config.text.encoder=clip"
        )
    if settings.width % HEAD:
        raise ValueError(
            f"text.width is {settings.width}: give a multiple of {HEAD}, the width of a head"
        )
    read = range(min(len(source), MOST_READ))
    captions = (caption for i in read for caption in source.captions(i))
    vocabulary = train_vocabulary(captions, settings.vocabulary)
    return {
        "kind": "transformer", "vocab": vocabulary_size(vocabulary), "length": settings.tokens,
        "width": settings.width, "depth": settings.depth, "heads": settings.width // HEAD,
        "mlp": 4 * settings.width, "tokenizer": vocabulary,
    }  # fmt: skip
