"""The cost of a program: FLOPs, memory, parameters, seconds.

XLA counts the body of a `scan` or `while` once, however often it runs. So FLOPs are measured for
single network calls, and the cost of a sampler is the sum over its calls. XLA does not count the
taps of a kernel in the padding, so these numbers are smaller than k^2 multiplications per pixel:
compare them only with each other.

`traced_flops` needs no compilation, which takes minutes for large networks.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

PyTree = Any


class Cost(NamedTuple):
    """The cost of one call. flops: a multiply-add is two. Bytes are those of the allocations."""

    flops: float
    peak_bytes: int


def cost_of_call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Cost:
    """The cost of fn(*args, **kwargs), which is compiled for the default backend but not run.

    Arguments may be arrays or `jax.ShapeDtypeStruct`s. Raises ValueError if the program has a loop.
    """
    traced = jax.jit(fn).trace(*args, **kwargs)
    loops = sorted({"scan", "while"} & set(_primitives(traced.jaxpr.jaxpr)))
    if loops:
        raise ValueError(
            f"the program holds a {' and a '.join(loops)}, whose body XLA counts once: measure one "
            "network call and multiply by the number of calls"
        )
    compiled = traced.lower().compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if not analysis or memory is None:
        raise ValueError(f"the {jax.default_backend()} compiler reports no cost: use another one")
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Cost(
        flops=float(analysis["flops"]),
        # Donated arguments share their memory with outputs: count them once.
        peak_bytes=resident + memory.temp_size_in_bytes - memory.alias_size_in_bytes,
    )


class FlopCounter:
    """A jitted function that sums the FLOPs of its calls in the attribute `flops`."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn, self.programs, self.flops = jax.jit(fn), {}, 0.0

    def __call__(self, *args):
        shapes = jax.tree.map(jax.typeof, args)
        leaves, tree = jax.tree.flatten(shapes)
        # One compiled program for each combination of shapes, as in jit; only a compiled program
        # reports its FLOPs.
        program = self.programs.get((tree, *leaves))
        if program is None:
            program = self.programs[tree, *leaves] = self.fn.lower(*args).compile()
        self.flops += float((program.cost_analysis() or {}).get("flops", 0.0))
        return program(*args)


def param_count(params: PyTree) -> int:
    """The number of scalars in a tree of arrays or ShapeDtypeStructs."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def latency(fn: Callable[..., Any], *args: Any, repeats: int = 10) -> float:
    """The median wall-clock seconds of a compiled call, after one warm-up call."""
    jitted = jax.jit(fn)
    jax.block_until_ready(jitted(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(jitted(*args))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def traced_flops(fn: Callable, *args: PyTree) -> float:
    """The FLOPs of one call fn(*args) on one device, as XLA counts them before optimisation.

    args: arrays or ShapeDtypeStructs. A loop's body counts once, so `fn` should have no loop.
    """
    analysis = jax.jit(fn).lower(*args).cost_analysis()
    if not analysis or "flops" not in analysis:
        raise ValueError(f"the {jax.default_backend()} compiler counts no FLOPs: plan on another")
    return float(analysis["flops"])


def tree_bytes(tree: PyTree) -> int:
    """The bytes on one device of a tree of arrays or ShapeDtypeStructs, given their shardings."""

    def size(leaf: Any) -> int:
        place = getattr(leaf, "sharding", None)
        shape = place.shard_shape(leaf.shape) if place is not None else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _primitives(jaxpr: core.Jaxpr) -> Iterator[str]:
    """The names of the primitives of a jaxpr and of all jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in core.jaxprs_in_params(equation.params):
            yield from _primitives(inner)


class Ledger:
    """The FLOPs and device-seconds of a run, added to those of its teachers, and its speed."""

    def __init__(self, before: dict, flops_per_step: float, start: int):
        self.before = {"flops": 0.0, "device_seconds": 0.0} | before
        self.flops_per_step, self.start = flops_per_step, start
        self.began = self.clock = time.monotonic()  # the clock measures the speed

    def time_from(self, running: PyTree) -> None:
        """Start the clock once `running`, results of the first step, are computed."""
        jax.block_until_ready(running)
        self.clock = time.monotonic()

    @contextlib.contextmanager
    def paused(self, running: PyTree) -> Iterator[None]:
        """A block, such as an eval, that counts as device-seconds but not in steps per second.

        running: results of the step, which is waited for first.
        """
        jax.block_until_ready(running)
        began = time.monotonic()
        yield
        self.clock += time.monotonic() - began

    def entry(self, step: int) -> dict:
        """{"ledger": {"flops", "device_seconds"}, "steps_per_second", "flops_per_step"}."""
        now, done = time.monotonic(), step - self.start
        spent = {
            "flops": self.flops_per_step * done,
            "device_seconds": (now - self.began) * jax.device_count(),
        }
        ledger = {name: self.before[name] + value for name, value in spent.items()}
        # The clock starts after the first step, so one step fewer is timed.
        speed = (done - 1) / max(now - self.clock, 1e-9)
        return {"ledger": ledger, "steps_per_second": speed, "flops_per_step": self.flops_per_step}
