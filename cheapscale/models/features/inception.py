"""Inception-v3 of the Frechet inception distance: TensorFlow's graph of 2015-12-05.

It is not torchvision's network (Szegedy et al. 2015, arXiv 1512.00567): average pools leave the
padding out of the average, the last block's pool is a maximum, and there are 1008 classes. Every
convolution is followed by a batch norm (eps 1e-3, folded in) and a relu. Names are those of
pytorch-fid's and torch-fidelity's file (pt_inception-2015-12-05-6726825d.pth).

The same weights give different numbers behind different resizing, so `inputs` says whose numbers
are meant:

  "torch_fidelity"  TensorFlow 1's bilinear resize to 299, then (v - 128) / 128 of v in 0..255
  "pytorch_fid"     bilinear between pixel centres to 299, [-1, 1] as it is
  "resized"         images come at 299 (clean-fid's resizing is done outside), (v - 128) / 128
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models.features import convolution, resampling
from cheapscale.models.features.network import FeatureNetwork
from cheapscale.models.features.weights import Weights

PyTree = Any

BN_EPS = 1e-3
CLASSES = 1008
INPUTS = ("torch_fidelity", "pytorch_fid", "resized")


class Conv(NamedTuple):
    """A convolution of the plan; `pool` averages its 3x3 surroundings before bias and relu."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    pool: bool = False


def _maximum(stride: int, padding: str):
    """Largest of 3x3; a row and a column at a time, which is quicker than a window on a CPU."""

    def pool(x):
        if padding == "SAME":
            pads = ((0, 0), (1, 1), (1, 1), (0, 0))
            x = jnp.pad(x, pads, constant_values=-jnp.inf)
        for axis in (1, 2):
            side = (x.shape[axis] - 3) // stride * stride + 1
            parts = [jax.lax.slice_in_dim(x, i, i + side, stride, axis) for i in range(3)]
            x = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
        return x

    return pool


HALVE = _maximum(2, "VALID")
LARGEST = _maximum(1, "SAME")

# A block is a tuple of branches that read the same input and are concatenated; a branch is a
# sequence of steps: a convolution, a pool, or two convolutions side by side.


def _block_a(pool: int) -> tuple:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        (Conv("branch_pool", pool, pool=True),),
    )


def _block_c(width: int) -> tuple:
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (Conv("branch_pool", 192, pool=True),),
    )


def _block_e(pool: tuple) -> tuple:
    def both(name):
        return (Conv(name + "a", 384, (1, 3)), Conv(name + "b", 384, (3, 1)))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), both("branch3x3_2")),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            both("branch3x3dbl_3"),
        ),
        pool,
    )


BLOCK_B = (
    (Conv("branch3x3", 384, (3, 3), 2, "VALID"),),
    (
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, (3, 3)),
        Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
    ),
    (HALVE,),
)
BLOCK_D = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, "VALID")),
    (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
    ),
    (HALVE,),
)

# Four stages of (prefix of the names, block), each ending in a map at half the size.
STAGES = (
    (
        ("", ((Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),),)),
        ("", ((Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),),)),
        ("", ((Conv("Conv2d_2b_3x3", 64, (3, 3)), HALVE),)),
    ),
    (
        ("", ((Conv("Conv2d_3b_1x1", 80),),)),
        ("", ((Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"), HALVE),)),
    ),
    (
        ("Mixed_5b.", _block_a(32)),
        ("Mixed_5c.", _block_a(64)),
        ("Mixed_5d.", _block_a(64)),
        ("Mixed_6a.", BLOCK_B),
        ("Mixed_6b.", _block_c(128)),
        ("Mixed_6c.", _block_c(160)),
        ("Mixed_6d.", _block_c(160)),
        ("Mixed_6e.", _block_c(192)),
    ),
    (
        ("Mixed_7a.", BLOCK_D),
        ("Mixed_7b.", _block_e((Conv("branch_pool", 192, pool=True),))),
        ("Mixed_7c.", _block_e((LARGEST, Conv("branch_pool", 192)))),
    ),
)


def build(
    weights: Weights, input_size: int = 299, inputs: str = "torch_fidelity"
) -> FeatureNetwork:
    """The network: maps of 64, 192, 768 and 2048 channels at strides 4, 8, 16 and 32, and outputs
    "features" [b, 2048], "logits" [b, 1008] without their bias (those of the inception score),
    and the averages "features_64", "features_192", "features_768" of the earlier maps.

    inputs: "torch_fidelity", "pytorch_fid" or "resized", see above.
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
    """[b, h, w, 3] in [-1, 1] -> the network's own scale at size x size."""
    if inputs == "resized" and x.shape[1:3] != (size, size):
        raise ValueError(
            f"inception_v3 was given images of {x.shape[1]}x{x.shape[2]} as already resized: "
            f"resize them to {size}x{size}, or load it with inputs='torch_fidelity'"
        )
    if inputs != "resized":
        matrix = {
            "torch_fidelity": resampling.bilinear_tf1,
            "pytorch_fid": resampling.bilinear_centres,
        }[inputs]
        x = resampling.separable(x, matrix(x.shape[1], size), matrix(x.shape[2], size))
    return x if inputs == "pytorch_fid" else ((x + 1.0) * 127.5 - 128.0) / 128.0


def _read_branch(weights: Weights, params: PyTree, prefix: str, steps: tuple, width: int) -> int:
    """Fill `params` with the convolutions of one branch of `width` inputs; returns its outputs."""
    for step in steps:
        if callable(step):
            continue
        convs = (step,) if isinstance(step, Conv) else step
        for conv in convs:
            name = prefix + conv.name
            shape = (conv.width, width, *conv.kernel)
            params[name] = convolution.folded(weights, name + ".conv", name + ".bn", shape, BN_EPS)
        width = sum(conv.width for conv in convs)
    return width


def _branch(params: PyTree, prefix: str, steps: tuple, x: jax.Array) -> jax.Array:
    for step in steps:
        if isinstance(step, Conv):
            x = _conv(params[prefix + step.name], step, x)
        elif callable(step):
            x = step(x)
        else:
            x = jnp.concatenate([_conv(params[prefix + c.name], c, x) for c in step], axis=-1)
    return x


def _conv(weights: PyTree, step: Conv, x: jax.Array) -> jax.Array:
    x = convolution.conv(x, weights["kernel"], step.stride, step.padding)
    # The average and a 1x1 convolution commute, and there are fewer channels after it.
    x = average(x) if step.pool else x
    return jax.nn.relu(x + weights["bias"][None, None, None, :])


def average(x: jax.Array) -> jax.Array:
    """Mean of the 3x3 surroundings, only of those within the image."""
    for axis in (1, 2):
        side = x.shape[axis]
        pads = [(0, 0)] * 4
        pads[axis] = (1, 1)
        padded = jnp.pad(x, pads)
        total = sum(jax.lax.slice_in_dim(padded, i, i + side, 1, axis) for i in range(3))
        index = np.arange(side)
        count = np.float32(3) - (index == 0) - (index == side - 1)
        x = total / count.reshape([side if i == axis else 1 for i in range(4)])
    return x
