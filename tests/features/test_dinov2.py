"""DINOv2 on random weights against transformers' and timm's, and the resizing of its positions."""

import jax
import numpy as np
import pytest

from cheapscale import features
from cheapscale.evaluation.embedding import clean
from cheapscale.features import dinov2, resampling
from cheapscale.features.weights import read_weights

torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test) to compare")

WIDTH, DEPTH = 128, 4


def randomise(model, seed=0):
    """Random weights that make every part of a network matter."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif value.is_floating_point():
            value.copy_(value + 0.3 * torch.randn(value.shape, generator=generator))
    return model.eval()


def images(height, width):
    x = np.random.default_rng(3).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pixels = ((x + 1) / 2 - mean[None, None, None]) / deviation[None, None, None]
    return x, torch.tensor(pixels).permute(0, 3, 1, 2)


def close(found, expected, tolerance=1e-5):
    expected = expected.detach().numpy()
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def reduced(path, **options):
    weights = read_weights(path)
    return dinov2.build(weights, "dinov2_vits14", width=WIDTH, depth=DEPTH, **options)


def test_transformers_names_and_positions(torchvision, tmp_path):
    transformers = pytest.importorskip("transformers", reason="install transformers (extra: test)")
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, image_size=70
    )
    theirs = randomise(transformers.Dinov2Model(config))
    theirs.save_pretrained(tmp_path)
    network = reduced(tmp_path / "model.safetensors", position_offset=0.0, input_size=42)
    outputs = jax.jit(network.outputs)
    for height, width in ((70, 70), (42, 84)):
        x, pixels = images(height, width)
        with torch.no_grad():
            expected = theirs(pixels).last_hidden_state
        close(outputs(network.params, x)["features"], expected[:, 0])
    maps = jax.eval_shape(network.apply, network.params, x)
    assert [m.shape for m in maps] == [(2, 3, 6, WIDTH)] * 4
    # No whole number of patches is refused, and both remedies that the message names help.
    square = np.zeros((1, 55, 55, 3), np.float32)
    said = "dinov2_vits14 sees images of 55x55, not a multiple of its 14-px patches: "
    with pytest.raises(ValueError, match=said + "measure with --resize=clean, or set input_size"):
        network.outputs(network.params, square)
    larger = reduced(tmp_path / "model.safetensors", input_size=56)
    for remedied, seen in ((network, clean(square, network.input_size)), (larger, square)):
        found = jax.eval_shape(remedied.outputs, network.params, seen)
        assert found["features"].shape == (1, WIDTH)


def test_hub_names(torchvision, tmp_path):
    timm = pytest.importorskip("timm", reason="install timm (extra: test)")
    theirs = timm.models.vision_transformer.VisionTransformer(
        70, 14, embed_dim=WIDTH, depth=DEPTH, num_heads=2, init_values=1.0, num_classes=0
    )
    torch.save(randomise(theirs).state_dict(), tmp_path / "hub.pth")
    network = reduced(tmp_path / "hub.pth", input_size=70)
    x, pixels = images(70, 70)
    with torch.no_grad():
        expected = theirs.forward_features(pixels)
        *_, last = theirs.forward_intermediates(pixels, norm=False, intermediates_only=True)
    close(jax.jit(network.outputs)(network.params, x)["features"], expected[:, 0])
    close(jax.jit(network.apply)(network.params, x)[-1], last.permute(0, 2, 3, 1))


def test_dinos_tokens_before_the_blocks_and_after_every_quarter(torchvision, tmp_path):
    """DINO has patches of 16 px and no LayerScale; the discriminator reads its tokens."""
    timm = pytest.importorskip("timm", reason="install timm (extra: test)")
    theirs = timm.models.vision_transformer.VisionTransformer(
        64, 16, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=0
    )
    torch.save(randomise(theirs).state_dict(), tmp_path / "dino.pth")
    network = dinov2.build(
        read_weights(tmp_path / "dino.pth"), "dino_vits16", WIDTH, DEPTH, patch=16, input_size=64
    )
    x, pixels = images(64, 64)
    first, *found = jax.jit(network.tokens)(network.params, x)
    assert len(found) == 4 and all(t.shape == (2, 17, WIDTH) for t in (first, *found))
    with torch.no_grad():
        expected = theirs.pos_drop(theirs._pos_embed(theirs.patch_embed(pixels)))
        after = [expected]
        for block in theirs.blocks:
            after.append(block(after[-1]))
    close(first, expected)
    for n, tokens in enumerate(found, start=1):
        close(tokens, after[n * DEPTH // 4])


@pytest.mark.parametrize("out", [3, 5, 9])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_positions_are_resized_as_published(out, offset):
    grid = np.random.default_rng(4).normal(size=(1, 5, 5, 2)).astype(np.float32)
    target = {"scale_factor": (out + offset) / 5} if offset else {"size": (out, out)}
    expected = torch.nn.functional.interpolate(
        torch.tensor(grid).permute(0, 3, 1, 2), mode="bicubic", **target
    )
    matrix = resampling.bicubic(5, out, offset)
    found = resampling.separable(grid, matrix, matrix)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_the_size_must_be_the_one_that_the_name_says(tmp_path):
    shapes = {"patch_embed.proj.weight": (384, 3, 14, 14), "patch_embed.proj.bias": (384,)}
    shapes |= {"cls_token": (1, 1, 384), "pos_embed": (1, 1370, 384), "blocks.0.x": (1,)}
    np.savez(tmp_path / "small.npz", **{k: np.ones(s, np.float32) for k, s in shapes.items()})
    with pytest.raises(ValueError, match=r"shape \(384, 3, 14, 14\) where this network has \(1024"):
        features.load("dinov2_vitl14", tmp_path / "small.npz")
    with pytest.raises(ValueError, match="1 blocks .* where this network has 12"):
        features.load("dinov2_vits14", tmp_path / "small.npz")
