"""Weight files as {name: NumPy array}: .npz, .safetensors, and PyTorch's .pth, .pt, .th and .bin.

A network reads its arrays by name and shape, so that the file of another network is refused before
anything compiles.
"""

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import safetensors.numpy

TORCH_SUFFIXES = (".pth", ".pt", ".th", ".bin")
Paths = str | pathlib.Path | Sequence[str | pathlib.Path]


class Weights(NamedTuple):
    """Arrays by name, the path they came from, and the SHA-256 of the file (several files: their
    hashes joined by "+")."""

    arrays: dict[str, np.ndarray]
    path: str
    sha256: str

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The array `name` as float32; -1 in `shape` stands for any length.

        Raises ValueError where the array is missing or has another shape.
        """
        if name not in self.arrays:
            raise ValueError(
                f"{self.path} has no weight {name!r}: it is not a file of this network"
            )
        found = self.arrays[name].shape
        if len(found) != len(shape) or any(n not in (-1, m) for n, m in zip(shape, found)):
            wanted = str(shape).replace("-1", "any")
            raise ValueError(
                f"{self.path}: weight {name!r} has shape {found} where this network has {wanted}: "
                "it is a file of another network"
            )
        return np.asarray(self.arrays[name], np.float32)


def default_paths(name: str) -> list[pathlib.Path]:
    """The files that the environment variable CHEAPSCALE_WEIGHTS_<NAME> names."""
    variable = "CHEAPSCALE_WEIGHTS_" + name.upper()
    if not os.environ.get(variable):
        raise ValueError(
            f"no weight file is given for {name!r}: pass its path, or set {variable} to it"
        )
    return named_files(os.environ[variable])


def named_files(path: Paths) -> list[pathlib.Path]:
    """The files that `path` names: one, a sequence, or a string of several joined by "+".

    A "+" in the name of a file that exists is part of the name.
    """
    if isinstance(path, pathlib.Path) or (isinstance(path, str) and pathlib.Path(path).is_file()):
        return [pathlib.Path(path)]
    if not isinstance(path, str):
        return [pathlib.Path(part) for part in path]
    parts = [pathlib.Path(part) for part in path.split("+")]
    # One existing part is enough: the error then names the part that is missing.
    return parts if any(part.is_file() for part in parts) else [pathlib.Path(path)]


def read_weights(path: Paths, sha256: str | None = None) -> Weights:
    """The arrays of one weight file, or of several (see `named_files`) together.

    Raises ValueError where a file is missing, unreadable, or has another hash than `sha256`.
    """
    paths = named_files(path)
    for one in paths:
        if not one.is_file():
            raise ValueError(f"no weight file at {one}: download it, then give its path")
    shown = " + ".join(map(str, paths))
    found = "+".join(hashlib.sha256(one.read_bytes()).hexdigest() for one in paths)
    if sha256 and sha256.lower() != found:
        raise ValueError(
            f"{shown} has SHA-256 {found} but {sha256} was asked for: it is another version or "
            "is damaged"
        )
    arrays = {}
    for one in paths:
        arrays |= _read(one)
    return Weights(arrays, shown, found)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(
            f"{path} ends in {path.suffix!r}: give .npz, .safetensors or one of {TORCH_SUFFIXES}"
        )
    try:
        if path.suffix == ".safetensors":
            found = safetensors.numpy.load_file(path)
            # NumPy itself has no bfloat16 arithmetic.
            halves = {k: v.astype(np.float32) for k, v in found.items() if v.dtype == "bfloat16"}
            return found | halves
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (ValueError, TypeError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path} is not a whole {path.suffix} file of arrays ({error}): copy or save it again"
        ) from error


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file and torch is not installed: install torch, or convert the "
            "file to .safetensors or .npz"
        ) from error
    if _is_torchscript(path):
        stored = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        if isinstance(stored.get(wrapper), dict):
            stored = stored[wrapper]
    return {k: v.float().numpy() for k, v in stored.items() if isinstance(v, torch.Tensor)}


def _is_torchscript(path: pathlib.Path) -> bool:
    """Whether a PyTorch file is a compiled module, as OpenAI's CLIP files are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as stored:
        return any(name.endswith("/constants.pkl") for name in stored.namelist())
