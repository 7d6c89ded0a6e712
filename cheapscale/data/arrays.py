"""NumPy's files (.npz, .npy), read without trust: nothing is allocated that a file only claims."""

import os
import pathlib
import zipfile
from typing import Any

import numpy as np
from numpy.lib import format as npy

RATIO = 1100  # no entry of a zip is more times smaller than its content (1032 in DEFLATE)
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """{name: array} of an .npz file, or {"": array} of an .npy file.

    Raises ValueError that names the file if it is no such file, is damaged, or holds Python
    objects, which are not run.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: correct its name")
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return {"": _read_array(file, path.stat().st_size)}
        with zipfile.ZipFile(path) as stored:
            arrays = {}
            for entry in stored.infolist():
                if entry.file_size > RATIO * entry.compress_size + RATIO:
                    raise ValueError(f"{entry.filename} claims {entry.file_size} bytes")
                with stored.open(entry) as file:
                    arrays[entry.filename.removesuffix(".npy")] = _read_array(file, entry.file_size)
            return arrays
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds for damaged files
        raise ValueError(
            f"{path} is not a whole file of NumPy arrays ({error}): write or download it again"
        ) from error


def _read_array(file: Any, size: int) -> np.ndarray:
    """The array of an .npy stream of `size` bytes; ValueError if its header claims more."""
    version = npy.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"its version is {version}")
    shape, fortran, dtype = HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects: save its numbers alone with np.savez")
    content = file.read(size)
    count = int(np.prod(shape, dtype=object))
    if count < 0 or count * dtype.itemsize > len(content):
        raise ValueError(f"an array of shape {shape} does not fit into {len(content)} bytes")
    array = np.frombuffer(content, dtype, count) if count else np.zeros(0, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
