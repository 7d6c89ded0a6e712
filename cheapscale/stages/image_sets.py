"""Sets of images that evaluation looks at, read a few at a time: plain ones, and reconstructions
with what they should be.

A teacher takes an image to noise and back on the same nodes (spec section 2.2). A one-step
generator maps the stored noise of an image, found once at the base resolution, to that image at its
own resolution: what L_rec trains.

Every set has a fingerprint of what it holds, so that results of one are never taken for another's.
"""

import hashlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cheapscale.data.digest import digest
from cheapscale.data.latents import LatentStore, PairSource
from cheapscale.evaluation.pixels import check_images, from_uint8, to_uint8
from cheapscale.evaluation.quality import choice
from cheapscale.stages import data
from cheapscale.stages.invert import round_trip
from cheapscale.stages.networks import fingerprint, make_generator
from cheapscale.stages.sampling import sampler
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.sharding import in_batches


class Images(NamedTuple):
    """A set of `num` images.

    read(ids [n]) -> (uint8 [n, R, R, 3], labels [n]); labels are zeros where `labelled` is False.
    captions(ids) -> texts, None where the images have none.
    """

    num: int
    resolution: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    fingerprint: str
    labelled: bool = True
    captions: Callable[[np.ndarray], list[str]] | None = None


class Pairs(NamedTuple):
    """`num` images with what they should be. read(ids [n]) -> (images, targets), both float32
    [n, resolution, resolution, 3] in [-1, 1]."""

    num: int
    resolution: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    fingerprint: str


def chosen_images(source, order: np.ndarray) -> Images:
    """The images of a source whose ids are `order`, in that order."""

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = data.read(source, order[ids])
        return to_uint8(check_images(images)), labels

    def captions(ids: np.ndarray) -> list[str]:
        return [source.caption(int(order[i])) for i in ids]

    return Images(
        len(order),
        source.resolution,
        read,
        digest([source.fingerprint(), source.resolution, np.asarray(order).tolist()]),
        labelled=bool(source.num_classes),
        captions=captions if len(order) and source.caption(int(order[0])) else None,
    )


def sampled_images(
    loaded: Loaded, resolution: int, labels: np.ndarray | None, num: int, **options
) -> Images:
    """Samples 0 ... num - 1 of a model. labels: [num], None for a model without classes.
    options: those of `sampling.sampler`."""
    draw = sampler(loaded, **options)
    given = np.zeros(num, np.int32) if labels is None else labels

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, _ = draw(ids, given[ids])
        return to_uint8(check_images(images, "samples")), given[ids]

    kept = {name: value for name, value in options.items() if name != "batch_size"}
    made_by = digest([fingerprint(loaded.params), given.tolist(), kept])
    return Images(num, resolution, read, made_by, labelled=labels is not None)


def npz_images(path: pathlib.Path, num: int) -> Images:
    """At most `num` images of an .npz, a fixed random choice in the order they stand in: uint8
    `images` or ADM's `arr_0`, perhaps `labels` and `captions`."""
    with np.load(path) as stored:
        name = "images" if "images" in stored else "arr_0"
        if name not in stored:
            raise ValueError(f"{path} holds {', '.join(stored.files)} but no images and no arr_0")
        images = stored[name]
        labels = stored["labels"] if "labels" in stored else None
        texts = stored["captions"] if "captions" in stored else None
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: {name} is {images.dtype}: store uint8 (pixels.to_uint8)")
    check_images(images, f"images of {path}")
    for what, values in (("labels", labels), ("captions", texts)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{path} holds {len(images)} images but {len(values)} {what}")
    order = np.sort(choice(len(images), num))
    given = np.zeros(len(images), np.int32) if labels is None else labels.astype(np.int32)
    content = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
    kept = [None if values is None else values.tolist() for values in (labels, texts)]
    return Images(
        len(order),
        images.shape[1],
        lambda ids: (images[order[ids]], given[order[ids]]),
        digest([content, kept, len(order)]),
        labelled=labels is not None,
        captions=None if texts is None else lambda ids: [str(t) for t in texts[order[ids]]],
    )


def teacher_pairs(teacher: Loaded, source, num: int, *, nodes: int, batch_size: int) -> Pairs:
    """At most `num` images of `source`, a fixed random choice, there and back on `nodes` nodes."""
    order = choice(len(source), num)
    trip = round_trip(teacher, nodes=nodes, batch_size=batch_size)

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        targets, labels = data.read(source, order[ids])
        _, images = trip(targets, labels)
        return np.clip(images, -1, 1), targets

    made_by = digest([fingerprint(teacher.params), source.fingerprint(), len(order), nodes])
    return Pairs(len(order), source.resolution, read, made_by)


def generator_pairs(generator: Loaded, source, latents: str, num: int, *, batch_size: int) -> Pairs:
    """At most `num` images of `source`, a fixed random choice, and G of their stored noise.

    source: the training images at the generator's resolution. latents: folder of the store that was
    made for them; one of another teacher or of other images is refused.
    """
    (model,) = generator.meta["networks"].values()
    store = LatentStore.open(
        latents, expect={"teacher": generator.meta["teacher"], "direction": "invert"}
    )
    pairs = PairSource(source, store)
    order = choice(len(pairs), num)
    generate = make_generator(model, generator.meta["diffusion"])

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        items = [pairs[int(i)] for i in order[ids]]
        z = np.stack([item["z"] for item in items])
        labels = np.asarray([item["label"] for item in items], np.int32)
        images = in_batches(generate, generator.params, z, labels, batch_size=batch_size)
        return np.clip(images, -1, 1), np.stack([item["image"] for item in items])

    made_by = digest([fingerprint(generator.params), source.fingerprint(), store.manifest, num])
    return Pairs(len(order), source.resolution, read, made_by)


def file_pairs(images: Images, targets: Images) -> Pairs:
    """Images that were made elsewhere, and in the same order what they should be."""
    if (images.num, images.resolution) != (targets.num, targets.resolution):
        raise ValueError(
            f"there are {images.num} images of {images.resolution} px but {targets.num} targets of "
            f"{targets.resolution}: give one target for each image, at its size"
        )

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return from_uint8(images.read(ids)[0]), from_uint8(targets.read(ids)[0])

    made_by = digest([images.fingerprint, targets.fingerprint])
    return Pairs(images.num, images.resolution, read, made_by)
