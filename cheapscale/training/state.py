"""The state of a training run at one step, and the keys of its random numbers.

Every field except `step` is a dict keyed by network (`net`; `generator`, `discriminator`). The
state holds no random key: the key of step n in a named stream is
fold_in(fold_in(key(seed), stream), n), so a resumed run draws the same numbers as an uninterrupted
run.
"""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from cheapscale.data.numbers import whole

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """step: int32 scalar, number of finished optimiser steps. params: {net: nested dict of
    weights}. ema_params: the same of the leaves that train (see `averaged`). opt_state: {net: optax
    state of the trainable leaves}. extra: {net: pytree} that is saved but not optimised
    (spectral-norm vectors, loss by noise)."""

    step: jax.Array
    params: PyTree
    ema_params: PyTree
    opt_state: PyTree
    extra: PyTree


class Optimiser:
    """An optax transform for the leaves whose path satisfies `trainable` (default: all).

    `trainable(path)` receives the '/'-joined path of a leaf, e.g. "dec_16_block0/conv1/kernel". The
    other leaves have no gradient and no optimiser state and never change.
    """

    def __init__(
        self, tx: optax.GradientTransformation, trainable: Callable[[str], bool] | None = None
    ):
        self.tx = tx
        self.trainable = trainable or (lambda path: True)

    def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """(trainable leaves, frozen leaves), as two nested dicts with disjoint leaves."""
        return split(params, self.trainable)

    def init(self, params: PyTree) -> PyTree:
        return self.tx.init(self.split(params)[0])

    def apply(self, grads: PyTree, opt_state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """(all params, optimiser state) after one step; `grads` of frozen leaves do nothing."""
        moving, fixed = self.split(params)
        updates, opt_state = self.tx.update(self.split(grads)[0], opt_state, moving)
        return merge(optax.apply_updates(moving, updates), fixed), opt_state


def split(tree: PyTree, keep: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """(leaves whose path satisfies `keep`, other leaves) of a nested dict, without empty dicts."""
    flat = flatten_dict(tree, sep="/")
    kept = {path: leaf for path, leaf in flat.items() if keep(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in kept}
    return unflatten_dict(kept, sep="/"), unflatten_dict(rest, sep="/")


def merge(a: PyTree, b: PyTree) -> PyTree:
    """The union of two nested dicts with disjoint leaves: the inverse of `split`."""
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    if both := set(a) & set(b):
        raise ValueError(f"both trees hold the leaf {min(both)!r}: merge takes disjoint trees")
    return unflatten_dict(a | b, sep="/")


def create_state(
    params: PyTree, extra: PyTree, optimisers: dict[str, Optimiser], nets: Iterable[str]
) -> TrainState:
    """The state at step 0; the EMA of the networks `nets` starts at their parameters."""
    every = Optimiser(optax.identity())
    moving = {net: optimisers.get(net, every).split(params[net])[0] for net in nets}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # Copies, because the step donates its state and a buffer may be donated only once.
        ema_params=jax.tree.map(jnp.copy, moving),
        opt_state={net: tx.init(params[net]) for net, tx in optimisers.items()},
        extra=extra,
    )


def averaged(state: TrainState, net: str) -> PyTree:
    """The EMA weights of a network. Those that never train are stored once, in `params`."""
    return overlaid(state.params[net], state.ema_params[net])


def overlaid(tree: PyTree, over: PyTree) -> PyTree:
    """A nested dict with the leaves of `over` where it has them, and those of `tree` elsewhere."""
    return unflatten_dict(flatten_dict(tree) | flatten_dict(over))


def update_ema(ema: PyTree, params: PyTree, step: jax.Array, decay: float) -> PyTree:
    """The EMA d ema + (1 - d) params, with d = min(decay, (1 + n) / (10 + n)) at step n.

    The bound (1 + n) / (10 + n) lets the average of a short run forget its initialisation.
    """
    n = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    # In this form the average of equal weights stays equal to them bit for bit; d e + (1 - d) p is
    # rounded.
    return jax.tree.map(lambda e, p: e + (1.0 - d).astype(e.dtype) * (p - e), ema, params)


def stream_key(seed: int, stream: str, step: int | jax.Array) -> jax.Array:
    """The key of one step (or one sample) in the random stream named `stream`.

    Raises ValueError for a seed that is no whole number of 32 bits: a key holds no more of it.
    """
    root = jax.random.key(whole(seed, "seed"), impl="threefry2x32")
    # crc32 is the same in every process, unlike Python's hash of a string.
    root = jax.random.fold_in(root, zlib.crc32(stream.encode()) & 0x7FFFFFFF)
    return jax.random.fold_in(root, step)
