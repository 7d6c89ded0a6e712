"""CIFAR-10 ResNets of 6 n + 2 layers (He et al. 2015, arXiv 1512.03385, section 4.2).

A 3x3 convolution to 16 channels, three groups of n blocks with 16, 32 and 64 channels at strides
1, 2 and 4, relu, batch norm (eps 1e-5, folded in), shortcuts without parameters ("option A": every
second pixel, the new channels zero, half of them on either side), global average, 10 logits.

Names are those of the published PyTorch files (resnet56-4bfd9763.th): conv1, bn1,
layer<1-3>.<n>.{conv1, bn1, conv2, bn2}, linear, all behind "module.".
"""

from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.models.features.convolution import conv, folded
from cheapscale.models.features.network import FeatureNetwork, enlarge, standardised
from cheapscale.models.features.weights import Weights

PyTree = Any

SIZES = {"resnet20": {"blocks": 3}, "resnet56": {"blocks": 9}}  # of each group
WIDTHS = (16, 32, 64)
CLASSES = 10
BN_EPS = 1e-5


def build(weights: Weights, name: str, blocks: int, input_size: int = 32) -> FeatureNetwork:
    """The network: maps of 16, 32 and 64 channels at strides 1, 2 and 4, and outputs "features"
    [b, 64] and "logits" [b, 10] (airplane, automobile, bird ... truck)."""
    prefix = "module." if "module.conv1.weight" in weights.arrays else ""
    if f"{prefix}layer1.{blocks}.conv1.weight" in weights.arrays:
        raise ValueError(
            f"{weights.path} has more than {blocks} blocks in a group: it is a file of another "
            f"network than {name}"
        )
    stem, width = folded(weights, prefix + "conv1", prefix + "bn1", (16, 3, 3, 3), BN_EPS), 16
    groups = []
    for number, out in enumerate(WIDTHS, start=1):
        group = []
        for i in range(blocks):
            block = f"{prefix}layer{number}.{i}."
            convs = ((1, (out, width, 3, 3)), (2, (out, out, 3, 3)))
            group.append(
                [
                    folded(weights, f"{block}conv{k}", f"{block}bn{k}", shape, BN_EPS)
                    for k, shape in convs
                ]
            )
            width = out
        groups.append(group)
    params = {
        "stem": stem,
        "groups": groups,
        "logits": {
            "kernel": weights.take(prefix + "linear.weight", CLASSES, width).T,
            "bias": weights.take(prefix + "linear.bias", CLASSES),
        },
    }
    params = jax.tree.map(jnp.asarray, params)

    def apply(params, x):
        x = jax.nn.relu(_conv(params["stem"], standardised(enlarge(x, input_size))))
        maps = []
        for group in params["groups"]:
            for first, second in group:
                stride = first["kernel"].shape[3] // x.shape[3]
                h = jax.nn.relu(_conv(first, x, stride))
                x = jax.nn.relu(_conv(second, h) + _shortcut(x, stride))
            maps.append(x)
        return tuple(maps)

    def outputs(params, x):
        features = jnp.mean(apply(params, x)[-1], axis=(1, 2))
        logits = features @ params["logits"]["kernel"] + params["logits"]["bias"][None, :]
        return {"features": features, "logits": logits}

    return FeatureNetwork(name, apply, params, weights.sha256, input_size, outputs=outputs)


def _conv(weights: PyTree, x: jax.Array, stride: int = 1) -> jax.Array:
    return conv(x, weights["kernel"], stride, padding=1) + weights["bias"][None, None, None, :]


def _shortcut(x: jax.Array, stride: int) -> jax.Array:
    if stride == 1:
        return x
    new = x.shape[3] // 2  # on either side: the channels double
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (new, new)))
