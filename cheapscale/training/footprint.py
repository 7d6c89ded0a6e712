"""FLOPs and memory of a step from its traced program, before anything is compiled or run.

Compiling tells more, but takes minutes at the sizes for which one asks beforehand, and its answer
holds for one backend and version. Tracing takes seconds on any machine.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from jax.extend import core

PyTree = Any


def traced_flops(fn: Callable, *args: PyTree) -> float:
    """FLOPs of one call fn(*args), unpartitioned, as XLA counts them before it optimises.

    args: arrays or ShapeDtypeStructs. The body of a loop counts once: give a function without one.
    """
    analysis = jax.jit(fn).lower(*args).cost_analysis()
    if not analysis or "flops" not in analysis:
        raise ValueError(f"the {jax.default_backend()} compiler counts no FLOPs: plan on another")
    return float(analysis["flops"])


def traced_bytes(
    fn: Callable, *args: PyTree, donated: int = 0, batch_size: int = 0, ways: int = 1
) -> int:
    """The most bytes of intermediate values and results alive at once on one device.

    Every value lives from the equation that makes it to the last that reads it, in the order of
    the program. The arguments are not counted. Left out is what a compiler does beyond that:
    fusion and a better order (less), padding and workspace (more).

    donated: so many leading leaves of the result take the place of arguments and cost nothing.
    batch_size, ways: a value whose leading axis is a multiple of the batch is split `ways` ways
    over the devices, every other value is whole on each.
    """

    def size(aval: Any) -> int:
        if not hasattr(aval, "dtype") or not hasattr(aval, "shape"):
            return 0
        split = ways if batch_size and aval.shape and aval.shape[0] % batch_size == 0 else 1
        return math.prod(aval.shape) * aval.dtype.itemsize // split

    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return _peak(jaxpr, size, free={v for v in jaxpr.outvars[:donated] if _is_variable(v)})


def tree_bytes(tree: PyTree) -> int:
    """Bytes on one device of a tree of arrays or ShapeDtypeStructs, placed as they say."""

    def size(leaf: Any) -> int:
        place = getattr(leaf, "sharding", None)
        shape = place.shard_shape(leaf.shape) if place is not None else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _peak(jaxpr: core.Jaxpr, size: Callable, free: Collection = ()) -> int:
    last: dict[Any, int] = {}
    for place, equation in enumerate(jaxpr.eqns):
        last |= {v: place for v in equation.invars if _is_variable(v)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if _is_variable(v)}
    dying: dict[int, list] = {}
    for variable, place in last.items():
        dying.setdefault(place, []).append(variable)
    alive: dict[Any, int] = {}
    total = peak = 0
    for place, equation in enumerate(jaxpr.eqns):
        made = {v: 0 if v in free else size(v.aval) for v in equation.outvars if v in last}
        inside = max((_peak(inner, size) for inner in _inner(equation)), default=0)
        peak = max(peak, total + max(inside, sum(made.values())))
        alive |= made
        total += sum(made.values())
        total -= sum(alive.pop(v, 0) for v in dying.get(place, ()))
    return peak


def _inner(equation: Any) -> Iterator[core.Jaxpr]:
    """The programs that an equation calls."""
    for value in equation.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(inner, "jaxpr", inner)  # a closed jaxpr wraps an open one
            if hasattr(inner, "eqns"):
                yield inner


def _is_variable(value: Any) -> bool:
    return not isinstance(value, core.Literal)
