"""One writer in a work directory: a file `writer.json` names the host and the process.

A process that was killed leaves its file behind. On the same machine it is known to be gone from
the list of processes. Of another machine only the file can be seen: its writer touches it every
BEAT seconds, so one that is not touched within PATIENCE seconds has no writer any more. This needs
no common clock, and a run that was pre-empted continues on another machine by itself.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging

from cheapscale.data.files import local_folder
from cheapscale.training.mesh import barrier

NAME = "writer.json"
BEAT, PATIENCE = 10.0, 60.0
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
    path, stop, first = folder / NAME, threading.Event(), jax.process_index() == 0
    new = [place for place in (folder, *folder.parents) if first and not place.exists()]
    with barrier(f"claiming {workdir}"):  # if process 0 is refused, all are
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            _claim(path, workdir)
    HELD.add(folder)
    beat = threading.Thread(target=_touch, args=(path, stop), daemon=True)
    if first:
        beat.start()
    try:
        yield
    finally:
        HELD.discard(folder)
        if first:
            stop.set()
            beat.join()
            if _read(path)[0] == _me():
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # input that was refused leaves no empty folders
            for place in new:
                place.rmdir()


def _claim(path: pathlib.Path, workdir: str | os.PathLike) -> None:
    """Create the file for this process; Busy if another one holds it."""
    while True:
        with contextlib.suppress(FileExistsError):
            with open(path, "x") as file:
                try:
                    print(json.dumps(_me()), file=file, flush=True)
                except OSError:  # the disk is full
                    path.unlink()
                    raise
            return
        holder, touched = _read(path)
        if touched and _alive(path, holder, touched):
            raise Busy(
                f"{workdir} is being written by process {holder.get('pid')} on "
                f"{holder.get('host')}: wait for it, or use another folder"
            )
        if _read(path) == (holder, touched):  # else another process has been faster
            path.unlink(missing_ok=True)


def _me() -> dict:
    """The identity of this process on this machine, or in this container."""
    return {"host": socket.gethostname(), "space": _space(), "pid": os.getpid(),
            "started": _started(os.getpid())}  # fmt: skip


def _space() -> str:
    """The namespace of process numbers: containers may share the name of their machine."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; "" if it is gone, or if there is no /proc."""
    with contextlib.suppress(OSError):  # its name, in parentheses, may have spaces
        state, *rest = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (
            "" if state in "ZX" else rest[18]
        )  # a zombie has ended, but its parent has not seen it
    return ""


def _read(path: pathlib.Path) -> tuple[dict, int]:
    """(holder, time of the last touch in ns), ({}, 0) without a file; {} of an unfinished one."""
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        touched = os.fstat(file.fileno()).st_mtime_ns  # opening makes a network disk look again
        with contextlib.suppress(ValueError, TypeError):
            return dict(json.load(file)), touched
        return {}, touched
    return {}, 0


def _alive(path: pathlib.Path, holder: dict, touched: int) -> bool:
    """Whether the process that holds the file still runs; takes PATIENCE seconds elsewhere."""
    mine = _me()
    if (holder.get("host"), holder.get("space")) == (mine["host"], mine["space"]):
        if mine["started"]:
            return _started(holder.get("pid", 0)) == holder.get("started")
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder.get("pid", 0), 0)
            return True
        return False
    logging.info("%s: seeing for %.0f s whether %s still writes", path.parent, PATIENCE, holder)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(PATIENCE / 60)
        if _read(path) != (holder, touched):
            return bool(_read(path)[1])
    return False


def _touch(path: pathlib.Path, stop: threading.Event) -> None:
    """Touch the file every BEAT seconds until `stop`, or until somebody has deleted it."""
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
