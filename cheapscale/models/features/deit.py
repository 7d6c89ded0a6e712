"""DeiT-B distilled (timm's "deit_base_distilled_patch16_224") re-assembled into four maps.

A pre-norm vision transformer (Touvron et al. 2021, arXiv 2012.12877): patches, a class and a
distillation token in front, learned positions, blocks x + attention(LN x), x + MLP(LN x), exact
GELU, LayerNorm eps 1e-6. Positions are resized bilinearly where the image is not the file's size.
Its patch tokens after a quarter, half, three quarters and all of the blocks (2, 5, 8, 11 of 12)
become maps as in the projected discriminator (spec 3.4): a 1x1 convolution to 96, 192, 384, 768
channels, then a 4x4 stride-4 transposed, a 2x2 stride-2 transposed, no, and a 3x3 stride-2
convolution: strides 4, 8, 16, 32 for patches of 16. These re-assembly kernels are random and
frozen: `redraw` draws them anew.

Features are the mean of the class and the distillation token after the last LayerNorm, logits the
mean of what the two heads make of them.

Names are timm's: cls_token, dist_token, pos_embed, patch_embed.proj, blocks.<n>.{norm1, attn.qkv,
attn.proj, norm2, mlp.fc1, mlp.fc2}, norm, head, head_dist; qkv channels are ordered (three, head,
dim), heads of 64.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models.features import vit
from cheapscale.models.features.convolution import conv
from cheapscale.models.features.network import FeatureNetwork, enlarge, standardised
from cheapscale.models.features.weights import Weights

PyTree = Any

EXTRA_TOKENS = 2  # class and distillation


def build(weights: Weights, input_size: int = 224, seed: int = 0) -> FeatureNetwork:
    """The network from timm's weights, its random re-assembly drawn from `seed`; outputs
    "features" [b, width] and, where the file has the heads, "logits" [b, classes]."""
    proj = weights.take("patch_embed.proj.weight", -1, 3, -1, -1)
    width, patch = proj.shape[0], proj.shape[2]
    network = {
        "patch": {
            "kernel": proj.transpose(2, 3, 1, 0),
            "bias": weights.take("patch_embed.proj.bias", width),
        },
        "extra": jnp.concatenate(
            [weights.take(name, 1, 1, width) for name in ("cls_token", "dist_token")], axis=1
        ),
        "position": weights.take("pos_embed", 1, -1, width),
        "segments": vit.read_blocks(weights, "blocks.", vit.TIMM, width),
        "norm": vit.read_norm(weights, "norm.", width),
    }
    if "head.weight" in weights.arrays:
        network["heads"] = _read_heads(weights, width)
    network = jax.tree.map(jnp.asarray, network)

    def redraw(key):
        return {"vit": network, "reassembly": init_reassembly(key, width)}

    def sized(x):
        x = enlarge(x, input_size)
        vit.check_patches("deit_base_distilled", x, patch)
        return x

    def apply(params, x):
        return tuple(reassemble(params["reassembly"], hidden(params["vit"], sized(x))))

    def outputs(params, x):
        return pooled(params["vit"], sized(x))

    return FeatureNetwork(
        "deit_base_distilled",
        apply,
        redraw(jax.random.key(seed)),
        weights.sha256,
        input_size,
        redraw=redraw,
        outputs=outputs,
    )


def hidden(network: PyTree, x: jax.Array) -> list[jax.Array]:
    """Images [b, h, w, 3] in [-1, 1] -> the patch tokens [b, h/p, w/p, width] after each quarter
    of the blocks."""
    found, grid = _tokens(network, x)
    return [t[:, EXTRA_TOKENS:].reshape(len(t), *grid, t.shape[2]) for t in found]


def pooled(network: PyTree, x: jax.Array) -> dict[str, jax.Array]:
    """Images [b, h, w, 3] in [-1, 1] -> "features" [b, width], and "logits" [b, classes] where
    the network has heads."""
    extra = _tokens(network, x)[0][-1][:, :EXTRA_TOKENS]
    extra = vit.layer_norm(network["norm"], extra)
    found = {"features": jnp.mean(extra, axis=1)}
    if "heads" in network:
        heads = network["heads"]
        logits = jnp.einsum("btc,tcn->btn", extra, heads["kernel"]) + heads["bias"][None, :, :]
        found["logits"] = jnp.mean(logits, axis=1)
    return found


def _tokens(network: PyTree, x: jax.Array) -> tuple[list[jax.Array], tuple[int, int]]:
    """All tokens after each quarter of the blocks, and the patches of a column and of a row."""
    x = vit.patch_tokens(network["patch"]["kernel"], standardised(x))
    x = x + network["patch"]["bias"][None, None, None, :]
    b, h, w, c = x.shape
    extra = jnp.broadcast_to(network["extra"], (b, EXTRA_TOKENS, c))
    tokens = jnp.concatenate([extra, x.reshape(b, h * w, c)], axis=1)
    tokens = tokens + _positions(network["position"], h, w)
    return vit.encode(network["segments"], tokens), (h, w)


def _positions(position: jax.Array, h: int, w: int) -> jax.Array:
    side = math.isqrt(position.shape[1] - EXTRA_TOKENS)
    if (side, side) == (h, w):
        return position
    grid = position[:, EXTRA_TOKENS:].reshape(1, side, side, -1)
    # The reference's resize does not smooth ahead of shrinking.
    grid = jax.image.resize(grid, (1, h, w, grid.shape[3]), "bilinear", antialias=False)
    return jnp.concatenate([position[:, :EXTRA_TOKENS], grid.reshape(1, h * w, -1)], axis=1)


def _read_heads(weights: Weights, width: int) -> PyTree:
    """Kernels [2, width, classes] and biases [2, classes]: of the class token's head, then of the
    distillation token's."""
    names = ("head", "head_dist")
    classes = weights.take("head.weight", -1, width).shape[0]
    return {
        "kernel": np.stack([weights.take(f"{n}.weight", classes, width).T for n in names]),
        "bias": np.stack([weights.take(f"{n}.bias", classes) for n in names]),
    }


def init_reassembly(key: jax.Array, width: int) -> PyTree:
    """Random frozen kernels of the re-assembly, normal with variance 1 / fan-in, biases zero."""
    layers = []
    for i, kernel in enumerate((4, 2, 0, 3)):
        channels = width // 8 * 2**i
        key, a, b = jax.random.split(key, 3)
        layer = {"project": jax.random.normal(a, (width, channels)) * width**-0.5}
        if kernel:
            # A transposed convolution as wide as its stride has one input pixel per output pixel.
            fan_in = channels * (9 if kernel == 3 else 1)
            shape = (kernel, kernel, channels, channels)
            layer["resize"] = jax.random.normal(b, shape) * fan_in**-0.5
        layers.append(layer)
    return layers


def reassemble(layers: PyTree, tokens: list[jax.Array]) -> list[jax.Array]:
    """Four token maps at one size -> maps at four times, twice, once and half that size."""
    maps = []
    for layer, x in zip(layers, tokens):
        x = jnp.einsum("bhwc,cd->bhwd", x, layer["project"])
        kernel = layer.get("resize")
        if kernel is not None and kernel.shape[0] == 3:
            x = conv(x, kernel, 2, padding=1)
        elif kernel is not None:
            b, h, w, _ = x.shape
            k, _, _, c = kernel.shape
            x = jnp.einsum("bhwc,ijcd->bhiwjd", x, kernel).reshape(b, h * k, w * k, c)
        maps.append(x)
    return maps
