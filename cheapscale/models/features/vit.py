"""Pre-norm transformer blocks of DeiT, DINOv2 and CLIP: x + attention(LN x), then x + MLP(LN x).

A block is a dict: norm1, qkv, proj, norm2, fc1, fc2. Heads have 64 channels in all of these
networks. Equal blocks are stacked and scanned over, so that one block compiles and not all of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cheapscale.models.features.weights import Weights

PyTree = Any

HEAD_DIM = 64
SEGMENTS = 4  # the tokens after each quarter of the blocks are handed out


class BlockNames(NamedTuple):
    """What a file calls the parts of one block, up to "weight" and "bias".

    qkv: one name, or three where queries, keys and values lie apart.
    scales: full names of LayerScale's factors of the two branches, where the network has them.
    """

    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: str
    fc2: str
    scales: tuple[str, ...] = ()


TIMM = BlockNames("norm1.", ("attn.qkv.",), "attn.proj.", "norm2.", "mlp.fc1.", "mlp.fc2.")


def read_blocks(
    weights: Weights, prefix: str, names: BlockNames, width: int, depth: int | None = None
) -> list[PyTree]:
    """All blocks `prefix`<n> as `SEGMENTS` stacked trees, each a quarter of the depth.

    Raises ValueError where the depth is another than `depth` (None: any) or no multiple of
    `SEGMENTS`, or the width none of 64.
    """
    found = len({n[len(prefix) :].split(".")[0] for n in weights.arrays if n.startswith(prefix)})
    if depth not in (None, found):
        raise ValueError(
            f"{weights.path} has {found} blocks {prefix}<n> where this network has {depth}: it is "
            "a file of another network"
        )
    if not found or found % SEGMENTS or width % HEAD_DIM:
        raise ValueError(
            f"{weights.path} has {found} blocks {prefix}<n> of width {width}: this network needs a "
            f"multiple of {SEGMENTS} blocks and of {HEAD_DIM} channels"
        )
    blocks = [read_block(weights, f"{prefix}{i}.", names, width) for i in range(found)]
    size = found // SEGMENTS
    return [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks[i : i + size])
        for i in range(0, found, size)
    ]


def read_block(weights: Weights, prefix: str, names: BlockNames, width: int) -> PyTree:
    """One block; LayerScale is folded into the last linear layer of each branch."""

    def linear(name, fan_in, fan_out):
        return {
            "kernel": weights.take(f"{prefix}{name}weight", fan_out, fan_in).T,
            "bias": weights.take(f"{prefix}{name}bias", fan_out),
        }

    mlp = weights.take(f"{prefix}{names.fc1}bias", -1).shape[0]
    qkv = [linear(name, width, 3 * width // len(names.qkv)) for name in names.qkv]
    block = {
        "norm1": read_norm(weights, prefix + names.norm1, width),
        "qkv": jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *qkv),
        "proj": linear(names.proj, width, width),
        "norm2": read_norm(weights, prefix + names.norm2, width),
        "fc1": linear(names.fc1, width, mlp),
        "fc2": linear(names.fc2, mlp, width),
    }
    for name, branch in zip(names.scales, ("proj", "fc2")):
        scale = weights.take(prefix + name, width)
        kernel, bias = block[branch]["kernel"], block[branch]["bias"]
        block[branch] = {"kernel": kernel * scale[None, :], "bias": bias * scale}
    return block


def read_norm(weights: Weights, name: str, width: int) -> PyTree:
    """Scale and bias of a LayerNorm called `name` (which ends in a dot)."""
    return {
        "scale": weights.take(name + "weight", width),
        "bias": weights.take(name + "bias", width),
    }


def check_patches(name: str, x: jax.Array, patch: int) -> None:
    """Refuse images x [b, h, w, 3] that are no whole number of patches."""
    if x.shape[1] % patch or x.shape[2] % patch:
        raise ValueError(
            f"{name} sees images of {x.shape[1]}x{x.shape[2]}, not a multiple of its {patch}-px "
            "patches: measure with --resize=clean, or set input_size to a larger multiple"
        )


def patch_tokens(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """x [b, h, w, 3], kernel [p, p, 3, width] -> [b, h/p, w/p, width]: one product per patch."""
    patches = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=kernel.shape[0], q=kernel.shape[1])
    return patches @ rearrange(kernel, "p q c width -> (p q c) width")


def encode(segments: list[PyTree], tokens: jax.Array, **options) -> list[jax.Array]:
    """Tokens [b, t, c] after each segment of blocks; `options` are those of `transform`."""
    out = []
    for segment in segments:
        tokens, _ = jax.lax.scan(
            lambda t, block: (transform(block, t, **options), None), tokens, segment
        )
        out.append(tokens)
    return out


def gelu(x: jax.Array) -> jax.Array:
    """Exact Gaussian error linear unit."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def transform(
    block: PyTree,
    x: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array] = gelu,
    eps: float = 1e-6,
    causal: bool = False,
) -> jax.Array:
    """One block on tokens x [b, t, c]; qkv channels are ordered (three, head, dim)."""
    b, t, c = x.shape
    qkv = linear(block["qkv"], layer_norm(block["norm1"], x, eps))
    qkv = qkv.reshape(b, t, 3, c // HEAD_DIM, HEAD_DIM)
    attended = jax.nn.dot_product_attention(
        qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=causal
    )
    x = x + linear(block["proj"], attended.reshape(b, t, c))
    h = activation(linear(block["fc1"], layer_norm(block["norm2"], x, eps)))
    return x + linear(block["fc2"], h)


def linear(weights: PyTree, x: jax.Array) -> jax.Array:
    """x [b, t, in] -> [b, t, out]."""
    return x @ weights["kernel"] + weights["bias"][None, None, :]


def layer_norm(weights: PyTree, x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Over the channels of x [b, t, c]."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * weights["scale"][None, None, :] + weights["bias"][None, None, :]
