"""Checkpoints: Orbax, asynchronous, numbered by step, committed whole or not at all.

A work directory holds `config.json` (what the run is), `checkpoints/<step>/{state,meta}` and the
logs. `meta` carries the networks' architecture, so every consumer rebuilds a network from the
checkpoint alone: `load_network(workdir, "net")`.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from cheapscale.data.files import whole_or_nothing
from cheapscale.training.state import TrainState

PyTree = Any

# Keys whose change does not alter the meaning of a checkpoint: a run may resume with other values.
HARMLESS = (
    "total_steps", "log_every", "eval_every", "save_every", "preview_every", "keep", "mesh",
    "resume", "num_threads", "cache_latents", "data_dir", "preview_steps",
)  # fmt: skip


class Loaded(NamedTuple):
    """A network read from a work directory: weights, how to rebuild it, and at which step."""

    params: PyTree
    meta: dict
    step: int
    workdir: str


class Checkpoints:
    """The checkpoints of one work directory; use as a context manager."""

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
        """Start saving and return at once; a step that is already there is left alone."""
        if self.manager.latest_step() == step:
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.manager.save(step, args=args, force=True)

    def reached_preemption(self, step: int) -> bool:
        """True at the step on which all processes agreed to stop (needs jax.distributed)."""
        return self.manager.reached_preemption(step)

    def meta(self) -> tuple[int, dict]:
        """(step, meta) of the newest."""
        return self.latest_step(), self._restored(meta=ocp.args.JsonRestore())

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, placed as `abstract` says: any mesh may restore any checkpoint."""
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
    """Read one network's (EMA) weights, and nothing else, from a work directory, as NumPy.

    net: its name; None takes the only one there. Raises FileNotFoundError where there is no
    checkpoint, ValueError where it holds no such network.
    """
    step, meta = read_meta(workdir, step)
    names = list(meta["networks"])
    if net is None and len(names) == 1:
        net = names[0]
    if net not in names:
        raise ValueError(f"{workdir} holds the networks {names}, not {net!r}: name one of them")
    field = "ema_params" if ema else "params"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = reader.metadata(state_path(workdir, step)).item_metadata.tree[field][net]
    shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), stored)
    return Loaded(read_part(workdir, step, field, net, shapes), meta, step, str(workdir))


def load_optimiser(
    workdir: str | pathlib.Path, net: str, shapes: PyTree, *, step: int | None = None
) -> PyTree:
    """The optimiser's state of one network, in NumPy; shapes: what its transform makes of it."""
    step, _ = read_meta(workdir, step)
    return read_part(workdir, step, "opt_state", net, shapes)


def checkpoints_folder(workdir: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(workdir).resolve() / "checkpoints"


def state_path(workdir: str | pathlib.Path, step: int) -> pathlib.Path:
    return checkpoints_folder(workdir) / str(step) / "state"


def read_part(
    workdir: str | pathlib.Path, step: int, field: str, net: str, shapes: PyTree
) -> PyTree:
    """One network's part of one field of the state, in NumPy, and nothing else of it."""
    target = {field: {net: shapes}}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(
            state_path(workdir, step),
            args=ocp.args.PyTreeRestore(item=target, restore_args=as_numpy, partial_restore=True),
        )
    return tree[field][net]


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


def differing_keys(
    old: dict, new: dict, harmless: tuple[str, ...] = HARMLESS, prefix: str = ""
) -> list[str]:
    """'key: old -> new' for every leaf that differs and changes the meaning of a checkpoint."""
    rows = []
    for name in sorted(set(old) | set(new)):
        if name in harmless:
            continue
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            rows += differing_keys(a, b, harmless, f"{prefix}{name}.")
        elif a != b:
            rows.append(f"{prefix}{name}: {a!r} -> {b!r}")
    return rows


def claim_workdir(
    workdir: str | pathlib.Path,
    config: dict,
    harmless: tuple[str, ...] = HARMLESS,
    *,
    begun: bool = True,
) -> None:
    """Write config.json into a fresh work directory; refuse one that belongs to another run.

    begun: whether anything is there that another config would not fit. A run that failed before
    its first checkpoint may be started again as it should have been.
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
        with whole_or_nothing(path) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")


def save_diverged(workdir: str | pathlib.Path, step: int, state: TrainState) -> pathlib.Path:
    """Keep a non-finite state for inspection, outside the checkpoints a resume would read."""
    folder = pathlib.Path(workdir).resolve() / "diverged" / str(step)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folder, state, force=True)
    return folder
