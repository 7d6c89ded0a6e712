"""What a run consists of at one step, and where its random numbers come from.

Every field but `step` is a dict keyed by network (`net`; `generator`, `discriminator`). Nothing
random is stored: the key of step n in a named stream is fold_in(fold_in(key(seed), stream), n), so
a resumed run draws exactly what the uninterrupted run would have drawn.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """One training run at one step.

    step: int32 scalar, optimiser steps done. params, ema_params: {net: pytree}. opt_state: {net:
    optax state of the trainable leaves}. extra: {net: pytree}, checkpointed but never optimised
    (spectral-norm vectors, loss per noise bin).
    """

    step: jax.Array
    params: PyTree
    ema_params: PyTree
    opt_state: PyTree
    extra: PyTree


class Optimiser:
    """An optax transform restricted to the leaves whose path satisfies `trainable`.

    Frozen leaves have no gradient, no optimiser state and are returned untouched (bit for bit).
    `trainable(path)` receives the '/'-joined path of a leaf, e.g. "dec_16_block0/conv1/kernel".
    """

    def __init__(
        self, tx: optax.GradientTransformation, trainable: Callable[[str], bool] | None = None
    ):
        self.tx = tx
        self.trainable = trainable or (lambda path: True)

    def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """(trainable leaves, frozen leaves), each a copy of the tree without the other's leaves."""
        return split(params, self.trainable)

    def init(self, params: PyTree) -> PyTree:
        return self.tx.init(self.split(params)[0])

    def apply(self, grads: PyTree, opt_state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """One step with `grads` of the trainable leaves: (new full params, new optimiser state)."""
        moving, fixed = self.split(params)
        updates, opt_state = self.tx.update(grads, opt_state, moving)
        return merge(optax.apply_updates(moving, updates), fixed), opt_state


def split(tree: PyTree, keep: Callable[[str], bool], prefix: str = "") -> tuple[PyTree, PyTree]:
    """Nested dict -> (leaves whose path satisfies `keep`, the others); empty sub-dicts vanish."""
    kept, rest = {}, {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            inner_kept, inner_rest = split(value, keep, f"{path}/")
            if inner_kept:
                kept[name] = inner_kept
            if inner_rest:
                rest[name] = inner_rest
        else:
            (kept if keep(path) else rest)[name] = value
    return kept, rest


def merge(a: PyTree, b: PyTree) -> PyTree:
    """The inverse of `split`: the union of two nested dicts with disjoint leaves."""
    out = dict(a)
    for name, value in b.items():
        if name not in out:
            out[name] = value
        elif isinstance(value, dict) and isinstance(out[name], dict):
            out[name] = merge(out[name], value)
        else:
            raise ValueError(f"both trees hold the leaf {name!r}: merge takes disjoint trees")
    return out


def create_state(
    params: PyTree, extra: PyTree, optimisers: dict[str, Optimiser], averaged: Iterable[str]
) -> TrainState:
    """The state at step 0: the EMA of the `averaged` networks starts at their parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params={net: jax.tree.map(jnp.copy, params[net]) for net in averaged},
        opt_state={net: tx.init(params[net]) for net, tx in optimisers.items()},
        extra=extra,
    )


def update_ema(ema: PyTree, params: PyTree, step: jax.Array, decay: float) -> PyTree:
    """ema <- d ema + (1-d) params with d = min(decay, (1+n)/(10+n)) at step n.

    The second argument keeps a short run's average from being its own initialisation.
    """
    n = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    return jax.tree.map(lambda e, p: e + (1.0 - d).astype(e.dtype) * (p - e), ema, params)


def stream_key(seed: int | jax.Array, stream: str, step: int | jax.Array) -> jax.Array:
    """The key of one step (or one sample) in a named stream; `stream` is hashed stably."""
    root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()) & 0x7FFFFFFF)
    return jax.random.fold_in(root, step)
