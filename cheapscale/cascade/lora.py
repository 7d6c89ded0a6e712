"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) of every kernel of a network: W + A B.

A convolution's kernel [k, k, in, out] is read as a matrix with k * k * in rows: A is a k x k
convolution to r channels, B a 1x1 convolution from them. Self-cascade (Guo et al. 2024, arXiv
2402.10491, Table 1) is compared with adapters that train at all noise levels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

PyTree = Any


def init_lora(params: PyTree, rank: int, key: jax.Array) -> PyTree:
    """{... "kernel": {"a": [rows, r], "b": [r, out]}} for every kernel; b is zero, so W stays W.

    The rank is at most the number of the kernel's rows and columns.
    """
    adapters = {}
    for i, (path, value) in enumerate(sorted(flatten_dict(params).items())):
        if path[-1] != "kernel":
            continue
        rows, out = math.prod(value.shape[:-1]), value.shape[-1]
        r = min(rank, rows, out)
        limit = math.sqrt(3 / rows)  # variance 1 / rows
        a = jax.random.uniform(jax.random.fold_in(key, i), (rows, r), jnp.float32, -limit, limit)
        adapters[(*path, "a")] = a
        adapters[(*path, "b")] = jnp.zeros((r, out))
    return unflatten_dict(adapters)


def adapted(params: PyTree, adapters: PyTree) -> PyTree:
    """The network's weights with the adapters added."""
    merged, low_rank = flatten_dict(params), flatten_dict(adapters)
    for *path, name in low_rank:
        if name == "a":
            kernel = merged[tuple(path)]
            product = low_rank[(*path, "a")] @ low_rank[(*path, "b")]
            merged[tuple(path)] = kernel + product.reshape(kernel.shape)
    return unflatten_dict(merged)
