"""CIFAR-10 ResNets: the architecture on random weights, and the accuracy of the published files."""

import jax
import numpy as np
import pytest

from cheapscale import features
from cheapscale.data.sources import open_source
from cheapscale.features import resnet
from cheapscale.features.weights import read_weights

FILES = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def torch_resnet(torch, blocks):
    """The paper's network from PyTorch's layers (shortcuts of option A)."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, width, out):
            super().__init__()
            self.stride = out // width
            self.conv1 = nn.Conv2d(width, out, 3, self.stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(out)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(out)

        def forward(self, x):
            h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            if self.stride > 1:
                half = x.shape[1] // 2
                x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
            return torch.relu(h + x)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            widths = (16, 16, 32, 64)
            for i, (width, out) in enumerate(zip(widths, widths[1:]), start=1):
                group = [Block(width if n == 0 else out, out) for n in range(blocks)]
                setattr(self, f"layer{i}", nn.Sequential(*group))
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            x = self.layer1(torch.relu(self.bn1(self.conv1(x))))
            pooled = self.layer3(self.layer2(x)).mean((2, 3))
            return pooled, self.linear(pooled)

    return nn.DataParallel(Network()).eval()


def test_architecture_on_random_weights(tmp_path):
    torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test) to compare")
    torch.manual_seed(0)
    theirs = torch_resnet(torch, blocks=2)
    for name, value in theirs.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.2)
    torch.save({"state_dict": theirs.state_dict(), "best_prec1": 0.1}, tmp_path / "net.th")
    network = resnet.build(read_weights(tmp_path / "net.th"), "resnet20", blocks=2)
    x = np.random.default_rng(6).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pixels = ((x + 1) / 2 - mean[None, None, None]) / deviation[None, None, None]
    with torch.no_grad():
        expected = theirs(torch.tensor(pixels).permute(0, 3, 1, 2))
    found = jax.jit(network.outputs)(network.params, x)
    for name, value in zip(("features", "logits"), expected):
        np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-4, atol=1e-5)
    maps = jax.eval_shape(network.apply, network.params, x)
    assert [m.shape[1:] for m in maps] == [(32, 32, 16), (16, 16, 32), (8, 8, 64)]


def published(shared, name):
    pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test) to read .th files")
    path = shared / "data" / "nets" / "cifar10_resnet" / FILES[name]
    if not path.is_file():
        pytest.skip(f"no weight file at {path}")
    return path


@pytest.mark.parametrize("name", FILES)
def test_published_networks_recognise_cifar10(name, shared):
    """The published accuracy is 92-93 %; 200 images may deviate by three standard deviations."""
    folder = shared / "data" / "tfds"
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"no CIFAR-10 at {folder}")
    network = features.load(name, published(shared, name))
    source = open_source("cifar10", "test", resolution=32, data_dir=str(folder))
    items = [source[i] for i in range(200)]
    x = np.stack([item["image"] for item in items])
    logits = jax.jit(network.outputs)(network.params, x)["logits"]
    accuracy = np.mean(logits.argmax(1) == np.array([item["label"] for item in items]))
    assert 0.87 < accuracy < 0.98


def test_the_depth_must_be_the_one_that_the_name_says(shared):
    with pytest.raises(ValueError, match="more than 3 blocks in a group"):
        features.load("resnet20", published(shared, "resnet56"))
    with pytest.raises(ValueError, match="no weight 'module.layer1.3.conv1.weight'"):
        features.load("resnet56", published(shared, "resnet20"))
