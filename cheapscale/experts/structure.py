"""The channels of a U-Net that an expert may lose, and their removal from the weights.

Three widths of each residual block are variable, with names such as "enc_16_block0.inner" (the
attention of transformer layers is not):

    inner   channels between the two convolutions: written by conv0, affine, norm1; read by conv1
    qk      channels of the queries and keys of attention: written by qkv; each reads the other
    v       channels of the values of attention: written by qkv, read by proj

The residual stream between blocks keeps its width. So skip connections, the norms after
concatenations and modules attached to the stream (feature upsamplers, adapters) fit every expert;
the FLOPs can still fall to about 45 % of the base.

The positions of these channels follow from the plan that builds the network, without tracing it.
Weights become smaller arrays instead of being masked. A norm keeps its number of groups and
attention its number of heads, so every group and every head must keep equally many channels.
Attention divides its logits by sqrt(d) for heads of d channels. When d falls to d', the query
weights are multiplied by sqrt(d' / d), so that the logits of the remaining channels do not change.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cheapscale.models.plan import Block, UNetConfig, plan
from cheapscale.teacher.teacher import Teacher, make_teacher

PyTree = Any
Keep = Mapping[str, np.ndarray]  # {variable: channels that stay}; others keep all channels


class Variable(NamedTuple):
    """A width that can be pruned.

    cells: number of groups of the norm or heads of attention; all must keep equally many channels.
    """

    block: str
    field: str
    width: int
    cells: int

    @property
    def menu(self) -> tuple[int, ...]:
        """The allowed widths, ascending."""
        return tuple(range(self.cells, self.width + 1, self.cells))


class Axis(NamedTuple):
    """An axis of a weight along which the channels of the variables `names` are concatenated."""

    axis: int
    names: tuple[str, ...]


class Layout(NamedTuple):
    """The positions of channels: {path of a weight, as "enc_16_block0/conv1/kernel": its axis}.

    holds: every weight that shrinks, and along which axis. reads: the weights that read channels;
    if they are zero, the channels have no effect. queries: {path of a weight: variable} of the
    weights that produce queries.
    """

    holds: dict[str, Axis]
    reads: dict[str, Axis]
    queries: dict[str, str]


@functools.lru_cache(maxsize=32)
def variables(config: UNetConfig) -> dict[str, Variable]:
    """{name: Variable} for every variable width of a network, in the network's order."""
    found = {}
    for block in _blocks(config):
        widths = [("inner", block.inner, block.groups1)]
        if block.heads and not block.depth:
            widths += [("qk", block.qk, block.heads), ("v", block.v, block.heads)]
        for field, width, cells in widths:
            found[f"{block.name}.{field}"] = Variable(block.name, field, width, cells)
    return found


@functools.lru_cache(maxsize=32)
def layout(config: UNetConfig) -> Layout:
    """The layout of a network: the weights that write and read the channels of its variables."""
    holds: dict[str, Axis] = {}
    reads: dict[str, Axis] = {}
    queries: dict[str, str] = {}

    def writes(path: str, axis: int, *names: str) -> None:
        holds[f"{path}/kernel"], holds[f"{path}/bias"] = Axis(axis, names), Axis(0, names)

    for block in _blocks(config):
        name = block.name
        inner, qk, v = (f"{name}.{field}" for field in ("inner", "qk", "v"))
        writes(f"{name}/conv0", 3, inner)
        writes(f"{name}/affine", 1, *(inner,) * (1 + block.scale_shift))  # scales, then shifts
        holds[f"{name}/norm1/scale"] = holds[f"{name}/norm1/bias"] = Axis(0, (inner,))
        reads[f"{name}/conv1/kernel"] = Axis(2, (inner,))
        if block.heads and not block.depth:
            writes(f"{name}/qkv", 1, qk, qk, v)
            reads[f"{name}/proj/kernel"] = Axis(0, (v,))
            # Logits are q.k, so setting a query channel to zero also removes its key channel: the
            # weights that produce queries count as the readers of the keys.
            for leaf, axis in (("kernel", 1), ("bias", 0)):
                path = f"{name}/qkv/{leaf}"
                reads[path], queries[path] = Axis(axis, (qk,)), qk
    return Layout(holds | {p: a for p, a in reads.items() if p not in queries}, reads, queries)


