"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) from an int8 file that holds its graph.

The .npz has "graph", a JSON list of operations in order (conv, dwconv, add, mean, each with the
numbers of its input and output tensors). For convolution NN it has `wNN`, int8 [out, h, w, in]
([1, h, w, channels] if depthwise), `sNN`, the scales of the output channels, and `bNN`, the biases
with batch norm folded in. The kernel is w * s; activations stay in floating point.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.features.layers import conv, depthwise
from cheapscale.features.network import FeatureNetwork, enlarge
from cheapscale.features.weights import Weights

PyTree = Any

FIRST_STRIDE = 4  # of the maps: the projected discriminator's 4, 8, 16, 32
OPERATIONS = ("quantize", "conv", "dwconv", "add", "mean", "reshape", "softmax")


def build(weights: Weights, input_size: int = 224) -> FeatureNetwork:
    """The network: maps at strides 4 to 32 (24, 32, 96, 320 channels: the last linear bottleneck at
    each stride), and outputs "features" [b, 1280] and "logits" [b, 1001] (0 is the background)."""
    if "graph" not in weights.arrays:
        raise ValueError(f"{weights.path} has no 'graph': it is not an int8 MobileNetV2 file")
    graph = json.loads(str(weights.arrays["graph"]))
    for op in graph:
        if op["op"] not in OPERATIONS or op.get("padding", "SAME") != "SAME":
            raise ValueError(
                f"{weights.path}: operation {op} is not one of {OPERATIONS} with padding 'SAME': "
                "it is a file of another network"
            )
    # The graph multiplies int8 numbers by their scales, see `_read`.
    floats = {n: np.float32(a) if a.dtype == np.int8 else a for n, a in weights.arrays.items()}
    weights = weights._replace(arrays=floats)
    convs = [op for op in graph if op["op"] in ("conv", "dwconv")]
    params = {f"{op['idx']:02d}": jax.tree.map(jnp.asarray, _read(weights, op)) for op in convs}
    taps, logits = _taps(graph), convs[-1]["out"]
    (features,) = (op["out"] for op in graph if op["op"] == "mean")

    def apply(params, x):
        values = _run(graph, params, enlarge(x, input_size))
        return tuple(values[number] for number in taps)

    def outputs(params, x):
        values = _run(graph, params, enlarge(x, input_size))
        return {
            name: values[n][:, 0, 0] for name, n in (("features", features), ("logits", logits))
        }

    return FeatureNetwork(
        "mobilenet_v2", apply, params, weights.sha256, input_size, outputs=outputs
    )


def _read(weights: Weights, op: dict) -> PyTree:
    index = f"{op['idx']:02d}"
    # [1, h, w, c] -> [h, w, 1, c] where depthwise, [out, h, w, in] -> [h, w, in, out] otherwise
    axes = (1, 2, 0, 3) if op["op"] == "dwconv" else (1, 2, 3, 0)
    kernel = weights.take("w" + index, *op["wshape"]).transpose(axes)
    scale, bias = (weights.take(name + index, kernel.shape[3]) for name in "sb")
    return {"kernel": kernel * scale, "bias": bias}


def _taps(graph: list[dict]) -> tuple[int, ...]:
    """Numbers of the tensors that are maps: the last linear one at each stride."""
    stride, last = {}, {}
    for op in graph:
        if op["op"] == "mean":
            break
        source = op["inp"][0] if isinstance(op["inp"], list) else op["inp"]
        stride[op["out"]] = stride.get(source, 1) * op.get("stride", 1)
        if op.get("act", "none") == "none":
            last[stride[op["out"]]] = op["out"]
    return tuple(last[s] for s in sorted(last) if s >= FIRST_STRIDE)


def _run(graph: list[dict], params: PyTree, x: jax.Array) -> dict[int, jax.Array]:
    """Every tensor of the graph by its number; XLA drops the unused ones."""
    values = {}
    for op in graph:
        match op["op"]:
            case "quantize":
                out = x
            case "add":
                out = values[op["inp"][0]] + values[op["inp"][1]]
            case "mean":
                out = jnp.mean(values[op["inp"][0]], axis=(1, 2), keepdims=True)
            case "conv":
                out = conv(values[op["inp"]], params[f"{op['idx']:02d}"], op["stride"])
            case "dwconv":
                out = depthwise(values[op["inp"]], params[f"{op['idx']:02d}"], op["stride"])
            case _:  # reshape and softmax come after the logits
                continue
        values[op["out"]] = jax.nn.relu6(out) if op.get("act") == "relu6" else out
    return values
