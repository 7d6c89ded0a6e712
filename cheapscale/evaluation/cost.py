"""What a program costs, as the compiler sees it: FLOPs, memory, parameters, seconds.

A sampler costs the sum over its network calls of the cost of one compiled call. The body of a
`scan` or `while` is counted once by XLA however often it runs, so programs with loops are refused.
XLA leaves out taps that fall into padding: compare ratios of such numbers, not them with counts of
k^2 multiplications.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


class Cost(NamedTuple):
    """Of one call. flops: multiply and add count separately; bytes as allocated by the program."""

    flops: float
    peak_bytes: int
    argument_bytes: int
    output_bytes: int


def cost_of_call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Cost:
    """Cost of fn(*args, **kwargs), compiled for the default backend but not run.

    Arguments may be arrays or `jax.ShapeDtypeStruct`s. Raises ValueError if the program loops.
    """
    loops = sorted(_loops(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr))
    if loops:
        raise ValueError(
            f"the program holds a {' and a '.join(loops)}, whose body XLA counts once: measure one "
            "network call and multiply by the number of calls"
        )
    compiled = jax.jit(fn).lower(*args, **kwargs).compile()
    analysis = compiled.cost_analysis()
    memory = compiled.memory_analysis()
    if not analysis or memory is None:
        raise ValueError(f"the {jax.default_backend()} compiler reports no cost: use another one")
    resident = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return Cost(
        flops=float(analysis["flops"]),
        peak_bytes=resident + memory.temp_size_in_bytes - memory.alias_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
    )


class Billed:
    """A compiled function that keeps account of the FLOPs of its calls."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn, self.programs, self.flops = jax.jit(fn), {}, 0.0

    def __call__(self, *args):
        shapes = jax.tree.map(jax.typeof, args)
        leaves, tree = jax.tree.flatten(shapes)
        program = self.programs.get((tree, *leaves))
        if program is None:
            program = self.programs[tree, *leaves] = self.fn.lower(*args).compile()
        self.flops += float((program.cost_analysis() or {}).get("flops", 0.0))
        return program(*args)


def param_count(params: PyTree) -> int:
    """Number of scalars in a tree of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def latency(fn: Callable[..., Any], *args: Any, repeats: int = 10) -> float:
    """Median wall-clock seconds of a compiled call, after one warm-up call."""
    jitted = jax.jit(fn)
    jax.block_until_ready(jitted(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(jitted(*args))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _loops(jaxpr) -> set[str]:
    """Names of the looping primitives in a jaxpr and in everything it calls."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while"):
            found.add(equation.primitive.name)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)  # a closed jaxpr wraps an open one
                if hasattr(inner, "eqns"):
                    found |= _loops(inner)
    return found
