"""What every frozen feature network looks like to the discriminator and to the distances."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


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
    """

    name: str
    apply: Callable[[PyTree, jax.Array], tuple[jax.Array, ...]]
    params: PyTree
    sha256: str = ""
    input_size: int = 0
    redraw: Callable[[jax.Array], PyTree] | None = None
    outputs: Callable[[PyTree, jax.Array], dict[str, jax.Array]] | None = None

    def draw(self, key: jax.Array) -> PyTree:
        """`params` with the random frozen parts, if any, drawn from `key`."""
        return self.redraw(key) if self.redraw else self.params


def enlarge(x: jax.Array, input_size: int) -> jax.Array:
    """x [b, h, w, c], each side below `input_size` enlarged to it (bilinear, pixel centres)."""
    height, width = (max(side, input_size) for side in x.shape[1:3])
    if (height, width) == x.shape[1:3]:
        return x
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "bilinear")
