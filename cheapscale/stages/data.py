"""The stages' view of data: sources opened from a config, checked, and streamed by step."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from cheapscale.data import loader, sources
from cheapscale.data.augment import random_flip
from cheapscale.data.latents import record_key
from cheapscale.data.resize import RESIZE_ID
from cheapscale.training.checkpoint import Loaded

PyTree = Any


def open_data(data, *, split: str | None = None, resolution: int | None = None):
    """The source that `config.data` names, at its split and resolution unless told otherwise.

    Scenes have as many images as one asks for: `options.size` is that of the training split, and
    another split keeps its own size.
    """
    options = dict(data["options"])
    if split not in (None, data["split"]):
        options.pop("size", None)
    return sources.open_source(
        data["name"],
        split or data["split"],
        resolution=resolution or data["resolution"],
        data_dir=data["data_dir"] or None,
        **options,
    )


def read(source, ids: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """(images float32 [n, R, R, c], labels int32 [n]) of a source; ValueError for no ids."""
    batch = loader.gather(source, ids)
    return batch["image"], batch["label"].astype(np.int32)


def describe(source) -> dict:
    """What travels with the weights about the images they were trained on."""
    return {
        "name": source.name,
        "split": source.split,
        "resolution": source.resolution,
        "num_classes": source.num_classes,
        "class_names": list(source.class_names),
        "fingerprint": source.fingerprint(),
        "resize": RESIZE_ID,
    }


def class_mix(source, num: int) -> np.ndarray:
    """int32 [num] labels with the source's own class frequencies, the same for every caller.

    Classes drawn uniformly would differ from an unbalanced data set by their frequencies alone.
    """
    pick = np.random.default_rng(0).integers(0, len(source), num)
    return source.labels()[pick].astype(np.int32)


def check_model(model: dict, source) -> None:
    """Refuse a network that does not fit the images, before anything compiles."""
    if model["resolution"] != source.resolution:
        raise ValueError(
            f"model.resolution is {model['resolution']}, but data.resolution is "
            f"{source.resolution}: set both to the base resolution"
        )
    if model["num_classes"] not in (0, source.num_classes):
        raise ValueError(
            f"model.num_classes is {model['num_classes']}, but {source.name} has "
            f"{source.num_classes} classes: set it to that, or to 0 for an unconditional model"
        )


def check_teacher(teacher: Loaded, source) -> None:
    """The teacher must have been trained at this resolution, with this resize and these classes;
    other images are said to be such."""
    model, trained = teacher.meta["networks"]["net"], teacher.meta["data"]
    check_model(model, source)
    for key, value in (("name", source.name), ("class_names", list(source.class_names))):
        if trained[key] != value:
            raise ValueError(
                f"the teacher in {teacher.workdir} was trained on {key} {trained[key]!r}, but "
                f"these images have {value!r}: name the images that the teacher knows"
            )
    if trained["resize"] != RESIZE_ID:
        raise ValueError(
            f"the teacher in {teacher.workdir} was trained on images made by {trained['resize']}, "
            f"but this version makes them by {RESIZE_ID}: retrain it, or use its own version"
        )
    if trained.get("fingerprint", source.fingerprint()) != source.fingerprint():
        logging.warning("these are not the images that %s was trained on", teacher.workdir)


def stream(config, source, transform=None) -> Callable[[int], Iterator]:
    """batches(start_step) of a stage that trains on images, as its config says."""
    return functools.partial(
        real_batches,
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        num_threads=config.data.num_threads,
        transform=transform,
    )


def real_batches(
    source, start_step: int, *, batch_size: int, seed: int, transform, num_threads: int = 1
) -> Iterator:
    """Batches {image, label, ...} of this process from `start_step` on."""
    stream = loader.batches(
        source,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        transform=transform,
        num_threads=num_threads,
    )
    # not a generator of its own: what the loader refuses is refused at once
    return ({name: rows for name, rows in batch.items() if name != "id"} for batch in stream)


def drawn_latent(manifest: dict, n: int) -> np.ndarray:
    """Latent n of a store of teacher samples, at scale sigma_max: drawn again, never stored."""
    rng = np.random.default_rng((manifest["seed"], n))
    z = rng.standard_normal(manifest["shape"], dtype=np.float32)
    return np.float32(manifest["sigma_max"]) * z


class TeacherPairs:
    """(z, the teacher's sample of z) from a store made with `invert.direction` "sample"."""

    def __init__(self, store):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, n: int) -> dict:
        label, image = self.store.record(*record_key(self.store.manifest, n))
        z = drawn_latent(self.store.manifest, n)
        return {"image": image, "z": z, "label": np.int32(label), "id": np.int64(n)}


def pair_and_real_batches(
    source, pairs, start_step: int, *, seed: int, flips: bool, **loading
) -> Iterator[PyTree]:
    """{"pair": {image, z, label}, "real": {image, label}}: two independent step-addressed streams.

    pairs: a PairSource or TeacherPairs; the real stream sees every image, whatever the pairs.
    loading: batch_size, num_threads.
    """
    mirror = random_flip if flips else None
    pair_stream = real_batches(pairs, start_step, seed=seed, transform=None, **loading)
    real_stream = real_batches(source, start_step, seed=seed + 1, transform=mirror, **loading)
    return (
        {"pair": {name: rows for name, rows in pair.items() if name != "flip"}, "real": real}
        for pair, real in zip(pair_stream, real_stream)
    )
