"""Checkpoints of training runs, written asynchronously and atomically by Orbax.

A work directory holds `config.json`, `checkpoints/<step>/{state,meta}` and the logs. `meta` has the
architecture of the networks, so `load_network(workdir)` needs only the checkpoint.
"""

import contextlib
import glob
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from cheapscale.data.files import atomic_write, local_folder, read_json
from cheapscale.training.exported import PLACES, model_file, read_header, read_model, sha256_of
from cheapscale.training.state import TrainState, overlaid

PyTree = Any

# Fields of a config that may change when a run is resumed, since no weight depends on them.
HARMLESS = (
    "total_steps", "total_flops", "log_every", "eval_every", "save_every", "preview_every", "keep",
    "mesh", "resume", "num_threads", "data_dir",
    # The images are compared by their fingerprint.
    "skip_corrupt", "accept_other_data",
)  # fmt: skip

# Files of jobs and evaluations, from which a work directory or a store is known to be in use.
RESULTS = ("evaluate.json", "manifest.json", "shards/*", "shard-*")


class Loaded(NamedTuple):
    """A network read from a work directory: its weights, the checkpoint's meta and step."""

    params: PyTree
    meta: dict
    step: int
    workdir: str


class LiteralPath(type(epath.Path("/"))):
    """A path for Orbax, whose pattern searches take [, * and ? of the path itself literally.

    Orbax lists the files of a new checkpoint with `glob`, and would find none in a folder "run[1]".
    """

    def glob(self, pattern: str) -> Iterable["LiteralPath"]:
        return map(type(self), glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))


class Checkpoints:
    """The checkpoints of one work directory; a context manager.

    A new checkpoint is read back before an older one is deleted: its arrays must have the names and
    shapes of the state, else it is not a checkpoint, and the next `save` or `wait` raises OSError.
    Raises ValueError for a folder that is an address, and if `keep` is less than 1.
    """

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}, which deletes every checkpoint: give 1 or more")
        self.workdir, self.folder = workdir, checkpoints_folder(workdir)
        self.saving: tuple[int, dict] = (0, {})
        preserve = ocp.checkpoint_managers.LatestN(keep)
        check = ocp.options.AsyncOptions(post_finalization_callback=self._read_back)
        options = ocp.CheckpointManagerOptions(preservation_policy=preserve, async_options=check)
        self.manager = ocp.CheckpointManager(LiteralPath(self.folder), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.manager.close()

    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict) -> None:
        """Save in the background; does nothing if this step is already the newest checkpoint."""
        if self.manager.latest_step() == step:
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.manager.wait_until_finished()  # as Orbax does, but before `saving` changes
        self.saving = step, shapes(state)
        self.manager.save(step, args=args, force=True)

    def _read_back(self) -> None:
        """Raise OSError if the written arrays are not those of the state, before it is committed
        and an older checkpoint is deleted."""
        step, wanted = self.saving
        places = LiteralPath(self.folder).glob(f"{step}.orbax-checkpoint-tmp/state")
        found = [shapes(array_metadata(place)) for place in places]
        if found != [wanted]:
            raise OSError(
                f"checkpoint {step} of {self.workdir} was written, but its arrays cannot be read "
                "back: the older ones are kept; use another disk"
            )

    def reached_preemption(self, step: int) -> bool:
        """Whether this is the step at which all processes stop (needs jax.distributed)."""
        return self.manager.reached_preemption(step)

    def meta(self) -> tuple[int, dict]:
        """(step, meta) of the newest checkpoint."""
        return read_meta(self.workdir, self.latest_step())

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, placed with the shardings of `abstract`, which may be of another mesh
        than the one that saved it. ValueError if it has other arrays."""
        step, args = self.latest_step(), ocp.args.StandardRestore(abstract)
        with named_damage(self.workdir, step):
            stored = shapes(array_metadata(state_path(self.workdir, step)))
            wanted = shapes(abstract)
            for name in sorted(stored.keys() | wanted.keys()):
                if stored.get(name) != wanted.get(name):
                    raise ValueError(
                        f"{self.workdir} does not fit this config: {name} is {stored.get(name)} "
                        f"there and {wanted.get(name)} here: give the model and optim of that run"
                    )
            return self.manager.restore(step, args=ocp.args.Composite(state=args))["state"]

    def wait(self) -> None:
        self.manager.wait_until_finished()


def load_network(
    workdir: str | pathlib.Path,
    net: str | None = None,
    *,
    ema: bool = True,
    step: int | None = None,
) -> Loaded:
    """The EMA weights (or with ema=False the raw ones) of a network, as NumPy arrays.

    workdir: a work directory, or an exported model, which has averaged weights only.
    net: name of the network, or with ema=False of one that only helped to train it, as
        meta["helpers"] names them; None if the checkpoint has one. step: default the newest.
    Raises FileNotFoundError without a checkpoint, ValueError if it lacks the network.
    """
    file, (step, meta) = model_file(workdir), read_meta(workdir, step)
    names = list(meta["networks"])
    if net is None and len(names) == 1:
        net = names[0]
    if net not in names and (ema or net not in meta.get("helpers", {})):
        raise ValueError(f"{workdir} holds the networks {names}, not {net!r}: name one of them")
    if file and not ema:
        raise ValueError(f"{workdir} has averaged weights only: leave out --ema=False")
    if file:
        return Loaded(read_model(file), meta, step, str(workdir))
    path = LiteralPath(state_path(workdir, step))
    with named_damage(workdir, step), contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        stored = array_metadata(path)
        smooth = flatten_dict(stored["ema_params"][net]) if ema else {}
        # weights that never train, as those of a published encoder of captions
        raw = {k: m for k, m in flatten_dict(stored["params"][net]).items() if k not in smooth}
        wanted = {
            field: {net: unflatten_dict(leaves)}
            for field, leaves in (("ema_params", smooth), ("params", raw))
            if leaves
        }
        wanted = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), wanted)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        # optimiser state and other networks are not read
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        found = reader.restore(path, args=args)
        params = overlaid(*(found.get(field, {net: {}})[net] for field in ("params", "ema_params")))
    return Loaded(params, meta, step, str(workdir))


def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """{"params.net.conv.kernel": shape, ...} of the arrays of a state, or of their metadata."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="."): tuple(x.shape) for k, x in leaves}


