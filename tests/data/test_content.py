"""A set of images is known by what its files hold, and an unchanged one is not read twice."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from cheapscale.data import content
from cheapscale.data.content import content_hash
from cheapscale.data.sources import open_source
from cheapscale.evaluation.statistics import Identity, cache_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHEAPSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "SETTLED", -1.0)  # the files of a test are younger
    return tmp_path / "cache" / "fingerprints"


def write_pictures(folder, seed, suffix="bmp", num=3):
    """Save pictures whose names and sizes are the same for every seed; returns the folder."""
    folder.mkdir(parents=True)
    for i in range(num):
        pixels = np.random.default_rng([seed, i]).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{suffix}", **{"compress_level": 0})
    return folder


def fingerprint(folder):
    return open_source("folder", "all", resolution=8, data_dir=folder).fingerprint()


@pytest.mark.parametrize("suffix", ["bmp", "png"])
def test_sets_of_equal_names_and_sizes_have_other_fingerprints_and_statistics(tmp_path, suffix):
    a, b, again = (
        write_pictures(tmp_path / name, seed, suffix)
        for name, seed in (("a", 1), ("b", 2), ("c", 1))
    )
    sizes = [[path.stat().st_size for path in sorted(folder.iterdir())] for folder in (a, b)]
    assert sizes[0] == sizes[1]
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a) == fingerprint(again) == fingerprint(a.rename(tmp_path / "moved"))
    rest = dict(split="all", resolution=8, num=3, network="n", sha256="")
    files = [cache_path(Identity(fingerprint(folder), **rest)) for folder in (again, b)]
    assert files[0] != files[1]


def test_the_times_of_files_and_the_order_of_a_listing_do_not_matter(tmp_path):
    a = write_pictures(tmp_path / "a", 1)
    before = fingerprint(a)
    shutil.copytree(a, tmp_path / "b", copy_function=shutil.copyfile)
    for path in sorted((tmp_path / "b").iterdir(), reverse=True):
        os.utime(path, (1, 1))
    assert fingerprint(tmp_path / "b") == before


def test_a_changed_file_is_seen_even_if_size_and_time_are_restored(tmp_path):
    a = write_pictures(tmp_path / "a", 1)
    before, stat = fingerprint(a), (a / "1.bmp").stat()
    data = bytearray((a / "1.bmp").read_bytes())
    data[-1] ^= 1
    (a / "1.bmp").write_bytes(data)
    os.utime(a / "1.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(a) != before


def test_an_unchanged_set_is_not_read_again_and_the_cache_stays_small(tmp_path, cache, monkeypatch):
    a = write_pictures(tmp_path / "a", 1, num=5)
    files, reads = sorted(a.iterdir()), []
    real = content._sampled
    monkeypatch.setattr(content, "_sampled", lambda *args: reads.append(1) or real(*args))
    first = content_hash(files, [path.name for path in files])
    assert content_hash(files, [path.name for path in files]) == first and len(reads) == 5
    monkeypatch.setattr(content, "KEPT", 3)
    hashes = {content_hash(files[:n], [path.name for path in files[:n]]) for n in (1, 2, 3, 4)}
    assert len(hashes) == 4 and len(list(cache.iterdir())) == 3
    for entry in cache.iterdir():  # a damaged entry is read over
        entry.write_bytes(b"\xff" * 64)
    assert content_hash(files[:4], [path.name for path in files[:4]]) in hashes


def test_a_set_that_was_just_written_is_not_remembered(tmp_path, cache, monkeypatch):
    """Its files could change once more within one tick of the clock."""
    monkeypatch.setattr(content, "SETTLED", 60.0)
    fingerprint(write_pictures(tmp_path / "a", 1))
    assert not cache.exists()


def test_a_full_disk_of_the_cache_changes_nothing(tmp_path, monkeypatch):
    a = write_pictures(tmp_path / "a", 1)
    before = fingerprint(a)
    asked = []

    def full(path):
        asked.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("CHEAPSCALE_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(content, "atomic_write", full)
    assert fingerprint(a) == before and asked


@pytest.mark.parametrize("place", [0, 50_000, 99_999])
def test_blocks_of_large_sets_reach_from_the_first_byte_to_the_last(tmp_path, place, monkeypatch):
    monkeypatch.setattr(content, "WHOLE", 1000)
    data = bytearray(100_000)
    (tmp_path / "a").write_bytes(data)
    data[place] = 1
    (tmp_path / "b").write_bytes(data)
    a, b = (content_hash([tmp_path / name], ["x"]) for name in "ab")
    assert a != b


def test_array_records_of_equal_names_and_sizes_have_other_fingerprints(shared, tmp_path):
    original = shared / "data" / "tfds" / "noto_emoji" / "1.0.0"
    prints = []
    for name in "abc":
        folder = tmp_path / name / "noto_emoji" / "1.0.0"
        shutil.copytree(original, folder, copy_function=shutil.copyfile)
        os.chmod(folder, 0o755)
        file = next(folder.glob("*test.array_record*"))
        if name == "c":
            data = bytearray(file.read_bytes())
            place = data.index(b"IDAT") + 20  # within a picture
            data[place] ^= 1
            file.write_bytes(data)
        source = open_source("noto_emoji", "test", resolution=8, data_dir=str(tmp_path / name))
        prints.append(source.fingerprint())
    assert prints[0] == prints[1] != prints[2]
