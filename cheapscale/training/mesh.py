"""The placement of arrays on devices by one named mesh, and barriers between processes.

The mesh axes are `data` (splits the batch), `fsdp` (splits the batch and large parameters) and
`tensor` (always 1, as no network splits its channels). Axis types are Auto, since linen layers fail
under Explicit axes with sharded kernels.
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
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cheapscale.data.numbers import whole

PyTree = Any
AXES = ("data", "fsdp", "tensor")
# Leaves with fewer elements are replicated: gathering them costs more than the memory it saves.
MIN_SHARDED = 2**20
WEEK = 7 * 24 * 3600 * 1000  # in milliseconds


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over `devices` (default: all). One size may be -1, for the remaining devices.

    Raises ValueError if the sizes do not cover the devices, or `tensor` is not 1.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) == 1 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if sizes[2] != 1:
        raise ValueError(f"tensor is {sizes[2]}, but no network is split by its channels: give 1")
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise ValueError(
            f"a mesh of data={sizes[0]}, fsdp={sizes[1]} does not cover {len(devices)} devices: "
            f"give --config.mesh.fsdp a divisor of {len(devices)}"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """A block, or as a decorator a function, in which a seed gives what it gives everywhere: no
    JAX_* variable of this machine changes types or random numbers. ValueError for a seed offset,
    which JAX cannot undo for a block."""
    if offset := jax.config.jax_random_seed_offset:
        raise ValueError(f"JAX_RANDOM_SEED_OFFSET={offset} changes what every seed gives: unset it")
    with (
        jax.enable_x64(False),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
        jax.transfer_guard("allow"),
    ):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its leading axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds completely."""
    return NamedSharding(mesh, P())


def batch_ways(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError for a batch that the mesh cannot split evenly."""
    ways = batch_ways(mesh)
    if batch_size % ways:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {ways} devices that share a batch: "
            f"give --config.batch_size={max(batch_size // ways, 1) * ways}"
        )


def placed(shapes: PyTree, mesh: Mesh) -> PyTree:
    """ShapeDtypeStructs with the shardings of `infer_sharding`."""
    places = infer_sharding(shapes, mesh)
    return jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
    )


def infer_sharding(tree: PyTree, mesh: Mesh, min_size: int = MIN_SHARDED) -> PyTree:
    """A NamedSharding for each leaf (arrays or ShapeDtypeStructs): a leaf with at least `min_size`
    elements is split along its largest axis that `fsdp` divides; others are replicated.

    Optimiser moments have the shapes of their parameters, so they are split in the same way.
    """
    fsdp = mesh.shape["fsdp"]

    def place(leaf):
        divisible = [axis for axis, n in enumerate(leaf.shape) if n % fsdp == 0]
        if fsdp == 1 or math.prod(leaf.shape) < min_size or not divisible:
            return replicated(mesh)
        # For a kernel [3, 3, in, out] this is the larger channel axis.
        axis = max(divisible, key=lambda a: leaf.shape[a])
        return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return jax.tree.map(place, tree)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Global arrays on the mesh, assembled from the NumPy rows of each process."""
    sharding = batch_sharding(mesh)
    # No host holds the whole batch: each process contributes the rows of its own devices.
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def fetch(tree: PyTree) -> PyTree:
    """The arrays as complete NumPy arrays on every process; gathers parts of other processes."""

    def whole(x):
        if x.is_fully_addressable:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


class OtherFailed(RuntimeError):
    """Another process of the run failed, so this one cannot go on."""


@contextlib.contextmanager
def barrier(what: str) -> Iterator[None]:
    """A block that all processes leave together, when the last one has reached its end. If one
    raises inside, all raise: that process its own error, the others OtherFailed.

    Processes may take any time inside: they wait on the coordination service and not on a device
    collective, which would time out. Collective operations inside have to be other barriers or
    `broadcast_from_host0`. If a process dies, all end when jax.distributed notices.
    """
    if jax.process_count() == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
        logging.error("%s failed here; waiting for the other processes: %r", what, error)
    # All blocks use the same key. So a process that failed before an inner barrier, and is already
    # at the outer one, still meets the others, and all learn of the failure.
    ocp.multihost.get_barrier_sync_fn()(key="cheapscale", timeout_ms=WEEK)
    failed = multihost_utils.process_allgather(np.asarray([error is not None]), tiled=True)
    if error is not None:
        raise error
    if failed.any():
        raise OtherFailed(f"process {np.argmax(failed)} failed in {what}: its log says why")


def broadcast_from_host0(value: np.ndarray) -> np.ndarray:
    """The `value` of process 0, on every process; the values of the others are ignored.

    All processes have to call it, in the same order as other collective calls.
    """
    if jax.process_count() == 1:
        return value
    packed = io.BytesIO()
    with barrier("agreeing on a value"):
        np.save(packed, value, allow_pickle=False)
    # Sent as bytes: a device broadcast truncates 64-bit numbers to 32 bits and needs equal shapes.
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
    compiler_options: dict[str, str] | None = None,
) -> PyTree:
    """fn(params, *rows) for all rows, as NumPy (an array or a tree of arrays [rows, ...]).

    The batches have equal sizes, at most the number of rows; each is split over the devices of the
    mesh. One `fn` object compiles once per batch size.

    prepare(rows) -> rows: NumPy preprocessing of one batch, for results that would not fit in
    memory for all rows. compiler_options: of `fn`'s compilation.
    """
    whole(batch_size, "batch_size", 1)
    if not len(arrays[0]):
        raise ValueError("there are no rows to compute: give at least one")
    mesh = jax.sharding.get_mesh()
    mesh = mesh if mesh.axis_names else make_mesh(devices=jax.local_devices())
    ways = batch_ways(mesh)
    batch_size = max(1, math.ceil(min(batch_size, len(arrays[0])) / ways)) * ways
    place = batch_sharding(mesh)
    run, out = jax.jit(fn, out_shardings=place, compiler_options=compiler_options), []
    with pinned():
        # Every device holds all weights and computes a part of the batch, without communication.
        params = jax.device_put(params, replicated(mesh))
        for start in range(0, len(arrays[0]), batch_size):
            rows = [np.asarray(a[start : start + batch_size]) for a in arrays]
            rows = [prepare(r) for r in rows] if prepare else rows
            short = batch_size - len(rows[0])
            if short:  # pad with copies of the last row, so that no second shape compiles
                rows = [np.concatenate([r, np.repeat(r[-1:], short, axis=0)]) for r in rows]
            result = run(params, *(jax.device_put(r, place) for r in rows))
            out.append(jax.tree.map(lambda a: a[: len(a) - short], fetch(result)))  # noqa: B023
    return jax.tree.map(lambda *parts: np.concatenate(parts), *out)
