"""Encoders of captions on random weights against transformers', and what is refused."""

import numpy as np
import pytest

from cheapscale.data.tokens import train_vocabulary
from cheapscale.features.text_encoders import load_text_encoder
from cheapscale.models.text import TextConfig, TextEncoder

VOCABULARY = train_vocabulary(["a red disc left of a small blue square"] * 9, 300)
IDS = np.array([[5, 17, 299, -1, -1, -1], [3, 1, 4, 1, 5, 299], [299, -1, -1, -1, -1, -1]])


def bert(transformers):
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=96, max_position_embeddings=8,
    )  # fmt: skip
    return "minilm", transformers.BertModel(config, add_pooling_layer=False)


def clip(transformers):
    config = transformers.CLIPTextConfig(
        vocab_size=300, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=96, max_position_embeddings=8, eos_token_id=299,
    )  # fmt: skip
    return "clip", transformers.CLIPTextModel(config)


def t5(transformers, act="relu"):
    config = transformers.T5Config(
        vocab_size=300, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=3,
        feed_forward_proj=act,
    )  # fmt: skip
    return "t5", transformers.T5EncoderModel(config)


def t5_gated(transformers):
    return t5(transformers, "gated-gelu")


@pytest.mark.parametrize("make", [bert, clip, t5, t5_gated])
def test_encoders_equal_those_of_transformers(make, torchvision, tmp_path):
    transformers = pytest.importorskip("transformers", reason="install transformers (extra: test)")
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    name, theirs = make(transformers)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text(VOCABULARY)
    files = f"{tmp_path}/model.safetensors+{tmp_path}/tokenizer.json"
    encoder = load_text_encoder(name, files, 6)

    ours = TextEncoder(TextConfig(**encoder.fields)).apply({"params": encoder.params}, IDS)
    mask = IDS >= 0
    with torch.no_grad():
        out = theirs.eval()(
            torch.from_numpy(np.maximum(IDS, 0)),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
        )
    expected = out.last_hidden_state.numpy()
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(ours.tokens[mask], expected[mask], atol=1e-4)
    mean = np.stack([row[kept].mean(axis=0) for row, kept in zip(expected, mask)])
    pooled = out.pooler_output.numpy() if name == "clip" else mean
    np.testing.assert_allclose(ours.pooled, pooled, atol=1e-4)

    if name != "t5":
        with pytest.raises(ValueError, match="text.tokens is 9, but .* has 8 positions"):
            load_text_encoder(name, files, 9)
    with pytest.raises(ValueError, match="name the weights and the vocabulary"):
        load_text_encoder(name, f"{tmp_path}/model.safetensors", 6)
    large = train_vocabulary([f"{n}{n * n}" for n in range(999)], 320)
    (tmp_path / "tokenizer.json").write_text(large)
    with pytest.raises(ValueError, match=r"vocabulary has 320 tokens, but .* embeds 300"):
        load_text_encoder(name, files, 6)
