"""DeiT-B and EfficientNet-lite0 on random weights against timm's own networks."""

import jax
import numpy as np
import pytest

from cheapscale.models import features
from cheapscale.models.features import deit

torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test) to compare")


@pytest.fixture(scope="module")
def timm(torchvision):
    return pytest.importorskip("timm", reason="install timm (extra: test)")


def saved(model, path):
    """The model in evaluation mode with weights at which every part matters, and their file."""
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
    for found, value in zip(jax.jit(deit.hidden)(network.params["vit"], x), expected, strict=True):
        close(found, value)
    with torch.no_grad():
        seen = theirs.forward_features(torch.tensor(pixels).permute(0, 3, 1, 2))
        pooled = theirs.forward_head(seen, pre_logits=True)
        logits = theirs.forward_head(seen)
    outputs = jax.jit(network.outputs)(network.params, x)
    assert set(outputs) == {"features", "logits"}
    close(outputs["features"], pooled)
    close(outputs["logits"], logits)
    # the re-assembly that is drawn at random has no part in what measures
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


def test_deit_refuses_half_a_head(timm, tmp_path):
    theirs = timm.models.deit.VisionTransformerDistilled(
        img_size=16, patch_size=8, embed_dim=64, depth=4, num_heads=1, num_classes=7
    )
    state = theirs.state_dict()
    del state["head_dist.bias"]
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"half\.pth has no weight 'head_dist\.bias'"):
        features.load("deit_base_distilled", tmp_path / "half.pth")


def test_efficientnet_lite0_maps_and_outputs(timm, tmp_path):
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=7)
    saved(theirs, tmp_path / "lite0.pth")
    network = features.load("efficientnet_lite0", tmp_path / "lite0.pth", input_size=64)
    x = np.random.default_rng(8).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
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
