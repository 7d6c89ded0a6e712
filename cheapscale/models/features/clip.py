"""CLIP's image and text towers (Radford et al. 2021, arXiv 2103.00020), ViT-B/32 and ViT-L/14.

Both towers are pre-norm transformers with x * sigmoid(1.702 x) and LayerNorm eps 1e-5. The image
tower normalises its tokens once more ahead of the blocks and projects the class token; the text
tower attends to the past only and projects the token of the end mark, which has the highest number
in the vocabulary. Neither embedding is normalised here: a CLIP score takes their cosine.

Two namings are read: OpenAI's (ViT-B-32.pt) and transformers' CLIPModel. `tokenizer.py` makes the
tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models.features import vit
from cheapscale.models.features.network import FeatureNetwork, enlarge, exact, standardised
from cheapscale.models.features.weights import Weights

PyTree = Any


class Image(NamedTuple):
    """Size of an image tower: channels, blocks, pixels of a patch, patches of a side."""

    width: int
    depth: int
    patch: int
    side: int


class Text(NamedTuple):
    """Size of a text tower: channels, blocks."""

    width: int
    depth: int


SIZES = {
    "clip_vitb32": {"image": Image(768, 12, 32, 7), "text": Text(512, 12)},
    "clip_vitl14": {"image": Image(1024, 24, 14, 16), "text": Text(768, 12)},
    "clip_vitl14_336": {"image": Image(1024, 24, 14, 24), "text": Text(768, 12)},
}
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5

OPENAI = vit.BlockNames(
    "ln_1.", ("attn.in_proj_",), "attn.out_proj.", "ln_2.", "mlp.c_fc.", "mlp.c_proj."
)
TRANSFORMERS = vit.BlockNames(
    "layer_norm1.",
    tuple(f"self_attn.{part}_proj." for part in "qkv"),
    "self_attn.out_proj.",
    "layer_norm2.",
    "mlp.fc1.",
    "mlp.fc2.",
)


def build(
    weights: Weights,
    name: str,
    image: Image,
    text: Text,
    input_size: int | None = None,
) -> FeatureNetwork:
    """The network: maps of patch tokens after each quarter of the image tower's blocks, and
    outputs "features" [b, d], the projected image embedding; `text_features` takes its params.

    Images come at `image.patch * image.side` px (CLIP: antialiased bicubic, done outside); smaller
    ones are enlarged bilinearly, larger ones are refused, since positions exist for one size.
    """
    size, grid = image.patch * image.side, (image.side, image.side)
    if input_size not in (None, size):
        raise ValueError(
            f"input_size={input_size} of {name}: its positions are for {size} px, so leave it out "
            "and measure larger images with --resize=clean"
        )
    read = _read_transformers if "visual_projection.weight" in weights.arrays else _read_openai
    params = read(weights, image, text)
    params = jax.tree.map(jnp.asarray, params)

    def tokens(params, x):
        x = enlarge(x, size)
        if x.shape[1:3] != (size, size):
            raise ValueError(
                f"{name} sees images of {x.shape[1]}x{x.shape[2]} and has positions for "
                f"{size}x{size} only: measure with --resize=clean, or resize them first"
            )
        x = standardised(x, MEAN, DEVIATION)
        x = vit.patch_tokens(params["patch"], x).reshape(len(x), -1, image.width)
        first = jnp.broadcast_to(params["class"][None, None, :], (len(x), 1, image.width))
        x = jnp.concatenate([first, x], axis=1) + params["position"][None, :, :]
        x = vit.layer_norm(params["norm_first"], x, EPS)
        return vit.encode(params["segments"], x, activation=vit.quick_gelu, eps=EPS)

    def apply(params, x):
        return tuple(
            t[:, 1:].reshape(len(t), *grid, image.width) for t in tokens(params["image"], x)
        )

    def outputs(params, x):
        last = tokens(params["image"], x)[-1][:, :1]
        last = vit.layer_norm(params["image"]["norm_last"], last, EPS)[:, 0]
        return {"features": last @ params["image"]["projection"]}

    return FeatureNetwork(name, apply, params, weights.sha256, size, outputs=outputs)


@exact
def text_features(params: PyTree, tokens: jax.Array) -> jax.Array:
    """Text embeddings [b, d] of int32 tokens [b, n <= 77], each row with an end mark."""
    text = params["text"]
    limit = text["position"].shape[0]
    if tokens.shape[1] > limit:
        raise ValueError(f"tokens of length {tokens.shape[1]}: CLIP has {limit} positions")
    x = text["embedding"][tokens] + text["position"][None, : tokens.shape[1], :]
    options = {"activation": vit.quick_gelu, "eps": EPS, "causal": True}
    x = vit.encode(text["segments"], x, **options)[-1]
    end = jnp.argmax(tokens, axis=1)
    x = jnp.take_along_axis(x, end[:, None, None], axis=1)
    return vit.layer_norm(text["norm_last"], x, EPS)[:, 0] @ text["projection"]


def _read_openai(weights: Weights, image: Image, text: Text) -> PyTree:
    blocks = "transformer.resblocks."
    projection = weights.take("visual.proj", image.width, -1)
    return {
        "image": {
            "patch": _patch(weights, "visual.conv1.weight", image),
            "class": weights.take("visual.class_embedding", image.width),
            "position": weights.take("visual.positional_embedding", image.side**2 + 1, image.width),
            "norm_first": vit.read_norm(weights, "visual.ln_pre.", image.width),
            "segments": vit.read_blocks(
                weights, "visual." + blocks, OPENAI, image.width, image.depth
            ),
            "norm_last": vit.read_norm(weights, "visual.ln_post.", image.width),
            "projection": projection,
        },
        "text": {
            "embedding": weights.take("token_embedding.weight", -1, text.width),
            "position": weights.take("positional_embedding", -1, text.width),
            "segments": vit.read_blocks(weights, blocks, OPENAI, text.width, text.depth),
            "norm_last": vit.read_norm(weights, "ln_final.", text.width),
            "projection": weights.take("text_projection", text.width, projection.shape[1]),
        },
    }


def _read_transformers(weights: Weights, image: Image, text: Text) -> PyTree:
    seen, said = "vision_model.", "text_model."
    table, blocks = "position_embedding.weight", "encoder.layers."
    projection = weights.take("visual_projection.weight", -1, image.width).T
    return {
        "image": {
            "patch": _patch(weights, seen + "embeddings.patch_embedding.weight", image),
            "class": weights.take(seen + "embeddings.class_embedding", image.width),
            "position": weights.take(seen + "embeddings." + table, image.side**2 + 1, image.width),
            # The published files spell it so.
            "norm_first": vit.read_norm(weights, seen + "pre_layrnorm.", image.width),
            "segments": vit.read_blocks(
                weights, seen + blocks, TRANSFORMERS, image.width, image.depth
            ),
            "norm_last": vit.read_norm(weights, seen + "post_layernorm.", image.width),
            "projection": projection,
        },
        "text": {
            "embedding": weights.take(said + "embeddings.token_embedding.weight", -1, text.width),
            "position": weights.take(said + "embeddings." + table, -1, text.width),
            "segments": vit.read_blocks(
                weights, said + blocks, TRANSFORMERS, text.width, text.depth
            ),
            "norm_last": vit.read_norm(weights, said + "final_layer_norm.", text.width),
            "projection": weights.take("text_projection.weight", projection.shape[1], text.width).T,
        },
    }


def _patch(weights: Weights, name: str, image: Image) -> np.ndarray:
    kernel = weights.take(name, image.width, 3, image.patch, image.patch)
    return kernel.transpose(2, 3, 1, 0)
