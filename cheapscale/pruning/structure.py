"""Which channels of a U-Net belong together, and how to cut them out (spec sections 4.6 to 4.9).

Nothing is traced: `layout` walks the same plan as the linen module. The axis of a weight is a
concatenation of segments, and a segment names a *variable*, a width that is pruned as one:

    conv, dense a -> b     reads the segments of a, writes a variable of its own
    residual sum           both operands are one variable (union-find)
    skip concatenation     [stream, skip]: two segments at an offset, nothing merged
    group norm             is cut like its input; keeps its number of groups, each losing equally
    shift and scale        [inner, inner], the same channels twice
    attention              q and k share a variable, v and the projection's input another; heads
                           keep their number and lose equally
    image, head's output, features of the noise, conditions    fixed

A weight really shrinks. Attention divides its logits by sqrt(d) of what is left, so the query
weights are multiplied by sqrt(d' / d): the temperature stays.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cheapscale.models.plan import FAMILIES, Block, UNetConfig, plan

PyTree = Any
PLANS = {"inner": ("inner", "qk", "v"), "all": ("inner", "qk", "v", "stream", "map")}


class Segment(NamedTuple):
    """A stretch of an axis: the channels of a variable, or with "" fixed ones."""

    variable: str
    width: int


class Variable(NamedTuple):
    """A width that is pruned as one.

    kind: inner | qk | v | stream | map. cells: equal parts of the width that must lose equally
    (groups of norms, heads). step: what it can lose at a time. fields: (block, field of Block) that
    hold the width. seam: a norm's group lies across the seam to what it is concatenated with, so
    that which channels are normed together shifts when either side narrows (section 4.8).
    """

    width: int
    kind: str
    cells: int
    step: int
    fields: tuple[tuple[str, str], ...]
    seam: bool = False

    @property
    def menu(self) -> tuple[int, ...]:
        """Widths it can have, increasing."""
        return tuple(range(self.width, 0, -self.step))[::-1]


class Layout(NamedTuple):
    """leaves: {path of a weight: segments of each axis}; variables: {name: Variable};
    queries: {path of a qkv weight: the variable of its queries}."""

    leaves: dict[str, tuple[tuple[Segment, ...], ...]]
    variables: dict[str, Variable]
    queries: dict[str, str]


@functools.lru_cache(maxsize=32)
def layout(config: UNetConfig) -> Layout:
    """The variables of a network and where they are read and written."""
    walk = _Walk(plan(config), FAMILIES[config.family].label_late)
    return Layout(walk.named(), walk.variables(), walk.queries())


def keep_best(variable: Variable, scores: np.ndarray, width: int) -> np.ndarray:
    """The `width` best channels, equally many of each cell, in increasing order."""
    if width not in variable.menu:
        raise ValueError(
            f"a width of {width} does not divide over {variable.cells} groups of "
            f"{variable.width} channels: choose one of {', '.join(map(str, variable.menu))}"
        )
    size = variable.width // variable.cells
    ranked = np.argsort(-np.asarray(scores).reshape(variable.cells, size), axis=1, kind="stable")
    best = np.sort(ranked[:, : width // variable.cells], axis=1)
    return (best + size * np.arange(variable.cells)[:, None]).ravel()


def pruned_config(config: UNetConfig, keep: Mapping[str, np.ndarray]) -> UNetConfig:
    """The network whose variables have the widths of `keep`; those it does not name stay."""
    changes = {(block, field): value for block, field, value in config.overrides}
    for name, variable in layout(config).variables.items():
        width = len(keep.get(name, range(variable.width)))
        if width != variable.width:
            changes |= dict.fromkeys(variable.fields, width)
    overrides = tuple((block, field, value) for (block, field), value in sorted(changes.items()))
    new = dataclasses.replace(config, overrides=overrides)
    plan(new)  # refuses widths that do not fit together
    return new


def prune(
    params: PyTree, config: UNetConfig, keep: Mapping[str, np.ndarray], *, power: float = 1.0
) -> PyTree:
    """The weights of `pruned_config(config, keep)`, host arrays.

    keep: {variable: channels that stay}; a permutation is allowed, and absent names stay whole.
    power: of the factor on query weights; an optimiser's first moments take -1, its second -2.
    """
    found = layout(config)
    _check(found.variables, keep)

    def cut(path: str, value: Any) -> np.ndarray:
        array = np.asarray(value)
        if path in found.queries:
            name = found.queries[path]
            width = found.variables[name].width
            factor = math.sqrt(len(keep.get(name, range(width))) / width) ** power
            array = array.copy()
            array[..., :width] *= np.float32(factor)
        for axis, segments in enumerate(found.leaves[path]):
            offset, rows = 0, []
            for segment in segments:
                whole = np.arange(segment.width)
                rows.append(
                    offset + (keep.get(segment.variable, whole) if segment.variable else whole)
                )
                offset += segment.width
            array = np.take(array, np.concatenate(rows), axis=axis)
        return array

    return _map_paths(cut, params)


def prune_optimiser(
    opt_state: PyTree, params: PyTree, config: UNetConfig, keep: Mapping[str, np.ndarray]
) -> PyTree:
    """An optax state cut like its parameters: every tree of their structure inside it.

    In the order of Adam's fields, the first such tree holds first moments, the second second ones.
    """
    powers = iter((-1.0, -2.0))

    def walk(node):
        if isinstance(node, dict) and node.keys() == params.keys():
            return prune(node, config, keep, power=next(powers, 1.0))
        if isinstance(node, tuple):
            inner = [walk(child) for child in node]
            return type(node)(*inner) if hasattr(node, "_fields") else tuple(inner)
        return node

    return walk(opt_state)


def masked(params: PyTree, config: UNetConfig, keep: Mapping[str, np.ndarray]) -> PyTree:
    """Variables of the full-size network that compute what the pruned one computes: {"params",
    "keep"}.

    What reads a channel that goes is zero, and norms leave it out of their moments. One compiled
    program then serves every choice of inner widths, where each pruned network would need its own.
    Not for streams: where one side of a concatenation narrows, the norm behind it regroups its
    channels (section 4.8), which masks do not.
    """
    found = layout(config)
    _check(found.variables, keep)

    def ones(axis: tuple[Segment, ...]) -> np.ndarray:
        parts = []
        for segment in axis:
            mask = np.ones(segment.width, np.float32)
            if segment.variable in keep:
                mask = np.isin(np.arange(segment.width), keep[segment.variable]).astype(np.float32)
            parts.append(mask)
        return np.concatenate(parts)

    def cut(path: str, value: Any) -> np.ndarray:
        array = np.asarray(value)
        for axis, segments in members(found, path):
            shape = [1] * array.ndim
            shape[axis] = -1
            array = array * ones(segments).reshape(shape)
        return array

    masks: PyTree = {}
    for path, axes in found.leaves.items():
        if path.endswith("/scale"):
            *parents, _ = path.split("/")
            node = masks
            for name in parents:
                node = node.setdefault(name, {})
            node["mask"] = ones(axes[0])
    return {"params": _map_paths(cut, params), "keep": masks}


def members(found: Layout, path: str) -> list[tuple[int, tuple[Segment, ...]]]:
    """The axes of a weight along which it reads channels; of qkv also the one that writes q, which
    only k reads."""
    axes = found.leaves[path]
    reads = [(len(axes) - 2, axes[-2])] if path.endswith("/kernel") else []
    if path in found.queries:
        name = found.queries[path]
        width = found.variables[name].width
        rest = sum(segment.width for segment in axes[-1]) - width
        reads.append((len(axes) - 1, (Segment(name, width), Segment("", rest))))
    return reads


def flops(config: UNetConfig, size: tuple[int, int] | None = None) -> float:
    """Multiplications and additions of one call for one image, convolutions' padded taps left out
    (as XLA counts). size: of the canvas; None is the native one."""
    height, width = size or (config.resolution, config.resolution)
    scale = height / config.resolution, width / config.resolution
    total = 0.0
    for block in plan(config):
        h, w = (round(block.resolution * s) for s in scale)
        pixels, taps = h * w, (3 * h - 2) * (3 * w - 2)
        if block.kind == "map":
            total += 2 * block.in_channels * block.out_channels
        elif block.kind in ("conv_in", "head"):
            total += 2 * taps * block.in_channels * block.out_channels
        elif block.kind == "aux":
            total += 2 * 4 * 9 * pixels * block.in_channels * block.out_channels
        else:
            total += 2 * taps * block.inner * (block.in_channels + block.out_channels)
            total += 2 * block.emb * block.inner * (1 + block.scale_shift)
            if block.shortcut:
                total += 2 * pixels * block.in_channels * block.out_channels
            if block.heads:
                total += 2 * pixels * block.out_channels * (2 * block.qk + 2 * block.v)
                total += 2 * pixels**2 * (block.qk + block.v)
    return total


class _Walk:
    """One pass over the plan: unions of variables, segments of weights, constraints of norms."""

    def __init__(self, blocks: Sequence[Block], label_late: bool):
        self.label_late = label_late
        self.parent: dict[str, str] = {}
        self.width: dict[str, int] = {}
        self.kind: dict[str, str] = {}
        self.fields: dict[str, list[tuple[str, str]]] = {}
        self.leaves: dict[str, tuple] = {}
        self.norms: list[tuple[tuple[Segment, ...], int]] = []
        self.heads: list[tuple[str, int]] = []
        self.query: dict[str, str] = {}
        self.pushed: dict[str, tuple[Segment, ...]] = {}
        self.emb = (Segment("", 0),)
        self.hidden = self.emb
        self.stream = self.aux = ()
        for block in blocks:
            getattr(self, f"_{block.kind}")(block)
            if block.push:
                self.pushed[block.name] = self.stream

    def new(self, name: str, width: int, kind: str, *fields: tuple[str, str]) -> Segment:
        self.parent[name], self.width[name], self.kind[name] = name, width, kind
        self.fields[name] = list(fields)
        return Segment(name, width)

    def root(self, name: str) -> str:
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def union(self, a: Segment, b: Segment) -> None:
        first, second = self.root(a.variable), self.root(b.variable)
        if first != second:
            self.parent[second] = first
            self.fields[first] += self.fields[second]

    def weight(self, path: str, *axes: tuple[Segment, ...], bias: bool = True) -> None:
        self.leaves[f"{path}/kernel"] = axes
        if bias:
            self.leaves[f"{path}/bias"] = axes[-1:]

    def conv(self, path: str, reads: tuple, writes: tuple) -> None:
        self.weight(path, (Segment("", 3),), (Segment("", 3),), reads, writes)

    def norm(self, path: str, reads: tuple, groups: int) -> None:
        self.leaves[f"{path}/scale"] = self.leaves[f"{path}/bias"] = (reads,)
        self.norms.append((reads, groups))

    def _map(self, block: Block) -> None:
        name, inputs = block.name, (Segment("", block.in_channels),)
        fixed = (Segment("", block.out_channels),)
        if name == "map_noise":  # Fourier frequencies: fixed
            self.leaves[f"{name}/freqs"] = ((Segment("", block.out_channels // 2),),)
        elif name == "map_layer0":
            self.hidden = (
                self.new("map.hidden", block.out_channels, "map", (name, "out_channels")),
            )
            self.weight(name, inputs, self.hidden)
        elif name == "map_layer1":
            self.emb = (self.new("map.emb", block.out_channels, "map", (name, "out_channels")),)
            self.weight(name, self.hidden, self.emb)
        elif name == "map_extra0":
            self.weight(name, inputs, fixed)
        elif name in ("map_extra1", "map_caption"):
            self.weight(name, inputs, self.emb, bias=name == "map_extra1")
        elif name == "map_label" and self.label_late:  # joins the embedding itself
            self.weight(name, inputs, self.emb, bias=False)
        else:  # joins the features of the noise
            self.weight(name, inputs, fixed, bias=name == "map_label")

    def _conv_in(self, block: Block) -> None:
        self.aux = (Segment("", block.in_channels),)
        self.stream = (self._stream(block),)
        self.conv(block.name, self.aux, self.stream)

    def _stream(self, block: Block) -> Segment:
        name = f"{block.name}.out"
        return self.new(name, block.out_channels, "stream", (block.name, "out_channels"))

    def _aux(self, block: Block) -> None:
        # (h + filtered conv of the image branch): the sum is the stream, and the next image branch
        self.conv(block.name, self.aux, self.stream)
        self.aux = self.stream

    def _res(self, block: Block) -> None:
        name = block.name
        reads = self.stream + (self.pushed[block.pop] if block.pop else ())
        inner = self.new(f"{name}.inner", block.inner, "inner", (name, "inner"))
        out = self._stream(block)
        self.norm(f"{name}/norm0", reads, block.groups0)
        self.conv(f"{name}/conv0", reads, (inner,))
        self.weight(f"{name}/affine", self.emb, (inner,) * (1 + block.scale_shift))
        self.norm(f"{name}/norm1", (inner,), block.groups1)
        self.conv(f"{name}/conv1", (inner,), (out,))
        if block.shortcut:
            self.weight(f"{name}/skip", reads, (out,))
        else:
            self.union(self.stream[0], out)
        if block.heads:
            qk = self.new(f"{name}.qk", block.qk, "qk", (name, "qk"))
            v = self.new(f"{name}.v", block.v, "v", (name, "v"))
            self.norm(f"{name}/norm2", (out,), block.groups2)
            self.weight(f"{name}/qkv", (out,), (qk, qk, v))
            self.weight(f"{name}/proj", (v,), (out,))
            self.heads += [(qk.variable, block.heads), (v.variable, block.heads)]
            for leaf in ("kernel", "bias"):
                self.query[f"{name}/qkv/{leaf}"] = qk.variable
        self.stream = (out,)

    def _head(self, block: Block) -> None:
        self.norm(f"{block.name}/norm", self.stream, block.groups0)
        self.conv(f"{block.name}/conv", self.stream, (Segment("", block.out_channels),))

    def named(self) -> dict:
        """The weights' segments under the names of the unions' roots."""

        def rooted(segment: Segment) -> Segment:
            return (
                Segment(self.root(segment.variable), segment.width) if segment.variable else segment
            )

        return {
            path: tuple(tuple(map(rooted, axis)) for axis in axes)
            for path, axes in self.leaves.items()
        }

    def queries(self) -> dict:
        return {path: self.root(name) for path, name in self.query.items()}

    def variables(self) -> dict[str, Variable]:
        cells: dict[str, int] = {}
        steps: dict[str, int] = {}
        seams = set()
        for segments, groups in self.norms:
            size, offset = sum(s.width for s in segments) // groups, 0
            for segment in segments:
                root = self.root(segment.variable)
                if offset % size == segment.width % size == 0:
                    cells[root] = math.lcm(cells.get(root, 1), segment.width // size)
                else:
                    seams.add(root)
                if len(segments) > 1:  # the sum must still divide, whichever side narrows
                    steps[root] = math.lcm(steps.get(root, 1), groups)
                offset += segment.width
        for name, heads in self.heads:
            cells[self.root(name)] = math.lcm(cells.get(self.root(name), 1), heads)
        found = {}
        for name in filter(lambda name: self.root(name) == name, self.parent):
            parts = cells.get(name, 1)
            step = math.lcm(parts, steps.get(name, 1))
            fields = tuple(self.fields[name])
            found[name] = Variable(
                self.width[name], self.kind[name], parts, step, fields, name in seams
            )
        return found


def _check(variables, keep):
    for name, channels in keep.items():
        if name not in variables:
            raise ValueError(
                f"keep names {name!r}: the network's variables are {', '.join(variables)}"
            )
        variable, channels = variables[name], np.asarray(channels)
        size = variable.width // variable.cells
        if len(np.unique(channels)) != len(channels) or not np.all(
            (channels >= 0) & (channels < variable.width)
        ):
            raise ValueError(f"keep[{name!r}] must hold different numbers below {variable.width}")
        counts = np.bincount(channels // size, minlength=variable.cells)
        if len(set(counts)) != 1:
            raise ValueError(
                f"keep[{name!r}] leaves {counts.tolist()} channels of its {variable.cells} groups: "
                "keep equally many of each"
            )


def _map_paths(fn, tree, prefix=""):
    return {
        name: _map_paths(fn, value, f"{prefix}{name}/")
        if isinstance(value, dict)
        else fn(f"{prefix}{name}", value)
        for name, value in tree.items()
    }
