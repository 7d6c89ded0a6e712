"""Checkpoints of training runs, written asynchronously and atomically by Orbax.

A work directory holds `config.json`, `checkpoints/<step>/{state,meta}` and the logs. `meta` has the
architecture of the networks, so `load_network(workdir)` needs only the checkpoint.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from cheapscale.data.files import atomic_write
from cheapscale.training.state import TrainState

PyTree = Any

# Fields of a config that may change when a run is resumed, since no weight depends on them.
HARMLESS = (
    "total_steps", "log_every", "eval_every", "save_every", "preview_every", "keep", "mesh",
    "resume", "num_threads", "data_dir",
)  # fmt: skip


class Loaded(NamedTuple):
    """A network read from a work directory: its weights, the checkpoint's meta and step."""

    params: PyTree
    meta: dict
    step: int
    workdir: str


class Checkpoints:
    """The checkpoints of one work directory; a context manager."""

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 2):
        self.folder = checkpoints_folder(workdir)
        preserve = ocp.checkpoint_managers.LatestN(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=preserve)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

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
        self.manager.save(step, args=args, force=True)

    def reached_preemption(self, step: int) -> bool:
        """Whether this is the step at which all processes stop (needs jax.distributed)."""
        return self.manager.reached_preemption(step)

    def meta(self) -> tuple[int, dict]:
        """(step, meta) of the newest checkpoint."""
        return self.latest_step(), self._restored(meta=ocp.args.JsonRestore())

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, placed with the shardings of `abstract`, which may be of another mesh
        than the one that saved it."""
        return self._restored(state=ocp.args.StandardRestore(abstract))

    def _restored(self, **item):
        found = self.manager.restore(self.latest_step(), args=ocp.args.Composite(**item))
        return found[next(iter(item))]

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

    net: name of the network; None if the checkpoint has only one. step: default the newest.
    Raises FileNotFoundError without a checkpoint, ValueError if it lacks the network.
    """
    step, meta = read_meta(workdir, step)
    names = list(meta["networks"])
    if net is None and len(names) == 1:
        net = names[0]
    if net not in names:
        raise ValueError(f"{workdir} holds the networks {names}, not {net!r}: name one of them")
    field, path = "ema_params" if ema else "params", state_path(workdir, step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.metadata(path).item_metadata.tree[field][net]
        shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), stored)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        args = ocp.args.PyTreeRestore(
            item={field: {net: shapes}},
            restore_args={field: {net: as_numpy}},
            partial_restore=True,  # optimiser state and other networks are not read
        )
        params = reader.restore(path, args=args)[field][net]
    return Loaded(params, meta, step, str(workdir))


def checkpoints_folder(workdir: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(workdir).resolve() / "checkpoints"


def state_path(workdir: str | pathlib.Path, step: int) -> pathlib.Path:
    return checkpoints_folder(workdir) / str(step) / "state"


def read_meta(workdir: str | pathlib.Path, step: int | None = None) -> tuple[int, dict]:
    """(step, meta) of the newest checkpoint, or of `step`; FileNotFoundError if there is none."""
    folder = checkpoints_folder(workdir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no checkpoint in {str(workdir)!r}: train that stage first, or name its work directory"
        )
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step() if step is None else step
        if step is None:
            raise FileNotFoundError(f"{workdir} has no checkpoint yet: train that stage first")
        if step not in manager.all_steps():
            raise FileNotFoundError(
                f"{workdir} has no checkpoint of step {step}: it has {list(manager.all_steps())}"
            )
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    return step, meta


def differing_keys(old: dict, new: dict, harmless: tuple[str, ...] = HARMLESS) -> list[str]:
    """'key: old -> new' for each leaf that differs, unless a part of its key is in `harmless`."""
    a, b = flatten_dict(old, sep="."), flatten_dict(new, sep=".")
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not set(key.split(".")) & set(harmless)
    ]


def claim_workdir(
    workdir: str | pathlib.Path,
    config: dict,
    harmless: tuple[str, ...] = HARMLESS,
    *,
    begun: bool = True,
) -> None:
    """Write config.json into a new work directory; ValueError if it belongs to another config.

    begun: whether the directory has results. If the earlier run failed before its first checkpoint,
    its config is replaced.
    """
    path = pathlib.Path(workdir) / "config.json"
    config = json.loads(json.dumps(config))  # tuples and lists compare equal
    if begun and path.is_file():
        rows = differing_keys(json.loads(path.read_text()), config, harmless)
        if rows:
            raise ValueError(
                f"{workdir} was started with another config ({'; '.join(rows)}): "
                "use a new work directory, or undo the change"
            )
    elif jax.process_index() == 0:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")


def save_diverged(workdir: str | pathlib.Path, step: int, state: TrainState) -> pathlib.Path:
    """Save a non-finite state for inspection, outside `checkpoints`, and return its folder."""
    folder = pathlib.Path(workdir).resolve() / "diverged" / str(step)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder, state, force=True)
    return folder
