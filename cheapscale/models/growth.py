"""Growing a one-step generator by doublings (PaGoDA, arXiv 2405.14822, section 3.3).

A generator is a `UNet` whose config has `growth`: one width for each doubling. To grow it, build
the network with the longer `growth` and copy every parameter whose name and shape the smaller
network shares. Then only the end of the decoder trains:

    trains    every decoder block of the base's top level with the up-block that leads to it, the
              blocks of the level below except the first, all grown blocks, the head
    frozen    everything else: encoder, middle, coarse levels, noise and label maps

For the 64-px ADM, the trainable blocks are "output blocks >= 9" of the published code. All frozen
blocks run before the trainable ones, so the gradient needs neither a backward pass through the
frozen blocks nor their activations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from cheapscale.models.plan import UNetConfig, plan

PyTree = Any


class GrowthReport(NamedTuple):
    """'/'-joined paths of leaves: copied from the smaller network, newly initialised, and leaves of
    the smaller network that the grown network lacks or has in another shape."""

    copied: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]


def trainable_names(config: UNetConfig, freeze: bool = True) -> frozenset[str]:
    """Names of the blocks that train; without growth, or without `freeze`, all of them, and the
    encoder of captions if it is not one of published weights."""
    names = [block.name for block in plan(config)]
    if not (config.growth and freeze):
        learnt = config.text is not None and config.text.kind == "transformer"
        return frozenset(names + ["text"] * learnt)
    # Of the base's blocks, only those of its two finest decoder levels train.
    top, below = config.resolution, config.resolution // 2
    late = [n for n in names if n.startswith((f"dec_{top}_", "grow_")) or n == "head"]
    upper = [n for n in names if n.startswith(f"dec_{below}_block")]
    return frozenset(late + upper[1:])


def trainable(config: UNetConfig, freeze: bool = True) -> Callable[[str], bool]:
    """A predicate of '/'-joined leaf paths, such as "dec_16_block0/conv1/kernel"."""
    names = trainable_names(config, freeze)
    return lambda path: path.split("/", 1)[0] in names


def last_layer(config: UNetConfig) -> str:
    """Path of the second kernel of the last residual block.

    The adaptive weight lambda of PaGoDA's loss compares the gradients of L_rec and L_adv there.
    """
    last = [block.name for block in plan(config) if block.kind == "res"][-1]
    return f"{last}/conv1/kernel"


def grow_params(fresh: PyTree, old: PyTree, config: UNetConfig) -> tuple[PyTree, GrowthReport]:
    """Parameters of the grown network: `old` where name and shape agree, `fresh` elsewhere.

    Args:
        fresh: newly initialised parameters of `config`.
        old: parameters (usually the EMA) of the network with fewer doublings, or of the teacher.

    Raises ValueError if a leaf that will be frozen was not copied: it would keep random values.
    """
    ours, theirs = flatten_dict(fresh, sep="/"), flatten_dict(old, sep="/")
    # A leaf of another shape (the head, after a change of width) counts as fresh.
    same = {p for p, leaf in ours.items() if p in theirs and theirs[p].shape == leaf.shape}
    report = GrowthReport(
        copied=tuple(p for p in ours if p in same),
        fresh=tuple(p for p in ours if p not in same),
        dropped=tuple(sorted(set(theirs) - same)),
    )
    trains = trainable(config)
    random = [p for p in report.fresh if not trains(p)]
    if config.growth and random:
        raise ValueError(
            f"growing to {config.output_resolution} px would freeze random weights: "
            f"{', '.join(random[:5])}{' ...' if len(random) > 5 else ''} "
            f"({len(random)} in all) have no counterpart of their shape in the smaller "
            "network; give both the same base (channels, channel_mult, blocks, attention)"
        )
    params = {p: theirs[p] if p in same else leaf for p, leaf in ours.items()}
    return unflatten_dict(params, sep="/"), report
