"""Latent construction: every training image to noise by the teacher's ODE (spec section 2).

    for each image x with class y, and for its mirror image if data.flip:
        z <- Heun along sigma = 0.002 -> 80 on the n-node Karras grid, starting at x itself
        store[id, flip] <- z                                  (raw, at scale sigma_max)

Products are in full float32 where the network's precision is float32: an accelerator's default
would cost more than Heun's own error. The log shows rms(z)/sigma_max: below 1 it measures how far
the teacher is from the data (section 2.3). It is never normalised away.

`invert.direction` "sample" runs the other way: the store then holds the teacher's samples of fresh
noise, the pairs of the L_dstl baseline (section 3.2(d)).
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cheapscale.data import latents
from cheapscale.data.augment import flip
from cheapscale.diffusion import solvers
from cheapscale.evaluation.pixels import from_uint8, to_uint8
from cheapscale.models.features.network import exact
from cheapscale.stages import data
from cheapscale.stages.networks import (
    check_guidance,
    fingerprint,
    load_teacher,
    make_segments,
    segment_grids,
)
from cheapscale.stages.sampling import levels, network_calls, teacher_map
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.footprint import traced_bytes, traced_flops, tree_bytes
from cheapscale.training.sharding import in_batches
from cheapscale.training.stage import Job

PyTree = Any


def build(config) -> Job:
    """The inversion job of one source and teacher. Raises ValueError where they do not fit."""
    teacher = load_teacher(config.teacher, dtype=config.compute.dtype)
    source = data.open_data(config.data)
    data.check_teacher(teacher, source)
    check_guidance(teacher.meta, config.invert.cfg_scale)
    if not config.latents:
        raise ValueError("config.latents is empty: name the folder of the latent store")
    direction = config.invert.direction
    if direction not in ("invert", "sample"):
        raise ValueError(f"invert.direction is {direction!r}: choose 'invert' or 'sample'")
    manifest = make_manifest(
        teacher,
        source,
        direction=direction,
        orientations=2 if config.data.flip else 1,
        seed=config.seed,
        nodes=config.invert.nodes,
        clip=config.invert.clip,
        cfg_scale=config.invert.cfg_scale,
        dtype=config.invert.dtype,
        per_shard=config.invert.per_shard,
    )
    store = latents.LatentWriter(config.latents, manifest)
    run = exact(
        teacher_map(
            teacher.meta["networks"]["net"],
            teacher.meta["diffusion"],
            steps=config.invert.nodes,
            clip=config.invert.clip,
            cfg_scale=config.invert.cfg_scale,
            direction=direction,
        )
    )

    def start(n: int) -> tuple[np.ndarray, int]:
        if direction == "invert":
            return oriented(source, *latents.record_key(store.manifest, n))
        return data.drawn_latent(manifest, n), n % max(source.num_classes, 1)

    calls = network_calls(
        teacher.meta["diffusion"], config.invert.nodes, direction, cfg_scale=config.invert.cfg_scale
    )

    def finished(z: np.ndarray) -> np.ndarray:
        """Latents stay as they are; a teacher's samples are images of eight bits (section 2.2)."""
        return z if direction == "invert" else from_uint8(to_uint8(z))

    def prepare() -> float:
        store.begin()
        return flops_of_path(teacher, store.manifest["shape"], config.invert, direction)

    def run_shard(flops_per_latent: float, shard: int, mesh) -> dict:
        began = time.monotonic()
        records = store.records(shard)
        inputs, labels = zip(*(start(n) for n in records))
        z = in_batches(
            run,
            teacher.params,
            np.stack(inputs),
            np.asarray(labels, np.int32),
            batch_size=config.batch_size,
        )
        cost = {
            "flops": flops_per_latent * len(records),
            "device_seconds": (time.monotonic() - began) * mesh.size,
        }
        return store.write_shard(shard, finished(z), np.asarray(labels, np.int32), cost)

    return Job(
        num_shards=store.num_shards,
        items_per_shard=config.invert.per_shard,
        prepare=prepare,
        done=store.is_done,
        run_shard=run_shard,
        finish=lambda _: store.finish(),
        describe=functools.partial(
            describe,
            teacher,
            store,
            run,
            calls=calls,
            flops=functools.partial(
                flops_of_path, teacher, store.manifest["shape"], config.invert, direction
            ),
            batch_size=min(config.batch_size, config.invert.per_shard),
        ),
    )


