"""The tensors of a PyTorch file, read without PyTorch and without running its pickle.

A file holds a pickle and the raw numbers of the storages that its tensors point into:

    zip     <any>/data.pkl, <any>/byteorder, and one stored entry <any>/data/<key> per storage
    script  a zip with <any>/constants.pkl: data.pkl describes a module with its attributes
    legacy  five pickles (a magic number, the protocol, the machine, the object, the storages'
            keys), then per key an int64 count and the numbers

The arrays are views into the file, so that nothing is allocated for what a file only claims, and
the state of an optimiser costs no memory.
"""

import io
import json
import math
import pathlib
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cheapscale.features.torch_pickle import MOST, Machine, Object, Tensor

MAGIC = 0x1950A86A20F9469CFC6C
DEEPEST = 32  # levels of dicts in dicts
EXPANDED = 1 << 16  # elements of a tensor that repeats fewer numbers (torch.Tensor.expand)
# Nothing but the tensors of an object: of its dicts, lists and modules, dense and not quantised.
PLAIN = (
    "g = lambda v: (v.dequantize() if v.is_quantized else v.to_dense()) if torch.is_tensor(v) else "
    'g(v.state_dict()) if hasattr(v, "state_dict") else {str(k): x for k, w in v.items() if '
    "torch.is_tensor(x := g(w)) or x} if isinstance(v, dict) else "
    "g(dict(enumerate(v))) if isinstance(v, (list, tuple)) else {}"
)
Groups = dict[str, dict[str, np.ndarray]]


class Refused(ValueError):
    """The file is whole, but holds something else than tensors."""


def read_torch(path: pathlib.Path) -> Groups:
    """The arrays of a PyTorch file by the dotted path of their dict and by their name in it: {"":
    {"conv.weight": ...}} for a plain state dict, {"model": ..., "ema": ...} for several.

    Raises Refused where the pickle holds anything but tensors, numbers and texts, and many other
    errors where the file is damaged.
    """
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    return (_read_zip if bytes(data[:2]) == b"PK" else _read_legacy)(path, data)


def _read_zip(path: pathlib.Path, data: np.ndarray) -> Groups:
    with zipfile.ZipFile(path) as stored:
        entries = {entry.filename: entry for entry in stored.infolist()}
    root = next((n for n in entries if n.split("/")[1:] == ["data.pkl"]), "")[: -len("data.pkl")]
    if not root:
        raise Refused(f"{path} is a zip without PyTorch's data.pkl: give a file of torch.save")

    def content(name: str) -> np.ndarray:
        """A view of an entry's bytes. The checksum is 0 where PyTorch was told to leave it out."""
        entry = entries[root + name]
        header = data[entry.header_offset :][:30]
        start = entry.header_offset + 30 + int(header[26:30].view("<u2").sum())
        found = data[start : start + entry.file_size]
        if entry.compress_type != zipfile.ZIP_STORED or len(found) < entry.file_size:
            raise ValueError(f"its entry {name} is compressed or cut")
        if entry.CRC not in (0, zlib.crc32(found)):
            raise ValueError(f"its entry {name} has another checksum")
        return found

    if root + "byteorder" in entries and bytes(content("byteorder")) != b"little":
        raise Refused(f"{path} comes from a big-endian machine: save it on a little-endian one")
    stream = io.BytesIO(content("data.pkl")[:MOST])
    machine = Machine(stream, script=root + "constants.pkl" in entries)
    tree = _checked(path, machine, stream)
    groups = _groups(tree, lambda key: content(f"data/{key}"), len(data))
    if machine.script:  # one module: its attributes have the names of its state dict
        flat = {f"{g}.{n}".lstrip("."): a for g, group in groups.items() for n, a in group.items()}
        return {"": flat}
    return groups


def _read_legacy(path: pathlib.Path, data: np.ndarray) -> Groups:
    stream = io.BytesIO(data[: 2 * MOST])
    if _checked(path, Machine(stream), stream, 'pickle.load(open({}, "rb"))') != MAGIC:
        raise Refused(f"{path} is a pickle, but not of torch.save: give a file of torch.save")
    Machine(stream).load()
    if not Machine(stream).load()["little_endian"]:
        raise Refused(f"{path} comes from a big-endian machine: save it on a little-endian one")
    machine = Machine(stream)
    tree = _checked(path, machine, stream)
    keys, storages = Machine(stream).load(), {}
    position = stream.tell()
    for key in keys:
        size = int(data[position : position + 8].view("<i8")[0]) * machine.dtypes[key].itemsize
        storages[key] = data[position + 8 : position + 8 + size]
        if len(storages[key]) < size:
            raise ValueError(f"its storage {key} is cut")
        position += 8 + size
    return _groups(tree, storages.__getitem__, len(data))


