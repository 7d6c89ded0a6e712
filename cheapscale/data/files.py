"""Files and folders of this project: atomic writing, JSON, and the folders that it may use."""

import contextlib
import functools
import json
import os
import pathlib
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from typing import Any


def local_folder(path: str | os.PathLike) -> pathlib.Path:
    """The absolute path of a folder that results are written to, which need not exist yet.

    Raises ValueError for an address such as gs://bucket/run, which would become a folder "gs:", for
    a shipped model, for "~" without a home folder, and for a name that TensorStore cannot open.
    """
    text = os.fspath(path)
    if re.search(r"(^|/)[A-Za-z][\w+.-]*:/", text):
        raise ValueError(
            f"{text} is an address, but runs are read and written in folders of this machine only: "
            "mount the bucket, such as with gcsfuse, and name a folder in it"
        )
    if text.startswith("pretrained:"):
        raise ValueError(f"{text} names a model of this package: name a folder")
    if pathlib.PurePath(text).parts[:1] == ("~",):
        raise ValueError(f"{text}: there is no home folder here: write the whole path, from /")
    if re.search(r"[\\\0\ud800-\udfff]", text):  # surrogates stand for bytes that are not UTF-8
        raise ValueError(
            f"{text!r} has a backslash or is not UTF-8, so that checkpoints cannot be read there: "
            "name another folder"
        )
    return pathlib.Path(text).resolve()


@functools.cache
def _temporary_cache() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="cheapscale-")


def cache_folder() -> pathlib.Path:
    """The folder of compiled programs, statistics and fitted networks: $CHEAPSCALE_CACHE, else
    ~/.cache/cheapscale, else a temporary one that lives as long as this process."""
    if named := os.environ.get("CHEAPSCALE_CACHE"):
        try:
            folder = local_folder(os.path.expanduser(named))
            there = next(place for place in (folder, *folder.parents) if place.exists())
            if not (there.is_dir() and os.access(there, os.W_OK)):
                raise ValueError(f"{there} is no folder that you may write")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"CHEAPSCALE_CACHE={named} cannot be used ({error}): unset it, or set another"
            ) from error
        return folder
    folder = pathlib.Path(os.path.expanduser("~/.cache/cheapscale"))
    if folder.is_absolute():  # else there is no home folder
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return pathlib.Path(_temporary_cache().name)


def read_json(path: str | os.PathLike, *keys: str) -> dict[str, Any]:
    """The object in a JSON file of this project, which has to have `keys`; ValueError with its name
    and a remedy if it is damaged."""
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in found]
        if not isinstance(found, dict) or missing:
            raise ValueError(f"it lacks {', '.join(missing)}" if missing else "it is no object")
        return found
    except (ValueError, TypeError, RecursionError) as error:  # of the encoding too
        why = str(error) if os.path.getsize(path) else "it is empty"
        raise ValueError(
            f"{path} is damaged ({why}): delete it and run the command that wrote it again"
        ) from error


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a JSON file for `read_json`, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def damaged(path: str | os.PathLike) -> Iterator[None]:
    """A block that takes the content of a file apart; ValueError with its name if a part lacks."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): delete it and run the command that wrote it again"
        ) from error


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
