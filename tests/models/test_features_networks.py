"""Feature networks on random weights against the same mathematics written with PyTorch."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cheapscale.models import features
from cheapscale.models.distances import lpips_distance
from cheapscale.models.features.convolution import depthwise

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


@pytest.mark.parametrize("side, kernel, stride", [(8, 3, 1), (8, 3, 2), (7, 5, 2), (2, 5, 1)])
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
        loss = lambda x, w: jnp.sum(jnp.sin(depthwise(x, w, stride)))  # noqa: E731
        return depthwise(x, w, stride), *jax.grad(loss, argnums=(0, 1))(x, w)

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


def deit_shapes(width, depth, patch, grid):
    shapes = {
        "cls_token": (1, 1, width), "dist_token": (1, 1, width),
        "pos_embed": (1, grid**2 + 2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
    }  # fmt: skip
    linear = {
        "attn.qkv": (3 * width, width), "attn.proj": (width, width),
        "mlp.fc1": (2 * width, width), "mlp.fc2": (width, 2 * width),
    }  # fmt: skip
    for i in range(depth):
        for name, shape in linear.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{name}.weight"] = shapes[f"blocks.{i}.{name}.bias"] = (width,)
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def torch_deit(weights, reassembly, x, depth, width, size):
    """Block outputs by nn.TransformerEncoderLayer, then the four re-assembled maps."""
    w = {k: torch.tensor(v) for k, v in weights.items()}
    x = (torch_images(x) + 1) / 2
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4)
    x = x.flatten(2).transpose(1, 2)
    grid = int((w["pos_embed"].shape[1] - 2) ** 0.5)
    position = w["pos_embed"][:, 2:].reshape(1, grid, grid, width).permute(0, 3, 1, 2)
    position = F.interpolate(position, size=(size, size), mode="bilinear", align_corners=False)
    position = position.flatten(2).transpose(1, 2)
    extra = torch.cat([w["cls_token"], w["dist_token"]], 1) + w["pos_embed"][:, :2]
    x = torch.cat([extra.expand(x.shape[0], -1, -1), x + position], 1)
    maps = []
    for i in range(depth):
        block = torch.nn.TransformerEncoderLayer(
            width, width // 64, 2 * width, dropout=0.0, activation="gelu", layer_norm_eps=1e-6,
            batch_first=True, norm_first=True,
        )  # fmt: skip
        names = {
            "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
            "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2.",
        }  # fmt: skip
        block.load_state_dict(
            {a + p: w[f"blocks.{i}.{b}{p}"] for a, b in names.items() for p in ("weight", "bias")}
        )
        x = block(x)
        tokens = x[:, 2:].transpose(1, 2).unflatten(2, (size, size))
        layer = [torch.tensor(np.asarray(v)) for v in jax.tree.leaves(reassembly[i])]
        h = F.conv2d(tokens, layer[0].T[:, :, None, None])
        if i in (0, 1):
            h = F.conv_transpose2d(h, layer[1].permute(2, 3, 0, 1), stride=(4, 2)[i])
        elif i == 3:
            h = F.conv2d(h, layer[1].permute(3, 2, 0, 1), stride=2, padding=1)
        maps.append(h)
    return maps


@pytest.mark.parametrize("side", [16, 24, 12])
def test_deit_blocks_reassembly_and_resized_positions(side, tmp_path):
    width, depth = 128, 4
    weights = random_weights(deit_shapes(width, depth, patch=4, grid=4))
    network = loaded("deit_base_distilled", weights, tmp_path, input_size=12)
    x = images(side)
    maps = jax.jit(network.apply)(network.params, x)
    agree(maps, torch_deit(weights, network.params["reassembly"], x, depth, width, side // 4))
    assert [m.shape[1] for m in maps] == [side, side // 2, side // 4, -(-side // 8)]
    assert [m.shape[3] for m in maps] == [16, 32, 64, 128]
    redrawn = network.draw(jax.random.key(5))
    assert redrawn["vit"] is network.params["vit"]
    assert not np.allclose(
        redrawn["reassembly"][0]["project"], network.params["reassembly"][0]["project"]
    )


def efficientnet_shapes():
    """Narrow stages with the kernel sizes, strides and repeats' names of the real one."""
    shapes = {"conv_stem.weight": (8, 3, 3, 3)}

    def norm(name, c):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (c,)

    norm("bn1", 8)
    width = 8
    stages = ((1, 3, 4), (2, 3, 6), (1, 5, 6), (1, 3, 8), (1, 5, 8), (1, 5, 10), (1, 3, 12))
    for stage, (repeats, kernel, out) in enumerate(stages):
        for i in range(repeats):
            p, mid = f"blocks.{stage}.{i}.", width if stage == 0 else 2 * width
            if stage == 0:
                shapes[p + "conv_dw.weight"] = (width, 1, kernel, kernel)
                shapes[p + "conv_pw.weight"] = (out, width, 1, 1)
                norms = (width, out)
            else:
                shapes[p + "conv_pw.weight"] = (mid, width, 1, 1)
                shapes[p + "conv_dw.weight"] = (mid, 1, kernel, kernel)
                shapes[p + "conv_pwl.weight"] = (out, mid, 1, 1)
                norms = (mid, mid, out)
            for n, c in enumerate(norms, start=1):
                norm(f"{p}bn{n}", c)
            width = out
    shapes["conv_head.weight"] = (20, width, 1, 1)
    norm("bn2", 20)
    return shapes