def _checked(
    path: pathlib.Path,
    machine: Machine,
    stream: io.BytesIO,
    load: str = "torch.load({}, weights_only=False)",
) -> Any:
    """The object of the next pickle; Refused where it holds classes or functions."""
    try:
        tree = machine.load()
    except Exception:
        if not machine.foreign and stream.tell() < MOST:
            raise
        machine.foreign = machine.foreign or [f"a pickle of more than {MOST >> 20} MB"]
    if machine.foreign:
        names = list(dict.fromkeys(machine.foreign))
        if any(name.startswith("torch.Complex") for name in names):
            raise Refused(f"{path} holds complex numbers: give the file of a network without them")
        if any("meta_tensor" in name for name in names):
            raise Refused(f"{path} holds shapes without numbers: save the network with its weights")
        remedy = f"if you trust it, save the weights alone: {_resave(path, load)}"
        if own := next((name for name in names if name.startswith("__main__.")), ""):
            remedy = f"save model.state_dict() in the program that defines {own}, and give that"
        raise Refused(
            f"{path} holds {', '.join(names[:3])} beside plain tensors, which would need its own "
            f"code: {remedy}"
        )
    return tree


def _resave(path: pathlib.Path, load: str) -> str:
    """A command that saves the tensors of a file whose pickle names other classes."""
    name, new = json.dumps(str(path)), json.dumps(f"{path.with_suffix('')}-weights.pt")
    code = f"import torch, pickle; {PLAIN}; torch.save(g({load.format(name)}), {new})"
    return f"python -c {shlex.quote(code)}"


def _groups(tree: Any, fetch: Callable[[str], np.ndarray], size: int) -> Groups:
    """`read_torch`'s result from the object of a pickle.

    fetch: the bytes of a storage by its key. size: bytes of the file.
    """
    storages: dict[str, np.ndarray] = {}

    def array(tensor: Tensor) -> np.ndarray:
        nonlocal size
        key = tensor.storage.key
        if key not in storages:
            storages[key] = fetch(key)
            size -= len(storages[key])
            if size < 0:
                raise ValueError("its storages lie on top of each other")
        return _array(tensor, storages[key])

    return {
        path: {name: array(tensor) for name, tensor in tensors.items()}
        for path, tensors in _tensors(tree)
    }


def _tensors(tree: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(dotted path, {name: tensor}) of every dict, list and object that holds tensors, once."""
    seen, nodes = set(), [("", tree, 0)]
    for path, node, depth in nodes:  # grows on the way
        if id(node) in seen:
            continue
        seen.add(id(node))
        if depth > DEEPEST:
            raise ValueError(f"it holds more than {DEEPEST} dicts in each other")
        node = node.state if isinstance(node, Object) else node
        node = dict(enumerate(node)) if isinstance(node, list | tuple) else node
        node = node if isinstance(node, dict) else {}
        tensors = {str(name): v for name, v in node.items() if isinstance(v, Tensor)}
        if tensors:
            yield path, tensors
        for name, value in node.items():
            if isinstance(value, dict | list | tuple | Object) and not isinstance(value, Tensor):
                nodes.append((f"{path}.{name}" if path else str(name), value, depth + 1))


def _array(tensor: Tensor, stored: np.ndarray) -> np.ndarray:
    """The view of a storage's bytes that a tensor describes; ValueError where it does not fit."""
    kind, shape = tensor.storage.dtype, tensor.shape
    if 0 in shape:
        return np.zeros(shape, kind)
    count = len(stored) // kind.itemsize
    first = tensor.storage.start + tensor.offset
    last = first + sum((n - 1) * stride for n, stride in zip(shape, tensor.strides, strict=True))
    if not 0 <= first <= last < count or math.prod(shape) > max(count, EXPANDED):
        raise ValueError(f"a tensor of shape {shape} does not fit into its {count} numbers")
    strides = [stride * kind.itemsize for stride in tensor.strides]
    return np.ndarray(shape, kind, stored.data, first * kind.itemsize, strides)
