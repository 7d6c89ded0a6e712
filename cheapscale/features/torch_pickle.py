"""A pickle of tensors as plain values; nothing that the pickle names is imported or called.

`Machine` builds dicts, lists, numbers, texts and descriptions of tensors, and lists the other
classes and functions that the pickle asks for. What a pickle of `MOST` bytes becomes takes less
than 1 GB and half a minute, whatever it says.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  gives NumPy the types bfloat16 and float8
import numpy as np

MOST = 1 << 23  # bytes of a pickle; one of 50,000 tensors is shorter
LONGEST = 256  # characters of a name
READER: Any = pickle._Unpickler  # that in C allocates what a file only claims
KINDS = {
    f"torch.{name}": np.dtype(name)
    for name in "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool "
    "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
}
STORAGES = {
    f"torch.{name}Storage": KINDS[f"torch.{kind}"]
    for name, kind in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
        "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
        "Bool": "bool",
    }.items()
}  # fmt: skip
STORAGES["torch.storage.UntypedStorage"] = np.dtype(np.uint8)


class Storage(NamedTuple):
    """Numbers that tensors point into. start: in elements; only views in old files begin late."""

    key: str
    dtype: np.dtype
    start: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Object:
    """What a pickle would have made with a class or function that is not known here."""

    def __init__(self, name: str):
        self.name, self.state = name, None


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *rest: Any) -> Tensor:
    sizes = (offset, *shape, *strides)
    if isinstance(storage, Object):  # the file will be refused, by the name of this object
        storage = Storage("", KINDS["torch.uint8"], 0)
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"a tensor of {storage} with offset, shape and strides {sizes}")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _tensor_of_kind(storage, offset, shape, strides, grad, hooks, kind, *rest) -> Tensor:
    return _tensor(storage._replace(dtype=KINDS[kind.name]), offset, shape, strides)


def put(target: dict, items: list) -> dict:
    """`target` with the items key, value, key, value ..."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Deeply nested tuples would overflow the C stack when they are hashed.
        if not isinstance(key, str | int | float | bytes | None) or len(str(key)) > LONGEST:
            raise ValueError(f"a dict with a long name or a key that is a {type(key).__name__}")
        target[key] = value
    return target


CALLS: dict[str, Callable] = {
    "collections.OrderedDict": lambda pairs=(): put({}, [x for k, v in pairs for x in (k, v)]),
    "collections.defaultdict": lambda *default: {},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_kind,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch.Size": lambda shape=(): tuple(shape),
    "torch.device": lambda *which: ":".join(map(str, which)),
    "collections.Counter": lambda counts=(): dict(counts),
    "__builtin__.set": lambda items=(): list(items),
    "_codecs.encode": lambda text, encoding: text.encode("latin-1"),
}
# What a defaultdict may begin with.
CALLS |= {f"__builtin__.{name}": lambda *value: None for name in "dict list int float".split()}
# Attributes of scripts: lists of a declared type.
CALLS |= {
    f"torch.jit._pickle.{name}": lambda value, *rest: value
    for name in "build_intlist build_doublelist build_boollist build_tensorlist "
    "restore_type_tag".split()
}


class Named(NamedTuple):
    """A class or function that a pickle names; `make` stands in for it."""

    name: str
    make: Callable

    def __call__(self, *arguments: Any) -> Any:
        return self.make(self.name, arguments)


class Machine(READER):
    """Reads one pickle.

    script: whether it is of a compiled module, whose own classes become `Object`s.
    foreign: the names that the pickle holds beside those of tensors. dtypes: of storages by key.
    """

    dispatch = dict(READER.dispatch)

    def __init__(self, stream: io.BytesIO, script: bool = False):
        super().__init__(stream)
        self.script, self.foreign, self.dtypes, self.copied = script, [], {}, 0

    def find_class(self, module: str, name: str) -> Named:
        name = f"{module}.{name}"
        known = name in CALLS or name in STORAGES or name in KINDS
        if not known and not (self.script and name.startswith("__torch__.")):
            self.foreign.append(name)
        return Named(name, self._call)

    def _call(self, name: str, arguments: tuple) -> Any:
        if name not in CALLS:
            return Object(name)
        # One long list that is copied again and again would take all memory.
        self.copied += sum(len(a) for a in arguments if isinstance(a, str | list | tuple | dict))
        if self.copied > MOST:
            raise ValueError("a pickle that copies its lists again and again")
        return CALLS[name](*arguments)

    def persistent_load(self, reference: tuple) -> Storage:
        kind, named, key, _, _, *view = reference
        if kind != "storage":
            raise ValueError(f"a reference to {kind!r}")
        # An unknown type, such as complex numbers, is in `foreign`.
        self.dtypes[str(key)] = dtype = STORAGES.get(named.name, np.dtype(np.uint8))
        return Storage(str(key), dtype, view[0][1] if view and view[0] else 0)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        put(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        put(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(put({}, items))

    def load_build(self) -> None:  # of a dict: the versions of a state dict's modules
        state = self.stack.pop()
        if isinstance(self.stack[-1], Object):
            self.stack[-1].state = state

    # Sets are lists, whose members are not hashed; an object is made as a function is called.
    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: READER.load_reduce,
        pickle.EMPTY_SET[0]: READER.load_empty_list,
        pickle.ADDITEMS[0]: READER.load_appends,
        pickle.FROZENSET[0]: READER.load_list,
    }
    del dispatch[pickle.BYTEARRAY8[0]]  # allocates before it reads
