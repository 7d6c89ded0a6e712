"""The data-latent pairs of Stage 2: the teacher's ODE maps every training image to noise (PaGoDA,
Kim et al. 2024, arXiv 2405.14822, section 3.2).

    for each image x with class y, and for its mirror image if data.flip:
        z <- Heun along sigma = 0.002 -> 80 on the n-node Karras grid, starting at x itself; or
             along sigma = s -> 80, starting at x + s N(0, I)
        store[id, flip] <- z                                  (raw, at scale sigma_max)

The log shows rms(z) / sigma_max. A ratio below 1 shows that teacher and data do not match; latents
are stored without correcting it. The ODE maps images *with* noise of the level where it starts to
the prior. An image itself has none, so that z is too small in the directions in which images do not
vary, and a generator that learns from such z meets other ones when it samples. A teacher trained
for minutes does not know its images to 0.002 either. `invert.noise` is s, a level that it knows
(scenes at 8 px, 3,000 updates: ratio 0.74 without noise, 0.98 with s = 0.05, then with a variance
of 0.9 to 1 at all frequencies but the mean, which has 0.6).

`invert.direction` "sample" solves the ODE from noise to images: the store then holds the teacher's
samples of fresh noise, the pairs of the baseline L_dstl (Eq. 1).

`invert.omega` guides the ODE, with a scale for each record that is drawn from pi(omega) and stored:
the samples (z, c, omega, x) from which a guided generator learns scales above 1 (section 4.2). With
direction "invert" it is the guided inversion of that section. Appendix C calls L_rec incompatible
with guidance, so unguided pairs are the default.
"""

import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from cheapscale.data.augment import flip
from cheapscale.data.pairs import PairStore, drawn_latent
from cheapscale.data.pixels import check_finite, from_uint8, to_uint8
from cheapscale.data.sources import open_data
from cheapscale.diffusion.guidance import draw_scale
from cheapscale.diffusion.samplers import nfe
from cheapscale.features.network import full_precision
from cheapscale.teacher.data import check_teacher
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.load import load_teacher
from cheapscale.teacher.sampling import check_guidance, levels, network_calls, ode_map
from cheapscale.teacher.teacher import Teacher
from cheapscale.training.cost import traced_flops, tree_bytes
from cheapscale.training.mesh import in_batches, pinned
from cheapscale.training.stage import Job
from cheapscale.training.state import stream_key


def build(config) -> Job:
    """The inversion job of one source and teacher. Raises ValueError where they do not fit."""
    teacher = load_teacher(config.teacher, dtype=config.compute.dtype)
    source = open_data(config.data)
    check_teacher(teacher, source)
    settings = config.invert
    scale = checked_scale(teacher, settings)
    if not config.latents:
        raise ValueError("latents is empty: give --config.latents=DIR, a folder for the pairs")
    store = PairStore.create(config.latents, make_manifest(teacher, source, config))
    # Full float32 products: an accelerator's default would cause a larger error than Heun's method.
    solve = functools.partial(
        ode_map,
        direction=settings.direction,
        steps=settings.nodes,
        level=settings.noise,
        clip=settings.clip,
    )
    levels(teacher.process, settings.nodes, settings.direction, level=settings.noise)  # refuses

    @full_precision
    def run(teacher, x, label, omega=settings.cfg_scale):
        return solve(teacher, x, label, cfg_scale=omega)

    flops = functools.partial(flops_of_path, teacher, settings.nodes, settings.direction, scale)

    def prepare() -> float:
        store.begin()
        return flops()

    def run_shard(flops_per_latent: float, shard: int, mesh) -> dict:
        began = time.monotonic()
        records = store.records(shard)
        x, labels = (
            np.stack(rows) for rows in zip(*(path_start(source, store, n) for n in records))
        )
        labels, omega = labels.astype(np.int32), None
        rows = (x, labels)
        if settings.omega:
            omega = scales(config.seed, records, settings.omega)
            rows += (omega,)
        z = in_batches(run, teacher, *rows, batch_size=config.batch_size)
        if settings.direction == "sample" and source.channels == 3:  # eight bits, as data have
            z = from_uint8(to_uint8(check_finite(z, "samples", records)))
        cost = {
            "flops": flops_per_latent * len(records),
            "device_seconds": (time.monotonic() - began) * mesh.size,
        }
        return store.write_shard(shard, z, labels, cost, omega)

    return Job(
        num_shards=store.num_shards,
        items_per_shard=settings.per_shard,
        prepare=prepare,
        done=store.is_done,
        run_shard=run_shard,
        finish=lambda _: PairStore.open(store.folder).summary(),
        describe=functools.partial(
            describe,
            teacher,
            store,
            calls=network_calls(
                teacher.process, settings.nodes, settings.direction, cfg_scale=scale
            ),
            flops=flops,
            batch_size=min(config.batch_size, settings.per_shard),
        ),
    )


def checked_scale(teacher: Teacher | Experts, settings) -> float:
    """The guidance scale by which the cost is counted; ValueError where the teacher has none."""
    scale = 2.0 if settings.omega else settings.cfg_scale  # all above 1 cost the same
    check_guidance(teacher, scale)
    if settings.omega and settings.cfg_scale != 1.0:
        raise ValueError(
            f"invert.cfg_scale is {settings.cfg_scale}, but invert.omega draws the scales: leave "
            "out one of them"
        )
    return scale


