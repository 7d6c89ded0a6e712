"""From PyTorch state dicts to nested parameters: transposition, and strict book-keeping.

A correspondence is a list of `Entry(path, name, kind)`: a leaf of our parameters, a tensor of the
state dict, and the conversion between them. Every leaf and every tensor must be used exactly once;
an error lists the rest, because a network with a few random layers would look almost right.

Layouts: convolution kernels OIHW -> HWIO; 1x1 convolutions and linear maps [out, in, ...] ->
[in, out]; attention's joint query-key-value channels to (three, head, dim).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from cheapscale.features.weights import as_float32

PyTree = Any

# Order of the channels of a joint qkv projection, slowest first. Published weights: EDM has
# head_dim_three ("dim, three" with its single head), PaGoDA and other flash-attention U-Nets
# three_head_dim, the original guided-diffusion (legacy order) head_three_dim.
QKV_LAYOUTS = {
    "three_head_dim": "three head dim",
    "head_three_dim": "head three dim",
    "head_dim_three": "head dim three",
}


class Entry(NamedTuple):
    """path: '/'-joined leaf. name: tensor, or several joined by "+" whose outputs stand side by
    side. kind: plain | conv | dense | qkv. heads: of a qkv."""

    path: str
    name: str
    kind: str
    heads: int = 0

    @property
    def names(self) -> list[str]:
        return self.name.split("+")


def convert(
    state: Mapping[str, np.ndarray],
    entries: Iterable[Entry],
    *,
    qkv_layout: str,
    ignore: Iterable[str] = (),
) -> PyTree:
    """Nested dict of float32 arrays from a state dict.

    ignore: endings of the names of tensors that hold no weights (resampling filters).
    Raises ValueError listing tensors that are missing and tensors that nothing uses, and naming
    one that is quantised or of another rank.
    """
    entries, endings = list(entries), tuple(ignore)
    weights = {name for name in state if not name.endswith(endings)}
    check_names(weights, entries)
    arrays = {entry.path: converted(state, entry, qkv_layout) for entry in entries}
    return unflatten_dict(arrays, sep="/")


def check_names(found: Iterable[str], entries: Iterable[Entry]) -> None:
    """Raises ValueError listing tensors that are missing and tensors that nothing uses."""
    weights, wanted = set(found), {name for entry in entries for name in entry.names}
    missing, unused = sorted(wanted - weights), sorted(weights - wanted)
    if missing or unused:
        raise ValueError(
            f"the checkpoint does not fit the model config: missing {missing or 'nothing'}, "
            f"unused {unused or 'nothing'}; check widths, blocks, attention and growth"
        )


def converted(state: Mapping[str, np.ndarray], entry: Entry, qkv_layout: str = "") -> np.ndarray:
    """The float32 leaf of an entry."""
    parts = [_converted(state[name], name, entry, qkv_layout) for name in entry.names]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def tensors_of(flat: Mapping[str, np.ndarray], entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """PyTorch's tensors of the leaves {path: leaf}, the inverse of `converted` for all kinds but
    qkv. The 1x1 convolutions of diffusers' shortcuts keep their four axes."""
    state = {}
    for entry in entries:
        parts = np.split(flat[entry.path], len(entry.names), axis=-1)
        for name, array in zip(entry.names, parts):
            array = (
                array.transpose(3, 2, 0, 1) if entry.kind == "conv" and array.ndim > 1 else array
            )
            array = array.T if entry.kind == "dense" and array.ndim > 1 else array
            array = array[:, :, None, None] if name.endswith("conv_shortcut.weight") else array
            state[name] = np.ascontiguousarray(array)
    return state


def check_shapes(params: PyTree, expected: PyTree) -> None:
    """Raises ValueError naming the leaves whose names or shapes differ from `expected`."""
    ours, theirs = flatten_dict(expected, sep="/"), flatten_dict(params, sep="/")
    problems = [
        f"{path} has {theirs[path].shape if path in theirs else 'nothing'} "
        f"for {ours[path].shape if path in ours else 'nothing'}"
        for path in sorted(ours.keys() | theirs.keys())
        if path not in ours or path not in theirs or ours[path].shape != theirs[path].shape
    ]
    if problems:
        raise ValueError(
            f"the checkpoint does not fit the model config: {'; '.join(problems)}; "
            "check the model's widths"
        )


def _check_rank(array: np.ndarray, name: str, entry: Entry) -> None:
    """Refuse an array that has no axes to transpose, or channels that are not q, k and v."""
    flat = array.ndim > 0 and array.size == math.prod(array.shape[:2])
    fits, wanted = {
        "plain": lambda: (True, ""),
        "conv": lambda: (array.ndim in (1, 4), "(out, in, height, width)"),
        "dense": lambda: (flat, "(out, in)"),
        "qkv": lambda: (
            flat and array.shape[0] % (3 * entry.heads) == 0,
            f"(a multiple of 3 x {entry.heads} heads, in)",
        ),
    }[entry.kind]()
    if not fits:
        raise ValueError(
            f"the checkpoint does not fit the model config: weight {name!r} has shape "
            f"{array.shape} for {wanted}; check the model's widths, attention and head_dim"
        )


def _converted(array: np.ndarray, name: str, entry: Entry, qkv_layout: str) -> np.ndarray:
    array = as_float32(array, f"weight {name!r}")
    _check_rank(array, name, entry)
    if entry.kind == "qkv":
        layouts = f"({QKV_LAYOUTS[qkv_layout]}) ... -> (three head dim) ..."
        array = rearrange(array, layouts, three=3, head=entry.heads)
    if entry.kind == "plain" or array.ndim == 1:
        return array
    if entry.kind == "conv":
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(array.reshape(array.shape[:2]).T)
