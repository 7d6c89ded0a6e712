"""Reading weight files: .npz, .safetensors, and PyTorch's .pth, .pt, .th and .bin.

Every reader returns {name: NumPy array}; networks take what they need by name and shape, so a file
of another network is refused with the first thing that is wrong, before anything compiles.
"""

import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PREFIX = "CHEAPSCALE_WEIGHTS_"
TORCH_SUFFIXES = (".pth", ".pt", ".th", ".bin")
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


class Weights(NamedTuple):
    """Arrays by name, where they came from, and the hash of the file (hashes joined by "+" for
    several files)."""

    arrays: dict[str, np.ndarray]
    path: str
    sha256: str

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The array as float32; -1 in `shape` stands for any length."""
        if name not in self.arrays:
            raise ValueError(
                f"{self.path} has no weight {name!r}: it is not a file of this network"
            )
        array = self.arrays[name]
        fits = array.ndim == len(shape) and all(w in (-1, n) for w, n in zip(shape, array.shape))
        if not fits:
            wanted = ", ".join("any" if n < 0 else str(n) for n in shape)
            raise ValueError(
                f"{self.path}: weight {name!r} has shape {array.shape} where this network "
                f"has ({wanted}): it is a file of another network"
            )
        return np.asarray(array, np.float32)


def default_paths(name: str) -> list[pathlib.Path]:
    """The files of network `name` in the environment, CHEAPSCALE_WEIGHTS_<NAME>, several joined
    by "+"; raises ValueError where it is not set."""
    variable = PREFIX + name.upper()
    if not os.environ.get(variable):
        raise ValueError(
            f"no weight file is given for {name!r}: pass its path, or set {variable} to it"
        )
    return named_files(os.environ[variable])


def named_files(
    path: str | pathlib.Path | Sequence[str | pathlib.Path],
) -> list[pathlib.Path]:
    """The files that `path` names: one, a sequence, or a string of several joined by "+".

    A "+" in the name of a file that exists is part of the name.
    """
    if not isinstance(path, str):
        return [path] if isinstance(path, pathlib.Path) else [pathlib.Path(one) for one in path]
    parts = [pathlib.Path(part) for part in path.split("+")]
    # One that is there is enough: what is refused then is the missing one, by its own name.
    joined = not pathlib.Path(path).is_file() and any(part.is_file() for part in parts)
    return parts if joined else [pathlib.Path(path)]


def read_weights(
    path: str | pathlib.Path | Sequence[str | pathlib.Path], sha256: str | None = None
) -> Weights:
    """Read one weight file, or several (see `named_files`) whose names are merged, checking the
    hash where given."""
    paths = named_files(path)
    arrays, hashes = {}, []
    for one in paths:
        if not one.is_file():
            raise ValueError(f"no weight file at {one}: download it, then give its path")
        hashes.append(hashlib.sha256(one.read_bytes()).hexdigest())
    shown, found = " + ".join(map(str, paths)), "+".join(hashes)
    if sha256 and sha256.lower() != found:
        raise ValueError(
            f"{shown} has SHA-256 {found} but {sha256} was asked for: it is another version or "
            "is damaged"
        )
    for one in paths:
        arrays |= _read(one)
    return Weights(arrays, shown, found)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except (ValueError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no .npz file of arrays ({error}): save it anew") from error
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise ValueError(
        f"{path} ends in {path.suffix!r}: give .npz, .safetensors or one of {TORCH_SUFFIXES}"
    )


def read_safetensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """A .safetensors file: 8 bytes of header length, a JSON header, raw little-endian arrays."""
    raw = pathlib.Path(path).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + size])
        arrays = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            array = np.frombuffer(raw[begin:end], DTYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                array = (array.astype(np.uint32) << 16).view(np.float32)
            arrays[name] = array.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error!r}") from error
    return arrays


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
