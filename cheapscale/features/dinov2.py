"""DINO (Caron et al. 2021, arXiv 2104.14294), ViT-S and -B with patch 16, and DINOv2 (Oquab et al.
2023, arXiv 2304.07193), ViT-S, -B and -L with patch 14.

A class token precedes the patches; the blocks have the exact GELU and LayerNorm eps 1e-6, those of
DINOv2 also LayerScale. Features are the class token after the last LayerNorm, as in FD-DINOv2
(Stein et al. 2023, arXiv 2306.04675), which uses DINOv2's ViT-L at 224 px. The weights may have
facebookresearch's names (dinov2_vitl14_pretrain.pth, dino_deitsmall16_pretrain.pth) or
transformers' (the published model.safetensors).
"""

import jax
import jax.numpy as jnp

from cheapscale.features import resampling, vit
from cheapscale.features.network import FeatureNetwork, standardised
from cheapscale.features.weights import Weights

SIZES = {
    "dino_vits16": {"width": 384, "depth": 12, "patch": 16},
    "dino_vitb16": {"width": 768, "depth": 12, "patch": 16},
    "dinov2_vits14": {"width": 384, "depth": 12},
    "dinov2_vitb14": {"width": 768, "depth": 12},
    "dinov2_vitl14": {"width": 1024, "depth": 24},
}
TRANSFORMERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "layernorm.": "norm.",
    "attention.attention.query.": "attn.q.",
    "attention.attention.key.": "attn.k.",
    "attention.attention.value.": "attn.v.",
    "attention.output.dense.": "attn.proj.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}


def build(
    weights: Weights,
    name: str,
    width: int,
    depth: int,
    patch: int = 14,
    input_size: int = 224,
    position_offset: float = 0.1,
) -> FeatureNetwork:
    """DINO (patch 16) or DINOv2 (14) with maps of patch tokens after each quarter of the blocks,
    [b, h/patch, w/patch, width] each, and with outputs "features" [b, width].

    Args:
      input_size: the side that images should have (the caller resizes them by antialiased bicubic,
        as FD-DINOv2 does). Smaller images are enlarged bilinearly; larger ones keep their size,
        which must be a multiple of the patch.
      position_offset: positions were learned on 37x37 patches and are resized to the image's grid
        (bicubic). torch.hub's model computes the scale from a grid that is 0.1 larger, and
        published FD-DINOv2 numbers depend on it; transformers' model uses 0.
    """
    weights = vit.renamed(weights, TRANSFORMERS)
    params = vit.read_images(
        weights, "cls_token", width=width, patch=patch, depth=depth, scaled=patch == 14
    )
    params = jax.tree.map(jnp.asarray, params)

    def resize(grid, h, w):
        matrices = (resampling.bicubic(grid.shape[1], n, position_offset) for n in (h, w))
        return resampling.separable(grid, *matrices)

    def prepared(x):
        return standardised(vit.sized(name, x, input_size, patch))

    def apply(params, x):
        return tuple(vit.encode_images(params, prepared(x), resize)[1])

    def outputs(params, x):
        first = vit.encode_images(params, prepared(x), resize)[0][-1]
        return {"features": vit.layer_norm(params["norm"], first)[:, 0]}

    def tokens(params, x):
        return vit.all_tokens(params, prepared(x), resize)

    # Features with and without the offset differ: their statistics must not be compared.
    variant = f"position_offset={position_offset:g}"
    return FeatureNetwork(
        name, apply, params, weights.sha256, input_size, outputs=outputs, tokens=tokens,
        variant=variant,
    )  # fmt: skip
