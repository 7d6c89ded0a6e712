"""The speed of our U-Net and of `diffusers.UNet2DModel`. Needs torch and diffusers.

Both have the same residual blocks, widths, norms and attention, so our weights are copied tensor by
tensor and the outputs are compared. A training step consists of EDM's denoising loss, its gradient,
Adam and the EMA of the weights; one-step sampling is one forward pass.

Differences: diffusers runs eagerly in NCHW (and a second time in channels_last), ours is compiled
in NHWC; diffusers projects to queries, keys and values in three products, ours in one; our step
also records the loss by noise level. Our FLOPs are counted by XLA, without taps in the padding;
theirs by torch, with these taps and without elementwise operations.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from cheapscale.models.unet import plan, unet
from cheapscale.training.cost import param_count
from launch.bench import ours

PyTree = Any
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def prepare(model: dict, batch: int) -> tuple[dict, dict]:
    """(facts for the record, {use: {side: call}}) of fields of our U-Net and a batch size."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    params, net = ours.random_weights(model), counterpart(model)
    copy_weights(params, model, net)
    shape = (batch, model["resolution"], model["resolution"], 3)
    images = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    facts = {
        "model": model,
        "batch": batch,
        "parameters": {
            "ours": param_count(params), "theirs": sum(p.numel() for p in net.parameters())
        },
        "output_difference": difference(model, params, net, images[:2]),
    }  # fmt: skip
    calls, flops = {}, {}
    calls["ours"], flops["ours"] = ours.our_calls(model, params, images)
    for layout in LAYOUTS:
        calls[layout], flops["theirs"] = their_calls(copy.deepcopy(net), images, layout)
    uses = ("sampling", "training")
    facts["flops"] = {use: {side: int(flops[side][use]) for side in flops} for use in uses}
    return facts, {use: {side: calls[side][use] for side in calls} for use in uses}


def counterpart(model: dict) -> torch.nn.Module:
    """The UNet2DModel with the architecture of our ADM U-Net `model`."""
    sides = [model["resolution"] >> level for level in range(len(model["channel_mult"]))]
    down, up = (
        [f"Attn{way}Block2D" if s in model["attention"] else f"Resnet{way}sampleBlock2D"
         for s in sides]
        for way in ("Down", "Up")
    )  # fmt: skip
    return diffusers.UNet2DModel(
        sample_size=model["resolution"],
        block_out_channels=tuple(model["channels"] * m for m in model["channel_mult"]),
        layers_per_block=model["num_blocks"],
        down_block_types=tuple(down),
        up_block_types=tuple(up[::-1]),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=model.get("head_dim", 64),
        norm_num_groups=model["groups"],
        attn_norm_num_groups=model["groups"],
    )


def blocks(net: torch.nn.Module) -> Iterator:
    """Yields (residual block, its attention or None) in the order of our plan."""
    for block in net.down_blocks:
        yield from zip(block.resnets, getattr(block, "attentions", [None] * len(block.resnets)))
        yield from ((down, None) for down in block.downsamplers or ())
    yield from zip(net.mid_block.resnets, [*net.mid_block.attentions, None])
    for block in net.up_blocks:
        yield from zip(block.resnets, getattr(block, "attentions", [None] * len(block.resnets)))
        yield from ((up, None) for up in block.upsamplers or ())


def copy_weights(params: PyTree, model: dict, net: torch.nn.Module) -> None:
    """Copy our weights into UNet2DModel; ValueError if one of its weights has no counterpart."""
    left = {id(p) for p in net.parameters()}

    def fill(layer, leaves):
        weight = np.asarray(leaves["scale"] if "scale" in leaves else leaves["kernel"])
        axes = (3, 2, 0, 1) if weight.ndim == 4 else tuple(range(weight.ndim))[::-1]
        weight = np.transpose(weight, axes).reshape(layer.weight.shape)
        for target, value in ((layer.weight, weight), (layer.bias, np.asarray(leaves["bias"]))):
            target.data.copy_(torch.tensor(value))
            left.discard(id(target))

    fill(net.conv_in, params[f"enc_{model['resolution']}_conv"])
    fill(net.time_embedding.linear_1, params["map_layer0"])
    fill(net.time_embedding.linear_2, params["map_layer1"])
    fill(net.conv_norm_out, params["head"]["norm"])
    fill(net.conv_out, params["head"]["conv"])
    layers = {
        "norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2",
        "conv1": "conv2", "skip": "conv_shortcut",
    }  # fmt: skip
    residual = [block for block in plan(unet(**model).config) if block.kind == "res"]
    for block, (res, attention) in zip(residual, blocks(net), strict=True):
        p = params[block.name]
        for here, there in layers.items():
            if here in p:
                fill(getattr(res, there), p[here])
        if block.heads:
            fill(attention.group_norm, p["norm2"])
            fill(attention.to_out[0], p["proj"])
            for i, layer in enumerate((attention.to_q, attention.to_k, attention.to_v)):
                fill(layer, {name: np.split(w, 3, axis=-1)[i] for name, w in p["qkv"].items()})
    if left:
        raise ValueError(f"{len(left)} tensors of UNet2DModel have no counterpart in the model")


def their_calls(
    net: torch.nn.Module, images: np.ndarray, layout: str
) -> tuple[dict[str, Callable], dict[str, int]]:
    """({use: call to time}, {use: FLOPs}) of UNet2DModel in one memory layout."""
    net = net.to(memory_format=LAYOUTS[layout])
    x = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(memory_format=LAYOUTS[layout])
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(ours.DECAY))
    optimiser = torch.optim.Adam(net.parameters(), lr=ours.RATE, fused=True)
    sd = ours.PROCESS.sigma_data

    def F(x, sigma):
        return net(x / (sigma**2 + sd**2).sqrt(), 250 * sigma.log().flatten()).sample

    def train_once():
        sigma = torch.exp(ours.PROCESS.P_mean + ours.PROCESS.P_std * torch.randn(len(x), 1, 1, 1))
        total = sigma**2 + sd**2
        noisy = x + sigma * torch.randn_like(x)
        D = sd**2 / total * noisy + sigma * sd / total.sqrt() * F(noisy, sigma)
        (total / (sigma * sd) ** 2 * (D - x) ** 2).mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update_parameters(net)

    top = torch.full((len(x), 1, 1, 1), ours.PROCESS.sigma_max)

    @torch.inference_mode()
    def sample_once():
        return F(ours.PROCESS.sigma_max * x, top)

    calls, flops = {"sampling": sample_once, "training": train_once}, {}
    for use, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        flops[use] = counter.get_total_flops()
    return calls, flops


def difference(model: dict, params: PyTree, net: torch.nn.Module, images: np.ndarray) -> float:
    """The largest difference between the outputs of both networks, over the largest output."""
    noise = np.linspace(-2, 2, len(images), dtype=np.float32)
    mine = unet(**model).apply({"params": params}, jnp.asarray(images), jnp.asarray(noise))
    with torch.inference_mode():
        x = torch.tensor(images.transpose(0, 3, 1, 2))
        theirs = net(x, torch.tensor(noise)).sample.numpy().transpose(0, 2, 3, 1)
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())
