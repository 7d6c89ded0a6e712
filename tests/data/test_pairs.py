"""The pair store: exact round trips, atomic shards, and errors for pairs of other images."""

import json
import os
import resource

import numpy as np
import pytest

from cheapscale.data.augment import flip
from cheapscale.data.loader import batches
from cheapscale.data.pairs import InvertedPairs, PairStore, SampledPairs
from cheapscale.data.resize import RESIZE_ID
from cheapscale.data.sources import open_source

IMAGES, BASE, PER_SHARD = 20, 8, 12
SHAPE = (BASE, BASE, 3)


def scenes(resolution=BASE, split="train", **options):
    return open_source("scenes", split, resolution=resolution, **{"size": IMAGES, **options})


def manifest(source=None, **changes):
    source = source or scenes()
    return {
        "teacher": "abc",
        "sigma_max": 80.0,
        "nodes": 40,
        "source": {
            "name": source.name,
            "split": source.split,
            "fingerprint": source.fingerprint(),
            "num_classes": source.num_classes,
            "resize": RESIZE_ID,
            "resolution": source.resolution,
        },
        "num_images": len(source),
        "orientations": 2,
        "shape": SHAPE,
        "dtype": "float32",
        "per_shard": PER_SHARD,
        **changes,
    }


def latent(n):
    """A latent that is different for every n."""
    return 80 * np.random.default_rng(n).standard_normal(SHAPE).astype(np.float32)


def write(writer, shard):
    source, records = scenes(), writer.records(shard)
    labels = source.labels()[[divmod(n, 2)[0] for n in records]]
    z = np.stack([latent(n) for n in records])
    return writer.write_shard(shard, z, labels, {"flops": 10.0 * len(records), "seconds": 1.0})


@pytest.fixture
def folder(tmp_path):
    writer = PairStore.create(tmp_path / "store", manifest())
    for shard in range(writer.num_shards):
        write(writer, shard)
    return writer.folder


def test_records_cover_every_key_once(tmp_path):
    writer = PairStore.create(tmp_path, manifest())
    assert writer.num_shards == 4  # 40 records by 12
    numbers = [n for shard in range(4) for n in writer.records(shard)]
    assert [writer.key(n) for n in numbers] == [(i, f) for i in range(IMAGES) for f in (0, 1)]


def test_without_mirror_images_there_is_one_latent_an_image(tmp_path):
    writer = PairStore.create(tmp_path, manifest(orientations=1))
    assert writer.num_shards == 2 and writer.key(13) == (13, 0)
    for shard in range(2):
        records, labels = writer.records(shard), scenes().labels()
        z = np.stack([latent(n) for n in records])
        writer.write_shard(shard, z, labels[list(records)])
    store = PairStore.open(tmp_path)
    assert len(store) == IMAGES
    np.testing.assert_array_equal(store.latent(13, 0), latent(13))
    with pytest.raises(ValueError, match="images 0..19 with flips 0..0"):
        store.latent(13, 1)
    pairs = InvertedPairs(scenes(), store, flips=False)
    np.testing.assert_array_equal(pairs[7]["z"], latent(7))
    with pytest.raises(
        ValueError, match="holds no latents of mirror images: give --config.data.flip=F"
    ):
        InvertedPairs(scenes(), store)


def test_float32_comes_back_bit_for_bit(folder):
    store = PairStore.open(folder)
    assert len(store) == 2 * IMAGES
    for n in reversed(range(2 * IMAGES)):
        id, flipped = divmod(n, 2)
        np.testing.assert_array_equal(store.latent(id, flipped), latent(n))
        record = store.record(id, flipped)
        assert record["label"] == scenes().labels()[id] and "omega" not in record


