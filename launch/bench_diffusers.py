"""Our U-Net and `diffusers.UNet2DModel`, for launch/bench.py: one function in two libraries.

The same residual blocks, widths, norms and attention, so that our weights can be copied tensor by
tensor and the outputs compared. A training step is EDM's denoising loss, its gradient, Adam and
the weights' moving average; one-step sampling is one forward pass. Needs torch and diffusers.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from cheapscale.diffusion.process import noise_feature
from cheapscale.evaluation.cost import param_count
from cheapscale.models.unet import plan, unet
from cheapscale.stages.networks import complete
from launch.bench_ours import DECAY, DIFFUSION, RATE, our_calls, random_weights

PyTree = Any

VERSIONS = {"torch": torch.__version__, "diffusers": diffusers.__version__}

FORMATS = ("contiguous", "channels_last")  # PyTorch's default layout, and ours

# What the two sides of the comparison do not share, for its record.
DIFFERENCES = (
    "theirs runs eagerly in NCHW (and once more in channels_last), ours compiled by XLA in NHWC",
    "theirs projects to queries, keys and values in three products, ours in one",
    "theirs applies silu to the embedding in every residual block, ours once",
    "our step also keeps the loss by noise level and the norm of the gradient",
    "theirs has one number of groups for every norm, so ours is given it (groups = width / 4)",
    "FLOPs of ours are XLA's, without taps that fall into padding; of theirs, torch's count with "
    "them and without elementwise work",
)

# The first pattern found in "<shape> <path of the operation>" names the class of a compiled
# operation. A fusion carries the path of its last operation.
CLASSES = (
    ("convolution: gradient of the kernel", r"^\w+\[\d+,3,3,\d+\].*transpose\(jvp.*/conv_general"),
    ("convolution: gradient of the input", r"transpose\(jvp.*/conv_general"),
    ("convolution: forward", r"/conv_general"),
    ("normalisation", r"/norm\d?/"),
    ("attention and dense", r"attend|/dot_general|/qkv/|/proj/|/skip/|/affine/|/map_"),
    ("changes of layout", r" $"),
    ("activations, resizing, sums", r"UNet"),
    ("loss, optimiser, EMA", r""),
)


def prepare(model: dict, batch: int) -> tuple[dict, dict, dict, Any]:
    """Both sides of one size, from fields of our U-Net and a batch size.

    Returns what the record says of them; {use: {side: call}}; {use: {side: FLOPs}}; our compiled
    training step.
    """
    model = complete(model)
    params, net = random_weights(model), network(model)
    copy_weights(params, model, net)
    shape = (batch, model["resolution"], model["resolution"], 3)
    images = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    apart = difference(model, params, net, images[:2])
    ours, our_flops, compiled = our_calls(model, params, images)
    sides = {"ours": ours}
    for layout in FORMATS:
        sides[layout], their_flops = their_calls(copy.deepcopy(net), images, layout)
    facts = {
        "model": model,
        "batch": batch,
        "parameters": {
            "ours": param_count(params),
            "theirs": sum(p.numel() for p in net.parameters()),
        },
        "output_difference": float(f"{apart:.2g}"),
    }
    uses = ("sampling", "training")
    calls = {use: {side: calls[use] for side, calls in sides.items()} for use in uses}
    flops = {use: {"ours": int(our_flops[use]), "theirs": int(their_flops[use])} for use in uses}
    return facts, calls, flops, compiled


def network(model: dict) -> torch.nn.Module:
    """UNet2DModel with the architecture of an ADM U-Net, given by all its fields."""
    sides = [model["resolution"] >> level for level in range(len(model["channel_mult"]))]
    down, up = (
        [
            f"Attn{way}Block2D" if s in model["attention"] else f"Resnet{way}sampleBlock2D"
            for s in sides
        ]
        for way in ("Down", "Up")
    )
    return diffusers.UNet2DModel(
        sample_size=model["resolution"],
        block_out_channels=tuple(model["channels"] * m for m in model["channel_mult"]),
        layers_per_block=model["num_blocks"],
        down_block_types=tuple(down),
        up_block_types=tuple(up[::-1]),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=model["head_dim"],
        norm_num_groups=model["groups"],
        attn_norm_num_groups=model["groups"],
    )


def blocks(net: torch.nn.Module) -> Iterator:
    """(residual block, its attention or None) in the order of our plan."""
    for block in net.down_blocks:
        yield from zip(block.resnets, getattr(block, "attentions", [None] * len(block.resnets)))
        yield from ((down, None) for down in block.downsamplers or ())
    yield from zip(net.mid_block.resnets, [*net.mid_block.attentions, None])
    for block in net.up_blocks:
        yield from zip(block.resnets, getattr(block, "attentions", [None] * len(block.resnets)))
        yield from ((up, None) for up in block.upsamplers or ())


def copy_weights(params: PyTree, model: dict, net: torch.nn.Module) -> None:
    """Ours into theirs. Raises ValueError unless every one of their weights has its counterpart."""
    left = {id(p) for p in net.parameters()}

    def fill(layer, ours):
        weight = ours["scale"] if "scale" in ours else ours["kernel"]
        axes = (3, 2, 0, 1) if weight.ndim == 4 else tuple(range(weight.ndim))[::-1]
        weight = np.transpose(np.asarray(weight), axes).reshape(layer.weight.shape)
        for target, value in ((layer.weight, weight), (layer.bias, np.asarray(ours["bias"]))):
            target.data.copy_(torch.tensor(value))
            left.discard(id(target))

    fill(net.conv_in, params[f"enc_{model['resolution']}_conv"])
    fill(net.time_embedding.linear_1, params["map_layer0"])
    fill(net.time_embedding.linear_2, params["map_layer1"])
    fill(net.conv_norm_out, params["head"]["norm"])
    fill(net.conv_out, params["head"]["conv"])
    ours = [block for block in plan(unet(**model).config) if block.kind == "res"]
    for block, (res, attention) in zip(ours, blocks(net), strict=True):
        p = params[block.name]
        fill(res.norm1, p["norm0"])
        fill(res.conv1, p["conv0"])
        fill(res.time_emb_proj, p["affine"])
        fill(res.norm2, p["norm1"])
        fill(res.conv2, p["conv1"])
        if block.shortcut:
            fill(res.conv_shortcut, p["skip"])
        if block.heads:
            fill(attention.group_norm, p["norm2"])
            fill(attention.to_out[0], p["proj"])
            for i, layer in enumerate((attention.to_q, attention.to_k, attention.to_v)):
                third = {name: np.split(w, 3, axis=-1)[i] for name, w in p["qkv"].items()}
                fill(layer, third)
    if left:
        raise ValueError(f"{len(left)} tensors of UNet2DModel have no counterpart in the model")


def their_calls(
    net: torch.nn.Module, images: np.ndarray, layout: str
) -> tuple[dict[str, Callable], dict[str, int]]:
    """({use: call to time}, {use: FLOPs}) of UNet2DModel in one memory layout."""
    layout = getattr(torch, {"contiguous": "contiguous_format"}.get(layout, layout))
    net = net.to(memory_format=layout)
    x = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(memory_format=layout)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE, fused=True)
    sd, top = DIFFUSION["sigma_data"], DIFFUSION["sigma_max"]

    def train_once():
        draw = torch.randn(len(x), 1, 1, 1)
        sigma = torch.exp(DIFFUSION["P_mean"] + DIFFUSION["P_std"] * draw)
        total = sigma**2 + sd**2
        noisy = x + sigma * torch.randn_like(x)
        F = net(noisy / total.sqrt(), 250 * sigma.log().flatten()).sample
        D = sd**2 / total * noisy + sigma * sd / total.sqrt() * F
        (total / (sigma * sd) ** 2 * (D - x) ** 2).mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update_parameters(net)

    z = top * x
    feature = torch.full((len(x),), float(noise_feature("openai", top)))

    @torch.inference_mode()
    def sample_once():
        return net(z / (top**2 + sd**2) ** 0.5, feature).sample

    flops = {}
    for use, call in (uses := {"training": train_once, "sampling": sample_once}).items():
        with FlopCounterMode(display=False) as counter:
            call()
        flops[use] = counter.get_total_flops()
    return uses, flops


def difference(model: dict, params: PyTree, net: torch.nn.Module, images: np.ndarray) -> float:
    """Largest difference between the two networks' outputs, over the largest output."""
    noise = np.linspace(-2, 2, len(images), dtype=np.float32)
    ours = unet(**model).apply({"params": params}, jnp.asarray(images), jnp.asarray(noise))
    with torch.inference_mode():
        x = torch.tensor(images.transpose(0, 3, 1, 2))
        theirs = net(x, torch.tensor(noise)).sample.numpy().transpose(0, 2, 3, 1)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
