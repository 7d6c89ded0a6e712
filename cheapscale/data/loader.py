"""Batches as a pure function of the step: shuffle, split over processes, transform, prefetch.

The source, reshuffled each epoch and repeated without end, is one infinite sequence of elements,
fixed by the seed. Step k takes elements k B to (k + 1) B - 1 of it. Process p of P gets the p-th
of P consecutive parts of these, so that the rows of all processes in turn are the batch of a single
one, and a run that starts at `start_step` sees what the uninterrupted run would: no iterator state
is ever saved.
A transform draws from a generator that depends on the seed and the element's position alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

Item = dict[str, Any]
Transform = Callable[[Item, np.random.Generator], Item]


def batches(
    source: Sequence[Item],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    transform: Transform | None = None,
    num_threads: int = 1,
    prefetch: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches {name: [batch_size / process_count, ...]} from step `start_step` on.

    source: random access to dicts of arrays and numbers of equal shapes. batch_size: global.
    num_threads, prefetch: batches made at the same time and ahead of use; results do not depend on
    them. 0 threads makes each batch when asked.
    """
    if len(source) == 0:
        raise ValueError("the source is empty: there is nothing to batch")
    if batch_size < 1 or batch_size > len(source):
        raise ValueError(
            f"batch_size {batch_size} must lie between 1 and the {len(source)} items of the "
            "source: lower it or use more data"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by {process_count} processes: "
            f"use a multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is outside 0..{process_count - 1}")
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, got {start_step}")
    elements = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        elements = elements.shuffle()
    elements = elements.repeat()
    if transform is not None:
        elements = elements.random_map(transform)
    parts = elements.batch(batch_size // process_count, drop_remainder=True)
    steps = parts[process_index::process_count][start_step:]
    # Elements are whole batches here: grain's default buffer would hold 500 of them.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(steps.to_iter_dataset(options))


def gather(source: Sequence[Item], ids: Iterable[int]) -> dict[str, np.ndarray]:
    """The items with these indices as one batch {name: [n, ...]}; for jobs and evaluation."""
    items = [source[int(i)] for i in ids]
    if not items:
        raise ValueError("cannot gather a batch of no items")
    return {name: np.stack([item[name] for item in items]) for name in items[0]}
