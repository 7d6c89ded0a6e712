"""CLIP's image and text towers (Radford et al. 2021, arXiv 2103.00020), ViT-B/32 and ViT-L/14.

Both towers are pre-norm transformers with the activation x * sigmoid(1.702 x) and LayerNorm eps
1e-5. The image tower normalises its tokens once more before the blocks and projects the class
token. The text tower has causal attention and projects the token of the end mark, which has the
highest number in the vocabulary. The embeddings are not normalised here: a CLIP score takes their
cosine.

The weights may have OpenAI's names (ViT-B-32.pt) or those of transformers' CLIPModel.
`tokenizer.py` makes the tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.features import vit
from cheapscale.features.network import FeatureNetwork, enlarge, full_precision, standardised
from cheapscale.features.weights import Weights

PyTree = Any

# Image tower: channels, blocks, pixels per patch, patches per side; text tower: channels, blocks.
SIZES = {
    name: dict(zip(("width", "depth", "patch", "side", "text_width", "text_depth"), size))
    for name, size in {
        "clip_vitb32": (768, 12, 32, 7, 512, 12),
        "clip_vitl14": (1024, 24, 14, 16, 768, 12),
        "clip_vitl14_336": (1024, 24, 14, 24, 768, 12),
    }.items()
}
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5
TRANSFORMERS = {
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # the published files spell it so
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.blocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "blocks",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.proj",
    "layer_norm": "norm",
}
OPENAI = {
    "transformer.resblocks": "blocks",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def build(
    weights: Weights,
    name: str,
    width: int,
    depth: int,
    patch: int,
    side: int,
    text_width: int,
    text_depth: int,
    input_size: int | None = None,
) -> FeatureNetwork:
    """CLIP with maps of patch tokens after each quarter of the image tower's blocks, and with
    outputs "features" [b, d], the projected image embedding; `text_features` takes its params.

    Images should have `patch * side` px (the caller resizes them by antialiased bicubic, as CLIP
    does). Smaller images are enlarged bilinearly; larger ones are refused, because the positions
    exist for one size.
    """
    size = patch * side
    if input_size not in (None, size):
        raise ValueError(f"input_size={input_size} of {name}: its positions are for {size} px only")
    weights = _openai_names(weights)
    take, projection = weights.take, weights.take("visual.proj", width, -1)
    conv1 = take("visual.conv1.weight", width, 3, patch, patch)
    params = {
        "image": {
            "patch": {"kernel": conv1.transpose(2, 3, 1, 0)},
            "extra": take("visual.class_embedding", width)[None, None, :],
            "position": take("visual.positional_embedding", side**2 + 1, width)[None, :, :],
            "norm_first": vit.read_norm(weights, "visual.ln_pre", width),
            "segments": vit.read_blocks(weights, "visual.blocks.", width, depth),
            "norm": vit.read_norm(weights, "visual.ln_post", width),
            "projection": projection,
        },
        "text": {
            "embedding": take("token_embedding.weight", -1, text_width),
            "position": take("positional_embedding", -1, text_width),
            "segments": vit.read_blocks(weights, "blocks.", text_width, text_depth),
            "norm": vit.read_norm(weights, "ln_final", text_width),
            "projection": take("text_projection", text_width, projection.shape[1]),
        },
    }
    params = jax.tree.map(jnp.asarray, params)

    def encode(params, x):
        x = enlarge(x, size)
        if x.shape[1:3] != (size, size):
            raise ValueError(
                f"{name} sees images of {x.shape[1]}x{x.shape[2]} and has positions for "
                f"{size}x{size} only: measure with --resize=clean, or resize them first"
            )
        x = standardised(x, MEAN, DEVIATION)
        return vit.encode_images(params["image"], x, activation=quick_gelu, eps=EPS)

    def apply(params, x):
        return tuple(encode(params, x)[1])

    def outputs(params, x):
        first = vit.layer_norm(params["image"]["norm"], encode(params, x)[0][-1], EPS)
        return {"features": first[:, 0] @ params["image"]["projection"]}

    return FeatureNetwork(name, apply, params, weights.sha256, size, outputs=outputs)


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


@full_precision
def text_features(params: PyTree, tokens: jax.Array) -> jax.Array:
    """Text embeddings [b, d] of int32 tokens [b, n <= 77], each row with an end mark."""
    text = params["text"]
    limit = text["position"].shape[0]
    if tokens.shape[1] > limit:
        raise ValueError(f"tokens of length {tokens.shape[1]}: CLIP has {limit} positions")
    x = text["embedding"][tokens] + text["position"][None, : tokens.shape[1], :]
    x = vit.encode(text["segments"], x, activation=quick_gelu, eps=EPS, causal=True)[-1]
    end = jnp.argmax(tokens, axis=1)  # the end mark has the highest number
    x = jnp.take_along_axis(x, end[:, None, None], axis=1)
    return vit.layer_norm(text["norm"], x, EPS)[:, 0] @ text["projection"]


def _openai_names(weights: Weights) -> Weights:
    """The weights under OpenAI's names, except for the blocks, which get timm's names."""
    if "visual_projection.weight" not in weights.arrays:
        return vit.renamed(weights, OPENAI)
    weights = vit.renamed(weights, TRANSFORMERS)
    arrays = weights.arrays | {  # transformers stores the transposed matrices of linear layers
        "visual.proj": weights.arrays["visual_projection.weight"].T,
        "text_projection": weights.arrays.get("text_projection.weight", np.zeros(0)).T,
    }
    return weights._replace(arrays=arrays)
