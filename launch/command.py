"""What every command does around its work: logging, the compile cache, errors in one sentence."""

import importlib.util
import json
import logging as std_logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable

import jax
from absl import app, flags, logging

import cheapscale
from cheapscale.data.files import whole_or_nothing
from cheapscale.training.logging import finish
from cheapscale.training.loop import Diverged, Preempted
from launch.memory import keep_memory

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")  # any of them: an accelerator
PACKAGES = tuple(f"{pathlib.Path(file).parent}{os.sep}" for file in (cheapscale.__file__, __file__))
PREEMPTED = 143  # 128 + SIGTERM: what a shell reports of a terminated process


def start(main: Callable[[list[str]], None]) -> None:
    """Read the flags, then run a command's `main`; what cannot be read ends in one sentence."""
    app.run(main, flags_parser=read_flags)


def read_flags(argv: list[str]) -> list[str]:
    """What is left of argv once every flag is read; exits with a sentence that names the flag."""
    try:
        left = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            getattr(flags.FLAGS.config, "stage", "")  # a file that is not there shows when used
        return left
    except (AttributeError, KeyError) as error:  # ml_collections names the field alone
        named = [word.partition("=")[0] for word in argv if word.startswith("--config.")]
        field = re.search(r"\w+", str(error))[0]
        flag = next((word for word in named if field in word.split(".")), ", ".join(named))
        sys.exit(
            f"error: {flag}: the config has no field {field!r} at this stage: leave it out, or "
            "name one of the config file"
        )
    except (flags.Error, OSError) as error:  # a config file's own words stand last
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("Pass --help")] or [str(error)]
        sys.exit(f"error: {lines[-1].removeprefix('ValueError: ')}")


def execute(name: str, workdir: str, body: Callable[[], dict], *, keep: bool = True) -> None:
    """Run `body` and close with its summary: one JSON line on stdout, <name>.json in `workdir`.

    keep: whether programs compiled on the way are kept for the next run.

    Known errors end the command with one sentence on stderr and status 1; a pre-empted run says at
    which step and ends with status 143.
    """
    # Before XLA starts its threads: so the plugins are asked, not jax. bench has its own flag.
    if "keep_memory" not in flags.FLAGS and not any(map(importlib.util.find_spec, PLUGINS)):
        keep_memory()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    # Orbax and Grain narrate through the same logger; a run's own lines must stay readable.
    logging.get_absl_handler().addFilter(ours)
    if "distributed" in flags.FLAGS and flags.FLAGS.distributed:
        jax.distributed.initialize()
    if keep:  # compiled programs are executable code: the folder is the user's own
        cache = os.environ.get("CHEAPSCALE_CACHE", os.path.expanduser("~/.cache/cheapscale"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "jax"))
    try:
        finish(workdir, name, body())
    except Preempted as stop:
        print(stop, flush=True)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError, Diverged) as error:
        if pathlib.Path(workdir).is_dir():  # a sentence says enough of a mistake, not of a fault
            pathlib.Path(workdir, f"{name}.traceback.txt").write_text(traceback.format_exc())
        sys.exit(f"error: {error}")


def ours(record: std_logging.LogRecord) -> bool:
    """Whether a line was logged by this project or by a user's own code, and no library."""
    path = record.pathname
    return "site-packages" not in path or path.startswith(PACKAGES)


def named_file(entry: str) -> tuple[str, str | None]:
    """(name, path) of "NAME=FILE"; a bare name has the path None: the environment names it."""
    name, _, path = entry.partition("=")
    return name, path or None


def write_record(path: str | os.PathLike | None, figures: dict) -> None:
    """Keep an experiment's figures as a file of its own, where one is asked for."""
    if path:
        with whole_or_nothing(path) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n")
