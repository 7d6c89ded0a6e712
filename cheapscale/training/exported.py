"""Trained networks as single files, and the models that ship with the package.

An exported model is one .safetensors file: the averaged weights in float16 under '/'-joined names,
and the checkpoint's meta as JSON in the header. Every command and config field that takes a work
directory also takes such a file, or the name of a shipped model: `pretrained:scenes64`.

`cheapscale/pretrained/` holds, for each of these, NAME.safetensors and the card NAME.json with its
SHA-256, data, licence, training and figures.
"""

import hashlib
import json
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


def pretrained() -> dict[str, dict]:
    """{name: card} of the models that ship with the package."""
    return {path.stem: read_json(path) for path in sorted(FOLDER.glob("*.json"))}


def model_file(place: str | pathlib.Path) -> pathlib.Path | None:
    """The file of an exported model, from its path or from "pretrained:NAME"; None for a folder.

    Raises ValueError for an unknown name, and for a shipped file that is not the card's.
    """
    if not str(place).startswith(PREFIX):
        return pathlib.Path(place) if str(place).endswith(SUFFIX) else None
    name, known = str(place).removeprefix(PREFIX), pretrained()
    if name not in known:
        names = ", ".join(PREFIX + name for name in known)
        raise ValueError(f"there is no model {str(place)!r}: give one of {names}")
    path = FOLDER / (name + SUFFIX)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != known[name]["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found}; install cheapscale again")
    return path


def write_model(path: str | pathlib.Path, params: PyTree, meta: dict, step: int) -> str:
    """Write the network of one checkpoint; returns the file's SHA-256."""
    flat = {}
    for name, leaf in flatten_dict(params, sep="/").items():
        with np.errstate(over="ignore"):
            flat[name] = np.asarray(leaf, np.float16)
    if bad := [name for name, leaf in flat.items() if not np.isfinite(leaf).all()]:
        raise ValueError(f"{bad[0]} does not fit float16: its largest weight exceeds 65504")
    with atomic_write(path) as temporary:
        # One entry: the order of several in the file would be random.
        header = {"model": json.dumps({"step": step, "meta": meta}, sort_keys=True)}
        safetensors.numpy.save_file(flat, temporary, metadata=header)
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def read_header(path: pathlib.Path) -> tuple[int, dict]:
    """(step, meta) of an exported model; ValueError for another file."""
    try:
        with safetensors.safe_open(path, "np") as file:
            header = json.loads((file.metadata() or {})["model"])
            return header["step"], header["meta"]
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