def keep_best(variable: Variable, scores: np.ndarray, width: int) -> np.ndarray:
    """The `width` channels of highest score, equally many from each cell, in ascending order.

    scores: [variable.width].
    """
    cells = np.asarray(scores).reshape(variable.cells, -1)
    ranked = np.argsort(-cells, axis=1, kind="stable")[:, : width // variable.cells]
    first = cells.shape[1] * np.arange(variable.cells)[:, None]
    return (np.sort(ranked, axis=1) + first).ravel()


def pruned_config(config: UNetConfig, widths: Mapping[str, int]) -> UNetConfig:
    """The config of the network with these widths, which become overrides of its plan."""
    changes = {(block, field): value for block, field, value in config.overrides}
    for name, width in widths.items():
        variable = variables(config)[name]
        if width != variable.width:
            changes[variable.block, variable.field] = width
    overrides = tuple((block, field, value) for (block, field), value in sorted(changes.items()))
    return dataclasses.replace(config, overrides=overrides)


def prune(params: PyTree, config: UNetConfig, keep: Keep) -> PyTree:
    """The weights of the network cut to `keep`, as NumPy arrays.

    The channels of a variable may also be permuted within their cells. Raises ValueError if cells
    keep different numbers of channels.
    """
    _check(config, keep)
    found, known, flat = layout(config), variables(config), _flat(params)
    for path, name in found.queries.items():
        width = known[name].width
        kept = len(keep.get(name, range(width)))
        flat[path] = flat[path].copy()
        # Compensates the scale 1 / sqrt(d') of narrower heads; queries are qkv's first channels.
        flat[path][..., :width] *= np.float32(math.sqrt(kept / width))
    for path, (axis, names) in found.holds.items():
        offsets = np.cumsum([0, *(known[name].width for name in names[:-1])])
        rows = [
            offset + np.asarray(keep.get(name, np.arange(known[name].width)))
            for offset, name in zip(offsets, names)
        ]
        flat[path] = np.take(flat[path], np.concatenate(rows), axis=axis)
    return unflatten_dict(flat, sep="/")


def cut(teacher: Teacher, keep: Keep) -> Teacher:
    """A Teacher with the network cut to `keep`."""
    config = teacher.net.config
    narrow = pruned_config(config, {name: len(channels) for name, channels in keep.items()})
    meta = teacher.meta | {"networks": {"net": dataclasses.asdict(narrow)}}
    return make_teacher(prune(teacher.params, config, keep), meta, teacher.step, teacher.workdir)


def masked(params: PyTree, config: UNetConfig, keep: Keep) -> tuple[PyTree, PyTree]:
    """(weights, masks) with which the full-size network computes the output of the cut network.

    The weights that read a removed channel become zero, and norms leave the channel out of their
    moments. All choices of widths then share one compiled program, while every pruned network would
    need its own compilation.

    masks: the variables of the collection "keep" of `UNet`.
    """
    _check(config, keep)
    found, known, flat = layout(config), variables(config), _flat(params)

    def ones(name: str) -> np.ndarray:
        width = known[name].width
        return np.isin(np.arange(width), keep.get(name, np.arange(width))).astype(np.float32)

    for path, (axis, (name,)) in found.reads.items():
        mask = np.ones(flat[path].shape[axis], np.float32)
        mask[: known[name].width] = ones(name)
        others = [i for i in range(flat[path].ndim) if i != axis]
        flat[path] = flat[path] * np.expand_dims(mask, others)
    masks = {
        block.name: {"norm1": {"mask": ones(f"{block.name}.inner")}} for block in _blocks(config)
    }
    return unflatten_dict(flat, sep="/"), masks


def flops(config: UNetConfig, size: tuple[int, int] | None = None) -> float:
    """The FLOPs of one call for one image, with XLA's conventions: a multiply-add is two, and taps
    of convolutions in the padding are not counted. size: (h, w); default: the native resolution."""
    height, width = size or (config.resolution, config.resolution)
    total = 0.0
    for block in plan(config):
        h = round(block.resolution * height / config.resolution)
        w = round(block.resolution * width / config.resolution)
        total += _flops_of(block, h, w)
    return total


def _flops_of(block: Block, h: int, w: int) -> float:
    """The FLOPs of one block of the plan, whose output has h x w pixels."""
    reads, writes, pixels = block.in_channels, block.out_channels, h * w
    # Taps of a 3x3 convolution over the image: 3 per row, but 2 in the first and the last one.
    taps = (3 * h - 2) * (3 * w - 2)
    if block.kind == "map":
        return 2 * reads * writes
    if block.kind in ("conv_in", "head"):
        return 2 * taps * reads * writes
    if block.kind == "resample":  # a stride of 2 starts in the padding, as every convolution ends
        taps = taps if block.resample == "up" else (3 * h - 1) * (3 * w - 1)
        return 2 * taps * reads * writes
    if block.kind == "aux":
        return 2 * 4 * 9 * pixels * reads * writes
    total = 2 * taps * block.inner * (reads + writes)
    total += 2 * block.emb * block.inner * (1 + block.scale_shift)
    if block.shortcut:
        total += 2 * pixels * reads * writes
    if block.depth:
        return total + _transformer_flops(block, pixels)
    if block.heads:
        total += 2 * pixels * writes * (2 * block.qk + 2 * block.v)  # qkv and proj
        total += 2 * pixels**2 * (block.qk + block.v)  # logits, and the sum over values
    if block.text:  # text_q and text_proj, text_kv, attention; captions are encoded once an image
        total += 2 * pixels * 2 * writes**2 + 2 * block.text_tokens * block.text * 2 * writes
        total += 2 * pixels * block.text_tokens * 2 * writes
    return total


def _transformer_flops(block: Block, pixels: int) -> float:
    """The FLOPs of a block's transformer layers, with the linear maps around them."""
    c, tokens = block.out_channels, block.text_tokens
    each = 2 * pixels * (4 + 2 + 12) * c**2  # qkv and proj; text_q and text_proj; fc0 and fc1
    each += 2 * tokens * block.text * 2 * c  # text_kv
    each += 2 * pixels * (pixels + tokens) * 2 * c  # logits, and the sums over values
    return block.depth * each + 2 * pixels * 2 * c**2  # proj_in and proj_out


def _blocks(config: UNetConfig) -> list[Block]:
    """The residual blocks of a network."""
    return [block for block in plan(config) if block.kind == "res"]


def _flat(params: PyTree) -> dict[str, np.ndarray]:
    """{path: weight} as NumPy arrays."""
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}


def _check(config: UNetConfig, keep: Keep) -> None:
    """Raise ValueError unless `keep` has different channels, equally many in each cell."""
    known = variables(config)
    for name, channels in keep.items():
        if name not in known:
            raise ValueError(f"keep names {name!r}: this network's widths are {', '.join(known)}")
        width, cells = known[name].width, known[name].cells
        counts = np.isin(np.arange(width), channels).reshape(cells, -1).sum(axis=1)
        if np.ptp(counts) or counts.sum() != len(channels):
            raise ValueError(
                f"keep[{name!r}] leaves {counts.tolist()} of {width} channels in its {cells} "
                "cells: keep equally many in each, once"
            )