def array_metadata(path: str | os.PathLike) -> PyTree:
    """The shapes and dtypes of the arrays of a stored state, each from its own stored header."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.metadata(epath.Path(path)).tree


@contextlib.contextmanager
def named_damage(workdir: str | pathlib.Path, step: int) -> Iterator[None]:
    """A block that reads a checkpoint. If it fails and the checkpoint is damaged, raises ValueError
    with its step, the newest undamaged one, and a remedy."""
    try:
        yield
    except Exception as error:
        damage = fault(workdir, step)
        if damage or isinstance(error, json.JSONDecodeError):  # of a file that is not in `fault`
            folder = checkpoints_folder(workdir)
            older = [n for n in saved_steps(workdir) if n < step and not fault(workdir, n)]
            raise ValueError(
                f"checkpoint {step} of {workdir} is damaged ({damage or error}): "
                + (f"step {older[-1]} is not, so " if older else "there is no other, so ")
                + f"delete it (rm -r '{folder / str(step)}') and "
                + ("give the same command again" if older else "train again")
            ) from error
        raise


def fault(workdir: str | pathlib.Path, step: int) -> str:
    """What is wrong with a checkpoint, read to its end, in a few words; "" if nothing is."""
    path = checkpoints_folder(workdir) / str(step)
    try:
        stored_meta(path)
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
            tree = array_metadata(path / "state")
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            args = ocp.args.PyTreeRestore(restore_args=as_numpy)
            reader.restore(LiteralPath(path / "state"), args=args)
    except Exception as error:  # Orbax and TensorStore raise many types
        return re.split(r" in OCDBT| \[tensorstore|\n", str(error))[0][:200] or repr(error)
    return ""


def stored_meta(folder: pathlib.Path) -> dict:
    """The meta of one checkpoint's folder; ValueError if it is cut or names no networks."""
    path = folder / "meta" / "metadata"
    meta = json.loads(path.read_text())
    if not (isinstance(meta, dict) and isinstance(meta.get("networks"), dict)):
        raise ValueError(f"{path} names no networks")
    return meta


def saved_steps(workdir: str | pathlib.Path) -> list[int]:
    """The steps of the checkpoints of a work directory, in ascending order."""
    folder = checkpoints_folder(workdir)
    return sorted(int(path.name) for path in folder.glob("[0-9]*/") if path.name.isdecimal())


def check_checkpoints(workdir: str | pathlib.Path) -> None:
    """Raise ValueError for a link among the checkpoints, which could not be deleted, and for a copy
    under another name, beside which a run would begin afresh."""
    steps = saved_steps(workdir)
    for path in checkpoints_folder(workdir).glob("[0-9]*/"):
        renamed = not steps and ".orbax-checkpoint-tmp" not in path.name
        if path.is_symlink() or renamed:
            raise ValueError(
                f"{path} is no checkpoint but {'a copy' if renamed else 'a link'}: put the folder "
                "there under the number of its step, or move it away"
            )


def has_results(folder: str | pathlib.Path) -> bool:
    """Whether a work directory or a store holds checkpoints, shards, or the end of a job."""
    root = pathlib.Path(folder)
    return bool(saved_steps(root)) or any(next(root.glob(p), None) for p in RESULTS)


