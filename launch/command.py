"""The common part of all commands: flags, logging, compilation cache, errors and the summary.

A command is a module with a function `define`, which declares its flags, and a function `main`:

    def main(argv: list[str] | None = None) -> dict:
        return start(define, body, argv)

So `python -m launch.train ...` and `train.main([...])` in a test or notebook do the same.
"""

import ctypes
import difflib
import importlib.util
import json
import logging as std_logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import cheapscale
from cheapscale.data.files import atomic_write
from cheapscale.training.log import finish
from cheapscale.training.loop import Diverged, Preempted
from configs import fields

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")  # packages for accelerators
PACKAGES = tuple(f"{pathlib.Path(file).parent}{os.sep}" for file in (cheapscale.__file__, __file__))
PREEMPTED = 143  # 128 + SIGTERM, the exit status of a terminated process in a shell


def start(define: Callable[[], None], body: Callable[[Any], Any], argv: list[str] | None = None):
    """body(flags), after the command's flags are defined and read. The flags are removed
    afterwards, so that one process can call several commands.

    argv: the arguments after the command's name; default: those of this process.
    """
    words, given = sys.argv, flags.FLAGS
    app.define_help_flags()
    before = set(given)
    define()
    # ml_collections looks for --config.FIELD in sys.argv.
    sys.argv = words if argv is None else [body.__module__, *argv]
    try:
        read_flags(sys.argv)
        return body(given)
    finally:
        sys.argv = words
        for name in set(given) - before:
            delattr(given, name)


def config_flag() -> None:
    """Define --config=FILE:ARG and --config.FIELD=VALUE.

    A dictionary such as --config.features.paths.NAME accepts any keys, so ml_collections has to
    accept new fields; `fields.check` later raises ValueError for fields that the stage lacks.
    """
    config_flags.DEFINE_config_file(
        "config", None, "Config file and its argument string.",
        lock_config=False, accept_new_attributes=True,
    )  # fmt: skip


def read_flags(argv: list[str]) -> None:
    """Read argv into the flags; ends the process with one sentence if an argument is wrong."""
    try:
        left = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            getattr(flags.FLAGS.config, "stage", "")  # opens the config file, which may be missing
    except (AttributeError, KeyError):  # a section that the config of this stage lacks
        known = fields.every_field()
        for word in argv:
            name = word.partition("=")[0].removeprefix("--config.")
            if name != word.partition("=")[0] and name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean --config.{near[0]}?" if near else "leave it out"
                sys.exit(f"error: --config.{name}: no stage has this field: {hint}")
        sys.exit(f"error: {' '.join(argv[1:])}: the config of this stage lacks one of these fields")
    except (flags.Error, OSError) as error:  # the message of the config file is the last line
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("Pass --help")] or [str(error)]
        sys.exit(f"error: {lines[-1].removeprefix('ValueError: ')}")
    if left[1:]:
        sys.exit(f"error: {left[1]}: every argument has to be a flag, such as --workdir=DIR")


def execute(name: str, workdir: str, body: Callable[[], dict], *, keep: bool = True) -> dict:
    """The summary that `body` returns; prints it as one JSON line and writes <name>.json.

    keep: whether compiled programs are kept on disk for the next run.

    A known error ends the command with one sentence on stderr and status 1; a pre-empted run prints
    its step and ends with status 143.
    """
    # jax.devices() would start XLA's threads, and keep_memory has to come before them. So the
    # presence of an accelerator is decided from the installed packages.
    if not any(map(importlib.util.find_spec, PLUGINS)):
        keep_memory()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    # Orbax and Grain write many lines to the same logger; the filter drops them.
    logging.get_absl_handler().addFilter(ours)
    if "distributed" in flags.FLAGS and flags.FLAGS.distributed:
        jax.distributed.initialize()
    if keep:  # compiled programs are executable code, so they are kept in the user's own folder
        cache = os.environ.get("CHEAPSCALE_CACHE", os.path.expanduser("~/.cache/cheapscale"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "jax"))
    try:
        summary = body()
        finish(workdir, name, summary)
        return summary
    except Preempted as stop:
        print(stop, flush=True)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError, Diverged) as error:
        if pathlib.Path(workdir).is_dir():  # the traceback helps if the error is in the program
            pathlib.Path(workdir, f"{name}.traceback.txt").write_text(traceback.format_exc())
        sys.exit(f"error: {error}")


def keep_memory() -> bool:
    """Make the process keep the memory that it frees; returns False if glibc is not in use.

    XLA:CPU allocates the buffers of a program in every call. By default glibc returns large buffers
    to the system afterwards, which costs a page fault for every 4 kB in the next step. Training the
    bench's "cifar32" case (0.7 GB per step, one core) takes 1.55 s per step with this setting and
    2.6 s without. Call it before any thread starts, because each thread gets its own arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # malloc.h: M_ARENA_MAX = 1, M_MMAP_MAX = 0, M_TRIM_THRESHOLD = never
    options = ((-8, 1), (-4, 0), (-1, -1))
    return mallopt is not None and all([mallopt(*option) for option in options])


def ours(record: std_logging.LogRecord) -> bool:
    """Whether this project or the user's code logged a line, and not a library."""
    path = record.pathname
    return "site-packages" not in path or path.startswith(PACKAGES)


def named_file(entry: str) -> tuple[str, str | None]:
    """(name, path) from "NAME=FILE"; for "NAME" the path is None, and the environment names it."""
    name, _, path = entry.partition("=")
    return name, path or None


def write_record(path: str | os.PathLike | None, figures: dict) -> None:
    """Write an experiment's figures to `path` as JSON, unless it is empty."""
    if path:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n")
