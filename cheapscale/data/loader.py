"""Batches as a pure function of the step: shuffle, split over processes, transform, prefetch.

The source is shuffled anew in each epoch and repeated endlessly: the seed determines one infinite
sequence of items. With batch size B, step k uses the items k B ... (k + 1) B - 1, and process p of
P reads the p-th of P equal consecutive parts of them. So all processes together read the batch that
a single process would read, and a run that starts at `start_step` sees the same batches as an
uninterrupted run, without any saved iterator state. The random numbers of a transform depend only
on the seed and on the item's position in the sequence.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from grain.sources import RandomAccessDataSource

from cheapscale.data.augment import random_flip
from cheapscale.data.source import Source

Item = dict[str, Any]
Batch = dict[str, np.ndarray]
Transform = Callable[[Item, np.random.Generator], Item]
PREFETCH = 2  # batches prepared ahead; Grain's default would keep 500 of them in memory


def batches(
    source: RandomAccessDataSource,
    start_step: int = 0,
    *,
    batch_size: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
    transform: Transform | None = None,
    num_threads: int = 1,
) -> Iterator[Batch]:
    """Endless batches {name: [batch_size / process count, ...]} from `start_step` on.

    source: items with the same names and shapes, by index. batch_size: global, summed over the
    processes. process: (index, count) of the calling process. num_threads: number of batches
    prepared in parallel; 0 prepares each batch on demand. It does not change the batches.
    """
    index, count = process
    if not 1 <= batch_size <= len(source):
        raise ValueError(
            f"batch_size {batch_size} must lie between 1 and the {len(source)} items of the "
            f"source: use more data, or give --config.batch_size={len(source)}"
        )
    if batch_size % count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by {count} processes: use a multiple of "
            f"{count}"
        )
    items = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if transform is not None:
        items = items.random_map(transform)
    # Cut the sequence into per-process batches: number k * count + index is step k of process
    # `index`. Slicing is lazy, so a late `start_step` costs nothing.
    parts = items.batch(batch_size // count, drop_remainder=True)
    steps = parts[index::count][start_step:]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=PREFETCH)
    return iter(steps.to_iter_dataset(options))


def training_batches(source: RandomAccessDataSource, start_step: int, **options) -> Iterator[Batch]:
    """`batches` without the ids and flips of the items, which are not inputs of a network."""
    # A generator expression evaluates `batches(...)` immediately, so its errors are raised here
    # and not at the first `next`.
    return (
        {name: rows for name, rows in batch.items() if name not in ("id", "flip")}
        for batch in batches(source, start_step, **options)
    )


def stream(
    config, source: Source, transform: Transform | None = None, *, process: tuple[int, int]
) -> Callable[[int], Iterator[Batch]]:
    """The function batches(start_step) of a stage that trains on images, from its config."""
    return functools.partial(
        training_batches,
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        process=process,
        transform=_with_words(source, transform),
        num_threads=config.data.num_threads,
    )


def _with_words(source: Source, transform: Transform | None) -> Transform | None:
    """The transform, and a random caption of every image where the source uses captions."""
    if not source.captioned:
        return transform
    images = transform or (lambda item, rng: item)
    return lambda item, rng: source.reworded(images(item, rng), rng)


def pair_and_real_batches(
    source: Source,
    pairs: RandomAccessDataSource,
    start_step: int,
    *,
    seed: int,
    flips: bool,
    sampled: RandomAccessDataSource | None = None,
    **options,
) -> Iterator[dict[str, Batch]]:
    """{"pair": {image, z, label}, "real": {image, label}}: PaGoDA's two independent batches.

    pairs: `InvertedPairs` or `SampledPairs`, for L_rec. source: all images, also those without a
    pair, for the discriminator. sampled: guided `SampledPairs`, which add a batch "sampled" {image,
    z, label, omega}. options: batch_size, process and num_threads of `batches`.
    """
    transform = _with_words(source, random_flip if flips else None)
    # Other seeds make the real images independent of the images in the pairs.
    made = {
        "pair": training_batches(pairs, start_step, seed=seed, **options),
        "real": training_batches(source, start_step, seed=seed + 1, transform=transform, **options),
    }
    if sampled is not None:
        made["sampled"] = training_batches(sampled, start_step, seed=seed + 2, **options)
    return (dict(zip(made, rows)) for rows in zip(*made.values()))
