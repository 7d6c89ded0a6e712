"""Low-rank adapters (Hu et al. 2021) of every kernel of a network: W + scale * A B.

A convolution's kernel [k, k, in, out] is a matrix of k k in rows: A is a k x k convolution to the
rank, B a 1x1 convolution from it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.models.layers import hashed_uniform

PyTree = Any


def init_lora(params: PyTree, rank: int, key: jax.Array) -> PyTree:
    """{... "kernel": {"a": [rows, r], "b": [r, out]}} for every kernel; b is zero, so W stays W.

    A kernel of fewer rows or columns than the rank gets adapters of that number.
    """
    if rank < 1:
        raise ValueError(f"cascade.lora_rank is {rank}: give at least 1")
    adapters: PyTree = {}
    for i, (name, value) in enumerate(params.items()):
        here = jax.random.fold_in(key, i)
        if isinstance(value, dict):
            inner = init_lora(value, rank, here)
            if inner:
                adapters[name] = inner
        elif name == "kernel":
            rows, out = math.prod(value.shape[:-1]), value.shape[-1]
            r = min(rank, rows, out)
            a = hashed_uniform(here, rows * r).reshape(rows, r) * math.sqrt(3 / rows)
            adapters[name] = {"a": a, "b": jnp.zeros((r, out))}
    return adapters


def adapted(params: PyTree, adapters: PyTree, scale: float = 1.0) -> PyTree:
    """The network's weights with the adapters added."""
    merged = dict(params)
    for name, value in adapters.items():
        if name == "kernel":
            kernel = params[name]
            merged[name] = kernel + scale * (value["a"] @ value["b"]).reshape(kernel.shape)
        else:
            merged[name] = adapted(params[name], value, scale)
    return merged
