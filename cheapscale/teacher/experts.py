"""A set of experts with the interface of a teacher: one network for each range of noise levels
(step-adaptive training, arXiv 2312.13307).

On disk a set is a folder, or a file of launch.export:

    manifest.json            groups, boundaries, budgets, the search, the base's fingerprint
    group-<j>/checkpoints    the expert of group j, counted from the cleanest levels

The experts share the base's noise process and are conditioned on its noise levels. The expert of a
step's noisier end takes the step, in either direction of the grid. Steps rather than nodes are
assigned to networks, so that sampling and inversion solve the same ODE.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.struct
import jax
import numpy as np

from cheapscale.data.files import damaged, read_json, write_json
from cheapscale.diffusion import samplers
from cheapscale.teacher.teacher import Origin, Teacher, fingerprint, make_teacher, unrounded
from cheapscale.training.checkpoint import Loaded, load_network

MANIFEST = "manifest.json"
PARTS = {"edges": list, "boundaries": list, "identity": str, "teacher": str, "ledger": dict}
SHARED = "budgets.json"  # what all groups share; written before any group is assessed
VERSION = 4


class Experts(flax.struct.PyTreeNode):
    """Networks of one noise process; each takes the steps between two boundaries.

    members: ordered from the cleanest levels to the noisiest. boundaries: the sigmas between them,
    ascending, one fewer than members.
    """

    members: tuple[Teacher, ...]
    boundaries: tuple[float, ...] = flax.struct.field(pytree_node=False)
    origin: Origin = flax.struct.field(pytree_node=False)

    net = property(lambda self: self.members[0].net)
    process = property(lambda self: self.members[0].process)
    resolution = property(lambda self: self.members[0].resolution)
    shape = property(lambda self: self.members[0].shape)
    num_classes = property(lambda self: self.members[0].num_classes)
    fields = property(lambda self: self.members[0].fields)
    params = property(lambda self: tuple(member.params for member in self.members))
    meta = Teacher.meta
    step = Teacher.step
    workdir = Teacher.workdir
    segments = Teacher.segments
    label_shape = Teacher.label_shape

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short SHA-256 of all experts' weights; of an exported file, of those that it rounds."""
        return unrounded(self.meta, fingerprint(self.params))

    def packed(self) -> tuple[dict, dict]:
        """(weights by the member's number, meta) for one file, which `unpacked` reads."""
        members = [{"meta": member.meta, "step": member.step} for member in self.members]
        stored = {"members": members, "boundaries": list(self.boundaries)}
        params = {str(n): member.params for n, member in enumerate(self.members)}
        return params, self.meta | {"experts": self.meta["experts"] | stored}

    def parts(self, grid: np.ndarray, shift: float = 1.0) -> list[tuple[Teacher, np.ndarray]]:
        """[(expert, the part of the grid that it takes)], the expert looked up at sigma / shift."""
        experts = expert_of_steps(np.asarray(grid) / shift, self.boundaries)
        cuts = np.flatnonzero(np.diff(experts)) + 1
        pieces = samplers.split_grid(grid, cuts)
        return [(self.members[experts[i]], piece) for i, piece in zip([0, *cuts], pieces)]

    def check_levels(self, grid: np.ndarray, method: str) -> None:
        """Refuse a sampler that calls an expert on noise levels that it was not trained on.

        Heun's corrector calls the expert of a step at the step's cleaner end, which lies outside
        the expert's range when the step is long.
        """
        for member, part in self.parts(grid):
            if "expert" not in member.meta:  # the base, which knows every level
                continue
            expert, called = member.meta["expert"], part if method == "heun" else part[:-1]
            low, high = expert["trained"]
            called = called[called > 0]
            outside = called[(called < low * (1 - 1e-6)) | (called > high * (1 + 1e-6))]
            if len(outside):
                raise ValueError(
                    f"{method} with {len(grid) - 1} steps calls the expert of group "
                    f"{expert['group']} of {self.workdir} at sigma {outside[-1]:.4g}, but it was "
                    f"trained from {low:.4g} to {high:.4g}: use --steps={expert['steps']} or "
                    "--method=euler, or train the set for these steps with --config.prune.steps"
                )

    def denoise(self, x: jax.Array, sigma: float, label: Any = None, **options) -> jax.Array:
        """D(x; sigma, label) by the expert for `sigma`, a Python number and not a traced array."""
        (expert,) = expert_of(np.array([float(sigma)]), self.boundaries)
        return self.members[expert].denoise(x, sigma, label, **options)

    def in_precision(self, dtype: str) -> "Experts":
        """The same set with networks that compute in `dtype`; "" changes nothing."""
        return self.replace(members=tuple(member.in_precision(dtype) for member in self.members))


def is_packed(meta: dict) -> bool:
    """Whether an exported file with this meta holds a set."""
    return "members" in meta.get("experts", {})


def unpacked(loaded: Loaded) -> Experts:
    """The set in an exported file."""
    stored = loaded.meta["experts"]
    members = tuple(
        make_teacher(loaded.params[str(n)], member["meta"], member["step"], loaded.workdir)
        for n, member in enumerate(stored["members"])
    )
    origin = Origin(loaded.meta, loaded.step, loaded.workdir)
    return Experts(members, tuple(stored["boundaries"]), origin)


