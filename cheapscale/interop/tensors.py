"""Large networks from safetensors: each tensor is read, converted, checked and put on the devices
by itself, so that the host never holds a second copy of the weights."""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict

from cheapscale.data.files import damaged
from cheapscale.interop.pytorch import Entry, check_names, converted
from cheapscale.training.mesh import infer_sharding, make_mesh

PyTree = Any
BUFFERS = ("position_ids",)  # endings of the names of tensors that hold no weights


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one or several safetensors files by name, read from the mapped files when they
    are asked for.

    prefix: is removed from the names. others: keep the tensors whose names do not begin with it.
    """

    def __init__(self, files: Sequence[pathlib.Path], prefix: str = "", others: bool = False):
        self.path = " + ".join(map(str, files))
        self._found: dict[str, tuple[Any, str]] = {}
        for file in files:
            try:
                mapped = safetensors.safe_open(file, "np")
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is no whole safetensors file ({error}): fetch it again"
                ) from error
            for name in mapped.keys():  # noqa: SIM118
                if (others or name.startswith(prefix)) and not name.endswith(BUFFERS):
                    self._found[name.removeprefix(prefix)] = (mapped, name)

    def __getitem__(self, name: str) -> np.ndarray:
        mapped, theirs = self._found[name]
        return mapped.get_tensor(theirs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def weight_files(folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """The safetensors files of a network in a folder of diffusers or transformers: whole, or the
    shards that an index lists; of float16 where there are no others. ValueError if there is none.
    """
    for name in (stem, f"{stem}.fp16"):
        if (file := folder / f"{name}.safetensors").is_file():
            return [file]
        index = folder / f"{stem}.safetensors.index{name.removeprefix(stem)}.json"
        if index.is_file():
            with damaged(index):
                shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / shard for shard in sorted(set(shards))]
            if absent := next((file for file in files if not file.is_file()), None):
                raise ValueError(f"{index} names {absent.name}, which is missing: fetch it as well")
            return files
    others = sorted(folder.glob("*.bin")) if folder.is_dir() else []
    remedy = f"save {others[0].name} as safetensors" if others else "fetch it as well"
    raise ValueError(f"{folder} has no {stem}.safetensors: {remedy}")


def place(
    tensors: Tensors,
    entries: Iterable[Entry],
    expected: PyTree,
    dtype: str = "",
    spare: bool = False,
) -> PyTree:
    """The parameters on the devices of the mesh, each with the sharding of `infer_sharding`.

    expected: tree of shapes. dtype: of the parameters, "" = as in the file. spare: the file may
    hold tensors that nothing uses. Raises ValueError for names or shapes that do not fit, and for
    weights that are not finite.
    """
    entries = list(entries)
    wanted_names = {name for entry in entries for name in entry.names}
    try:
        check_names(wanted_names & tensors.keys() if spare else tensors, entries)
    except ValueError as error:
        raise ValueError(f"{tensors.path}: {error}") from error
    mesh = jax.sharding.get_mesh()
    mesh = mesh if mesh.axis_names else make_mesh(devices=jax.local_devices())
    wanted = flatten_dict(expected, sep="/")
    places = flatten_dict(infer_sharding(expected, mesh), sep="/")
    return unflatten_dict(
        {
            entry.path: jax.device_put(_leaf(tensors, entry, wanted, dtype), places[entry.path])
            for entry in entries
        },
        sep="/",
    )


def _leaf(tensors: Tensors, entry: Entry, wanted: dict, dtype: str) -> np.ndarray:
    first = tensors[entry.names[0]].dtype
    leaf = converted(tensors, entry)
    if entry.path not in wanted or leaf.shape != wanted[entry.path].shape:
        shape = wanted[entry.path].shape if entry.path in wanted else "nothing"
        raise ValueError(
            f"{tensors.path}: weight {entry.name!r} has shape {leaf.shape} where the config has "
            f"{shape}: the config is of another network"
        )
    with np.errstate(over="ignore"):
        leaf = leaf.astype(jnp.dtype(dtype) if dtype else first, copy=False)
    if wrong := math.prod(leaf.shape) - np.count_nonzero(np.isfinite(leaf)):
        raise ValueError(
            f"{tensors.path}: {wrong} numbers of weight {entry.name!r} are not finite"
            + (f" as {dtype}: give --dtype=float32" if dtype else ": fetch the file again")
        )
    return leaf
