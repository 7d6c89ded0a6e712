"""Sets of images that evaluation looks at, read a few at a time: plain ones, and reconstructions
with what they should be.

A teacher takes an image to noise and back on the same nodes (spec section 2.2). A one-step
generator maps the stored noise of an image, found once at the base resolution, to that image at its
own resolution: what L_rec trains.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cheapscale.data.latents import LatentStore, PairSource
from cheapscale.evaluation.pixels import from_uint8, to_uint8
from cheapscale.evaluation.quality import choice
from cheapscale.stages.invert import round_trip
from cheapscale.stages.networks import make_generator
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.sharding import in_batches


class Images(NamedTuple):
    """A set of `num` images. read(ids [n]) -> (uint8 [n, R, R, 3], labels [n])."""

    num: int
    resolution: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Pairs(NamedTuple):
    """`num` images with what they should be. read(ids [n]) -> (images, targets), both float32
    [n, resolution, resolution, 3] in [-1, 1]."""

    num: int
    resolution: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def chosen_images(source, order: np.ndarray) -> Images:
    """The images of a source whose ids are `order`, in that order."""

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        items = [source[int(order[i])] for i in ids]
        images = to_uint8(np.stack([item["image"] for item in items]))
        return images, np.asarray([item["label"] for item in items], np.int32)

    return Images(len(order), source.resolution, read)


def teacher_pairs(teacher: Loaded, source, num: int, *, nodes: int, batch_size: int) -> Pairs:
    """At most `num` images of `source`, a fixed random choice, there and back on `nodes` nodes."""
    order = choice(len(source), num)
    trip = round_trip(teacher, nodes=nodes, batch_size=batch_size)

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        items = [source[int(i)] for i in order[ids]]
        targets = np.stack([item["image"] for item in items])
        _, images = trip(targets, np.asarray([item["label"] for item in items], np.int32))
        return np.clip(images, -1, 1), targets

    return Pairs(len(order), source.resolution, read)


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

    return Pairs(len(order), source.resolution, read)


def file_pairs(images: Images, targets: Images) -> Pairs:
    """Images that were made elsewhere, and in the same order what they should be."""
    if (images.num, images.resolution) != (targets.num, targets.resolution):
        raise ValueError(
            f"there are {images.num} images of {images.resolution} px but {targets.num} targets of "
            f"{targets.resolution}: give one target for each image, at its size"
        )

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return from_uint8(images.read(ids)[0]), from_uint8(targets.read(ids)[0])

    return Pairs(images.num, images.resolution, read)