def torch_efficientnet(weights, x):
    w = {k: torch.tensor(v) for k, v in weights.items()}

    def layer(h, name, norm, stride=1, groups=1, act=True):
        kernel = w[name + ".weight"]
        h = F.conv2d(same_pad(h, kernel.shape[2], stride), kernel, stride=stride, groups=groups)
        mean, variance = w[norm + ".running_mean"], w[norm + ".running_var"]
        h = F.batch_norm(h, mean, variance, w[norm + ".weight"], w[norm + ".bias"], eps=1e-3)
        return F.relu6(h) if act else h

    h, maps = layer(torch_images(x), "conv_stem", "bn1", 2), []
    for stage, stride in enumerate((1, 2, 2, 2, 1, 2, 1)):
        i = 0
        while f"blocks.{stage}.{i}.conv_dw.weight" in w:
            p, before, step = f"blocks.{stage}.{i}.", h, stride if i == 0 else 1
            if stage == 0:
                h = layer(h, p + "conv_dw", p + "bn1", step, h.shape[1])
                h = layer(h, p + "conv_pw", p + "bn2", act=False)
            else:
                h = layer(h, p + "conv_pw", p + "bn1")
                h = layer(h, p + "conv_dw", p + "bn2", step, h.shape[1])
                h = layer(h, p + "conv_pwl", p + "bn3", act=False)
            h = h + before if step == 1 and h.shape[1] == before.shape[1] else h
            i += 1
        if stage in (1, 2, 4, 6):
            maps.append(h)
    return maps


def test_efficientnet_lite0(tmp_path):
    weights = random_weights(efficientnet_shapes())
    network = loaded("efficientnet_lite0", weights, tmp_path, input_size=32)
    x = images(34)
    maps = jax.jit(network.apply)(network.params, x)
    agree(maps, torch_efficientnet(weights, x))
    assert [m.shape[1] for m in maps] == [9, 5, 3, 2]


def vgg_weights(seed=0):
    shapes, channels = {}, 3
    for numbers, out in zip(
        ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), (4, 5, 6, 7, 8)
    ):
        for n in numbers:
            shapes[f"features.{n}.weight"] = (out, channels, 3, 3)
            shapes[f"features.{n}.bias"] = (out,)
            channels = out
    shapes |= {f"lin{k}.model.1.weight": (1, c, 1, 1) for k, c in enumerate((4, 5, 6, 7, 8))}
    return random_weights(shapes, seed)


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
    frozen = ours.init_frozen(jax.random.key(0))
    np.testing.assert_allclose(jax.jit(ours.apply)(frozen, x, y, None), distance, rtol=1e-4)


def test_lpips_of_torch_fidelity_at_native_size(torchvision, tmp_path, monkeypatch):
    """Sides that no pooling divides evenly, nothing enlarged, VGG16 as wide as it is published."""
    fidelity = pytest.importorskip(
        "torch_fidelity.sample_similarity_lpips", reason="install torch-fidelity (extra: test)"
    )
    generator = torch.Generator().manual_seed(0)
    vgg = torchvision.models.vgg
    layers = vgg.make_layers(vgg.cfgs["D"]).eval()
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
    found = jax.jit(distance.apply)(network.params, x, y, None)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert found[2] == 0 < min(found[:2])
    maps = jax.eval_shape(network.apply, network.params, x)
    assert [m.shape[1:3] for m in maps] == [(37, 45), (18, 22), (9, 11), (4, 5), (2, 2)]
    narrow = loaded("vgg16_lpips", vgg_weights(), tmp_path)  # the size by default
    assert jax.eval_shape(narrow.apply, narrow.params, x)[0].shape == (3, 224, 224, 4)


def test_vgg_heads_of_their_own_file(shared, tmp_path):
    widths = (64, 128, 256, 512, 512)
    shapes, channels = {}, 3
    for numbers, out in zip(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), widths):
        for n in numbers:
            shapes[f"features.{n}.weight"] = (out, channels, 3, 3)
            shapes[f"features.{n}.bias"] = (out,)
            channels = out
    np.savez(tmp_path / "vgg.npz", **{k: np.zeros(s, np.float32) for k, s in shapes.items()})
    heads = shared / "data" / "nets" / "lpips_linear" / "vgg.pth"
    network = features.load("vgg16_lpips", (tmp_path / "vgg.npz", heads))
    assert tuple(v.shape[0] for v in network.params["lin"]) == widths
    assert all(float(v.min()) >= 0 for v in network.params["lin"])
    assert "lin" not in features.load("vgg16_lpips", tmp_path / "vgg.npz").params
