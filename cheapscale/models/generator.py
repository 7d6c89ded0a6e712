"""Growing a one-step generator: what is copied, what stays frozen, what is adapted to (PaGoDA).

A generator is a `UNet` whose config has `growth`: one width for each doubling (spec 4.1). Growing
means building the network of the longer `growth` and copying every parameter whose name and shape
it shares with the smaller one (4.3). Then only the end of the decoder trains (4.2):

    trains    every decoder block of the base's top level with the up-block that leads to it, those
              of the level below except the first, all grown blocks, the head
    frozen    everything else: encoder, middle, coarse levels, noise and label maps

For the 64-px ADM these are the published code's "output blocks >= 9". Frozen blocks come before
all trainable ones, so that a gradient with respect to the trainable leaves alone needs neither a
backward pass through the trunk nor its activations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cheapscale.models.plan import UNetConfig, plan

PyTree = Any


class GrowthReport(NamedTuple):
    """'/'-joined paths of the leaves: taken from the smaller network, newly initialised, and
    leaves of the smaller network that found no place."""

    copied: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]


def trainable_names(config: UNetConfig) -> frozenset[str]:
    """The blocks that train while growing; all of them where nothing has been grown."""
    blocks = plan(config)
    if not config.growth:
        return frozenset(block.name for block in blocks)
    top, below = config.resolution, config.resolution // 2
    names = {
        b.name for b in blocks if b.name.startswith((f"dec_{top}_", "grow_")) or b.name == "head"
    }
    upper = [b.name for b in blocks if b.name.startswith(f"dec_{below}_block")]
    return frozenset(names.union(upper[1:]))


def trainable(config: UNetConfig) -> Callable[[str], bool]:
    """A predicate of '/'-joined leaf paths, such as "dec_16_block0/conv1/kernel"."""
    names = trainable_names(config)
    return lambda path: path.split("/", 1)[0] in names


def last_layer(config: UNetConfig) -> str:
    """Path of the last residual block's second kernel, at which the adaptive lambda (spec 3.3)
    compares the gradients."""
    last = [block.name for block in plan(config) if block.kind == "res"][-1]
    return f"{last}/conv1/kernel"


def grow_params(fresh: PyTree, old: PyTree, config: UNetConfig) -> tuple[PyTree, GrowthReport]:
    """Parameters of the grown network: `old` where name and shape agree, `fresh` elsewhere.

    Args:
        fresh: newly initialised parameters of `config`.
        old: parameters (usually the EMA) of the network with fewer doublings, or of the teacher.

    Raises ValueError if a leaf that will be frozen was not copied: it would stay random for good.
    """
    theirs = dict(_leaves(old))
    trains = trainable(config)
    copied, new = [], []

    def take(path, leaf):
        same = path in theirs and theirs[path].shape == leaf.shape
        (copied if same else new).append(path)
        return theirs[path] if same else leaf

    params = _map(take, fresh)
    if config.growth:
        orphans = [path for path in new if not trains(path)]
        if orphans:
            raise ValueError(
                f"growing to {config.output_resolution} px would freeze random weights: "
                f"{', '.join(orphans[:5])}{' ...' if len(orphans) > 5 else ''} "
                f"({len(orphans)} in all) have no counterpart of their shape in the smaller "
                "network; give both the same base (channels, channel_mult, blocks, attention)"
            )
    dropped = sorted(set(theirs) - set(copied))
    return params, GrowthReport(tuple(copied), tuple(new), tuple(dropped))


def count(params: PyTree, keep: Callable[[str], bool] = lambda path: True) -> int:
    """Number of parameters (arrays or shapes) whose path satisfies `keep`."""
    return sum(int(np.prod(leaf.shape)) for path, leaf in _leaves(params) if keep(path))


def _leaves(tree: PyTree, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _map(function, tree: PyTree, prefix: str = "") -> PyTree:
    return {
        name: _map(function, value, f"{prefix}{name}/")
        if isinstance(value, dict)
        else function(f"{prefix}{name}", value)
        for name, value in tree.items()
    }
