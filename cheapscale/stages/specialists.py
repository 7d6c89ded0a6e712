"""A set of specialists as one artefact: a folder that samples and inverts as a teacher does (10.3).

    manifest.json            groups, owner rule, budgets, what was searched, the base's fingerprint
    group-<j>/checkpoints    the specialist of group j, counted from the cleanest; its meta holds
                             its widths and the channels kept

The specialists share the base's noise process and are told its global noise levels; each owns the
steps of a sampler whose noisier end lies in its group.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from cheapscale.data.files import whole_or_nothing
from cheapscale.training.checkpoint import Loaded, load_network

MANIFEST = "manifest.json"
SHARED = "budgets.json"  # what the groups share, written as soon as it is known
VERSION = 2


def is_set(folder: str | pathlib.Path) -> bool:
    return (pathlib.Path(folder) / MANIFEST).is_file()


def is_begun(folder: str | pathlib.Path) -> bool:
    """Whether an assessment has begun there and is not finished."""
    return (pathlib.Path(folder) / SHARED).is_file() and not is_set(folder)


def group_folder(folder: str | pathlib.Path, group: int) -> str:
    return str(pathlib.Path(folder) / f"group-{group}")


def assessment_path(folder: str | pathlib.Path, group: int) -> pathlib.Path:
    """Widths and channels of a group, as the assessment left them."""
    return pathlib.Path(folder) / f"assessment-{group}.json"


def read_assessment(folder: str | pathlib.Path, group: int) -> dict:
    return json.loads(assessment_path(folder, group).read_text())


def write_manifest(folder: str | pathlib.Path, manifest: dict) -> None:
    with whole_or_nothing(pathlib.Path(folder) / MANIFEST) as temporary:
        temporary.write_text(json.dumps({"version": VERSION} | manifest, indent=1) + "\n")


def read_manifest(folder: str | pathlib.Path) -> dict:
    """Raises FileNotFoundError where there is none, ValueError where it is of another version."""
    if not folder:
        raise ValueError("config.specialists is empty: name the folder of the set")
    path = pathlib.Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: run stage=assess into that folder first")
    manifest = json.loads(path.read_text())
    if manifest["version"] != VERSION:
        raise ValueError(
            f"{path} has version {manifest['version']}, this program reads {VERSION}: assess again"
        )
    return manifest


def load_set(folder: str | pathlib.Path, *, ema: bool = True) -> Loaded:
    """All specialists as one teacher: params a tuple, one tree for each group.

    meta is the base's, with the groups and each specialist's network under
    diffusion["specialists"]. Raises FileNotFoundError naming the first group that is not trained.
    """
    manifest = read_manifest(folder)
    loaded, count = [], len(manifest["edges"]) - 1
    for group in range(count):
        place = group_folder(folder, group)
        try:
            network = load_network(place, "net", ema=ema)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} has groups 0 ... {count - 1}, and group {group} is not trained yet: run "
                f"stage=prune with prune.group={group} into {place}"
            ) from error
        if network.meta["teacher"] != manifest["teacher"]:
            raise ValueError(
                f"{place} was pruned from the teacher {network.meta['teacher']}, but the set's is "
                f"{manifest['teacher']}: train that group again"
            )
        if network.meta["specialist"]["identity"] != manifest["identity"]:
            raise ValueError(
                f"{place} was trained for another assessment than {folder} has now: train that "
                "group again, in a new folder"
            )
        if network.meta["specialist"]["group"] != group:
            raise ValueError(
                f"{place} holds the specialist of group {network.meta['specialist']['group']}: "
                "that group's folder is another, see config.prune.group"
            )
        loaded.append(network)
    return joined(
        manifest["base"],
        manifest["teacher"],
        manifest["borders"],
        loaded,
        paid=manifest["ledger"],
        workdir=str(folder),
    )


def joined(
    base: dict,
    teacher: str,
    borders: Sequence[float],
    members: Sequence[Loaded],
    *,
    paid: Mapping[str, float] = MappingProxyType({}),
    workdir: str = "",
) -> Loaded:
    """Networks of one noise process as one teacher, each for the steps between two borders.

    Args:
        base: the meta of what they were made from; teacher: its fingerprint.
        borders: sigmas, ascending, one fewer than members, which are counted from the cleanest.
        members: specialists, or the base itself (T-Stitch: a small network for the noisy steps, the
            base for the clean ones).
        paid: {unit of the ledger: cost} of what is in no network's own, such as the assessment.
    """
    if len(borders) != len(members) - 1 or list(borders) != sorted(borders):
        raise ValueError(
            f"{len(members)} networks and the borders {list(borders)}: give one border fewer than "
            "networks, ascending"
        )
    ledger = {
        unit: before
        + paid.get(unit, 0.0)
        + sum(member.meta["ledger"][unit] - before for member in members)
        for unit, before in base["ledger"].items()
    }
    specialists = {
        "base": teacher,
        "borders": [float(border) for border in borders],
        "models": [member.meta["networks"]["net"] for member in members],
        "paid": {unit: total - base["ledger"][unit] for unit, total in ledger.items()},
    }
    meta = base | {
        "diffusion": base["diffusion"] | {"specialists": specialists},
        "ledger": ledger,
        "frozen_networks": base.get("frozen_networks", {}),
    }
    step = min(member.step for member in members)
    return Loaded(tuple(member.params for member in members), meta, step, workdir)
