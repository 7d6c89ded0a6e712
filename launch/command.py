"""The common part of all commands: flags, logging, compilation cache, errors and the summary.

A command is a module with a function `define`, which declares its flags, and a function `main`:

    def main(argv: list[str] | None = None) -> dict:
        return start(define, body, argv)

So `python -m launch.train ...` and `train.main([...])` in a test or notebook do the same.
"""

import contextlib
import ctypes
import importlib.util
import logging as std_logging
import os
import pathlib
import re
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging
from ml_collections import config_flags

import cheapscale
from cheapscale.data.files import cache_folder, local_folder, write_json
from cheapscale.training.compiler import choose_flags
from cheapscale.training.exported import model_file
from cheapscale.training.lock import only_writer
from cheapscale.training.log import finish
from cheapscale.training.mesh import pinned
from configs import common
from launch.errors import INTERRUPTED, net, shorten

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")  # packages for accelerators
NUMBERS = ("num_processes", "process_id")  # of jax.distributed, which JAX does not read itself
LIBRARIES = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib"))
PACKAGES = tuple(f"{pathlib.Path(file).parent}{os.sep}" for file in (cheapscale.__file__, __file__))
EXAMPLE = "configs/scenes.py:stage=pretrain"
FIELDS = "--config.FIELD=VALUE sets a field; launch.train --describe prints them."


def start(define: Callable[[], None], body: Callable[[Any], Any], argv: list[str] | None = None):
    """body(flags), after the command's flags are defined and read. The flags are removed
    afterwards, so that one process can call several commands. Any error ends in one sentence.

    argv: the arguments after the command's name; default: those of this process.
    """
    words, given, hooks = sys.argv, flags.FLAGS, (sys.excepthook, sys.unraisablehook)
    before = set(given)
    define()
    typed = [at_home(word) for word in (words[1:] if argv is None else argv)]
    # ml_collections looks for --config.FIELD in sys.argv too.
    sys.argv, values = take_fields([body.__module__, *typed])
    if "config" in given:
        # The config file itself reads the folder, from which it tells the splits.
        place = {name: text for name, text in values.items() if name == "data.data_dir"}
        sys.argv = join_words(sys.argv, [*map(common.word, place.items())] if one_config() else [])
    # TensorStore prints what its threads meet after an error, which the main thread raises as well.
    sys.excepthook = sys.unraisablehook = lambda *_: None
    try:
        with net():
            if {"--help", "-help", "-h"} & set(typed):
                print(help_text(body.__module__, set(given) - before))
                sys.exit(0)
            read_flags(sys.argv, values)
            result = body(given)
            print(end="", flush=True)  # here, where a closed pipe is no traceback
            return result
    except SystemExit as stop:
        if argv is None and stop.code == INTERRUPTED:
            os._exit(INTERRUPTED)  # XLA may be computing still, and crashes if Python tidies up
        raise
    finally:
        sys.argv, (sys.excepthook, sys.unraisablehook) = words, hooks
        for name in set(given) - before:
            delattr(given, name)


def at_home(word: str) -> str:
    """An argument with "~" after "=" as the home folder, which shells do not read there."""
    home = os.path.expanduser("~")
    return word if home == "~" else re.sub(r"(=['\"]?)~(?=/|$)", lambda m: m[1] + home, word)


def required(name: str, example: str) -> None:
    """Make a flag necessary; the error for its absence shows `example`."""
    message = f"--{name} is missing: give --{name}={example}"
    flags.register_validator(name, lambda value: value is not None, message)


def condition_flag(given: Any, captioned: bool, classes: str) -> str:
    """The flag that names what a model draws: "prompt" of a model of captions, else `classes`.
    Raises ValueError where the other one is given."""
    flag, other = ("prompt", classes) if captioned else (classes, "prompt")
    if given[other].value:
        kind = "was trained on captions" if captioned else "knows no captions"
        raise ValueError(f"{given.model} {kind}: give --{flag} instead of --{other}")
    return flag


def help_text(module: str, names: set[str]) -> str:
    """The docstring of the command's module, and its flags with defaults and meanings."""
    rows = [sys.modules[module].__doc__ or "", "Flags:"]
    for name in sorted(names):
        flag = flags.FLAGS[name]
        default = "" if flag.default in (None, "", []) else f" (default: {flag.default})"
        rows.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(rows)


