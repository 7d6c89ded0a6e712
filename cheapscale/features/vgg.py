"""VGG16 with the linear heads of LPIPS (Zhang et al. 2018, arXiv 1801.03924).

The maps are those of LPIPS: after the last relu of each of the five groups, at strides 1, 2, 4, 8
and 16. Names are torchvision's (features.<n>) and LPIPS' (lin<k>.model.1.weight). The heads are
usually in a second file; without them the network still gives features.
"""

import jax
import jax.numpy as jnp

from cheapscale.features.layers import conv, read_conv
from cheapscale.features.network import FeatureNetwork, enlarge, standardised
from cheapscale.features.weights import Weights

GROUPS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's layer numbers


def build(weights: Weights, input_size: int = 224, pooling: str = "max") -> FeatureNetwork:
    """The network from a VGG16 file and, for `lpips_distance`, the linear heads.

    pooling: "max" is the published LPIPS; "avg" is piq's variant, which PaGoDA's code uses.
    """
    if pooling not in ("max", "avg"):
        raise ValueError(f"pooling={pooling!r} of vgg16_lpips: choose 'max' or 'avg'")
    params, channels, widths = {"groups": []}, 3, []
    for numbers in GROUPS:
        group = []
        for number in numbers:
            group.append(read_conv(weights, f"features.{number}", -1, channels, 3, 3))
            channels = len(group[-1]["bias"])
        params["groups"].append(group)
        widths.append(channels)
    if "lin0.model.1.weight" in weights.arrays:
        params["lin"] = [
            weights.take(f"lin{k}.model.1.weight", 1, width, 1, 1).ravel()
            for k, width in enumerate(widths)
        ]

    def apply(params, x):
        x = standardised(enlarge(x, input_size))
        maps = []
        for group in params["groups"]:
            x = _pool(x, pooling) if maps else x
            for layer in group:
                x = jax.nn.relu(conv(x, layer))
            maps.append(x)
        return tuple(maps)

    params = jax.tree.map(jnp.asarray, params)
    return FeatureNetwork("vgg16_lpips", apply, params, weights.sha256, input_size, variant=pooling)


def _pool(x: jax.Array, pooling: str) -> jax.Array:
    """2x2 pooling that drops an odd last row or column. It reshapes, because the gradient of XLA's
    window reduction is slow on a CPU."""
    b, h, w, c = x.shape
    windows = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)
    return windows.max(axis=(2, 4)) if pooling == "max" else windows.mean(axis=(2, 4))
