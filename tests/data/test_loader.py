"""The loader: a batch depends only on the step, not on processes, threads or earlier batches."""

from functools import partial

import numpy as np
import pytest

from cheapscale.data.augment import augment, random_augment
from cheapscale.data.loader import batches
from cheapscale.data.sources import open_source


@pytest.fixture(scope="module")
def source():
    return open_source("scenes", "train", resolution=8, size=50)


def take(count, *args, **options):
    stream = batches(*args, **options)
    return [next(stream) for _ in range(count)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


OPTIONS = dict(batch_size=8, seed=3, transform=partial(random_augment, p=0.5))


def test_resuming_at_a_step_repeats_the_uninterrupted_stream(source):
    whole = take(16, source, **OPTIONS)  # more than two epochs
    for start in (0, 1, 7, 15):
        rest = take(16 - start, source, start_step=start, num_threads=2, **OPTIONS)
        for a, b in zip(whole[start:], rest):
            assert_same(a, b)


@pytest.mark.parametrize("count", [2, 4])
def test_all_processes_together_read_the_batch_of_a_single_one(source, count):
    whole = take(9, source, **OPTIONS)
    parts = [take(9, source, process=(i, count), **OPTIONS) for i in range(count)]
    for step, batch in enumerate(whole):
        for i in range(count):
            rows = slice(i * 8 // count, (i + 1) * 8 // count)
            mine = {name: values[rows] for name, values in batch.items()}
            assert_same(parts[i][step], mine)


def test_an_epoch_visits_every_item_once_and_the_next_in_another_order(source):
    ids = np.concatenate([b["id"] for b in take(20, source, batch_size=5, seed=0)])
    assert sorted(ids[:50]) == sorted(ids[50:]) == list(range(50))
    assert (ids[:50] != ids[50:]).any()


def test_seeds_differ(source):
    a, b = (take(1, source, batch_size=8, seed=seed)[0]["id"] for seed in (0, 1))
    assert (a != b).any()


def test_a_transform_depends_on_the_position_and_not_on_the_batch(source):
    small = take(12, source, **{**OPTIONS, "batch_size": 4})
    large = take(6, source, **OPTIONS)
    for name in small[0]:
        np.testing.assert_array_equal(
            np.concatenate([b[name] for b in small]), np.concatenate([b[name] for b in large])
        )


def test_no_two_elements_share_their_random_numbers(source):
    draws = np.concatenate(
        [
            b["draw"]
            for b in take(
                20,
                source,
                batch_size=10,
                seed=0,
                transform=lambda item, rng: {**item, "draw": rng.random()},
            )
        ]
    )
    assert len(np.unique(draws)) == 200  # the same image draws anew in the next epoch


def test_batches_have_the_sources_types(source):
    (batch,) = take(1, source, **OPTIONS)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "image": ((8, 8, 8, 3), "float32"),
        "label": ((8,), "int32"),
        "id": ((8,), "int64"),
        "augment": ((8, 9), "float32"),
    }
    (plain,) = take(1, source, batch_size=8, seed=3, num_threads=0)
    for i, image, label in zip(plain["id"], plain["image"], plain["label"]):
        np.testing.assert_array_equal(image, source[int(i)]["image"])
        assert label == source[int(i)]["label"]
    images, labels = source.read(plain["id"])
    np.testing.assert_array_equal(images, plain["image"])
    np.testing.assert_array_equal(labels, plain["label"])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=9, process=(0, 2)), "9 is not divisible by 2 processes"),
        (dict(batch_size=51), "51 must lie between 1 and the 50 items"),
        (dict(batch_size=0), "0 must lie between"),
    ],
)
def test_impossible_batches_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        batches(source, seed=0, **options)


def test_the_transform_changes_images_but_not_their_order(source):
    """Both streams visit the same items, and zero labels mean an unchanged image."""
    plain = take(3, source, batch_size=8, seed=3)
    seen = take(3, source, **OPTIONS)
    for a, b in zip(plain, seen):
        np.testing.assert_array_equal(a["id"], b["id"])
        for before, after, labels in zip(a["image"], b["image"], b["augment"]):
            assert (labels == 0).all() == np.array_equal(before, after)
    assert augment(plain[0]["image"][0], np.random.default_rng(0))[0].shape == (8, 8, 3)
