"""Vision transformers: the common part of DeiT, DINOv2 and CLIP.

A block computes x + attention(LN x), then x + MLP(LN x), with heads of 64 channels. The parameters
of equal blocks are stacked and scanned over, so that only one block is compiled. `renamed` changes
other names of weights to timm's: patch_embed.proj, cls_token, pos_embed, norm, and
blocks.<n>.{norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2}.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from cheapscale.features.layers import linear, read_conv, read_linear
from cheapscale.features.network import enlarge
from cheapscale.features.weights import Weights

PyTree = Any

HEAD_DIM = 64
EXACT_GELU = functools.partial(jax.nn.gelu, approximate=False)
SEGMENTS = 4  # the tokens after each quarter of the blocks make a map


def renamed(weights: Weights, table: dict[str, str]) -> Weights:
    """`weights` with each old part of a name replaced by the new one, in the table's order;
    separate attn.{q,k,v} are joined to attn.qkv."""
    arrays = {}
    for name, array in weights.arrays.items():
        for old, new in table.items():
            name = name.replace(old, new)
        arrays[name] = array
    for name in [name for name in arrays if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in arrays for part in parts):
            joined = np.concatenate([arrays.pop(part) for part in parts])
            arrays[name.replace(".attn.q.", ".attn.qkv.")] = joined
    return weights._replace(arrays=arrays)


def read_images(
    weights: Weights, *tokens: str, width: int = -1, patch: int = -1, **options
) -> PyTree:
    """The parameters of `encode_images` under timm's names.

    tokens: names of the tokens that precede the patches; `options` are those of `read_blocks`.
    """
    projection = read_conv(weights, "patch_embed.proj", width, 3, patch, patch)
    width = len(projection["bias"])
    return {
        "patch": projection,
        "extra": np.concatenate([weights.take(name, 1, 1, width) for name in tokens], axis=1),
        "position": weights.take("pos_embed", 1, -1, width),
        "segments": read_blocks(weights, "blocks.", width, **options),
        "norm": read_norm(weights, "norm", width),
    }


def read_blocks(
    weights: Weights, prefix: str, width: int, depth: int | None = None, scaled: bool = False
) -> list[PyTree]:
    """All blocks `prefix`<n> as `SEGMENTS` stacked trees, each a quarter of the depth.

    depth: the required number of blocks; by default any multiple of `SEGMENTS`.
    scaled: LayerScale's factors ls1.gamma and ls2.gamma are folded into the last linear layer of
      each branch.
    """
    found = len({n[len(prefix) :].split(".")[0] for n in weights.arrays if n.startswith(prefix)})
    if found != (depth or found) or not found or found % SEGMENTS or width % HEAD_DIM:
        raise ValueError(
            f"{weights.path} has {found} blocks {prefix}<n> of width {width} where this network "
            f"has {depth or f'a multiple of {SEGMENTS}'}, of a multiple of {HEAD_DIM}: it is a "
            "file of another network"
        )
    blocks = [_read_block(weights, f"{prefix}{i}.", width, scaled) for i in range(found)]
    size = found // SEGMENTS
    return [
        jax.tree.map(lambda *leaves: np.stack(leaves), *blocks[i : i + size])
        for i in range(0, found, size)
    ]


def _read_block(weights: Weights, prefix: str, width: int, scaled: bool) -> PyTree:
    fc1 = read_linear(weights, prefix + "mlp.fc1", width)
    block = {
        "norm1": read_norm(weights, prefix + "norm1", width),
        "qkv": read_linear(weights, prefix + "attn.qkv", width, 3 * width),
        "proj": read_linear(weights, prefix + "attn.proj", width, width),
        "norm2": read_norm(weights, prefix + "norm2", width),
        "fc1": fc1,
        "fc2": read_linear(weights, prefix + "mlp.fc2", len(fc1["bias"]), width),
    }
    # LayerScale multiplies a branch by gamma: the same as scaling its last layer.
    for name, last in (("ls1.gamma", "proj"), ("ls2.gamma", "fc2")) if scaled else ():
        gamma = weights.take(prefix + name, width)
        block[last]["kernel"] = block[last]["kernel"] * gamma[None, :]
        block[last]["bias"] = block[last]["bias"] * gamma
    return block


def read_norm(weights: Weights, name: str, width: int) -> PyTree:
    """Scale and bias of the LayerNorm `name`."""
    scale, bias = (weights.take(f"{name}.{part}", width) for part in ("weight", "bias"))
    return {"scale": scale, "bias": bias}


def sized(name: str, x: jax.Array, input_size: int, patch: int) -> jax.Array:
    """x [b, h, w, 3] enlarged to `input_size`; refused if it is no whole number of patches."""
    x = enlarge(x, input_size)
    if x.shape[1] % patch or x.shape[2] % patch:
        raise ValueError(
            f"{name} sees images of {x.shape[1]}x{x.shape[2]}, not a multiple of its {patch}-px "
            "patches: measure with --resize=clean, or set input_size to a larger multiple"
        )
    return x


def encode_images(
    params: PyTree, x: jax.Array, resize: Callable | None = None, **options
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Standardised images [b, h, w, 3] -> (extra tokens [b, n, c], patch tokens [b, h/p, w/p, c]),
    each after every quarter of the blocks. Arguments: see `all_tokens`.
    """
    p, n = params["patch"]["kernel"].shape[0], params["extra"].shape[1]
    h, w = x.shape[1] // p, x.shape[2] // p
    _, *found = all_tokens(params, x, resize, **options)
    return [t[:, :n] for t in found], [t[:, n:].reshape(len(x), h, w, -1) for t in found]


