"""The raw and the averaged weights in one file of somebody else's training.

A network is found by one tensor that each of its kind has (the anchor); what stands before that
name is the network's prefix: "" in a published file, "model.module." or "ema." in a checkpoint. A
prefix with a word such as ema holds averaged weights.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from cheapscale.features.weights import Weights

# A tensor of every network by the format of its names.
FORMATS = {"edm": "map_layer0.weight", "guided_diffusion": "time_embed.0.weight"}
AVERAGED = re.compile(r"(^|[._])(ema|averages?|averaged|avg|shadow|swa)([._]|\d|$)", re.IGNORECASE)
BUFFERS = ("resample_filter", "map_noise.freqs")  # not trained, so not averaged
# The state of an optimiser has averages too: of gradients.
OPTIMISER = re.compile(r"(^|[._])(opt|optim|optimi[sz]ers?)[._]|exp_avg|square_avg", re.IGNORECASE)


class Chosen(NamedTuple):
    """Arrays by name, without the prefixes; {"network": prefix, "average": prefix}, the same where
    a file has one; the number of arrays outside both."""

    raw: dict[str, np.ndarray]
    average: dict[str, np.ndarray]
    names: dict[str, str]
    left_out: int


def choose(file: Weights, form: str) -> Chosen:
    """The weights of the network and of its average, read by `read_weights(..., every=True)`.

    Raises ValueError where the file has no network with the names of `form`, and where it does not
    say which of its networks is which.
    """
    arrays = with_dots(file.arrays)
    found = {key: prefixes_of(arrays, anchor) for key, anchor in FORMATS.items()}
    prefixes = found[form]
    if not prefixes:
        other = next((f"--format={key}" for key in FORMATS if found[key]), "")
        remedy = f"give {other}" if other else "give a file of EDM's or guided-diffusion's networks"
        raise ValueError(f"{file.path} has no tensor named {FORMATS[form]}: {remedy}")
    averaged = [prefix for prefix in prefixes if AVERAGED.search(prefix)]
    raw = [prefix for prefix in prefixes if prefix not in averaged]
    if len(prefixes) > 1 and not len(raw) == len(averaged) == 1:
        keys = ", ".join(_key(prefix) for prefix in prefixes)
        _ask(file, f"networks under {keys}", prefixes)
    if len(prefixes) == 1 and raw and raw[0]:
        if unknown := _nameless(arrays, raw[0]):
            _ask(file, f"{unknown} beside {_key(raw[0])}, averages without our names", raw)
    raw, averaged = raw or averaged, averaged or raw
    names = {"network": _key(raw[0]), "average": _key(averaged[0])}
    left_out = sum(not name.startswith((raw[0], averaged[0])) for name in arrays)
    network, average = (under(arrays, prefix, prefixes) for prefix in (raw[0], averaged[0]))
    return Chosen(network, average, names, left_out)


def prefixes_of(arrays: Iterable[str], anchor: str) -> list[str]:
    """What stands before `anchor` in the names that end in it."""
    return [name.removesuffix(anchor) for name in arrays if f".{name}".endswith(f".{anchor}")]


def with_dots(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Latent diffusion's averages keep the names of the weights in "model." without their dots:
    "model_ema.outconvweight"; here they become "model_ema.out.conv.weight"."""
    full = {}
    for name in arrays:
        if split := re.match(r"((?:.*?\.)?)model\.(.+)", name):
            before, rest = split.groups()
            full[f"{before}model_ema.{rest.replace('.', '')}"] = f"{before}model_ema.{rest}"
    return {full.get(name, name): array for name, array in arrays.items()}


def under(
    arrays: Mapping[str, np.ndarray], prefix: str, prefixes: Iterable[str]
) -> dict[str, np.ndarray]:
    """The arrays whose names begin with `prefix`, without it, and not with a longer one."""
    inner = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix) and not name.startswith(inner)
    }


def _nameless(arrays: Mapping[str, np.ndarray], prefix: str) -> str:
    """The first of the arrays outside `prefix` that are averages by their names, or by their
    shapes: those of a whole network again. "" if there are none."""
    outside = [n for n in arrays if not n.startswith(prefix) and not OPTIMISER.search(n)]
    averages = [name for name in outside if AVERAGED.search(name) and arrays[name].size > 1]
    shapes = Counter(arrays[n].shape for n in outside)
    inner = Counter(
        a.shape for n, a in arrays.items() if n.startswith(prefix) and not n.endswith(BUFFERS)
    )
    alike = [n for n in outside if arrays[n].ndim > 1 and arrays[n].shape in inner]
    return next(iter(averages or (alike if inner <= shapes else ())), "")


def _key(prefix: str) -> str:
    return prefix.rstrip(".") or "the top level"


def _ask(file: Weights, what: str, prefixes: list[str]) -> None:
    choices = [f"{file.path}#{prefix.rstrip('.')}" for prefix in prefixes if prefix]
    choices = file.path.split(" + ") if " + " in file.path else choices
    choices = " or ".join(f"--weights={choice}" for choice in choices)
    raise ValueError(f"{file.path} holds {what}: say which to take, {choices}")
