"""The interface of every frozen feature network, and what all of them do to images first."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any

# Moments of ImageNet's pixels in [0, 1].
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class FeatureNetwork(NamedTuple):
    """A frozen network: pure functions and the weights that they take.

    name: key of the network in pytrees of frozen weights and in a run's summary.
    apply: (params, x [b, h, w, 3] in [-1, 1]) -> tuple of maps [b, h_i, w_i, c_i], finest first.
      It enlarges to `input_size` and applies the network's own mean and deviation.
    params: the weights; pass them to jitted functions as an argument, not as constants.
    sha256: hash of the weight file; "" while the weights are only shapes.
    input_size: images with a shorter side are enlarged (bilinear) to it; larger ones keep theirs.
    redraw: key -> params with new random frozen parts; None if the network has none.
    outputs: (params, x) -> {"features" [b, d] (pooled), "logits" [b, classes]}; a network may lack
      either.
    tokens: (params, x) -> tuple of the tokens [b, t, c] of a vision transformer, before its blocks
      and after each quarter of them; None for other networks.
    variant: which of several published ways of using the same weights this is. Statistics of two
      variants must not be compared.
    """

    name: str
    apply: Callable[[PyTree, jax.Array], tuple[jax.Array, ...]]
    params: PyTree
    sha256: str = ""
    input_size: int = 0
    redraw: Callable[[jax.Array], PyTree] | None = None
    outputs: Callable[[PyTree, jax.Array], dict[str, jax.Array]] | None = None
    tokens: Callable[[PyTree, jax.Array], tuple[jax.Array, ...]] | None = None
    variant: str = ""

    def draw(self, key: jax.Array) -> PyTree:
        """`params` with the random frozen parts, if any, drawn from `key`."""
        return self.redraw(key) if self.redraw else self.params


def enlarge(x: jax.Array, input_size: int) -> jax.Array:
    """x [b, h, w, c] with each side below `input_size` enlarged to it (bilinear, pixel centres)."""
    height, width = (max(side, input_size) for side in x.shape[1:3])
    if (height, width) == x.shape[1:3]:
        return x
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "bilinear")


def standardised(
    x: jax.Array, mean: Sequence[float] = MEAN, deviation: Sequence[float] = DEVIATION
) -> jax.Array:
    """(v - mean) / deviation for the pixels v = (x + 1) / 2 in [0, 1] of x [b, h, w, 3]."""
    mean, deviation = (np.float32(v)[None, None, None, :] for v in (mean, deviation))
    return ((x + 1.0) / 2.0 - mean) / deviation


def full_precision(function: Callable) -> Callable:
    """`function` with matrix products in full float32.

    By default an accelerator rounds the factors to fewer bits, so that a metric would depend on the
    machine that computed it.
    """

    @functools.wraps(function)
    def at_full_precision(*args):
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return at_full_precision