def expert_of(sigmas: np.ndarray, boundaries: Sequence[float]) -> np.ndarray:
    """The index of the expert of each level, counted from the cleanest.

    A level on a boundary belongs to the cleaner expert, even if float32 has rounded it up.
    """
    return np.searchsorted(np.asarray(boundaries, np.float64), np.asarray(sigmas) * (1 - 1e-6))


def expert_of_steps(grid: np.ndarray, boundaries: Sequence[float]) -> np.ndarray:
    """The expert of each step of an ascending or descending grid: that of its noisier end."""
    return expert_of(np.maximum(grid[:-1], grid[1:]), boundaries)


def join(
    base: dict,
    base_fingerprint: str,
    boundaries: Sequence[float],
    members: Sequence[Teacher],
    *,
    cost: Mapping[str, float] = MappingProxyType({}),
    workdir: str = "",
) -> Experts:
    """The `Experts` made of these networks, which share one noise process.

    Args:
        base: meta of the teacher from which the members were made.
        base_fingerprint: hash of that teacher's weights.
        boundaries: sigmas, ascending, one fewer than members.
        members: networks from the cleanest levels to the noisiest. The base may be one of them
            (T-Stitch, arXiv 2402.14167: a small network on the noisy steps, the base on the clean).
        cost: {unit of the ledger: cost} beyond the members' own training, such as the search.
    """
    if len(boundaries) != len(members) - 1 or list(boundaries) != sorted(boundaries):
        raise ValueError(
            f"{len(members)} networks and the boundaries {list(boundaries)}: give one boundary "
            "fewer than networks, ascending"
        )
    # Each member's ledger contains the base's training; the sum counts that training once.
    ledger = {
        unit: before
        + cost.get(unit, 0.0)
        + sum(member.meta["ledger"][unit] - before for member in members)
        for unit, before in base["ledger"].items()
    }
    extra = {unit: total - base["ledger"][unit] for unit, total in ledger.items()}
    meta = base | {
        "experts": {"base": base_fingerprint, "extra_cost": extra},
        "ledger": ledger,
        "frozen_networks": base.get("frozen_networks", {}),
    }
    step = min(member.step for member in members)
    boundaries = tuple(float(boundary) for boundary in boundaries)
    return Experts(tuple(members), boundaries, Origin(meta, step, workdir))


def is_set(folder: str | pathlib.Path) -> bool:
    """Whether a finished assessment lies in the folder. (A pair store has a manifest.json too.)"""
    path = pathlib.Path(folder) / MANIFEST
    return path.is_file() and "edges" in read_json(path)


def is_begun(folder: str | pathlib.Path) -> bool:
    """Whether an assessment has begun there and is not finished."""
    return (pathlib.Path(folder) / SHARED).is_file() and not is_set(folder)


def group_folder(folder: str | pathlib.Path, group: int) -> str:
    """The work directory of a group's expert."""
    return str(pathlib.Path(folder) / f"group-{group}")


def write_manifest(folder: str | pathlib.Path, manifest: dict) -> None:
    """Write manifest.json, whole or not at all."""
    write_json(pathlib.Path(folder) / MANIFEST, {"version": VERSION} | manifest)


def read_manifest(folder: str | pathlib.Path) -> dict:
    """The manifest of a set. Raises FileNotFoundError where there is none, ValueError where another
    version wrote it."""
    if not folder:
        raise ValueError("experts is empty: give --config.experts=DIR, the folder of the set")
    path = pathlib.Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: run the stage 'assess' into that folder first"
        )
    manifest = read_json(path, "version")
    if manifest["version"] != VERSION:
        raise ValueError(
            f"{path} has version {manifest['version']}, this program reads {VERSION}: assess again"
        )
    with damaged(path):
        for name, kind in PARTS.items():
            if not isinstance(manifest[name], kind):
                raise TypeError(f"{name} is {manifest[name]!r:.60}")
    return manifest


def load_experts(folder: str | pathlib.Path, *, ema: bool = True) -> Experts:
    """The set in a folder. Raises FileNotFoundError where a group is not trained yet, ValueError
    where a group's run belongs to another teacher, assessment or group."""
    manifest = read_manifest(folder)
    count = len(manifest["edges"]) - 1
    members = [_load_member(folder, manifest, group, count, ema) for group in range(count)]
    return join(
        manifest["base"],
        manifest["teacher"],
        manifest["boundaries"],
        members,
        cost=manifest["ledger"],
        workdir=str(folder),
    )


def _load_member(folder, manifest: dict, group: int, count: int, ema: bool) -> Teacher:
    place = group_folder(folder, group)
    try:
        loaded = load_network(place, "net", ema=ema)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} has groups 0 ... {count - 1}, and group {group} is not trained yet: run "
            f"the stage 'prune' with --config.prune.group={group} into {place}"
        ) from error
    of, expert = f"{place} was trained for another", loaded.meta["expert"]
    if loaded.meta["teacher"] != manifest["teacher"]:
        raise ValueError(f"{of} teacher than the set's, {manifest['teacher']}: train it again")
    if expert["identity"] != manifest["identity"]:
        raise ValueError(f"{of} assessment than {folder} has now: train it in a new folder")
    if expert["group"] != group:
        raise ValueError(f"{of} group, {expert['group']}: give --config.prune.group={group}")
    return make_teacher(*loaded)
