"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) from a quantised file that holds its graph.

The file is an .npz with "graph", a JSON list of operations in order (conv, dwconv, add, mean, each
with the numbers of its input and output tensors), and per convolution `wNN` int8 [out, h, w, in]
([1, h, w, channels] if depthwise), `sNN` float scales per output channel and `bNN` biases with
batch norm folded in; the kernel is w * s. Activations stay in floating point.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.models.features.convolution import conv, depthwise
from cheapscale.models.features.network import FeatureNetwork, enlarge
from cheapscale.models.features.weights import Weights

PyTree = Any

FIRST_STRIDE = 4  # of the maps handed out: the projected discriminator's usual 4, 8, 16, 32
OPERATIONS = ("conv", "dwconv", "add", "mean")
NO_EFFECT = ("quantize", "reshape", "softmax")  # on real-valued features and logits


def build(weights: Weights, input_size: int = 224) -> FeatureNetwork:
    """The network: maps at strides 4 to 32 (24, 32, 96, 320 channels: the last linear bottleneck of
    each), and outputs "features" [b, 1280] and "logits" [b, 1001] (0 is the background)."""
    if "graph" not in weights.arrays:
        raise ValueError(f"{weights.path} has no 'graph': it is not a quantised MobileNetV2 file")
    graph = json.loads(str(weights.arrays["graph"]))
    params = {}
    for op in graph:
        if op["op"] not in OPERATIONS + NO_EFFECT:
            raise ValueError(f"{weights.path}: operation {op['op']!r} is not one of {OPERATIONS}")
        if op["op"] in ("conv", "dwconv"):
            params[f"{op['idx']:02d}"] = _dequantise(weights, op)
    taps, features, logits = _landmarks(graph)

    def run(params, x, wanted):
        return _run(graph, params, enlarge(x, input_size), wanted)

    def apply(params, x):
        return run(params, x, taps)

    def outputs(params, x):
        found = run(params, x, (features, logits))
        return {"features": found[0], "logits": found[1][:, 0, 0, :]}

    return FeatureNetwork(
        "mobilenet_v2", apply, params, weights.sha256, input_size, outputs=outputs
    )


def _dequantise(weights: Weights, op: dict) -> PyTree:
    index = f"{op['idx']:02d}"
    out, height, width, inputs = op["wshape"]
    kernel = weights.take("w" + index, out, height, width, inputs)
    if op["op"] == "dwconv":  # to [h, w, 1, channels]
        channels, kernel = inputs, kernel.transpose(1, 2, 0, 3)
    else:  # to [h, w, in, out]
        channels, kernel = out, kernel.transpose(1, 2, 3, 0)
    scale = weights.take("s" + index, channels)
    return {
        "kernel": jnp.asarray(kernel * scale),
        "bias": jnp.asarray(weights.take("b" + index, channels)),
    }


def _landmarks(graph: list[dict]) -> tuple[tuple[int, ...], int, int]:
    """Tensor numbers: the last linear output at each stride, the pooled features, the logits."""
    stride, last = {}, {}
    features = logits = None
    for op in graph:
        if op["op"] in NO_EFFECT:
            stride[op["out"]] = 1
        elif op["op"] == "mean":
            features = op["out"]
        elif features is not None:
            logits = op["out"]
        else:
            source = op["inp"][0] if op["op"] == "add" else op["inp"]
            stride[op["out"]] = stride[source] * op.get("stride", 1)
            if op.get("act", "none") == "none":
                last[stride[op["out"]]] = op["out"]
    taps = tuple(last[s] for s in sorted(last) if s >= FIRST_STRIDE)
    return taps, features, logits


def _run(graph: list[dict], params: PyTree, x: jax.Array, wanted: tuple[int, ...]) -> tuple:
    """Evaluate the graph up to the last wanted tensor."""
    values, needed = {}, set(wanted)
    for op in graph:
        if op["op"] == "quantize":
            values[op["out"]] = x
        elif op["op"] == "add":
            values[op["out"]] = values[op["inp"][0]] + values[op["inp"][1]]
        elif op["op"] == "mean":
            # Features are flat for their users; the next convolution sees one pixel.
            values[op["out"]] = jnp.mean(values[op["inp"][0]], axis=(1, 2))
        else:
            values[op["out"]] = _conv(op, params[f"{op['idx']:02d}"], values[op["inp"]])
        if needed <= values.keys():
            return tuple(values[number] for number in wanted)
    raise ValueError(f"tensors {wanted} are not outputs of the graph")


def _conv(op: dict, weights: PyTree, x: jax.Array) -> jax.Array:
    x = x[:, None, None, :] if x.ndim == 2 else x
    if op["padding"] != "SAME":
        raise ValueError(f"padding {op['padding']!r} of operation {op['idx']} is not 'SAME'")
    layer = depthwise if op["op"] == "dwconv" else conv
    out = layer(x, weights["kernel"], op["stride"]) + weights["bias"][None, None, None, :]
    return jnp.clip(out, 0.0, 6.0) if op["act"] == "relu6" else out
