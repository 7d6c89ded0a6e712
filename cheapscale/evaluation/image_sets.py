"""Sets of images that evaluation reads in parts: images, and reconstructions with their targets.

A teacher inverts an image to noise by its ODE and samples from that noise on the same nodes
(PaGoDA, Kim et al. 2024, arXiv 2405.14822, section 3.1). A generator reconstructs an image at its
own resolution from the latent that the inversion stored at the base resolution: these are the
pairs that L_rec is trained on.

Every set has a fingerprint of its content, so that a work directory is never resumed with another
set.
"""

import hashlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cheapscale.data.arrays import read_npz
from cheapscale.data.digest import digest
from cheapscale.data.listing import below
from cheapscale.data.numbers import whole
from cheapscale.data.pairs import InvertedPairs, PairStore
from cheapscale.data.pixels import check_finite, check_images, from_uint8, pictures, to_uint8
from cheapscale.data.sources import open_source
from cheapscale.teacher.codec import enter, factor_of, leave
from cheapscale.teacher.data import match_classes
from cheapscale.teacher.experts import Experts
from cheapscale.teacher.sampling import Model, one_step, round_trip, sampler
from cheapscale.teacher.teacher import Generator, Teacher
from cheapscale.teacher.text import tokenise
from cheapscale.training.mesh import in_batches

FOLDER_OPTIONS = ("allow_upscale", "skip_corrupt", "probe")


class Images(NamedTuple):
    """A set of `num` images.

    read(ids [n]) -> (uint8 [n, R, R, 3], labels [n]); labels are zeros if `labelled` is False.
    captions(ids) -> list of texts; None for images without captions. names: of the files of a
    folder, without suffix; () for others.
    """

    num: int
    resolution: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    fingerprint: str
    labelled: bool = True
    captions: Callable[[np.ndarray], list[str]] | None = None
    names: tuple[str, ...] = ()


class Pairs(NamedTuple):
    """`num` reconstructions with their targets.

    read(ids [n]) -> (images, targets), both float32 [n, R, R, 3] in [-1, 1].
    """

    num: int
    resolution: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    fingerprint: str


def choice(length: int, num: int) -> np.ndarray:
    """The ids of at most `num` of `length` images: a random choice, the same in every call."""
    return np.random.default_rng(0).permutation(length)[: whole(num, "num", 1)]


def chosen_images(source, order: np.ndarray) -> Images:
    """The images of `source` with the ids `order`, in that order."""

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = source.read(order[ids])
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
    model: Model,
    resolution: int,
    labels: np.ndarray | None,
    num: int,
    *,
    captions: list[str] | None = None,
    **options,
) -> Images:
    """Samples 0 ... num - 1 of a model.

    labels: [num], or None for a model without classes. captions: one for each sample, for a model
    of captions. options: those of `sampling.sampler`.
    """
    draw = sampler(model, **options)
    shown = np.zeros(num, np.int32) if labels is None else labels
    given = tokenise(model.net.config.text, captions) if captions else shown

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, _ = draw(ids, given[ids])
        return to_uint8(images), shown[ids]

    kept = {name: value for name, value in options.items() if name != "batch_size"}
    made_by = digest([model.fingerprint, given.tolist(), kept])
    texts = None if captions is None else lambda ids: [captions[i] for i in ids]
    return Images(num, resolution, read, made_by, labelled=labels is not None, captions=texts)


def file_images(path: str, resolution: int, num: int, **options: bool) -> Images:
    """At most `num` images of a folder (searched recursively, without labels) or of an .npz.

    A larger set is reduced to a fixed random choice; the order stays. resolution: 0 accepts the
    resolution of the .npz. options: some of FOLDER_OPTIONS, for a folder.
    """
    place = pathlib.Path(path)
    if place.is_dir():
        if not resolution:
            raise ValueError("--images needs --resolution: a folder is opened at it")
        if (place / "sample.json").exists() or (place / "samples.npz").exists():
            raise ValueError(
                f"{path} holds what launch.sample wrote, whose pictures are sheets of many images: "
                f"give its file, --images={place / 'samples.npz'}"
            )
        options |= {"resolution": resolution, "data_dir": path, "unlabelled": True}
        source = open_source("folder", "all", **options)
        order = np.sort(choice(len(source), num))
        names = tuple(below(source.path(i).with_suffix(""), place.expanduser()) for i in order)
        return chosen_images(source, order)._replace(names=names)
    if place.suffix != ".npz" or not place.is_file():
        raise ValueError(f"{path} is neither a folder nor an .npz file: give the path of one")
    images = npz_images(place, num)
    if resolution not in (0, images.resolution):
        raise ValueError(f"{path} holds {images.resolution} px images, not {resolution}")
    return images


