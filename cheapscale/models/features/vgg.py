"""VGG16 (torchvision's names, features.<n>) with LPIPS' linear heads (lin<k>.model.1.weight).

Maps are those of LPIPS (Zhang et al. 2018): after the last relu of each of the five groups, at
strides 1, 2, 4, 8, 16. `pooling` "max" is the published LPIPS; "avg" is the variant of the piq
package that PaGoDA's code uses (spec 3.2). The heads usually lie in a file of their own; where the
files given have none, the network is still good for features.
"""

from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.models.features.convolution import conv
from cheapscale.models.features.network import FeatureNetwork, enlarge, standardised
from cheapscale.models.features.weights import Weights

PyTree = Any

GROUPS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's layer numbers


def build(weights: Weights, input_size: int = 224, pooling: str = "max") -> FeatureNetwork:
    """The network from a VGG16 file and, for `lpips_distance`, a file of linear heads."""
    if pooling not in ("max", "avg"):
        raise ValueError(f"pooling={pooling!r} of vgg16_lpips: choose 'max' or 'avg'")
    params: dict = {"groups": []}
    channels, widths = 3, []
    for numbers in GROUPS:
        group = []
        for number in numbers:
            kernel = weights.take(f"features.{number}.weight", -1, channels, 3, 3)
            channels = kernel.shape[0]
            bias = weights.take(f"features.{number}.bias", channels)
            group.append({"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias})
        params["groups"].append(group)
        widths.append(channels)
    if "lin0.model.1.weight" in weights.arrays:
        params["lin"] = [
            weights.take(f"lin{k}.model.1.weight", 1, width, 1, 1)[0, :, 0, 0]
            for k, width in enumerate(widths)
        ]

    def apply(params, x):
        x = standardised(enlarge(x, input_size))
        maps = []
        for group in params["groups"]:
            x = _pool(x, pooling) if maps else x
            for layer in group:
                x = jax.nn.relu(conv(x, layer["kernel"]) + layer["bias"][None, None, None, :])
            maps.append(x)
        return tuple(maps)

    params = jax.tree.map(jnp.asarray, params)
    return FeatureNetwork("vgg16_lpips", apply, params, weights.sha256, input_size, variant=pooling)


def _pool(x: jax.Array, pooling: str) -> jax.Array:
    """2x2 windows, an odd last row or column left out. Reshaped, since XLA's window reductions and
    their gradients are slow on a CPU."""
    b, h, w, c = x.shape
    windows = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return windows.max(axis=(2, 4)) if pooling == "max" else windows.mean(axis=(2, 4))