def test_guidance_scales_come_back_with_their_records(tmp_path):
    """omega of every record, in both kinds of pairs; a store without scales has none."""
    omega = np.linspace(1, 10, 2 * IMAGES, dtype=np.float32)
    store = PairStore.create(tmp_path, manifest(omega="uniform", seed=0))
    for shard in range(store.num_shards):
        rows = store.records(shard)
        labels = np.asarray([n // 2 % 8 for n in rows])
        store.write_shard(shard, np.stack([latent(n) for n in rows]), labels, omega=omega[rows])
    store = PairStore.open(tmp_path, expect={"omega": "uniform"})
    sampled = SampledPairs(store)
    np.testing.assert_array_equal([sampled[n]["omega"] for n in range(len(store))], omega)
    np.testing.assert_array_equal(sampled[7]["image"], latent(7))
    assert sampled[7]["label"] == 3 and np.abs(sampled[7]["z"] - latent(7)).max() > 1
    batch = next(batches(sampled, batch_size=4, seed=0))
    assert batch["omega"].dtype == np.float32 and batch["omega"].shape == (4,)
    with pytest.raises(ValueError, match="omega: stored 'uniform', wanted 'normal'"):
        PairStore.create(tmp_path, manifest(omega="normal", seed=0))


def test_float16_keeps_five_parts_in_ten_thousand(tmp_path):
    writer = PairStore.create(tmp_path, manifest(dtype="float16"))
    for shard in range(writer.num_shards):
        write(writer, shard)
    store = PairStore.open(tmp_path)
    for n in range(2 * IMAGES):
        z = store.latent(*divmod(n, 2))
        assert z.dtype == np.float32
        np.testing.assert_allclose(z, latent(n), rtol=5e-4, atol=80 * 6e-8)


def test_rms_is_reported_by_shard_and_store(folder):
    z = np.stack([latent(n) for n in range(2 * IMAGES)]) / 80
    total = PairStore.open(folder).rms()
    assert total == pytest.approx(np.sqrt((z**2).mean()), rel=1e-5)
    assert PairStore.open(folder).summary()["rms"] == total
    values = write(PairStore.create(folder, manifest()), 0)
    assert values["rms"] == pytest.approx(np.sqrt((z[:PER_SHARD] ** 2).mean()), rel=1e-5)


def test_the_cost_of_a_store_is_the_sum_over_its_shards(folder):
    shards = PairStore.create(folder, manifest()).num_shards
    assert PairStore.open(folder).cost() == {"flops": 20.0 * IMAGES, "seconds": 1.0 * shards}


def test_an_unfinished_store_is_refused_and_can_be_continued(tmp_path):
    with pytest.raises(ValueError, match="no pair store"):
        PairStore.open(tmp_path)
    writer = PairStore.create(tmp_path, manifest())
    write(writer, 1)
    with pytest.raises(
        ValueError, match=r"lacks 3 of 4 shards \(0, 2, 3\).*run the stage 'invert'"
    ):
        PairStore.open(tmp_path)
    again = PairStore.create(tmp_path, manifest())
    assert [again.is_done(k) for k in range(4)] == [False, True, False, False]
    for shard in (0, 2, 3):
        write(again, shard)
    np.testing.assert_array_equal(PairStore.open(tmp_path).latent(9, 1), latent(19))


def test_a_crash_halfway_leaves_no_shard(tmp_path, monkeypatch):
    writer = PairStore.create(tmp_path, manifest())
    write(writer, 0)

    def dying(file, records):
        file.write(records[:5].tobytes())
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        write(writer, 1)
    monkeypatch.undo()
    assert not writer.is_done(1) and writer.is_done(0)
    assert not list(tmp_path.glob("*.tmp"))
    # A process that is killed cannot clean up: its file is never taken for a shard.
    stale = tmp_path / "shard-00001.npy.elsewhere-1.tmp"
    young = tmp_path / "shard-00001.npy.elsewhere-2.tmp"
    for path in (stale, young):
        path.write_bytes(b"half a shard")
    os.utime(stale, (0, 0))
    assert not writer.is_done(1)
    write(writer, 1)
    # an old one is cleared away, a young one may belong to a writer that is alive
    assert writer.is_done(1) and not stale.exists() and young.exists()


def test_a_full_disk_loses_nothing(tmp_path):
    writer = PairStore.create(tmp_path, manifest())
    write(writer, 0)
    before = (tmp_path / "shard-00000.npy").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file may grow beyond 4 KiB
    try:
        with pytest.raises(OSError, match="shard 1 of .* could not be written .*make room"):
            write(writer, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not writer.is_done(1) and not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "shard-00000.npy").read_bytes() == before
    write(writer, 1)
    assert writer.is_done(1)


def test_a_manifest_that_differs_is_refused_with_both_values(folder):
    with pytest.raises(ValueError, match="teacher: stored 'abc', wanted 'xyz'"):
        PairStore.open(folder, expect={"teacher": "xyz", "nodes": 40})
    with pytest.raises(ValueError, match="source.split: stored 'train', wanted 'test'"):
        PairStore.open(folder, expect={"source": {"split": "test"}})
    with pytest.raises(ValueError, match="guidance: stored None, wanted 2"):
        PairStore.open(folder, expect={"guidance": 2})
    PairStore.open(folder, expect={"teacher": "abc", "shape": SHAPE})
    with pytest.raises(ValueError, match="nodes: stored 40, wanted 20.*give another folder"):
        PairStore.create(folder, manifest(nodes=20))
    missing = {key: value for key, value in manifest().items() if key != "nodes"}
    with pytest.raises(ValueError, match="nodes: stored 40, wanted None"):
        PairStore.create(folder, missing)


def test_bad_latents_are_refused(tmp_path):
    writer = PairStore.create(tmp_path, manifest())
    z, labels = np.ones((PER_SHARD, *SHAPE), np.float32), np.zeros(PER_SHARD, np.int32)
    with pytest.raises(ValueError, match="takes 12 latents of shape"):
        writer.write_shard(0, z[:3], labels[:3])
    z[5, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="image 2 with flip 1 is not finite"):
        writer.write_shard(0, z, labels)
    assert not writer.is_done(0)


def test_a_missing_key_or_damaged_shard_is_named(folder):
    store = PairStore.open(folder)
    with pytest.raises(ValueError, match="no latent of image 20 with flip 0"):
        store.latent(IMAGES, 0)
    with pytest.raises(ValueError, match="with flip 2"):
        store.latent(0, 2)
    shard = folder / "shard-00001.npy"
    whole = shard.read_bytes()
    for damaged in (b"\0" * 65536, whole[:3000], (folder / "shard-00000.npy").read_bytes()):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="shard-00001.npy is damaged"):
            PairStore.open(folder).latent(6, 0)
    other = json.loads((folder / "manifest.json").read_text()) | {"format": "older"}
    (folder / "manifest.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="holds format 'older'"):
        PairStore.open(folder)


def test_pairs_match_image_latent_and_flip(folder):
    """The mirror image belongs to the latent with flip 1, whatever the resolution has grown to."""
    for resolution in (BASE, 4 * BASE):
        source = scenes(resolution)
        pairs = InvertedPairs(source, PairStore.open(folder))
        assert len(pairs) == 2 * IMAGES
        for j in (0, 1, 6, 7, 39):
            item = pairs[j]
            id, flipped = j // 2, j % 2
            image = source[id]["image"]
            assert (item["id"], item["flip"]) == (id, flipped)
            np.testing.assert_array_equal(item["image"], flip(image) if flipped else image)
            assert (item["image"] != (image if flipped else flip(image))).any()
            np.testing.assert_array_equal(item["z"], latent(j))
            assert item["label"] == source[id]["label"]


def test_rescaled_latents_have_the_deviation_of_the_prior(folder):
    store = PairStore.open(folder)
    raw, pairs = (InvertedPairs(scenes(), store, rescale=rescale) for rescale in (False, True))
    z = np.stack([pairs[j]["z"] for j in range(len(pairs))])
    assert np.sqrt(np.mean(z.astype(np.float64) ** 2)) == pytest.approx(store.sigma_max)
    np.testing.assert_allclose(z[3], raw[3]["z"] / store.rms(), rtol=1e-6)


@pytest.mark.parametrize("proportion", [1.0, 0.5, 0.01])
def test_proportion_keeps_the_first_of_each_class(folder, proportion):
    source = scenes()
    pairs = InvertedPairs(source, PairStore.open(folder), proportion)
    labels = source.labels()
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kept = [i for i in pairs.ids if labels[i] == label]
        assert kept == members[: max(1, int(proportion * len(members)))].tolist()
    assert len(pairs) == 2 * len(pairs.ids)
    assert {pairs[j]["id"] for j in range(len(pairs))} == set(pairs.ids.tolist())


def test_pairs_of_another_source_are_refused(folder):
    store = PairStore.open(folder)
    for source, message in (
        (scenes(split="test"), "source.split: stored 'train', wanted 'test'"),
        (scenes(seed=1), "source.fingerprint"),
        (scenes(size=19), "num_images: stored 20, wanted 19"),
        (scenes(unlabelled=True), "source.num_classes: stored 8, wanted 0"),
    ):
        with pytest.raises(ValueError, match=message):
            InvertedPairs(source, store)
    with pytest.raises(ValueError, match="4 px cannot pair with latents of 8 px"):
        InvertedPairs(scenes(4), store)


def test_pairs_feed_the_loader(folder):
    pairs = InvertedPairs(scenes(16), PairStore.open(folder))
    batch = next(batches(pairs, batch_size=8, seed=0, num_threads=2))
    assert batch["image"].shape == (8, 16, 16, 3) and batch["z"].shape == (8, *SHAPE)
    for id, flipped, z in zip(batch["id"], batch["flip"], batch["z"]):
        np.testing.assert_array_equal(z, latent(2 * id + flipped))
