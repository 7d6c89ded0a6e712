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
    expected = expected.detach().permute(0, 2, 3, 1).numpy()
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_deit_tokens(timm, tmp_path):
    theirs = saved(
        timm.models.deit.VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=2
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


def test_efficientnet_lite0_maps(timm, tmp_path):
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    saved(theirs, tmp_path / "lite0.pth")
    network = features.load("efficientnet_lite0", tmp_path / "lite0.pth", input_size=64)
    x = np.random.default_rng(8).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    stages = []
    for stage in theirs.blocks:
        stage.register_forward_hook(lambda module, inputs, output: stages.append(output))
    with torch.no_grad():
        theirs(torch.tensor(x).permute(0, 3, 1, 2))
    found = jax.jit(network.apply)(network.params, x)
    assert [m.shape[3] for m in found] == [24, 40, 112, 320]
    for ours, stage in zip(found, (1, 2, 4, 6)):
        close(ours, stages[stage])
