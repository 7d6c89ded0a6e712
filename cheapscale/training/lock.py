"""One writer in a work directory: the process that holds a lock on the file `writer.json` in it.

The kernel gives the lock back when its process ends, however it ends, on this machine and over NFS
on others. The file names the host and the process, for those that find it locked.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import TextIO

import jax
from absl import logging

from cheapscale.data.files import local_folder
from cheapscale.training.mesh import barrier

NAME = "writer.json"
HELD: set[pathlib.Path] = set()  # the folders that this process writes


class Busy(ValueError):
    """Another process writes the work directory."""


@contextlib.contextmanager
def only_writer(workdir: str | os.PathLike) -> Iterator[None]:
    """A block in which no other process writes `workdir`, which is created if it is missing,
    and removed at the end if nothing was written.

    Blocks of the same folder may be nested. Of several processes of jax.distributed the first one
    holds the folder for all. Raises Busy, which names the other process, if there is one.
    """
    folder = local_folder(workdir)
    if folder in HELD:
        yield
        return
    first, file = jax.process_index() == 0, None
    new = [place for place in (folder, *folder.parents) if first and not place.exists()]
    with barrier(f"claiming {workdir}"):  # if process 0 is refused, all are
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            file = _claim(folder / NAME, workdir)
    HELD.add(folder)
    try:
        yield
    finally:
        HELD.discard(folder)
        if file:
            (folder / NAME).unlink(missing_ok=True)
            file.close()
        with contextlib.suppress(OSError):  # input that was refused leaves no empty folders
            for place in new:
                place.rmdir()


def _claim(path: pathlib.Path, workdir: str | os.PathLike) -> TextIO:
    """The locked file, which names this process; Busy if another process holds it."""
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = "another process"
        with file, contextlib.suppress(ValueError):  # it may not have written its name yet
            file.seek(0)
            holder = "process {pid} on {host}".format(**json.load(file))
        raise Busy(
            f"{workdir} is being written by {holder}: wait for it, or use another folder"
        ) from None
    except OSError as error:
        logging.warning("the disk of %s has no locks (%s): start no second writer", workdir, error)
    if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
        file.close()  # its holder ended and deleted it after it was opened here
        return _claim(path, workdir)
    try:
        file.truncate(0)
        print(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}), file=file, flush=True)
    except OSError:  # the disk is full
        path.unlink()
        raise
    return file
