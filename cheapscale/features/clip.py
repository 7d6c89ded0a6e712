"""CLIP's image and text towers (Radford et al. 2021, arXiv 2103.00020), ViT-B/32 and ViT-L/14.

The image tower is a pre-norm transformer with the activation x * sigmoid(1.702 x) and LayerNorm eps
1e-5. It normalises its tokens once more before the blocks and projects the class token. The text
tower is the encoder "clip" of `models.text` with a projection. The embeddings are not normalised
here: a CLIP score takes their cosine.

The weights may have OpenAI's names (ViT-B-32.pt) or those of transformers' CLIPModel.
`tokenizer.py` reads the vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from cheapscale.features import vit
from cheapscale.features.clip_names import openai_names
from cheapscale.features.network import FeatureNetwork, enlarge, full_precision, standardised
from cheapscale.features.text_encoders import encoder_fields, read_clip_text
from cheapscale.features.weights import Weights
from cheapscale.models.text import ACTIVATIONS, TextConfig, TextEncoder

PyTree = Any

# Image tower: channels, blocks, pixels per patch, patches per side.
SIZES = {
    name: dict(zip(("width", "depth", "patch", "side"), size))
    for name, size in {
        "clip_vitb32": (768, 12, 32, 7),
        "clip_vitl14": (1024, 24, 14, 16),
        "clip_vitl14_336": (1024, 24, 14, 24),
    }.items()
}
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5


def build(
    weights: Weights,
    name: str,
    width: int,
    depth: int,
    patch: int,
    side: int,
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
    weights = openai_names(weights)
    fields, encoder = read_clip_text(weights)
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
            "encoder": encoder,
            "projection": take("text_projection", fields["width"], projection.shape[1]),
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
        return vit.encode_images(params["image"], x, activation=ACTIVATIONS["quick_gelu"], eps=EPS)

    def apply(params, x):
        return tuple(encode(params, x)[1])

    def outputs(params, x):
        first = vit.layer_norm(params["image"]["norm"], encode(params, x)[0][-1], EPS)
        return {"features": first[:, 0] @ params["image"]["projection"]}

    return FeatureNetwork(name, apply, params, weights.sha256, size, outputs=outputs)


@full_precision
def text_features(params: PyTree, tokens: jax.Array) -> jax.Array:
    """Text embeddings [b, d] of int32 tokens [b, n <= 77], each row with an end mark."""
    encoder = params["text"]["encoder"]
    limit = len(encoder["position"])
    if tokens.shape[1] > limit:
        raise ValueError(f"tokens of length {tokens.shape[1]}: CLIP has {limit} positions")
    net = TextEncoder(TextConfig(**encoder_fields("clip", encoder)))
    return net.apply({"params": encoder}, tokens).pooled @ params["text"]["projection"]