def path_start(source, store: PairStore, n: int) -> tuple[np.ndarray, int | np.ndarray]:
    """(where the ODE of record n starts, its label)."""
    made = store.manifest
    if made["direction"] == "invert":
        x, label = oriented(source, *store.key(n))
        n_x = np.random.default_rng((made["seed"], n)).standard_normal(x.shape, np.float32)
        return x + np.float32(made["noise"]) * n_x, label
    if source.captioned:  # samples have the captions of the images
        return drawn_latent(made, n), source[store.key(n)[0]]["label"]
    return drawn_latent(made, n), n % max(source.num_classes, 1)


def describe(
    teacher: Teacher | Experts,
    store: PairStore,
    *,
    calls: int,
    flops: Callable[[], float],
    batch_size: int,
) -> dict:
    """The cost of the inversion, from shapes alone; nothing is computed or written.

    FLOPs are those of the network calls, without the solver's few additions. Memory is that of one
    device: the weights and the device's part of a batch.
    """
    rows = -(-batch_size // jax.local_device_count())
    model = jax.eval_shape(lambda model: model, teacher)
    x = jax.ShapeDtypeStruct((rows, *store.manifest["shape"]), np.float32)
    label = jax.ShapeDtypeStruct(teacher.label_shape(rows), np.int32)
    each = flops()
    weights, batch = tree_bytes(model), tree_bytes((x, label))
    todo = [shard for shard in range(store.num_shards) if not store.is_done(shard)]
    total, left = len(store), sum(len(store.records(s)) for s in todo)
    return {
        "networks": {"net": {"parameters": sum(p.size for p in jax.tree.leaves(model))}},
        "latents": total,
        "latents_left": left,
        "network_calls_per_latent": calls,
        "flops_per_network_call": each / calls,
        "flops_per_latent": each,
        "flops_total": each * total,
        "flops_left": each * left,
        "memory": {"bytes_per_device": weights + batch, "weights": weights, "batch": batch},
        "disk": str(store.folder),
        "disk_bytes": sum(store.shard_bytes(shard) for shard in todo),
    }


def flops_of_path(
    teacher: Teacher | Experts, nodes: int, direction: str, cfg_scale: float = 1.0
) -> float:
    """FLOPs of the teacher's calls along a path for one image, from shapes alone.

    They are counted for a batch of 8 and divided by 8, separately for each expert of a set.
    """
    x = jax.ShapeDtypeStruct((8, *teacher.shape), np.float32)
    label = jax.ShapeDtypeStruct(teacher.label_shape(8), np.int32)

    # Every call of one network costs the same, so that one level is enough.
    def one_call(member, x, label):
        return member.denoiser(label, cfg_scale=cfg_scale)(x, 1.0)

    return sum(
        nfe(part) * traced_flops(one_call, jax.eval_shape(lambda m: m, member), x, label) / 8
        for member, part in teacher.parts(levels(teacher.process, nodes, direction))
    )


@pinned()
def scales(seed: int, records: Sequence[int], distribution: str) -> np.ndarray:
    """omega ~ pi(omega), float32 [n]: one draw for each record's number."""
    keys = jax.vmap(lambda n: stream_key(seed, "omega", n))(np.asarray(records, np.uint32))
    return np.asarray(jax.vmap(lambda key: draw_scale(key, (), distribution))(keys))


def oriented(source, index: int, flipped: int) -> tuple[np.ndarray, int | np.ndarray]:
    """(image, label) of one record; flipped = 1 gives the mirror image, which is inverted too."""
    item = source[index]
    return (flip(item["image"]) if flipped else item["image"]), item["label"]


def make_manifest(teacher: Teacher | Experts, source, config) -> dict:
    """The manifest of a latent store, by which latents of another teacher or data are refused."""
    settings = config.invert
    made_by = {"teacher": teacher.fingerprint}
    if isinstance(teacher, Experts):  # the student will be a copy of their base
        made_by = {
            "teacher": teacher.meta["experts"]["base"],
            "experts": teacher.fingerprint,
            "boundaries": list(teacher.boundaries),
            # a student trained on these latents also counts the experts' training
            "extra_cost": teacher.meta["experts"]["extra_cost"],
        }
    if exported := teacher.meta.get("exported"):
        made_by["teacher_file"] = exported["sha256"]
    process = teacher.process
    return {
        **made_by,
        "teacher_step": teacher.step,
        "compute_dtype": teacher.net.config.dtype,
        "sigma_min": process.sigma_min,
        "sigma_max": process.sigma_max,
        "rho": process.rho,
        "source": source.describe(),
        "num_images": len(source),
        "shape": [source.resolution, source.resolution, source.channels],
        "direction": settings.direction,
        "orientations": 2 if config.data.flip else 1,
        "seed": config.seed,
        "nodes": settings.nodes,
        "clip": settings.clip,
        "noise": settings.noise,
        "level": settings.noise,  # where the ODE starts; stores without it started at sigma_min
        "cfg_scale": settings.cfg_scale,
        "dtype": settings.dtype,
        "per_shard": settings.per_shard,
        **({"omega": settings.omega} if settings.omega else {}),
    }