def same_place(old: str, new: str) -> bool:
    """Whether two spellings name one folder, or a folder that was moved or copied: with the same
    name, and the old one gone or with the same newest checkpoint and manifest."""
    if not (old and new):
        return old == new
    a, b = pathlib.Path(old).resolve(), pathlib.Path(new).resolve()
    return a == b or (a.name == b.name and (not a.exists() or held(a) == held(b)))


def held(folder: pathlib.Path) -> tuple:
    """What tells the content of a run, a store or an exported model from that of others."""
    if folder.is_file():
        return (sha256_of(folder),)
    steps, manifest = saved_steps(folder), folder / "manifest.json"
    return read_meta(folder) if steps else (), manifest.is_file() and manifest.read_bytes()


def checkpoints_folder(workdir: str | pathlib.Path) -> pathlib.Path:
    return local_folder(workdir) / "checkpoints"


def state_path(workdir: str | pathlib.Path, step: int) -> pathlib.Path:
    return checkpoints_folder(workdir) / str(step) / "state"


def read_meta(workdir: str | pathlib.Path, step: int | None = None) -> tuple[int, dict]:
    """(step, meta) of the newest checkpoint, or of `step`; FileNotFoundError if there is none."""
    if file := model_file(workdir):
        stored, meta = read_header(file)
        if step not in (None, stored):
            raise FileNotFoundError(f"{workdir} holds step {stored} alone, not step {step}")
        return stored, meta
    folder = checkpoints_folder(workdir)
    if not folder.is_dir():
        runs = runs_inside(workdir)
        remedy = f"give {' or '.join(runs)}" if runs else "train that stage first, or name its"
        raise FileNotFoundError(
            f"no checkpoint in {str(workdir)!r}: {remedy}{'' if runs else ' work directory'}"
        )
    steps = saved_steps(workdir)
    if not steps:
        raise FileNotFoundError(f"{workdir} has no checkpoint yet: train that stage first")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"{workdir} has no checkpoint of step {step}: it has {steps}")
    with named_damage(workdir, step):
        return step, stored_meta(folder / str(step))


def runs_inside(workdir: str | pathlib.Path) -> list[str]:
    """The folders in a pipeline's work directory that hold runs, the newest first."""
    root = pathlib.Path(workdir)
    saved = sorted(root.glob("*/checkpoints"), key=lambda path: path.stat().st_mtime, reverse=True)
    sets = [path.parent.parent for path in root.glob("*/group-*/checkpoints")]
    return list(dict.fromkeys(str(path) for path in [*sets, *(path.parent for path in saved)]))


def differing_keys(old: dict, new: dict, harmless: tuple[str, ...] = HARMLESS) -> list[str]:
    """'key: old -> new' for leaves that differ, unless a part of a key is in `harmless`: the stage
    alone if it differs, otherwise three and the number of further ones."""
    a, b = flatten_dict(old, sep="."), flatten_dict(new, sep=".")
    keys = [
        key
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
        and not set(key.split(".")) & set(harmless)
        and not (key in PLACES and same_place(a.get(key) or "", b.get(key) or ""))
    ]
    shown = ["stage"] if "stage" in keys else keys[:3]
    rows = [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in shown]
    return rows + [f"and {len(keys) - 3} more"] * (len(keys) > len(shown) > 1)


def claim_workdir(
    workdir: str | pathlib.Path,
    config: dict,
    harmless: tuple[str, ...] = HARMLESS,
    *,
    begun: bool = True,
) -> None:
    """Write config.json into a new work directory; ValueError if it belongs to another config.

    begun: whether the caller has found results; those of another stage count as well. If the
    earlier run failed before its first result, its config is replaced.
    """
    check_checkpoints(workdir)
    path = pathlib.Path(workdir) / "config.json"
    config = json.loads(json.dumps(config))  # tuples and lists compare equal
    begun = begun or has_results(workdir)
    if begun and (old := recorded(workdir, path)):
        rows = differing_keys(old, config, harmless)
        if rows:
            raise ValueError(
                f"{workdir} was started with another config ({'; '.join(rows)}): "
                "use a new work directory, or undo the change"
            )
    if not (begun and path.is_file()) and jax.process_index() == 0:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")


def recorded(workdir: str | pathlib.Path, path: pathlib.Path) -> dict:
    """The config in the file, else in the newest checkpoint; {} if there is neither."""
    if path.is_file():
        return read_json(path)
    return read_meta(workdir)[1].get("config", {}) if saved_steps(workdir) else {}


def save_diverged(workdir: str | pathlib.Path, step: int, state: TrainState) -> pathlib.Path:
    """Save a non-finite state for inspection, outside `checkpoints`, and return its folder."""
    folder = local_folder(workdir) / "diverged" / str(step)
    with ocp.StandardCheckpointer() as writer:
        writer.save(LiteralPath(folder), state, force=True)
    return folder
