"""Atomic writing: a file is complete or absent, even if its writer is killed."""

import contextlib
import os
import pathlib
import socket
import time
from collections.abc import Iterator


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path, which is renamed to `path` when the block ends and deleted on an error.

    A missing folder is created. If several processes write the same path, the last one to finish
    overwrites the others.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        # The content must reach the disk before the rename does, or a power cut could leave an
        # empty file under the final name. The second call writes the folder, which has the name.
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    for stale in path.parent.glob(f"{path.name}.*.tmp"):
        # A killed writer leaves its temporary file behind. A file younger than an hour may belong
        # to a process that is still writing.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stale.stat().st_mtime > 3600:
                stale.unlink()


def _to_disk(path: pathlib.Path) -> None:
    """Wait until a file or a folder is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
