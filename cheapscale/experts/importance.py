"""The importance of each channel for one group of noise levels.

With theta the teacher's weights and g the gradient of its loss on the group's levels, channel c of
a layer has the score

    S(c) = E_batches [ ( sum over the weights that read c of  theta g )^2 ],

the squared first-order change of the loss if the channel is removed (Molchanov et al. 2019, arXiv
1906.10771, Eq. 8). A channel is removed by setting the weights that read it to zero; the weights
that write it would count the same change twice. The square is taken for each batch and not for the
mean gradient, which vanishes at a trained optimum. Step-adaptive training (arXiv 2312.13307) has an
importance assessment, but we do not know its score.

A control: the magnitude of the weights.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from cheapscale.experts.structure import layout, variables
from cheapscale.models.plan import UNetConfig

PyTree = Any
Scores = dict[str, np.ndarray]  # {variable: [width]}, one score for each channel


def taylor(gradients: Iterable[PyTree], params: PyTree, config: UNetConfig) -> Scores:
    """S of every channel. gradients: one tree like `params` for each batch."""
    squares = [
        {name: change**2 for name, change in _changes(params, g, config).items()} for g in gradients
    ]
    return {name: np.mean([row[name] for row in squares], axis=0) for name in squares[0]}


def magnitude(params: PyTree, config: UNetConfig) -> Scores:
    """The squared norm of the weights that read each channel."""
    return _changes(params, params, config)


def _changes(params: PyTree, g: PyTree, config: UNetConfig) -> Scores:
    """The sum of theta g over the weights that read each channel, in float64."""
    theta, g = flatten_dict(params, sep="/"), flatten_dict(g, sep="/")
    total = {name: np.zeros(v.width) for name, v in variables(config).items()}
    for path, (axis, (name,)) in layout(config).reads.items():
        product = np.asarray(theta[path], np.float64) * np.asarray(g[path], np.float64)
        others = tuple(i for i in range(product.ndim) if i != axis)
        # qkv holds the queries, which read the keys, in its first channels.
        total[name] += product.sum(axis=others)[: len(total[name])]
    return total
