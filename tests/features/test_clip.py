"""CLIP's towers on random weights against transformers' and torch-fidelity's."""

import jax
import numpy as np
import pytest

from cheapscale import features
from cheapscale.features import clip
from cheapscale.features.weights import read_weights

torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test) to compare")

SIZE = {"width": 128, "depth": 4, "patch": 8, "side": 3}
VOCABULARY, EMBEDDING = 50, 32
# transformers' names -> OpenAI's, in this order; projections and queries, keys, values apart.
OPENAI = (
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


@pytest.fixture(scope="module")
def reference(torchvision, tmp_path_factory):
    """transformers' CLIPModel with random weights, and the folder with its file."""
    transformers = pytest.importorskip("transformers", reason="install transformers (extra: test)")
    vision = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"intermediate_size": 512, "image_size": 24, "patch_size": 8}
    text = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1}
    text |= {"intermediate_size": 192, "vocab_size": VOCABULARY, "max_position_embeddings": 9}
    text |= {"eos_token_id": VOCABULARY - 1}
    config = transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=EMBEDDING
    )
    model = transformers.CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif value.ndim == 1 and value.is_floating_point():
            value.copy_(value + 0.3 * torch.randn(value.shape, generator=generator))
        if value.is_floating_point():
            value.copy_(value.half())  # OpenAI's files are in half precision
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model, folder / "model.safetensors"


@pytest.fixture(scope="module")
def openai(reference, tmp_path_factory):
    """The same weights under OpenAI's names, and their file."""
    state = dict(reference[0].state_dict())
    weights = {f: state.pop(t).T for f, t in (
        ("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"),
    )}  # fmt: skip
    for name in [n for n in state if ".q_proj." in n]:
        parts = [state.pop(name.replace(".q_proj.", f".{p}_proj.")) for p in "qkv"]
        state[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    for name, value in state.items():
        for old, new in OPENAI:
            name = name.replace(old, new)
        weights[name] = value.contiguous()
    path = tmp_path_factory.mktemp("openai") / "clip.pt"
    torch.save(weights, path)
    return weights, path


def loaded(path):
    return clip.build(read_weights(path), "clip_vitb32", **SIZE)


def images():
    x = np.random.default_rng(5).uniform(-1, 1, (2, 24, 24, 3)).astype(np.float32)
    mean = np.float32([0.48145466, 0.4578275, 0.40821073])
    deviation = np.float32([0.26862954, 0.26130258, 0.27577711])
    pixels = ((x + 1) / 2 - mean[None, None, None]) / deviation[None, None, None]
    return x, torch.tensor(pixels).permute(0, 3, 1, 2)


def close(found, expected, tolerance=1e-5):
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_both_towers_agree_with_transformers(reference):
    theirs, path = reference
    network = loaded(path)
    x, pixels = images()
    end = VOCABULARY - 1
    tokens = np.array([[48, 3, 7, 12, end, end, end, end, end], [48, 5, 4, 3, 2, 1, 9, 8, end]])
    with torch.no_grad():
        image = theirs.get_image_features(pixels).pooler_output.numpy()
        text = theirs.get_text_features(torch.tensor(tokens)).pooler_output.numpy()
    outputs, words = jax.jit(network.outputs), jax.jit(clip.text_features)
    close(outputs(network.params, x)["features"], image)
    close(words(network.params, tokens), text)
    assert image.shape == text.shape == (2, EMBEDDING)
    for filling in (0, -1):  # OpenAI's, and ours: nothing behind the end mark is read
        tokens[0, 5:] = filling
        close(words(network.params, tokens), text)
    maps = jax.eval_shape(network.apply, network.params, x)
    assert [m.shape for m in maps] == [(2, 3, 3, 128)] * 4


def test_openai_names_give_the_same_weights(reference, openai):
    ours, theirs = (loaded(path).params for path in (reference[1], openai[1]))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_image_tower_agrees_with_torch_fidelity(openai):
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_clip", reason="install torch-fidelity (extra: test)"
    )
    weights, path = openai
    theirs = module.build_model(dict(weights), torch.float32)
    x, pixels = images()
    network = loaded(path)
    with torch.no_grad():
        expected = theirs.visual(pixels).numpy()
    close(jax.jit(network.outputs)(network.params, x)["features"], expected)


OTHERS = {  # {field: (requested size, what the error says of the file's size)}
    "width": (192, r"'visual.proj' has shape \(128, 32\) .*\(192, any"),
    "patch": (6, r"'visual.conv1.weight' .*8\) where .*128, 3, 6, 6\)"),
    "side": (4, r"'visual.positional_.*\(10, 128\) .* \(17, 128\)"),
    "depth": (8, "4 blocks visual.blocks.<n> .* has 8,"),
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_file_of_another_size_is_refused(field, openai):
    wanted, said = OTHERS[field]
    with pytest.raises(ValueError, match=said):
        clip.build(read_weights(openai[1]), "clip_vitb32", **SIZE | {field: wanted})


def test_the_published_sizes_belong_to_the_names(reference, openai):
    for path, said in (
        (openai[1], r"'visual.proj' has shape \(128, 32\) where this network has \(768, any\)"),
        (reference[1], r"'visual.proj' has shape \(128, 32\) where this network has \(768, any\)"),
    ):
        with pytest.raises(ValueError, match=said):
            features.load("clip_vitb32", path)


def test_images_and_texts_without_positions_are_refused(openai):
    network = loaded(openai[1])
    said = "images of 32x32 and has positions for 24x24 only: measure with --resize=clean, or"
    with pytest.raises(ValueError, match=said):
        network.outputs(network.params, np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="tokens of length 10: CLIP has 9"):
        clip.text_features(network.params, np.zeros((1, 10), np.int32))
    with pytest.raises(ValueError, match="input_size=48 of clip_vitb32: its positions are for"):
        clip.build(read_weights(openai[1]), "clip_vitb32", **SIZE, input_size=48)