def describe(
    teacher: Loaded,
    store: latents.LatentWriter,
    run: Callable,
    *,
    calls: int,
    flops: Callable[[], float],
    batch_size: int,
) -> dict:
    """What inverting costs, from shapes: nothing is computed or written.

    FLOPs are of the images' network calls, the solver's few additions left out. Memory is one
    device's: weights, and the values alive at once while it solves its part of a batch.
    """
    ways = jax.local_device_count()
    rows = -(-batch_size // ways)
    params = jax.eval_shape(lambda p: p, teacher.params)
    x = jax.ShapeDtypeStruct((rows, *store.manifest["shape"]), np.float32)
    label = jax.ShapeDtypeStruct((rows,), np.int32)
    each = flops()
    weights, values = tree_bytes(params), traced_bytes(run, params, x, label)
    todo = [shard for shard in range(store.num_shards) if not store.is_done(shard)]
    total, left = latents.num_records(store.manifest), sum(len(store.records(s)) for s in todo)
    return {
        "networks": {"net": {"parameters": sum(p.size for p in jax.tree.leaves(params))}},
        "latents": total,
        "latents_left": left,
        "network_calls_per_latent": calls,
        "flops_per_network_call": each / calls,
        "flops_per_latent": each,
        "flops_total": each * total,
        "flops_left": each * left,
        "memory": {"bytes_per_device": weights + values, "weights": weights, "values": values},
        "disk": str(store.folder),
        "payload_bytes": sum(store.payload_bytes(shard) for shard in todo),
        "disk_bytes": sum(store.file_bytes(shard) for shard in todo),
    }


def flops_of_path(teacher: Loaded, shape: Sequence[int], settings, direction: str) -> float:
    """FLOPs of the teacher's calls along a path for one image, from shapes; counted in a batch of
    8, for each specialist of a set by itself. settings: config.invert."""
    model, diffusion = teacher.meta["networks"]["net"], teacher.meta["diffusion"]
    grid = levels(diffusion, settings.nodes, direction)
    segments = make_segments(model, diffusion, cfg_scale=settings.cfg_scale)
    params = jax.eval_shape(lambda p: p, teacher.params)
    x = jax.ShapeDtypeStruct((8, *shape), np.float32)
    label = jax.ShapeDtypeStruct((8,), np.int32)
    total = 0.0
    for i, part in enumerate(segment_grids(diffusion, grid)):

        def one_call(params, x, label, i=i):
            return segments(params, label, grid)[i][0](x, 1.0)

        calls = sum(solvers.nfe([(None, part)]))
        total += calls * traced_flops(one_call, params, x, label) / 8
    return total


def oriented(source, index: int, flipped: int) -> tuple[np.ndarray, int]:
    """(image, label) of one record; the mirror image has its own latent (spec section 12.3)."""
    item = source[index]
    return (flip(item["image"]) if flipped else item["image"]), int(item["label"])


def make_manifest(teacher: Loaded, source, **settings) -> dict:
    """What a latent store says about itself: enough to refuse any pair that does not belong."""
    diffusion = teacher.meta["diffusion"]
    by = {"teacher": fingerprint(teacher.params)}
    if "specialists" in diffusion:  # the student will be a copy of their base
        specialists = diffusion["specialists"]
        by = {
            "teacher": specialists["base"],
            "specialists": by["teacher"],
            "borders": list(specialists["borders"]),
            "paid": specialists["paid"],  # whoever uses the latents pays for the specialists
        }
    return {
        **by,
        "teacher_step": teacher.step,
        "compute_dtype": teacher.meta["networks"]["net"]["dtype"],
        "sigma_min": diffusion["sigma_min"],
        "sigma_max": diffusion["sigma_max"],
        "rho": diffusion["rho"],
        "source": data.describe(source),
        "num_images": len(source),
        "shape": [source.resolution, source.resolution, 3],
        **settings,
    }


def round_trip(
    teacher: Loaded,
    *,
    nodes: int,
    clip: bool = False,
    batch_size: int = 64,
    diffusion_there: dict | None = None,
) -> Callable:
    """trip(images [n, R, R, 3], labels [n]) -> (z, images again): inverted, and solved back on the
    same nodes, with no step to 0. diffusion_there: another owner of the steps there."""
    settings = {"steps": nodes, "clip": clip}
    model, diffusion = teacher.meta["networks"]["net"], teacher.meta["diffusion"]
    way = diffusion_there or diffusion
    there = exact(teacher_map(model, way, direction="invert", **settings))
    back = exact(teacher_map(model, diffusion, direction="round_trip", **settings))

    def both(params: PyTree, x: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = there(params, x, label)
        return z, back(params, z, label)

    def trip(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return in_batches(both, teacher.params, images, labels, batch_size=batch_size)

    return trip