def all_tokens(
    params: PyTree, x: jax.Array, resize: Callable | None = None, **options
) -> tuple[jax.Array, ...]:
    """Standardised images [b, h, w, 3] -> tokens [b, n + patches, c], the extra ones first: before
    the blocks, and after every quarter of them.

    resize: (positions [1, s, s, c], h/p, w/p) -> [1, h/p, w/p, c], for images of another size than
      the file's; `options` are those of `transform`.
    """
    kernel = params["patch"]["kernel"]
    p, q, _, c = kernel.shape
    x = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=p, q=q)
    x = x @ kernel.reshape(-1, c)  # a convolution as one product
    if "bias" in params["patch"]:
        x = x + params["patch"]["bias"][None, None, None, :]
    b, h, w, _ = x.shape
    extra, n = params["extra"], params["extra"].shape[1]
    tokens = jnp.concatenate([jnp.broadcast_to(extra, (b, n, c)), x.reshape(b, h * w, c)], axis=1)
    position = params["position"]
    side = math.isqrt(position.shape[1] - n)
    if (side, side) != (h, w):
        grid = resize(position[:, n:].reshape(1, side, side, c), h, w)
        position = jnp.concatenate([position[:, :n], grid.reshape(1, h * w, c)], axis=1)
    tokens = tokens + position
    if "norm_first" in params:
        tokens = layer_norm(params["norm_first"], tokens, options["eps"])
    return (tokens, *encode(params["segments"], tokens, **options))


def encode(segments: list[PyTree], tokens: jax.Array, **options) -> list[jax.Array]:
    """Tokens [b, t, c] after each segment of blocks; `options` are those of `transform`."""
    out = []
    for segment in segments:
        tokens, _ = jax.lax.scan(
            lambda t, block: (transform(block, t, **options), None), tokens, segment
        )
        out.append(tokens)
    return out


def transform(
    block: PyTree,
    x: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array] = EXACT_GELU,
    eps: float = 1e-6,
) -> jax.Array:
    """One block on tokens x [b, t, c]; qkv channels are ordered (three, head, dim)."""
    b, t, c = x.shape
    qkv = linear(layer_norm(block["norm1"], x, eps), block["qkv"])
    q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, c // HEAD_DIM, HEAD_DIM), 2, 0)
    attended = jax.nn.dot_product_attention(q, k, v)
    x = x + linear(attended.reshape(b, t, c), block["proj"])
    h = activation(linear(layer_norm(block["norm2"], x, eps), block["fc1"]))
    return x + linear(h, block["fc2"])


def layer_norm(norm: PyTree, x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x [b, t, c] normalised over its channels."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)  # before squaring, against cancellation
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * norm["scale"][None, None, :] + norm["bias"][None, None, :]