def config_flag() -> None:
    """Define --config=FILE:WORDS, the config of one stage; --arg=WORDS are further words."""
    text = f"Config file and its words, as {EXAMPLE}. {FIELDS}"
    config_flags.DEFINE_config_file("config", None, text, lock_config=False)
    flags.DEFINE_string("arg", "", "Words for the config file, e.g. stage=grow,resolution=16.")


def pipeline_flags() -> None:
    """Define --config=FILE:WORDS and --arg=WORDS, for a command that makes several configs."""
    flags.DEFINE_string("config", None, f"Config file, such as configs/scenes.py. {FIELDS}")
    flags.DEFINE_string("arg", "", "Words for the config file, e.g. size=quick,seed=1.")


def one_config() -> bool:
    """Whether the command's --config is the config of one stage (config_flag)."""
    given = flags.FLAGS
    return "config" in given and given["config"].parser.flag_type() == "config object"


def join_words(argv: list[str], more: list[str]) -> list[str]:
    """argv with the words of every --arg=WORDS, and `more` words, behind the config file, as
    ml_collections wants."""
    joined: list[str] = []  # "--arg WORDS" as "--arg=WORDS"
    for word in argv:
        if joined and re.fullmatch("--?(config|arg)", joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    given = [word.partition("=")[2] for word in joined if re.match("--?arg=", word)] + more
    return [
        word + (":", ",")[":" in word] + ",".join(given)
        if given and re.match("--?config=", word)
        else word
        for word in joined
    ]


def take_fields(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """(argv without --config.FIELD=VALUE, {field: text}); the value may also be the next word, and
    a field without one is True, or False as --noconfig.FIELD."""
    rest, values, open_name = [], {}, ""
    for word in argv:
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(=.*)?", word, re.DOTALL)
        if match:
            values[match[2]] = match[3][1:] if match[3] else str(not match[1])
            open_name = "" if match[1] or match[3] else match[2]
        elif open_name and not re.match(r"--?[a-zA-Z]", word):
            values[open_name], open_name = word, ""
        else:
            rest, open_name = [*rest, word], ""
    return rest, values


def set_fields(values: dict[str, str]) -> None:
    """Put fields where the command's flags keep them: into its config, its words, or its options of
    a data set. Raises ValueError for a field that the command does not take."""
    given, options = flags.FLAGS, "data.options."
    if one_config():
        getattr(given.config, "stage", "")  # opens the config file, which may be missing
        common.change(given.config, values, strict=True)
    elif "config" in given:
        given.config, _, words = given.config.partition(":")
        given.arg = ",".join(filter(None, (words, *map(common.word, values.items()))))
    else:
        for name, text in values.items():
            if "options" not in given or not name.startswith(options):
                raise ValueError(f"--config.{name}: this command does not take it: leave it out")
            given.options.append(f"{name.removeprefix(options)}={text}")


def read_flags(argv: list[str], values: dict[str, str]) -> None:
    """Read argv into the flags and set fields; ends the process with one sentence if an argument is
    wrong."""
    try:
        left = flags.FLAGS(argv)
        set_fields(values)
    except OSError as error:  # of the config file; its cause is the last line
        said = str(error).splitlines()[-1].partition("] ")[2] or str(error)
        sys.exit(f"error: {said}: name a config file, as --config={EXAMPLE}")
    except (flags.Error, ValueError) as error:
        # The message of the config file is the last line.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("Pass --help")] or [str(error)]
        # The flag's own sentence: without the values of all flags, or the error's type, before it.
        said = re.sub(r"^(flags? .*?: (?=--)|ValueError: )", "", lines[-1])
        if wrong := re.match(r"flag (--\w+)=.*: (invalid literal|could not convert)", said):
            said += f": give one such as {wrong[1]}={flags.FLAGS[wrong[1][2:]].default or 1}"
        if stray := re.match("Unknown command line flag '(describe|dry_run|compile)'", said):
            said = f"--{stray[1]} is a flag of launch.train: give it there, or leave it out"
        sys.exit(f"error: {said}")
    except Exception as error:  # the config file may raise anything
        said = shorten(f"{type(error).__name__}: {error}")
        sys.exit(f"error: the config file is not in order: {said}")
    if left[1:]:
        sys.exit(f"error: {left[1]}: every argument has to be a flag, such as --workdir=DIR")


def execute(
    name: str, workdir: str, body: Callable[[], dict], *, keep: bool = True, alone: bool = True
) -> dict:
    """The summary that `body` returns; prints it as one JSON line and writes <name>.json.

    keep: whether compiled programs are kept on disk for the next run. alone: whether another
    process that writes the same work directory is an error. An error ends the command, and its
    traceback is kept in the work directory.
    """
    with net(workdir, name):
        local_folder(workdir)
        prepare(keep)
        lock = only_writer(workdir) if alone else contextlib.nullcontext()
        with lock, pinned():
            summary = body()
            finish(workdir, name, summary)
        return summary


def prepare(keep: bool) -> None:
    """Set up memory, logging, devices and the compilation cache; ValueError without a device."""
    # jax.devices() would start XLA's threads, and keep_memory has to come before them. So the
    # presence of an accelerator is decided from the installed packages.
    chosen = ""
    if not any(map(importlib.util.find_spec, PLUGINS)):
        keep_memory()
        chosen = choose_flags()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    # Orbax and Grain write many lines to the same logger; the filter drops them.
    logging.get_absl_handler().addFilter(ours)
    if chosen:
        logging.info("XLA_FLAGS=%s: measured for our networks; any value of yours is kept", chosen)
    if "distributed" in flags.FLAGS and flags.FLAGS.distributed:
        try:
            words = {name: os.environ.get(f"JAX_{name.upper()}") for name in NUMBERS}
            jax.distributed.initialize(**{name: int(text) for name, text in words.items() if text})
        except (ValueError, RuntimeError, IndexError) as error:  # IndexError: an address, no port
            raise ValueError(
                f"--distributed finds no other process ({error}): start it by Slurm or on a TPU "
                "pod, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID; on one host leave it out"
            ) from error
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # of JAX, without a text for some backends
        why = str(error).partition(" (set ")[0] or "no such backend"
        name = "JAX_PLATFORM_NAME" if os.environ.get("JAX_PLATFORM_NAME") else "JAX_PLATFORMS"
        raise ValueError(
            f"{name}={os.environ.get(name, '')} has no device here ({why}): "
            f"unset it, or set {name}=cpu"
        ) from error
    if keep:  # compiled programs are executable code, so they are kept in the user's own folder
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))