def npz_images(path: pathlib.Path, num: int) -> Images:
    """At most `num` images of an .npz with the array `images` or (as ADM writes it) `arr_0`, uint8
    or floats in [-1, 1], and optionally `labels` and `captions`. A larger set is reduced to a fixed
    random choice."""
    stored = read_npz(path)
    name = "images" if "images" in stored else "arr_0"
    if name not in stored:
        raise ValueError(f"{path} holds {', '.join(stored)} but no images and no arr_0")
    images, labels, texts = stored[name], stored.get("labels"), stored.get("captions")
    images = pictures(images, f"images of {path}")
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"images of {path} are {images.shape[1:3]}: crop them to squares")
    images = images if images.dtype == np.uint8 else to_uint8(images)
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise ValueError(f"labels of {path} are {labels.dtype} {labels.shape}: give integers [n]")
    if labels is not None and labels.size and not 0 <= labels.min() <= labels.max() < 2**31:
        raise ValueError(f"labels of {path} reach {labels.min()} ... {labels.max()}: count from 0")
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


def teacher_pairs(
    teacher: Teacher | Experts, source, num: int, *, nodes: int, batch_size: int
) -> Pairs:
    """Round trips of at most `num` images of `source` by the teacher's ODE on `nodes` nodes."""
    match_classes(teacher.meta, teacher.num_classes, source, teacher.workdir)
    order = choice(len(source), num)
    trip = round_trip(teacher, nodes=nodes, batch_size=batch_size)

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        targets, labels = source.read(order[ids])
        _, images = trip(enter(teacher.meta, targets), labels)
        return leave(teacher.meta, images), targets  # clipped, as samples are when they are stored

    made_by = digest([teacher.fingerprint, source.fingerprint(), len(order), nodes])
    return Pairs(len(order), source.resolution, read, made_by)


def generator_pairs(
    generator: Generator, source, latents: str, num: int, *, batch_size: int
) -> Pairs:
    """G(z) of at most `num` stored latents z, with the images of `source` that were inverted to z.

    source: the training images at the generator's resolution, or latents, whose targets are what
    they decode to. latents: folder of their pair store.
    Raises ValueError for a store of another teacher or of other images.
    """
    store = PairStore.open(
        latents, expect={"teacher": generator.meta["teacher"], "direction": "invert"}
    )
    rescale = generator.meta.get("config", {}).get("rescale_latents", False)
    pairs = InvertedPairs(source, store, flips=store.orientations == 2, rescale=rescale)
    order = choice(len(pairs), num)  # mirror images, if the store has them, are chosen too

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        items = [pairs[int(i)] for i in order[ids]]
        z = np.stack([item["z"] for item in items])
        labels = np.asarray([item["label"] for item in items], np.int32)
        images = in_batches(one_step, generator, z, labels, batch_size=batch_size)
        images = leave(generator.meta, check_finite(images, "reconstructions", order[ids]))
        return images, leave(generator.meta, np.stack([item["image"] for item in items]))

    made_by = digest([generator.fingerprint, source.fingerprint(), store.manifest, num])
    return Pairs(len(order), source.resolution * factor_of(generator.meta), read, made_by)


def file_pairs(images: Images, targets: Images) -> Pairs:
    """Reconstructions read from files, with their targets in the same order, in which the files of
    two folders have the same names."""
    if (images.num, images.resolution) != (targets.num, targets.resolution):
        raise ValueError(
            f"there are {images.num} images of {images.resolution} px but {targets.num} targets of "
            f"{targets.resolution}: give one target for each image, at its size"
        )
    for name, other in zip(images.names, targets.names):
        if name != other:
            raise ValueError(
                f"the target of {name} would be {other}: give both the same name in their folders"
            )

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return from_uint8(images.read(ids)[0]), from_uint8(targets.read(ids)[0])

    made_by = digest([images.fingerprint, targets.fingerprint])
    return Pairs(images.num, images.resolution, read, made_by)
