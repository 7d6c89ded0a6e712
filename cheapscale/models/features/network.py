"""What every frozen feature network looks like to the discriminator and to the distances."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any

MEAN = (0.485, 0.456, 0.406)  # of ImageNet in [0, 1]
DEVIATION = (0.229, 0.224, 0.225)


class FeatureNetwork(NamedTuple):
    """A frozen network as two functions and their weights.

    name: key of the network in `frozen` pytrees; also what a run's summary lists as used in a loss.
    apply: (params, x [b, h, w, 3] in [-1, 1]) -> tuple of maps [b, h_i, w_i, c_i], finest first.
      Enlarging to `input_size` and the network's own mean and deviation happen inside.
    params: weights, an argument of whatever is jitted.
    sha256: of the weight file; "" where there is none.
    input_size: images with a shorter side are enlarged (bilinear) to it, larger ones stay native.
    redraw: key -> params in which the random frozen parts, where a network has any, are drawn
      anew; None where it has none.
    outputs: (params, x) -> dict with "features" [b, d] (pooled) and "logits", None where the
      network has no such outputs.
    variant: the choice among several published ways of using the same weights, where there are
      any; statistics of two variants must not be compared.
    """

    name: str
    apply: Callable[[PyTree, jax.Array], tuple[jax.Array, ...]]
    params: PyTree
    sha256: str = ""
    input_size: int = 0
    redraw: Callable[[jax.Array], PyTree] | None = None
    outputs: Callable[[PyTree, jax.Array], dict[str, jax.Array]] | None = None
    variant: str = ""

    def draw(self, key: jax.Array) -> PyTree:
        """`params` with the random frozen parts, if any, drawn from `key`."""
        return self.redraw(key) if self.redraw else self.params


def enlarge(x: jax.Array, input_size: int) -> jax.Array:
    """x [b, h, w, c], each side below `input_size` enlarged to it (bilinear, pixel centres)."""
    height, width = (max(side, input_size) for side in x.shape[1:3])
    if (height, width) == x.shape[1:3]:
        return x
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "bilinear")


def standardised(
    x: jax.Array, mean: Sequence[float] = MEAN, deviation: Sequence[float] = DEVIATION
) -> jax.Array:
    """x [b, h, w, 3] in [-1, 1] with the mean and deviation of [0, 1] pixels taken out."""
    mean, deviation = (np.asarray(v, np.float32)[None, None, None, :] for v in (mean, deviation))
    return ((x + 1.0) / 2.0 - mean) / deviation


def exact(outputs: Callable) -> Callable:
    """`outputs` with products in full float32.

    An accelerator's default rounds their factors to fewer bits, and a metric must not depend on
    the machine that computed it.
    """

    @functools.wraps(outputs)
    def at_full_precision(*args):
        with jax.default_matmul_precision("highest"):
            return outputs(*args)

    return at_full_precision