def keep_memory() -> bool:
    """Make the process keep the memory that it frees; returns False if glibc is not in use.

    XLA:CPU allocates the buffers of a program in every call. By default glibc returns large ones to
    the system, which costs page faults in the next step: the bench's "cifar32" case takes 2.6 s
    instead of 1.55. Call it before any thread starts, because each thread gets its own arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # malloc.h: M_ARENA_MAX = 1, M_MMAP_MAX = 0, M_TRIM_THRESHOLD = never
    options = ((-8, 1), (-4, 0), (-1, -1))
    return mallopt is not None and all([mallopt(*option) for option in options])


def ours(record: std_logging.LogRecord) -> bool:
    """Whether this project or the user's code logged a line, and not a library."""
    path = record.pathname
    return path.startswith(PACKAGES) or not path.startswith(LIBRARIES)


def named_file(entry: str) -> tuple[str, str | None]:
    """(name, path) from "NAME=FILE"; for "NAME" the path is None, and the environment names it."""
    name, _, path = entry.partition("=")
    return name, path or None


def results_folder(model: str, *parts: str) -> str:
    """Where the results of a model lie by default: in its work directory, or in runs/NAME of a file
    and of a model that comes with the package."""
    file = model_file(model)
    return str(
        pathlib.Path("runs", file.stem).joinpath(*parts) if file else pathlib.Path(model, *parts)
    )


def write_record(path: str | os.PathLike | None, figures: dict) -> None:
    """Write an experiment's figures to `path` as JSON, unless it is empty."""
    if path:
        write_json(path, figures)
