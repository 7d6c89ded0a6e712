"""The rows of a pipeline's report: every generator, and controls that make the same images.

For each resolution R, in this order:

    dataR               training images: the value of a perfect generator
    teacher             at the base resolution: the teacher's own sampler
    dataS-bicubicR      training images of the smaller size S, enlarged: that of a perfect base
    NAME-nearestR, NAME-bicubicR    images of the smaller generator NAME, enlarged: no growth at all
    RUN-step0           the grown generator before its training
    RUN-CONTROL         trained controls (CONTROLS in configs/common.py), if the pipeline has them
    RUN                 the generator

All of them but the data begin with the same noise.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from cheapscale.data.pairs import InvertedPairs, PairStore
from cheapscale.data.pixels import check_finite, from_uint8, to_uint8
from cheapscale.data.resize import area_mean
from cheapscale.data.source import Source
from cheapscale.data.sources import open_data, open_pictures
from cheapscale.evaluation.detail import enlarge_bicubic
from cheapscale.evaluation.image_sets import choice
from cheapscale.models.growth import grow_params
from cheapscale.models.unet import init_params
from cheapscale.teacher import Experts, Generator, Teacher, load
from cheapscale.teacher.codec import codec_of, enter, factor_of, leave
from cheapscale.teacher.data import match_classes
from cheapscale.teacher.sampling import one_step, prior, round_trip, sample
from cheapscale.training.compiler import ONCE
from cheapscale.training.log import enlarge
from cheapscale.training.mesh import in_batches

NUM_PAIRS = 128  # training images, and held-out images, that the generators reconstruct
BATCH = 250


class Run(NamedTuple):
    """One finished stage of a pipeline; control is "" for a stage that later ones build upon."""

    folder: str
    config: Any
    workdir: str
    summary: dict
    seconds: float
    control: str = ""


class Row(NamedTuple):
    """The images of one generator or control.

    images: uint8 [n, R, R, 3] from fresh noise. again: {"train", "held_out"}: float32 [k, R, R, 3]
    from the latents of real images; {} for the data and the teacher.
    """

    images: np.ndarray
    again: dict[str, np.ndarray]


class Noise(NamedTuple):
    """What all rows begin with.

    parts: {"fresh", "train", "held_out"}: (z [n, h, w, c], labels [n]); the first is drawn from the
    prior, the others are the latents of real images. split: that of the held-out images. nodes: of
    the teacher's ODE. trip: (held-out images, the same after the teacher's round trip). rms:
    rms(z) / sigma_max of the held-out images.
    """

    parts: dict[str, tuple[np.ndarray, np.ndarray]]
    split: str
    nodes: int
    trip: tuple[np.ndarray, np.ndarray]
    rms: float


def rows(
    run: Run, controls: list[Run], teacher: Teacher | Experts, noise: Noise, drawn: dict[str, Row]
) -> Iterator[tuple[str, Row]]:
    """(name, row) of the controls at the run's resolution, then of the run.

    drawn: {work directory: row} of the smaller generators; the run's own is added.
    """
    px, base = pixels(run, teacher), run.config.get("base")
    z, labels = noise.parts["fresh"]
    train = read_some(run.config.data, len(z))
    yield f"data{px}", Row(train, {})
    generator = load(run.workdir)
    if not base:
        options = {"labels": labels, "steps": noise.nodes, "batch_size": BATCH}
        yield "teacher", Row(to_uint8(sample(teacher, np.arange(len(z)), **options)[0]), {})
    else:
        if base not in drawn:
            drawn[base] = generated(load(base), noise)
        small, name = drawn[base], pathlib.Path(base).name
        side = small.images.shape[1]
        reduced = to_uint8(area_mean(from_uint8(train), side))
        yield f"data{side}-bicubic{px}", bicubic(Row(reduced, {}), px)
        again = {part: enlarge(images, px) for part, images in small.again.items()}
        yield f"{name}-nearest{px}", Row(enlarge(small.images, px), again)
        yield f"{name}-bicubic{px}", bicubic(small, px)
        yield f"{run.folder}-step0", generated(step_zero(generator, load(base)), noise)
    for control in controls:
        # The run's own network with other weights, so that one program serves all.
        other = generator.replace(params=load(control.workdir).params)
        yield control.folder, generated(other, noise)
    drawn[run.workdir] = generated(generator, noise)
    yield run.folder, drawn[run.workdir]


def pixels(run: Run, teacher: Teacher | Experts) -> int:
    """The side in pixels of what a run draws, which is latents of an autoencoder or pixels."""
    return run.config.data.resolution * factor_of(teacher.meta)


def generated(generator: Generator, noise: Noise) -> Row:
    """The row of a generator, in one pass over all noise."""
    z, labels = (np.concatenate(arrays) for arrays in zip(*noise.parts.values()))
    images = in_batches(one_step, generator, z, labels, batch_size=BATCH)
    images = leave(generator.meta, check_finite(images, "samples", np.arange(len(z))))
    ends = np.cumsum([len(part[0]) for part in noise.parts.values()])
    again = dict(zip(noise.parts, np.split(images, ends[:-1])))
    return Row(to_uint8(again.pop("fresh")), again)


def bicubic(row: Row, resolution: int) -> Row:
    """The row with every image enlarged by bicubic interpolation."""
    images = to_uint8(enlarge_bicubic(from_uint8(row.images), resolution))
    return Row(images, {part: enlarge_bicubic(x, resolution) for part, x in row.again.items()})


def step_zero(grown: Generator, smaller: Generator) -> Generator:
    """The grown generator before training: `smaller`'s weights, and fresh weights of new blocks."""
    init = jax.jit(functools.partial(init_params, grown.fields), compiler_options=ONCE)
    fresh = init(jax.random.key(0))
    params, _ = grow_params(fresh, smaller.params, grown.net.config)
    return grown.replace(params=params)


