"""The Inception-v3 of the Frechet inception distance: TensorFlow's graph of 2015-12-05.

It is not torchvision's network (Szegedy et al. 2015, arXiv 1512.00567): average pools leave the
padding out of the average, the last block's pool is a maximum, and there are 1008 classes. Every
convolution is followed by batch norm (eps 1e-3, folded in) and relu. Names are those of the file
that pytorch-fid and torch-fidelity use (pt_inception-2015-12-05-6726825d.pth).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cheapscale.features import resampling
from cheapscale.features.layers import conv, folded
from cheapscale.features.network import FeatureNetwork
from cheapscale.features.weights import Weights

PyTree = Any

BN_EPS = 1e-3
CLASSES = 1008
INPUTS = ("torch_fidelity", "pytorch_fid")

# A block is a tuple of branches that read the same input and are concatenated. A branch is a
# string of steps: a convolution's name, two names joined by "+" (in parallel), or "max". A suffix
# "/1" or "/2" is a stride without padding, "/mean" an average of 3x3 pixels after the convolution.
DOUBLE = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
A = ("branch1x1", "branch5x5_1 branch5x5_2", DOUBLE, "branch_pool/mean")
B = ("branch3x3/2", DOUBLE + "/2", "max/2")
C = (
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "branch_pool/mean",
)
D = (
    "branch3x3_1 branch3x3_2/2",
    "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2",
    "max/2",
)
E = (
    "branch1x1",
    "branch3x3_1 branch3x3_2a+branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a+branch3x3dbl_3b",
    "branch_pool/mean",
)
# Four stages of (prefix of the names, block), each ending in a map at half the size.
STAGES = (
    (("", ("Conv2d_1a_3x3/2 Conv2d_2a_3x3/1 Conv2d_2b_3x3 max/2",)),),
    (("", ("Conv2d_3b_1x1 Conv2d_4a_3x3/1 max/2",)),),
    tuple((f"Mixed_{n}.", block) for n, block in zip(
        ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"), (A, A, A, B, C, C, C, C)
    )),
    (("Mixed_7a.", D), ("Mixed_7b.", E), ("Mixed_7c.", (*E[:3], "max branch_pool"))),
)  # fmt: skip


def build(
    weights: Weights, input_size: int = 299, inputs: str = "torch_fidelity"
) -> FeatureNetwork:
    """The network: maps of 64, 192, 768 and 2048 channels at strides 4, 8, 16 and 32, and outputs
    "features" [b, 2048], "logits" [b, 1008] without their bias (those of the inception score), and
    the averages "features_64", "features_192", "features_768" of the earlier maps.

    inputs: which tool's preparation of images; the same weights give other numbers after another
      resize:
        "torch_fidelity"  TensorFlow 1's bilinear resize to 299, then (v - 128) / 128, v in 0..255
        "pytorch_fid"     bilinear between pixel centres to 299, [-1, 1] as it is
    """
    if inputs not in INPUTS:
        raise ValueError(f"inputs={inputs!r} of inception_v3: choose one of {INPUTS}")
    params, channels = {}, 3
    for stage in STAGES:
        for prefix, block in stage:
            channels = sum(_read_branch(weights, params, prefix, b, channels) for b in block)
    params["logits"] = weights.take("fc.weight", CLASSES, channels).T
    params = jax.tree.map(jnp.asarray, params)

    def apply(params, x):
        x, maps = prepare(x, input_size, inputs), []
        for stage in STAGES:
            for prefix, block in stage:
                x = jnp.concatenate([_branch(params, prefix, b, x) for b in block], axis=-1)
            maps.append(x)
        return tuple(maps)

    def outputs(params, x):
        *early, features = (jnp.mean(m, axis=(1, 2)) for m in apply(params, x))
        found = {f"features_{m.shape[1]}": m for m in early}
        return found | {"features": features, "logits": features @ params["logits"]}

    return FeatureNetwork(
        "inception_v3", apply, params, weights.sha256, input_size, outputs=outputs, variant=inputs
    )


def prepare(x: jax.Array, size: int, inputs: str) -> jax.Array:
    """[b, h, w, 3] in [-1, 1] -> [b, size, size, 3], scaled as the network expects."""
    b, h, w, c = x.shape
    if inputs == "pytorch_fid":
        return jax.image.resize(x, (b, size, size, c), "bilinear", antialias=False)
    matrices = (resampling.bilinear_tf1(side, size) for side in (h, w))
    x = resampling.separable(x, *matrices)  # images that come at this size stay as they are
    return ((x + 1.0) * 127.5 - 128.0) / 128.0


def _read_branch(weights: Weights, params: PyTree, prefix: str, branch: str, channels: int) -> int:
    """Adds the convolutions of a branch with `channels` inputs to `params`; returns its outputs."""
    for step in branch.split():
        names = [prefix + n.split("/")[0] for n in step.split("+") if not n.startswith("max")]
        for name in names:
            shape = (-1, channels, -1, -1)
            params[name] = folded(weights, name + ".conv", name + ".bn", shape, BN_EPS)
        channels = sum(len(params[name]["bias"]) for name in names) or channels
    return channels


def _branch(params: PyTree, prefix: str, branch: str, x: jax.Array) -> jax.Array:
    for step in branch.split():
        x = jnp.concatenate([_step(params, prefix, name, x) for name in step.split("+")], axis=-1)
    return x


def _step(params: PyTree, prefix: str, step: str, x: jax.Array) -> jax.Array:
    name, _, how = step.partition("/")
    stride, padding = (int(how), "VALID") if how.isdigit() else (1, "SAME")
    if name == "max":
        return nn.max_pool(x, (3, 3), (stride, stride), padding)
    x = conv(x, params[prefix + name], stride, padding)
    # The published graph averages before the 1x1 convolution. Both commute, and the convolution
    # leaves fewer channels to average.
    return jax.nn.relu(average(x) if how == "mean" else x)


def average(x: jax.Array) -> jax.Array:
    """Mean over 3x3 pixels, of which only those inside the image count."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
