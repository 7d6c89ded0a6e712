"""DeiT-B and EfficientNet-lite0 on random weights against timm's own networks."""

import jax
import numpy as np
import pytest

from cheapscale import features
from cheapscale.features import deit

torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test) to compare")
F = torch.nn.functional


@pytest.fixture(scope="module")
def timm(torchvision):
    return pytest.importorskip("timm", reason="install timm (extra: test)")


def saved(model, path):
    """The model in evaluation mode with random weights of every part, and their file."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            value.copy_(value + 0.2 * torch.randn(value.shape, generator=generator))
    torch.save(model.state_dict(), path)
    return model.eval()


def close(found, expected, tolerance=1e-5):
    expected = expected.detach()
    expected = (expected.permute(0, 2, 3, 1) if expected.ndim == 4 else expected).numpy()
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def without_head(model, path):
    """The file of a model from which the classifier was taken off."""
    model.reset_classifier(0)
    torch.save(model.state_dict(), path)
    return path


def test_deit_tokens(timm, tmp_path):
    theirs = saved(
        timm.models.deit.VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=2, num_classes=7
        ),
        tmp_path / "deit.pth",
    )
    network = features.load("deit_base_distilled", tmp_path / "deit.pth", input_size=32)
    x = np.random.default_rng(7).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pixels = ((x + 1) / 2 - mean[None, None, None]) / deviation[None, None, None]
    with torch.no_grad():
        expected = theirs.forward_intermediates(
            torch.tensor(pixels).permute(0, 3, 1, 2), norm=False, intermediates_only=True
        )
    for found, value in zip(
        jax.jit(deit.encode)(network.params["vit"], x)[1], expected, strict=True
    ):
        close(found, value)
    with torch.no_grad():
        seen = theirs.forward_features(torch.tensor(pixels).permute(0, 3, 1, 2))
        pooled = theirs.forward_head(seen, pre_logits=True)
        logits = theirs.forward_head(seen)
    outputs = jax.jit(network.outputs)(network.params, x)
    assert set(outputs) == {"features", "logits"}
    close(outputs["features"], pooled)
    close(outputs["logits"], logits)
    # the random re-assembly does not affect features and logits
    redrawn = jax.jit(network.outputs)(network.draw(jax.random.key(3)), x)
    jax.tree.map(np.testing.assert_array_equal, redrawn, outputs)
    assert "HIGHEST" in str(jax.make_jaxpr(network.outputs)(network.params, x))
    # smaller images are enlarged here too
    small = jax.eval_shape(network.outputs, network.params, x[:, :9, :9])
    assert small["features"].shape == pooled.shape
    bare = features.load(
        "deit_base_distilled", without_head(theirs, tmp_path / "bare.pth"), input_size=32
    )
    outputs = jax.jit(bare.outputs)(bare.params, x)
    assert set(outputs) == {"features"}
    close(outputs["features"], pooled)


@pytest.mark.parametrize("side", [16, 24, 12])
def test_deit_resizes_its_positions_and_reassembles_its_tokens(side, tmp_path):
    """Against PyTorch's convolutions; the tokens themselves are compared with timm's above."""
    rng = np.random.default_rng(0)
    linear = {
        "attn.qkv": (192, 64),
        "attn.proj": (64, 64),
        "mlp.fc1": (32, 64),
        "mlp.fc2": (64, 32),
    }
    shapes = {"cls_token": (1, 1, 64), "dist_token": (1, 1, 64), "pos_embed": (1, 18, 64)}
    shapes |= {"patch_embed.proj.weight": (64, 3, 4, 4), "patch_embed.proj.bias": (64,)}
    for prefix in [f"blocks.{i}." for i in range(4)]:
        for name, shape in linear.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
        shapes |= {f"{prefix}norm{n}.{part}": (64,) for n in (1, 2) for part in ("weight", "bias")}
    shapes |= {"norm.weight": (64,), "norm.bias": (64,)}
    arrays = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    np.savez(tmp_path / "deit.npz", **arrays)
    network = features.load("deit_base_distilled", tmp_path / "deit.npz", input_size=12)
    x = rng.uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    grid, size = arrays["pos_embed"][:, 2:].reshape(1, 4, 4, 64), side // 4
    resized = F.interpolate(
        torch.tensor(grid).permute(0, 3, 1, 2), size=(size, size), mode="bilinear"
    )
    close(deit.resize_positions(grid, size, size), resized)

    _, tokens = jax.jit(deit.encode)(network.params["vit"], x)
    maps = jax.jit(network.apply)(network.params, x)
    for i, (ours, t) in enumerate(zip(maps, tokens, strict=True)):
        layer = {k: torch.tensor(np.asarray(v)) for k, v in network.params["reassembly"][i].items()}
        h = torch.tensor(np.asarray(t)).permute(0, 3, 1, 2)
        h = F.conv2d(h, layer["project"].T[:, :, None, None])
        if i in (0, 1):
            h = F.conv_transpose2d(h, layer["resize"].permute(2, 3, 0, 1), stride=(4, 2)[i])
        elif i == 3:
            h = F.conv2d(h, layer["resize"].permute(3, 2, 0, 1), stride=2, padding=1)
        close(ours, h)
    assert [m.shape[1] for m in maps] == [side, side // 2, size, -(-side // 8)]
    redrawn = network.draw(jax.random.key(5))["reassembly"][0]["project"]
    assert not np.allclose(redrawn, network.params["reassembly"][0]["project"])


def test_efficientnet_lite0_maps_and_outputs(timm, tmp_path):
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=7)
    saved(theirs, tmp_path / "lite0.pth")
    network = features.load("efficientnet_lite0", tmp_path / "lite0.pth", input_size=64)
    x = np.random.default_rng(8).uniform(-1, 1, (2, 66, 66, 3)).astype(np.float32)
    stages = []
    for stage in theirs.blocks:
        stage.register_forward_hook(lambda module, inputs, output: stages.append(output))
    with torch.no_grad():
        seen = theirs.forward_features(torch.tensor(x).permute(0, 3, 1, 2))
        pooled = theirs.forward_head(seen, pre_logits=True)
        logits = theirs.forward_head(seen)

    def both(params, x):  # one program
        return network.apply(params, x), network.outputs(params, x)

    found, outputs = jax.jit(both)(network.params, x)
    assert set(outputs) == {"features", "logits"} and pooled.shape == (2, 1280)
    close(outputs["features"], pooled)
    close(outputs["logits"], logits)
    assert "HIGHEST" in str(jax.make_jaxpr(network.outputs)(network.params, x))
    assert [m.shape[3] for m in found] == [24, 40, 112, 320]
    for ours, stage in zip(found, (1, 2, 4, 6)):
        close(ours, stages[stage])
    bare = features.load("efficientnet_lite0", without_head(theirs, tmp_path / "bare.pth"))
    assert set(jax.eval_shape(bare.outputs, bare.params, x)) == {"features"}