def make_noise(teacher: Teacher | Experts, invert: Run, num: int, rescale: bool) -> Noise:
    """`num` draws from the prior, whose classes have the frequencies of the training set; latents
    that the run `invert` stored; and latents of held-out images, made here in the same way.

    rescale: whether the generators take latents of the prior's size.
    """
    config, size = invert.config, np.float32(1 / invert.summary["rms"] if rescale else 1)
    train = matched(teacher, open_data(config.data))
    z = prior(0, np.arange(num), teacher.shape, teacher.process.sigma_max)
    parts = {"fresh": (np.asarray(z), train.class_mix(num))}
    if pairs := stored_pairs(invert, train):
        z, labels = (np.stack([pair[key] for pair in pairs]) for key in ("z", "label"))
        parts["train"] = size * z, labels
    split = config.data.eval_split
    if teacher.num_classes and not open_pictures(config.data, split=split).num_classes:
        logging.warning("the round trip is of training images, as the others have no labels")
        split = config.data.split
    images, labels = first_images(matched(teacher, open_pictures(config.data, split=split)))
    x = enter(teacher.meta, images)
    n_x = np.random.default_rng(config.seed).standard_normal(x.shape, np.float32)
    how = config.invert
    trip = round_trip(teacher, nodes=how.nodes, level=how.noise, clip=how.clip)
    z, again = trip(x + np.float32(how.noise) * n_x, labels)
    parts["held_out"] = size * z, labels
    rms = float(np.sqrt(np.mean(z**2)) / teacher.process.sigma_max)
    again = leave(teacher.meta, again) if codec_of(teacher.meta) else again
    return Noise(parts, split, config.invert.nodes, (images, again), rms)


def targets(run: Run, invert: Run, teacher: Teacher | Experts, split: str) -> dict[str, np.ndarray]:
    """{"train", "held_out"}: the images at the run's resolution whose latents `make_noise` has."""
    pairs = stored_pairs(invert, matched(teacher, open_data(run.config.data)))
    found = {}
    if pairs:
        images = np.stack([pair["image"] for pair in pairs])
        found["train"] = leave(teacher.meta, images) if codec_of(teacher.meta) else images
    return found | {"held_out": first_images(open_pictures(run.config.data, split=split))[0]}


def stored_pairs(invert: Run, source: Source) -> list[dict]:
    """At most NUM_PAIRS pairs of training images, at the source's resolution, and their latents; []
    if the store holds the teacher's samples."""
    store = PairStore.open(invert.config.latents)
    if store.manifest["direction"] != "invert":
        return []
    pairs = InvertedPairs(source, store, flips=store.orientations == 2)
    return [pairs[int(i)] for i in choice(len(pairs), NUM_PAIRS)]


def first_images(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels): the first NUM_PAIRS, float32 [k, R, R, 3]."""
    return source.read(range(min(NUM_PAIRS, len(source))))


def matched(teacher: Teacher | Experts, source: Source) -> Source:
    """The source, with its classes numbered as the teacher does."""
    match_classes(teacher.meta, teacher.num_classes, source, teacher.workdir)
    return source


def read_some(data: Any, num: int, split: str | None = None) -> np.ndarray:
    """At most `num` images of a split, a fixed random choice, uint8 [n, R, R, 3]."""
    source = open_pictures(data, split=split)
    return to_uint8(source.read(choice(len(source), num))[0])
