"""The stages' view of data: sources opened from a config, checked, and streamed by step."""

from collections.abc import Iterator
from typing import Any

import jax

from cheapscale.data import loader, sources
from cheapscale.data.augment import random_flip
from cheapscale.data.latents import PairSource
from cheapscale.data.resize import RESIZE_ID

PyTree = Any


def open_data(data, *, split: str | None = None, resolution: int | None = None):
    """The source that `config.data` names, at its split and resolution unless told otherwise."""
    return sources.open_source(
        data["name"],
        split or data["split"],
        resolution=resolution or data["resolution"],
        data_dir=data["data_dir"] or None,
        **dict(data["options"]),
    )


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


def real_batches(source, start_step: int, *, batch_size: int, seed: int, transform) -> Iterator:
    """Batches {image, label, ...} of this process from `start_step` on."""
    stream = loader.batches(
        source,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        transform=transform,
    )
    for batch in stream:
        batch.pop("id")
        yield batch


def pair_and_real_batches(
    source, store, start_step: int, *, batch_size: int, seed: int, proportion: float, flips: bool
) -> Iterator[PyTree]:
    """{"pair": {image, z, label}, "real": {image, label}}: two independent step-addressed streams.

    proportion: the share of each class whose pairs feed L_rec; the real stream sees every image.
    """
    pairs = PairSource(source, store, proportion=proportion)
    pair_stream = real_batches(pairs, start_step, batch_size=batch_size, seed=seed, transform=None)
    real_stream = real_batches(
        source,
        start_step,
        batch_size=batch_size,
        seed=seed + 1,
        transform=random_flip if flips else None,
    )
    for pair, real in zip(pair_stream, real_stream):
        pair.pop("flip")
        yield {"pair": pair, "real": real}
