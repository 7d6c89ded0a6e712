"""A hash of what files hold, by which two sets of equal names and sizes differ.

Sets of up to 256 MiB are hashed whole. Of a larger set every file gives its size and blocks spread
evenly from its first byte to its last: at least three of 4 KiB, and more where files are few, about
256 MiB in all. The place of the files and their times are left out, so a copy has the same hash.

$CHEAPSCALE_CACHE/fingerprints remembers the hash of a set by the places, sizes and times of its
files, so that an unchanged set is not read again. It holds at most 256 sets of a few bytes each.
"""

import contextlib
import hashlib
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cheapscale.data.files import atomic_write, cache_folder

WHOLE = 2**28  # bytes that are read of a set, unless it has so many files that `FEWEST` needs more
BLOCK, FEWEST = 4096, 3  # bytes and least number of the blocks of a file
KEPT = 256  # sets in the cache
SETTLED = 2.0  # seconds after which a second change of a file surely has another time


def content_hash(files: Sequence[pathlib.Path], names: Sequence[str]) -> str:
    """64 hexadecimal digits for files with these names, in this order.

    names: what identifies each file within its set, such as its path below the set's folder. Raises
    ValueError for a file that cannot be read.
    """
    stats = in_threads(_stat, files)
    entry = _cache_entry(files, names, stats)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", known := entry.read_text()):
            return known
    share = min(1.0, WHOLE / max(1, sum(stat.st_size for stat in stats)))
    parts = in_threads(lambda pair: _sampled(pair[0], pair[1], share), list(zip(files, stats)))
    whole = hashlib.sha256()
    for name, stat, part in zip(names, stats, parts):
        whole.update(f"{name!r} {stat.st_size} ".encode() + part)
    if time.time() - max((stat.st_ctime for stat in stats), default=0) > SETTLED:
        with contextlib.suppress(OSError):  # a cache that cannot be written is none
            _remember(entry, whole.hexdigest())
    return whole.hexdigest()


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list:
    """[function(item) for item in items] by 16 threads, which overlap the waits for the disk."""
    parts = [items[first : first + 64] for first in range(0, len(items), 64)]
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda part: [function(item) for item in part], parts)
        return [value for values in found for value in values]


def _stat(path: pathlib.Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): repair or remove it") from error


def _sampled(path: pathlib.Path, stat: os.stat_result, share: float) -> bytes:
    """The SHA-256 of a file, or of blocks that make up about `share` of it."""
    count = max(FEWEST, int(share * stat.st_size / BLOCK))
    try:
        with open(path, "rb", buffering=0) as file:
            if share == 1 or count * BLOCK >= stat.st_size:
                return hashlib.file_digest(file, "sha256").digest()
            found = hashlib.sha256()
            for n in range(count):
                file.seek(n * (stat.st_size - BLOCK) // (count - 1))
                found.update(file.read(BLOCK))
            return found.digest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): repair or remove it") from error


def _cache_entry(files: Sequence, names: Sequence[str], stats: Sequence) -> pathlib.Path:
    """The cache's file for exactly these files in this state."""
    key = hashlib.sha256(f"{WHOLE} {BLOCK} {FEWEST} ".encode())
    for path, name, stat in zip(files, names, stats):
        # No program can set st_ctime, while unpacking and copying set st_mtime.
        state = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev
        key.update(f"{os.path.abspath(path)!r} {name!r} {state}".encode())
    return cache_folder() / "fingerprints" / key.hexdigest()


def _remember(entry: pathlib.Path, value: str) -> None:
    """Write one entry of the cache, and delete the oldest ones beyond `KEPT`."""
    with atomic_write(entry) as temporary:
        temporary.write_text(value)
    oldest = sorted(entry.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]
    for path in oldest:
        path.unlink(missing_ok=True)
