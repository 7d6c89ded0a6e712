"""Which channels matter (step-adaptive training, spec section 4.4).

With g the gradient of the loss on one group's noise levels only, the score of channel c of a
variable v is

    (1)  S_v(c) = E_batches [ ( sum over weights that read c of  theta g )^2 ]

Only the reading side counts: removing a channel is setting those weights to zero, and the producing
side would count the same change twice. Squaring for each batch, not once for the sum, keeps what
cancels at a trained optimum. Queries and keys are read by each other: either's own weights count.

Controls: the same over all noise levels, the sum squared once (`accumulated`), Diff-Pruning's
early stop (`informative_levels`), magnitude, and chance.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from cheapscale.models.plan import UNetConfig
from cheapscale.pruning.structure import Layout, layout, members

PyTree = Any
Scores = dict[str, np.ndarray]


def taylor(
    gradients: Iterable[PyTree], params: PyTree, config: UNetConfig, *, accumulated: bool = False
) -> Scores:
    """Equation (1) over the batches' gradients: {variable: [width]}.

    accumulated: the changes are summed over the batches and squared once: a control that cancels
    near an optimum.
    """
    found, total, count = layout(config), {}, 0
    inside, outside = (1, 2) if accumulated else (2, 1)
    for grads in gradients:
        for name, change in _changes(found, params, grads).items():
            total[name] = total.get(name, 0.0) + change**inside
        count += 1
    if not count:
        raise ValueError("no batches to score with: give at least one gradient")
    return {name: (value / count) ** outside for name, value in total.items()}


def magnitude(params: PyTree, config: UNetConfig) -> Scores:
    """Sum of squares of the weights that read a channel."""
    found = layout(config)
    return _changes(found, params, params)


def chance(config: UNetConfig, seed: int | tuple[int, ...]) -> Scores:
    rng = np.random.default_rng(seed)
    return {name: rng.random(v.width) for name, v in layout(config).variables.items()}


def informative_levels(losses: Iterable[float], threshold: float) -> int:
    """How many noise levels, from clean to noisy, Diff-Pruning takes gradients of: up to the first
    whose loss is below `threshold` times the largest so far (Fang et al. 2023; 0.05 on CIFAR-10).

    As the loss of predicted noise falls with noise, this leaves the noisy end out.
    """
    largest, count = 0.0, 0
    for loss in losses:
        largest = max(largest, float(loss))
        if float(loss) < threshold * largest:
            break
        count += 1
    return count


def gradients(grad: Callable, params: PyTree, batches: Iterable[Any]) -> Iterator[PyTree]:
    """grad(params, *batch) for each batch, on the host. grad: compiled once by the caller."""
    for batch in batches:
        yield jax.device_get(grad(params, *batch))


def _changes(found: Layout, params: PyTree, grads: PyTree) -> Scores:
    """sum of theta g over the weights that read each channel, {variable: [width]}."""
    total: Scores = {}

    def walk(theta, grad, prefix):
        for name, value in theta.items():
            path = f"{prefix}{name}"
            if isinstance(value, dict):
                walk(value, grad[name], f"{path}/")
                continue
            for axis, segments in members(found, path):
                product = np.asarray(value, np.float64) * np.asarray(grad[name], np.float64)
                others = tuple(a for a in range(product.ndim) if a != axis)
                change, offset = product.sum(axis=others), 0
                for segment in segments:
                    part = change[offset : offset + segment.width]
                    if segment.variable:
                        total[segment.variable] = total.get(segment.variable, 0.0) + part
                    offset += segment.width

    walk(params, grads, "")
    return total
