"""A pickle of tensors as plain values; nothing that the pickle names is imported or called.

`Machine` follows the opcodes itself. It builds dicts, lists, numbers, texts and descriptions of
tensors, and lists the other classes and functions that the pickle asks for. What a pickle of
`MOST` bytes becomes takes less than 1 GB and half a minute, whatever it says.
"""

import io
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  gives NumPy the types bfloat16 and float8
import numpy as np

MOST = 1 << 23  # bytes of a pickle; one of 50,000 tensors is shorter
LONGEST = 256  # characters of a name
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


class Named(NamedTuple):
    """A class or function that a pickle names."""

    name: str


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
MAKE = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list,
}  # fmt: skip
LITERALS = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)


class Machine:
    """Follows one pickle.

    script: whether it is of a compiled module, whose own classes become `Object`s.
    foreign: the names that the pickle holds beside those of tensors. dtypes: of storages by key.
    """

    def __init__(self, script: bool = False):
        self.stack, self.marks, self.memo = [], [], {}
        self.script, self.foreign, self.dtypes, self.copied = script, [], {}, 0

    def run(self, stream: io.BytesIO) -> Any:
        """The object of the pickle at the stream's position, which is at its end then.

        Raises ValueError and many other errors where the pickle is damaged.
        """
        for code, argument, _ in pickletools.genops(stream):
            self._step(code.name, argument)
        return self.stack.pop()

    def _since_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _name(self, name: str) -> Named:
        known = name in CALLS or name in STORAGES or name in KINDS
        if not known and not (self.script and name.startswith("__torch__.")):
            self.foreign.append(name)
        return Named(name)

    def _call(self, named: Named, arguments: tuple) -> Any:
        if named.name not in CALLS:
            return Object(named.name)
        # One long list that is copied again and again would take all memory.
        self.copied += sum(len(a) for a in arguments if isinstance(a, str | list | tuple | dict))
        if self.copied > MOST:
            raise ValueError("a pickle that copies its lists again and again")
        return CALLS[named.name](*arguments)

    def _storage(self, reference: tuple) -> Storage:
        kind, named, key, _, _, *view = reference
        if kind != "storage":
            raise ValueError(f"a reference to {kind!r}")
        # An unknown type, such as complex numbers, is in `foreign`.
        self.dtypes[str(key)] = dtype = STORAGES.get(named.name, np.dtype(np.uint8))
        return Storage(str(key), dtype, view[0][1] if view and view[0] else 0)

    def _step(self, code: str, argument: Any) -> None:
        stack = self.stack
        match code:
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                stack.pop()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[-int(code[-1]) :] = [tuple(stack[-int(code[-1]) :])]
            case "LIST" | "FROZENSET":
                stack.append(self._since_mark())
            case "DICT":
                stack.append(put({}, self._since_mark()))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS" | "ADDITEMS":
                values = self._since_mark()
                stack[-1].extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                put(stack[-1], [key, value])
            case "SETITEMS":
                items = self._since_mark()
                put(stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self._name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._name(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                arguments, named = stack.pop(), stack.pop()
                stack.append(self._call(named, arguments))
            case "BUILD":  # of a dict: the versions of a state dict's modules
                state = stack.pop()
                if isinstance(stack[-1], Object):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if code in MAKE:
                stack.append(MAKE[code]())
            case _ if code in LITERALS:
                stack.append(argument)
            case _:
                raise ValueError(f"the opcode {code}, which PyTorch does not write")
