"""Trained networks as single files, and the models that ship with the package.

An exported model is one .safetensors file: the averaged weights in float16 under '/'-joined names,
and the checkpoint's meta as JSON in the header. Every command and config field that takes a work
directory also takes such a file, or the name of a shipped model: `pretrained:scenes64`.

`cheapscale/pretrained/` holds, for each of these, NAME.safetensors and the card NAME.json with its
SHA-256, data, licence, training and figures.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from cheapscale.data.files import atomic_write, read_json

PyTree = Any

PREFIX, SUFFIX = "pretrained:", ".safetensors"
FOLDER = pathlib.Path(__file__).parent.parent / "pretrained"
# The fields of a config that name a place, which may be spelled in another way or moved.
PLACES = ("teacher", "latents", "samples", "start", "base", "experts", "cascade.init_from")


class NoModel(ValueError):
    """There is no shipped model of this name; the text has one line for each that there is."""


def pretrained() -> dict[str, dict]:
    """{name: card} of the models that ship with the package."""
    cards = sorted(FOLDER.glob("*.json"))
    return {card.stem: read_json(card) for card in cards if card.with_suffix(SUFFIX).is_file()}


def listing(cards: dict[str, dict]) -> str:
    """One line for each shipped model: its name, and what it is."""
    return "\n".join(
        f"  {PREFIX + name:<28}{card['model']}, {card['resolution']} px, "
        f"{card['data']['name']}, {card['bytes'] / 1e6:.1f} MB"
        for name, card in cards.items()
    )


def model_file(place: str | pathlib.Path) -> pathlib.Path | None:
    """The file of an exported model, from its path or from "pretrained:NAME"; None for a folder.

    Raises NoModel for an unknown name, ValueError for a shipped file that is not the card's.
    """
    if not str(place).startswith(PREFIX):
        path = pathlib.Path(place)
        return path if path.suffix == SUFFIX and not path.is_dir() else None
    name, known = str(place).removeprefix(PREFIX), pretrained()
    if name not in known:
        text = f"there is no model {str(place)!r}: give a work directory, a file of launch.export"
        raise NoModel(f"{text}, or one of\n{listing(known)}" if known else text)
    path = FOLDER / (name + SUFFIX)
    if sha256_of(path) != known[name]["sha256"]:
        raise ValueError(f"{path} is not the file of its card: install cheapscale again")
    return path


def sha256_of(path: str | pathlib.Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(config: dict) -> dict[str, str]:
    """{field: SHA-256} of the exported models that the places of a config name."""
    words = flatten_dict(config, sep=".")
    found = {name: model_file(words[name]) for name in ("model", *PLACES) if words.get(name)}
    return {name: sha256_of(file) for name, file in found.items() if file}


def rounded(params: PyTree) -> PyTree:
    """The weights as a file holds them: float16; ValueError if one does not fit."""
    with np.errstate(over="ignore"):
        flat = {k: np.asarray(v, np.float16) for k, v in flatten_dict(params, sep="/").items()}
    if bad := [name for name, leaf in flat.items() if not np.isfinite(leaf).all()]:
        raise ValueError(f"{bad[0]} does not fit float16: its largest weight exceeds 65504")
    return unflatten_dict(flat, sep="/")


def portable(value: Any) -> Any:
    """The JSON value without the absolute paths of this machine."""
    if isinstance(value, dict):
        return {name: portable(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(entry) for entry in value]
    return "" if isinstance(value, str) and os.path.isabs(value) else value


def write_model(path: str | pathlib.Path, params: PyTree, meta: dict, step: int) -> str:
    """Write the network of one checkpoint; returns the file's SHA-256."""
    flat = flatten_dict(rounded(params), sep="/")
    with atomic_write(path) as temporary:
        # One entry: the order of several in the file would be random.
        header = {"model": json.dumps({"step": step, "meta": portable(meta)}, sort_keys=True)}
        temporary.write_bytes(safetensors.numpy.save(flat, header))
    return sha256_of(path)


def read_header(path: pathlib.Path) -> tuple[int, dict]:
    """(step, meta) of an exported model, whose meta["exported"] has the SHA-256 of the file;
    ValueError for another file."""
    try:
        with safetensors.safe_open(path, "np") as file:
            header = json.loads((file.metadata() or {})["model"])
        exported = header["meta"].get("exported", {}) | {"sha256": sha256_of(path)}
        return header["step"], header["meta"] | {"exported": exported}
    except FileNotFoundError:
        raise FileNotFoundError(f"no model at {path}: give a file of launch.export") from None
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no exported model ({error}): give a file of launch.export"
        ) from error


def read_model(path: pathlib.Path) -> PyTree:
    """The weights of an exported model as nested float32 arrays."""
    flat = safetensors.numpy.load_file(path)
    return unflatten_dict({k: v.astype(np.float32) for k, v in flat.items()}, sep="/")
