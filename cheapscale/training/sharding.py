"""Where arrays live: one named mesh, one rule that places every leaf on it; and where processes
wait for each other.

Axes: `data` (batch), `fsdp` (batch, and the parameters are split along it), `tensor` (kept for
tensor parallelism; 1 until a network uses it). Axis types are Auto: linen layers fail under
Explicit axes with sharded kernels.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any
AXES = ("data", "fsdp", "tensor")
# Leaves smaller than this many elements are replicated: gathering them costs more than it saves.
MIN_SHARDED = 2**20
WEEK = 7 * 24 * 3600 * 1000  # in milliseconds


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices; one size may be -1, the devices that are left.

    Raises ValueError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(
            f"mesh sizes {dict(zip(AXES, sizes))}: each is positive, at most one is -1"
        )
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if sizes[2] != 1:
        raise ValueError(
            f"config.mesh.tensor is {sizes[2]}, but no network here is split by its channels: use "
            "fsdp for large parameters, and data"
        )
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))} does not cover {len(devices)} devices: "
            "make config.mesh multiply to the device count, or set one axis to -1"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis of a batch is split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Refuse a batch that the mesh cannot split evenly."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the mesh's data x fsdp = {ways}: "
            f"use a multiple of {ways}"
        )


def placed(shapes: PyTree, mesh: Mesh) -> PyTree:
    """ShapeDtypeStructs with the shardings that `infer_sharding` gives them."""
    return jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
        shapes,
        infer_sharding(shapes, mesh),
    )


def infer_sharding(tree: PyTree, mesh: Mesh, min_size: int = MIN_SHARDED) -> PyTree:
    """A NamedSharding for each leaf (arrays or ShapeDtypeStructs): large leaves are split along
    their largest axis that `fsdp` divides, everything else is replicated.

    Optimiser moments have the shapes of their parameters, so they follow them.
    """
    fsdp = mesh.shape["fsdp"]

    def place(leaf):
        if fsdp == 1 or math.prod(leaf.shape) < min_size:
            return replicated(mesh)
        divisible = [axis for axis, n in enumerate(leaf.shape) if n % fsdp == 0]
        if not divisible:
            return replicated(mesh)
        axis = max(divisible, key=lambda a: leaf.shape[a])
        return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return jax.tree.map(place, tree)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """This process's rows (NumPy) -> global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def fetch(tree: PyTree) -> PyTree:
    """Arrays -> NumPy, whole on every process, whether or not other processes hold a part."""

    def whole(x):
        if x.is_fully_addressable:
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Processes leave this block when the last one is done with it; where one raises in it all do
    (its own error there, RuntimeError elsewhere).

    Inside, every process works by itself for as long as it takes: they do not wait on the devices,
    whose collectives give up on a process that is late. What they do together inside is to be
    another such block, or `agreed`.

    A process that dies ends all of them: at once if it is process 0, otherwise when its heartbeat
    is missed (100 s by default). So does an error outside such a block, once jax.distributed has
    waited for the other processes to exit (300 s by default).
    """
    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    error = None
    try:
        yield
    except Exception as caught:
        error = caught
        logging.error("%s failed here; waiting for the other processes: %r", what, error)
    # One key for all blocks: a process that failed before an inner one meets the others there.
    ocp.multihost.get_barrier_sync_fn()(key="cheapscale", timeout_ms=WEEK)
    failed = multihost_utils.process_allgather(np.asarray([error is not None]), tiled=True)
    if error is not None:
        raise error
    if failed.any():
        raise RuntimeError(f"process {np.argmax(failed)} failed in {what}: its log says why")


def agreed(value: np.ndarray) -> np.ndarray:
    """Process 0's `value` on every process, whatever shape and dtype the others have.

    All processes have to call it, in the same order as everything else they do together.
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    packed = io.BytesIO()
    with together("agreeing on a value"):
        np.save(packed, value, allow_pickle=False)
    # As bytes: a broadcast on the devices would cut 64-bit numbers to 32, and wants equal shapes.
    mine = np.frombuffer(packed.getvalue(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(mine.size)))
    first = multihost_utils.broadcast_one_to_all(np.resize(mine, length))
    return np.load(io.BytesIO(first.tobytes()), allow_pickle=False)


def in_batches(
    fn: Callable,
    params: PyTree,
    *arrays: np.ndarray,
    batch_size: int,
    prepare: Callable | None = None,
) -> PyTree:
    """fn(params, *rows) over all rows in equal padded batches, split over the devices of the mesh.

    prepare(rows) -> rows, in NumPy, a batch at a time: what would take much memory for all rows.
    Returns fn's result (an array or a tree of them) in NumPy, all rows. One compilation for one
    `fn` and batch size, whatever the number of rows and of calls; fewer rows than a batch are a
    smaller batch. ValueError where there are none.
    """
    if not len(arrays[0]):
        raise ValueError("no rows: there is nothing to compute")
    mesh = jax.sharding.get_mesh()
    mesh = mesh if mesh.axis_names else make_mesh(devices=jax.local_devices())
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = max(1, math.ceil(min(batch_size, len(arrays[0])) / ways)) * ways
    place = batch_sharding(mesh)
    params = jax.device_put(params, replicated(mesh))
    run = jax.jit(fn, out_shardings=place)
    out = []
    for start in range(0, len(arrays[0]), batch_size):
        rows = [np.asarray(a[start : start + batch_size]) for a in arrays]
        rows = [prepare(r) for r in rows] if prepare else rows
        short = batch_size - len(rows[0])
        if short:
            rows = [np.concatenate([r, np.repeat(r[-1:], short, axis=0)]) for r in rows]
        result = run(params, *(jax.device_put(r, place) for r in rows))
        out.append(jax.tree.map(lambda a: a[: len(a) - short], fetch(result)))  # noqa: B023
    return jax.tree.map(lambda *parts: np.concatenate(parts), *out)
