"""Inception-v3 against torch-fidelity's on random weights; its resizing against both references."""

import jax
import numpy as np
import pytest

from cheapscale import features
from cheapscale.features import inception

torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test) to compare")

SIZE = 107  # the smallest side with more than one pixel in the last map: 53, 25, 11, 5, 2


@pytest.fixture(scope="module")
def reference(torchvision, tmp_path_factory):
    """torch-fidelity's network at a reduced side with random weights, and their file."""
    fidelity = pytest.importorskip("torch_fidelity", reason="install torch-fidelity (extra: test)")
    folder = tmp_path_factory.mktemp("inception")

    class Random(fidelity.FeatureExtractorInceptionV3):
        INPUT_IMAGE_SIZE = SIZE

        def load_state_dict(self, state_dict):
            """There is no published file to read."""

    torch.save({}, folder / "none.pth")
    layers = ["64", "192", "768", "2048", "logits_unbiased"]
    network = Random("random", layers, feature_extractor_weights_path=folder / "none.pth")
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("num_batches_tracked"):
            continue
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(0, 0.05, generator=generator)
    torch.save(network.state_dict(), folder / "weights.pth")
    return network, folder / "weights.pth"


def test_every_layer_agrees_with_torch_fidelity(reference):
    theirs, path = reference
    network = features.load("inception_v3", path, input_size=SIZE)
    assert network.variant == "torch_fidelity" and len(network.sha256) == 64
    images = np.random.default_rng(0).integers(0, 256, (2, 33, 40, 3), dtype=np.uint8)
    expected = theirs(torch.tensor(images).permute(0, 3, 1, 2))
    x = images.astype(np.float32) / 127.5 - 1
    found = jax.jit(network.outputs)(network.params, x)
    names = ("features_64", "features_192", "features_768", "features", "logits")
    assert set(found) == set(names)
    for name, value in zip(names, expected):
        error = np.linalg.norm(found[name] - value.numpy()) / np.linalg.norm(value.numpy())
        assert error < 1e-5, f"{name}: {error}"
    maps = jax.eval_shape(network.apply, network.params, x)
    assert [m.shape[1:] for m in maps] == [(25, 25, 64), (11, 11, 192), (5, 5, 768), (2, 2, 2048)]


@pytest.mark.parametrize("sides", [(32, 32), (75, 75), (64, 190), (23, 300)])
def test_resizing_and_scale_are_those_of_the_tool_that_is_named(torchvision, sides):
    compat = pytest.importorskip(
        "torch_fidelity.interpolate_compat_tensorflow", reason="install torch-fidelity"
    )
    images = np.random.default_rng(1).integers(0, 256, (1, *sides, 3)).astype(np.float32)
    x, v = images / 127.5 - 1, torch.tensor(images).permute(0, 3, 1, 2)
    resized = compat.interpolate_bilinear_2d_like_tensorflow1x(v, (75, 75), align_corners=False)
    plain = torch.nn.functional.interpolate(v / 255, (75, 75), mode="bilinear") * 2 - 1
    for inputs, expected, tolerance in (
        ("torch_fidelity", (resized - 128) / 128, 1e-6),
        ("pytorch_fid", plain, 3e-5),  # its kernel rounds positions in another order
    ):
        found = inception.prepare(x, 75, inputs)
        expected = expected.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(found, expected, atol=tolerance)
    if sides == (75, 75):  # clean-fid resizes outside
        np.testing.assert_allclose(
            inception.prepare(x, 75, "torch_fidelity"), (images - 128) / 128, atol=1e-6
        )


@pytest.mark.parametrize("side", [1, 2, 5])
def test_average_leaves_the_padding_out(side):
    x = np.random.default_rng(2).normal(size=(1, side, side, 2)).astype(np.float32)
    expected = torch.nn.functional.avg_pool2d(
        torch.tensor(x).permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False
    )
    np.testing.assert_allclose(
        inception.average(x), expected.permute(0, 2, 3, 1).numpy(), rtol=1e-5, atol=1e-6
    )


def test_other_inceptions_and_inputs_are_refused(reference, tmp_path):
    weights = {k: v.numpy() for k, v in torch.load(reference[1], weights_only=True).items()}
    weights["fc.weight"] = weights["fc.weight"][:1000]
    path = tmp_path / "torchvision.npz"
    np.savez(path, **{k: np.broadcast_to(np.float32(1), v.shape) for k, v in weights.items()})
    with pytest.raises(ValueError, match=r"'fc.weight' has shape \(1000, 2048\) where .* \(1008,"):
        features.load("inception_v3", path)
    with pytest.raises(ValueError, match="inputs='clean' of inception_v3: choose one of"):
        features.load("inception_v3", path, inputs="clean")
