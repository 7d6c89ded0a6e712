"""The names of CLIP's weights in the files of transformers and of OpenAI."""

from cheapscale.features.vit import renamed
from cheapscale.features.weights import Weights

# In this order: what is left without "vision_model" belongs to the text tower.
TRANSFORMERS = {
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # the published files spell it so
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.blocks",
    "text_model.": "",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "blocks",
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
PROJECTIONS = {
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
}  # fmt: skip


def openai_names(weights: Weights) -> Weights:
    """The weights of one tower or of both under OpenAI's names, except for the blocks, which get
    timm's names."""
    if "ln_final.weight" in weights.arrays:
        return renamed(weights, OPENAI)
    # transformers stores the transposed matrices of linear layers
    transposed = {
        new: weights.arrays[name].T for name, new in PROJECTIONS.items() if name in weights.arrays
    }
    weights = renamed(weights, TRANSFORMERS)
    return weights._replace(arrays=weights.arrays | transposed)
