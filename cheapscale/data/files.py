"""Files that appear whole or not at all, whatever kills the writer."""

import contextlib
import os
import pathlib
import socket
import time
from collections.abc import Iterator


@contextlib.contextmanager
def whole_or_nothing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Write to the yielded path; it takes the name `path` once it is on the disk, or disappears.

    The folder is made where it is missing. Several processes may write the same name: the last one
    to finish stays.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        for target in (temporary, path.parent):
            if target == path.parent:
                os.replace(temporary, path)
            descriptor = os.open(target, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    finally:
        temporary.unlink(missing_ok=True)
    for stale in path.parent.glob(f"{path.name}.*.tmp"):
        # left by a writer that was killed; another process may be writing a younger one
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stale.stat().st_mtime > 3600:
                stale.unlink()
