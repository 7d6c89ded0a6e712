"""CIFAR-10 ResNets of 6 n + 2 layers (He et al. 2015, arXiv 1512.03385, section 4.2).

A 3x3 convolution to 16 channels; three groups of n blocks with 16, 32 and 64 channels at strides
1, 2 and 4; relu; batch norm (eps 1e-5) folded in; shortcuts without parameters ("option A": every
second pixel, and zeros for the new channels, half of them on either side); global average; 10
logits. Names are those of the published PyTorch files (resnet56-4bfd9763.th), which begin with
"module.".
"""

from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.features.layers import conv, folded, linear, read_linear
from cheapscale.features.network import FeatureNetwork, enlarge, standardised
from cheapscale.features.weights import Weights

PyTree = Any

SIZES = {"resnet20": {"blocks": 3}, "resnet56": {"blocks": 9}}  # blocks in each group
WIDTHS = (16, 32, 64)
BN_EPS = 1e-5


def build(weights: Weights, name: str, blocks: int, input_size: int = 32) -> FeatureNetwork:
    """The network: maps of 16, 32 and 64 channels at strides 1, 2 and 4, and outputs "features"
    [b, 64] and "logits" [b, 10] (airplane, automobile, bird ... truck)."""
    prefix = "module." if "module.conv1.weight" in weights.arrays else ""
    if f"{prefix}layer1.{blocks}.conv1.weight" in weights.arrays:
        raise ValueError(f"{weights.path} has more than {blocks} blocks in a group: no {name}")

    def read(layer, number, out, width):
        names = (f"{prefix}{layer}{kind}{number}" for kind in ("conv", "bn"))
        return folded(weights, *names, (out, width, 3, 3), BN_EPS)

    width = WIDTHS[0]
    params = {"stem": read("", 1, width, 3), "groups": []}
    for number, out in enumerate(WIDTHS, start=1):
        group = []
        for i in range(blocks):
            block = f"layer{number}.{i}."
            group.append((read(block, 1, out, width), read(block, 2, out, out)))
            width = out
        params["groups"].append(group)
    params["logits"] = read_linear(weights, prefix + "linear", width, 10)

    def apply(params, x):
        x = jax.nn.relu(conv(standardised(enlarge(x, input_size)), params["stem"], padding=1))
        maps = []
        for group in params["groups"]:
            for block in group:
                x = _block(block, x)
            maps.append(x)
        return tuple(maps)

    def outputs(params, x):
        features = jnp.mean(apply(params, x)[-1], axis=(1, 2))
        return {"features": features, "logits": linear(features, params["logits"])}

    params = jax.tree.map(jnp.asarray, params)
    return FeatureNetwork(name, apply, params, weights.sha256, input_size, outputs=outputs)


def _block(block: PyTree, x: jax.Array) -> jax.Array:
    first, second = block
    stride = len(first["bias"]) // x.shape[3]  # the channels double where the sides halve
    h = jax.nn.relu(conv(x, first, stride, padding=1))
    h = conv(h, second, padding=1)
    if stride > 1:
        new = x.shape[3] // 2  # zero channels on either side
        x = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (new, new)))
    return jax.nn.relu(h + x)
