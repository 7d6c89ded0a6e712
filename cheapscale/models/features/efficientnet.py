"""EfficientNet-lite0 (timm's "tf_efficientnet_lite0") as a frozen feature network.

Stem 3x3 stride 2, then seven stages of blocks: one depthwise-separable, six of inverted residuals;
a 1x1 convolution to 1280 channels, global average, a linear classifier. relu6, no
squeeze-and-excitation, batch norm (eps 1e-3) folded into the convolutions. Parameter names are
timm's: conv_stem, bn1, blocks.<stage>.<block>.{conv_pw, conv_dw, conv_pwl, bn1, bn2, bn3},
conv_head, bn2, classifier. Widths, kernel sizes and the number of blocks are read off the file.
Pixels enter as [-1, 1] (mean and deviation 0.5 of [0, 1]). The maps are those of the projected
discriminator: after stages 1, 2, 4 and 6, at strides 4, 8, 16, 32 (24, 40, 112, 320 channels).
"""

from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.models.features.convolution import conv, depthwise, folded
from cheapscale.models.features.network import FeatureNetwork, enlarge
from cheapscale.models.features.weights import Weights

PyTree = Any

STAGE_STRIDES = (1, 2, 2, 2, 1, 2, 1)
TAPS = (1, 2, 4, 6)  # stages whose output is a map
BN_EPS = 1e-3


def build(weights: Weights, input_size: int = 224) -> FeatureNetwork:
    """The network from timm's weights; outputs "features" [b, 1280] and, where the file has the
    classifier, "logits" [b, classes]."""
    params = {"stem": folded(weights, "conv_stem", "bn1", (-1, 3, 3, 3), BN_EPS)}
    width = params["stem"]["bias"].shape[0]
    for stage in range(len(STAGE_STRIDES)):
        count = _count(weights, f"blocks.{stage}.")
        params[f"stage{stage}"] = []
        for i in range(count):
            block, width = _block(weights, f"blocks.{stage}.{i}.", width, separable=stage == 0)
            params[f"stage{stage}"].append(block)
    params["head"] = folded(weights, "conv_head", "bn2", (-1, width, 1, 1), BN_EPS)
    width = params["head"]["bias"].shape[0]
    if "classifier.weight" in weights.arrays:
        kernel = weights.take("classifier.weight", -1, width).T
        bias = weights.take("classifier.bias", kernel.shape[1])
        params["logits"] = {"kernel": kernel, "bias": bias}

    def apply(params, x):
        return _maps(params, enlarge(x, input_size))

    def outputs(params, x):
        last = apply(params, x)[-1]
        last = relu6(_add_bias(conv(last, params["head"]["kernel"]), params["head"]))
        features = jnp.mean(last, axis=(1, 2))
        if "logits" not in params:
            return {"features": features}
        logits = features @ params["logits"]["kernel"] + params["logits"]["bias"][None, :]
        return {"features": features, "logits": logits}

    params = jax.tree.map(jnp.asarray, params)
    return FeatureNetwork(
        "efficientnet_lite0", apply, params, weights.sha256, input_size, outputs=outputs
    )


def _maps(params: PyTree, x: jax.Array) -> tuple[jax.Array, ...]:
    x = relu6(_add_bias(conv(x, params["stem"]["kernel"], 2), params["stem"]))
    maps = []
    for stage, stride in enumerate(STAGE_STRIDES):
        for i, block in enumerate(params[f"stage{stage}"]):
            step = stride if i == 0 else 1
            h = x
            if "expand" in block:
                h = relu6(_add_bias(conv(h, block["expand"]["kernel"]), block["expand"]))
            h = depthwise(h, block["depthwise"]["kernel"], step)
            h = relu6(_add_bias(h, block["depthwise"]))
            h = _add_bias(conv(h, block["project"]["kernel"]), block["project"])
            x = x + h if h.shape == x.shape else h
        if stage in TAPS:
            maps.append(x)
    return tuple(maps)


def relu6(x: jax.Array) -> jax.Array:
    """min(max(x, 0), 6)."""
    return jnp.clip(x, 0.0, 6.0)


def _add_bias(x: jax.Array, weights: PyTree) -> jax.Array:
    return x + weights["bias"][None, None, None, :]


def _count(weights: Weights, prefix: str) -> int:
    count = 0
    while any(name.startswith(f"{prefix}{count}.") for name in weights.arrays):
        count += 1
    if count == 0:
        raise ValueError(f"{weights.path} has no weight {prefix}0.*: it is no EfficientNet-lite0")
    return count


def _block(weights: Weights, prefix: str, width: int, separable: bool) -> tuple[PyTree, int]:
    """One block's folded weights and its output width."""
    if separable:
        layers = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
    else:
        layers = {
            "expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"),
            "project": ("conv_pwl", "bn3"),
        }  # fmt: skip
    block = {}
    for layer, (name, norm) in layers.items():
        shape = (width, 1, -1, -1) if layer == "depthwise" else (-1, width, 1, 1)
        block[layer] = folded(weights, prefix + name, prefix + norm, shape, BN_EPS)
        width = block[layer]["bias"].shape[0]
    return block, width
