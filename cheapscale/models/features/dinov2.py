"""DINOv2 vision transformers (Oquab et al. 2023, arXiv 2304.07193), ViT-S, -B and -L with patch 14.

A class token in front, learned positions, pre-norm blocks with LayerScale (folded into the linear
layers), exact GELU, LayerNorm eps 1e-6. Features are the class token after the last LayerNorm, as
in FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675), which takes ViT-L at 224 px.

Positions were learned on a grid of 37x37 patches and are resized to the image's (bicubic). The
published code computes the scale from a grid that is 0.1 larger, and every number quoted with
torch.hub's model has it; transformers does not (`position_offset=0`).

Two namings are read: facebookresearch's (dinov2_vitl14_pretrain.pth) and transformers' (those of
the published model.safetensors).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.models.features import resampling, vit
from cheapscale.models.features.network import FeatureNetwork, enlarge, standardised
from cheapscale.models.features.weights import Weights

PyTree = Any

SIZES = {
    "dinov2_vits14": {"width": 384, "depth": 12},
    "dinov2_vitb14": {"width": 768, "depth": 12},
    "dinov2_vitl14": {"width": 1024, "depth": 24},
}
PATCH = 14
HUB = vit.TIMM._replace(scales=("ls1.gamma", "ls2.gamma"))
TRANSFORMERS = vit.BlockNames(
    "norm1.",
    tuple(f"attention.attention.{part}." for part in ("query", "key", "value")),
    "attention.output.dense.",
    "norm2.",
    "mlp.fc1.",
    "mlp.fc2.",
    ("layer_scale1.lambda1", "layer_scale2.lambda1"),
)


def build(
    weights: Weights,
    name: str,
    width: int,
    depth: int,
    input_size: int = 224,
    position_offset: float = 0.1,
) -> FeatureNetwork:
    """The network: maps of patch tokens after each quarter of the blocks, all [b, h/14, w/14,
    width], and outputs "features" [b, width].

    Images come at `input_size` (FD-DINOv2: antialiased bicubic, done outside); smaller ones are
    enlarged bilinearly, larger ones stay native if they are a multiple of 14.
    """
    if "embeddings.cls_token" in weights.arrays:
        token, position, patch = (
            f"embeddings.{part}"
            for part in ("cls_token", "position_embeddings", "patch_embeddings.projection")
        )
        blocks, names, norm = "encoder.layer.", TRANSFORMERS, "layernorm."
    else:
        token, position, patch = "cls_token", "pos_embed", "patch_embed.proj"
        blocks, names, norm = "blocks.", HUB, "norm."
    params = {
        "patch": {
            "kernel": weights.take(patch + ".weight", width, 3, PATCH, PATCH).transpose(2, 3, 1, 0),
            "bias": weights.take(patch + ".bias", width),
        },
        "class": weights.take(token, 1, 1, width),
        "position": weights.take(position, 1, -1, width),
        "segments": vit.read_blocks(weights, blocks, names, width, depth),
        "norm": vit.read_norm(weights, norm, width),
    }
    params = jax.tree.map(jnp.asarray, params)

    def tokens(params, x):
        x = enlarge(x, input_size)
        vit.check_patches(name, x, PATCH)
        x = vit.patch_tokens(params["patch"]["kernel"], standardised(x))
        x = x + params["patch"]["bias"][None, None, None, :]
        b, h, w, c = x.shape
        first = jnp.broadcast_to(params["class"], (b, 1, c))
        x = jnp.concatenate([first, x.reshape(b, h * w, c)], axis=1)
        x = x + _positions(params["position"], h, w, position_offset)
        return vit.encode(params["segments"], x), (h, w)

    def apply(params, x):
        found, grid = tokens(params, x)
        return tuple(t[:, 1:].reshape(len(t), *grid, width) for t in found)

    def outputs(params, x):
        last = tokens(params, x)[0][-1]
        return {"features": vit.layer_norm(params["norm"], last[:, :1])[:, 0]}

    variant = f"position_offset={position_offset:g}"
    return FeatureNetwork(
        name, apply, params, weights.sha256, input_size, outputs=outputs, variant=variant
    )


def _positions(position: jax.Array, h: int, w: int, offset: float) -> jax.Array:
    """[1, 1 + side^2, c] -> [1, 1 + h w, c]; the class token's stays."""
    side = math.isqrt(position.shape[1] - 1)
    if (side, side) == (h, w):
        return position
    grid = position[:, 1:].reshape(1, side, side, -1)
    rows, columns = (resampling.bicubic(side, out, offset) for out in (h, w))
    grid = resampling.separable(grid, rows, columns)
    return jnp.concatenate([position[:, :1], grid.reshape(1, h * w, -1)], axis=1)
