"""Feature networks on random weights against the same mathematics written with PyTorch."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale import features
from cheapscale.features import vgg
from cheapscale.features.distances import lpips_distance
from cheapscale.features.layers import depthwise

torch = pytest.importorskip("torch", reason="install torch==2.13.0 (extra: test) to compare")
F = torch.nn.functional


def random_weights(shapes, seed=0):
    """Kernels of unit gain, everything else around its neutral value."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        value = rng.normal(size=shape)
        if name.endswith("running_var") or "lin" in name:
            value = rng.uniform(0.5, 2.0, shape)
        elif len(shape) > 1:
            value *= np.prod(shape[1:]) ** -0.5
        elif name.endswith("weight"):
            value = 1.0 + 0.2 * value
        else:
            value *= 0.1
        weights[name] = value.astype(np.float32)
    return weights


def images(side, batch=2):
    x = np.random.default_rng(9).uniform(-1, 1, (batch, side, side, 3))
    return x.astype(np.float32)


def torch_images(x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def same_pad(x, kernel, stride):
    """TensorFlow's SAME padding for a torch tensor."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def agree(maps, expected, rtol=1e-4):
    assert len(maps) == len(expected)
    for ours, theirs in zip(maps, expected):
        theirs = theirs.detach().permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


def loaded(name, weights, tmp_path, **options):
    path = tmp_path / f"{name}.npz"
    np.savez(path, **weights)
    return features.load(name, path, **options)


@pytest.mark.parametrize(
    "side, kernel, stride", [(8, 3, 1), (8, 3, 2), (7, 5, 2), (2, 5, 1), (5, 5, 2)]
)
def test_depthwise_and_its_gradients(side, kernel, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, side, side, 4)).astype(np.float32)
    w = rng.normal(size=(kernel, kernel, 1, 4)).astype(np.float32)
    tx = torch_images(x).requires_grad_()
    tw = torch.tensor(w).permute(3, 2, 0, 1).requires_grad_()
    theirs = F.conv2d(same_pad(tx, kernel, stride), tw, stride=stride, groups=4)
    torch.sin(theirs).sum().backward()

    @jax.jit
    def both(x, w):
        layer = lambda x, w: depthwise(x, {"kernel": w, "bias": jnp.zeros(4)}, stride)  # noqa: E731
        loss = lambda x, w: jnp.sum(jnp.sin(layer(x, w)))  # noqa: E731
        return layer(x, w), *jax.grad(loss, argnums=(0, 1))(x, w)

    ours, for_x, for_w = both(x, w)
    agree([ours, for_x], [theirs, tx.grad])
    np.testing.assert_allclose(for_w, tw.grad.permute(2, 3, 1, 0).numpy(), rtol=1e-4, atol=1e-4)


def mobilenet_file(rng):
    """A graph of every operation: strides 2, 4, 4, 8 with a residual sum, mean, logits."""
    graph, arrays = [{"op": "quantize", "inp": [0], "out": 100}], {}
    layers = [  # kind, out, in, kernel, stride, activation, input tensor
        ("conv", 8, 3, 3, 2, "relu6", 100), ("dwconv", 8, 8, 3, 2, "relu6", 101),
        ("conv", 6, 8, 1, 1, "none", 102), ("conv", 6, 6, 1, 1, "none", 103),
        ("add", (103, 104)), ("dwconv", 6, 6, 3, 2, "relu6", 105),
        ("conv", 5, 6, 1, 1, "none", 106), ("conv", 9, 5, 1, 1, "relu6", 107),
        ("mean", 108), ("conv", 4, 9, 1, 1, "none", 109),
    ]  # fmt: skip
    index = 0
    for out, layer in enumerate(layers, start=101):
        if layer[0] in ("add", "mean"):
            inputs = layer[1] if layer[0] == "add" else (layer[1],)
            graph.append({"op": layer[0], "inp": list(inputs), "out": out})
            continue
        kind, c_out, c_in, k, stride, act, source = layer
        shape = [1, k, k, c_in] if kind == "dwconv" else [c_out, k, k, c_in]
        graph.append(
            {"op": kind, "idx": index, "stride": stride, "padding": "SAME", "act": act,
             "inp": source, "out": out, "wshape": shape}
        )  # fmt: skip
        arrays[f"w{index:02d}"] = rng.integers(-127, 128, shape).astype(np.int8)
        arrays[f"s{index:02d}"] = rng.uniform(0.005, 0.01, c_out).astype(np.float32)
        arrays[f"b{index:02d}"] = rng.normal(size=c_out).astype(np.float32)
        index += 1
    return graph, arrays | {"graph": np.asarray(json.dumps(graph))}


def torch_mobilenet(graph, arrays, x):
    values = {100: torch_images(x)}
    for op in graph[1:]:
        if op["op"] == "add":
            values[op["out"]] = values[op["inp"][0]] + values[op["inp"][1]]
        elif op["op"] == "mean":
            values[op["out"]] = values[op["inp"][0]].mean((2, 3), keepdim=True)
        elif op["op"] in ("conv", "dwconv"):
            i = f"{op['idx']:02d}"
            w = torch.tensor(arrays["w" + i].astype(np.float32))
            scale = torch.tensor(arrays["s" + i])
            groups = w.shape[3] if op["op"] == "dwconv" else 1
            w = w.permute(3, 0, 1, 2) if groups > 1 else w.permute(0, 3, 1, 2)
            h = same_pad(values[op["inp"]], w.shape[2], op["stride"])
            h = F.conv2d(h, w * scale[:, None, None, None], stride=op["stride"], groups=groups)
            h = h + torch.tensor(arrays["b" + i])[None, :, None, None]
            values[op["out"]] = F.relu6(h) if op["act"] == "relu6" else h
        else:
            values[op["out"]] = values[op["inp"][0]]
    return values


def test_mobilenet_runs_its_graph(tmp_path):
    graph, arrays = mobilenet_file(np.random.default_rng(0))
    network = loaded("mobilenet_v2", arrays, tmp_path, input_size=16)
    x = images(16)
    values = torch_mobilenet(graph, arrays, x)
    agree(jax.jit(network.apply)(network.params, x), [values[105], values[107]])
    outputs = jax.jit(network.outputs)(network.params, x)
    np.testing.assert_allclose(outputs["features"], values[109][:, :, 0, 0], rtol=1e-4)
    np.testing.assert_allclose(outputs["logits"], values[110][:, :, 0, 0], rtol=1e-4, atol=1e-4)
    # Smaller images are enlarged as PyTorch does it, pixel centres on pixel centres.
    small = images(8)
    large = F.interpolate(torch_images(small), size=16, mode="bilinear", align_corners=False)
    values = torch_mobilenet(graph, arrays, large.permute(0, 2, 3, 1).numpy())
    agree(jax.jit(network.apply)(network.params, small), [values[105], values[107]])


def vgg_weights(widths=(4, 5, 6, 7, 8)):
    shapes, channels = {}, 3
    for numbers, out in zip(vgg.GROUPS, widths):
        for n in numbers:
            shapes[f"features.{n}.weight"] = (out, channels, 3, 3)
            shapes[f"features.{n}.bias"] = (out,)
            channels = out
    shapes |= {f"lin{k}.model.1.weight": (1, c, 1, 1) for k, c in enumerate(widths)}
    return random_weights(shapes)


def torch_lpips(weights, x, y, pooling):
    w = {k: torch.tensor(v) for k, v in weights.items()}
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    deviation = torch.tensor((0.229, 0.224, 0.225))[:, None, None]

    def maps(h):
        h, out = ((torch_images(h) + 1) / 2 - mean) / deviation, []
        for n in range(30):
            if f"features.{n}.weight" in w:
                kernel, bias = (w[f"features.{n}.{part}"] for part in ("weight", "bias"))
                h = F.relu(F.conv2d(h, kernel, bias, padding=1))
            if n in (3, 8, 15, 22, 29):
                out.append(h)
            elif n in (4, 9, 16, 23):
                h = F.max_pool2d(h, 2) if pooling == "max" else F.avg_pool2d(h, 2)
        return out

    total = 0.0
    for k, (f, g) in enumerate(zip(maps(x), maps(y))):
        f, g = (v / (v.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for v in (f, g))
        total = total + F.conv2d((f - g) ** 2, w[f"lin{k}.model.1.weight"]).mean((1, 2, 3))
    return maps(x), total


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_vgg_and_lpips(pooling, tmp_path):
    weights = vgg_weights()
    network = loaded("vgg16_lpips", weights, tmp_path, input_size=18, pooling=pooling)
    x, y = images(18), images(18)[::-1].copy()
    expected, distance = torch_lpips(weights, x, y, pooling)
    agree(jax.jit(network.apply)(network.params, x), expected)
    ours = lpips_distance(network)
    np.testing.assert_allclose(jax.jit(ours)(network.params, x, y), distance, rtol=1e-4)


def test_lpips_of_torch_fidelity_at_native_size(torchvision, tmp_path, monkeypatch):
    """Images whose sides no pooling divides evenly, without enlarging, in the full-width VGG16."""
    fidelity = pytest.importorskip(
        "torch_fidelity.sample_similarity_lpips", reason="install torch-fidelity (extra: test)"
    )
    generator = torch.Generator().manual_seed(0)
    theirs = torchvision.models.vgg
    layers = theirs.make_layers(theirs.cfgs["D"]).eval()
    for value in layers.state_dict().values():
        gain = (2 / value[0].numel()) ** 0.5 if value.ndim == 4 else 0.1
        value.normal_(0, gain, generator=generator)
    heads = {
        f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator)
        for k, c in enumerate((64, 128, 256, 512, 512))
    }
    # what theirs would download
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: heads)
    monkeypatch.setattr(
        fidelity, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=layers)
    )
    theirs = fidelity.SampleSimilarityLPIPS("random")
    torch.save({f"features.{k}": v for k, v in layers.state_dict().items()}, tmp_path / "vgg.pth")
    torch.save(heads, tmp_path / "heads.pth")
    files = f"{tmp_path / 'vgg.pth'}+{tmp_path / 'heads.pth'}"
    network = features.load("vgg16_lpips", files, input_size=0)
    assert network.input_size == 0
    pairs = np.random.default_rng(0).integers(0, 256, (2, 3, 37, 45, 3), dtype=np.uint8)
    pairs[1, 2] = pairs[0, 2]
    expected = theirs(*(torch.tensor(side).permute(0, 3, 1, 2) for side in pairs)).numpy()
    distance = lpips_distance(network)
    x, y = (side.astype(np.float32) / 127.5 - 1 for side in pairs)
    found = jax.jit(distance)(network.params, x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert found[2] == 0 < min(found[:2])
    maps = jax.eval_shape(network.apply, network.params, x)
    assert [m.shape[1:3] for m in maps] == [(37, 45), (18, 22), (9, 11), (4, 5), (2, 2)]
    narrow = loaded("vgg16_lpips", vgg_weights(), tmp_path)  # the size by default
    assert jax.eval_shape(narrow.apply, narrow.params, x)[0].shape == (3, 224, 224, 4)


def test_vgg_heads_of_their_own_file(shared, tmp_path):
    widths = (64, 128, 256, 512, 512)
    weights = {k: v for k, v in vgg_weights(widths).items() if k.startswith("features")}
    heads = shared / "data" / "nets" / "lpips_linear" / "vgg.pth"
    assert "lin" not in loaded("vgg16_lpips", weights, tmp_path).params
    network = features.load("vgg16_lpips", (tmp_path / "vgg16_lpips.npz", heads))
    assert tuple(v.shape[0] for v in network.params["lin"]) == widths
    assert all(float(v.min()) >= 0 for v in network.params["lin"])
