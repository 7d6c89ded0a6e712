"""The one net for errors: whatever reaches the top of a command becomes one sentence on stderr.

The exit status is 1, or as a shell has it: 130 after Ctrl-C, 141 if nobody reads stdout any more,
143 after SIGTERM. The traceback goes to a file in the work directory, or to a temporary folder.
"""

import contextlib
import errno
import os
import pathlib
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator

from absl import flags

from cheapscale.training.exported import NoModel
from cheapscale.training.lock import Busy
from cheapscale.training.loop import Diverged, Preempted
from cheapscale.training.mesh import OtherFailed

INTERRUPTED, CLOSED, PREEMPTED = 130, 141, 143  # 128 + SIGINT, SIGPIPE, SIGTERM
KNOWN = (ValueError, OSError, Diverged, OtherFailed)
LONGEST = 700  # characters of a message

SPACE = "free some space, or name a folder on another disk"
PERMIT = "name a folder that you may write"
REMEDIES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EROFS: PERMIT,
    errno.EACCES: PERMIT,
    errno.EPERM: PERMIT,
    errno.EEXIST: "it is a file: name a folder",
    errno.ENOTDIR: "a part of it is a file: name a folder",
    errno.EISDIR: "it is a folder: name a file, or move it away",
    errno.ENOENT: "correct the name",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # libraries only say so in a text


@contextlib.contextmanager
def net(folder: str | os.PathLike | None = None, name: str = "error") -> Iterator[None]:
    """A block whose exceptions end the command with one sentence and a status that is not 0.

    folder: where <name>.traceback.txt is written, if the folder exists.
    """
    try:
        yield
    except Preempted as stop:
        with contextlib.suppress(OSError):
            print(stop, flush=True)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        stop_with("interrupted: the same command continues from what is finished", INTERRUPTED)
    except BrokenPipeError:
        stop_with("error: nobody reads stdout any more: send it to a file", CLOSED)
    except Exception as error:
        text = sentence(error, folder)
        # The folder of another writer is not touched.
        folder = None if isinstance(error, Busy) else folder
        note = keep_traceback(folder, name, known=bool(text))
        said = shorten(f"{type(error).__name__}: {error}")
        stop_with(f"error: {text or f'a fault of this program, which is not yours: {said}'}{note}")


def stop_with(text: str, status: int = 1) -> None:
    """End the process with a sentence on stderr; in a process, SystemExit has it as its code."""
    try:
        print(end="", flush=True)
    except OSError:  # stdout is closed or full: Python would fail again when it exits
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if status == 1:
        sys.exit(text)  # prints it
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    sys.exit(status)


def sentence(error: Exception, folder: str | os.PathLike | None = None) -> str:
    """What happened and what to do, for an error of the input or the machine; "" for another.

    folder: named where the error names no file.
    """
    text = shorten(str(error))
    if isinstance(error, NoModel):
        return str(error)  # with a line for each model
    if isinstance(error, OSError) and error.errno in FULL and not error.filename and cannot_print():
        return f"stdout: {os.strerror(error.errno)}: send it to a file on another disk"
    for code, remedy in REMEDIES.items():
        said = os.strerror(code)
        if isinstance(error, OSError) and error.errno == code:
            place = error.filename or folder
            return f"{f'{place}: ' if place else ''}{said}: {remedy}"
        if code in FULL and said in text:
            return f"{f'{folder}: ' if folder else ''}{said}: {remedy}"
    if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", text):
        return f"there is too little memory ({text or 'MemoryError'}): give {smaller_batch()}"
    return (text or repr(error)) if isinstance(error, KNOWN) else ""


def cannot_print() -> bool:
    """Whether stdout takes no more, after a failed print."""
    try:
        print(end="", flush=True)
    except OSError:
        return True
    return False


def shorten(text: str) -> str:
    """A text on one line, cut where it becomes too long to read."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 4] + " ..."


def smaller_batch() -> str:
    """The flag that halves the batch of this command."""
    given = flags.FLAGS
    for name in ("batch_size", "restarts"):
        if name in given:
            return f"--{name}={max(given[name].value // 2, 1)}"
    now = getattr(given["config"].value, "batch_size", 32) if "config" in given else 32
    return f"--config.batch_size={max(now // 2, 1)}, or less"


def keep_traceback(folder: str | os.PathLike | None, name: str, *, known: bool) -> str:
    """Write the traceback of the current exception; "; its traceback is in FILE" if it matters.

    A known error leaves a file only in an existing work directory, and names it only on failure.
    """
    path = pathlib.Path(folder or "", f"{name}.traceback.txt")
    elsewhere = not folder or not path.parent.is_dir()
    if elsewhere and known:
        return ""
    try:
        if elsewhere:
            path = pathlib.Path(tempfile.mkdtemp(prefix="cheapscale-"), path.name)
        path.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
    except (OSError, MemoryError) as error:
        return f"; the traceback could not be written to {path} ({error.__class__.__name__})"
    return "" if known else f"; report it with {path}"
