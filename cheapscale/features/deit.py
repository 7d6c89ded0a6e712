"""DeiT-B distilled (Touvron et al. 2021, arXiv 2012.12877), timm's deit_base_distilled_patch16_224.

A class token and a distillation token precede the patches; the activation is the exact GELU, and
LayerNorm has eps 1e-6. Features are the mean of both tokens after the last LayerNorm, logits the
mean of the logits of the two heads.

The patch tokens after each quarter of the blocks become four maps as in the projected discriminator
of StyleGAN-XL (Sauer et al. 2022, arXiv 2202.00273): a 1x1 convolution to 96, 192, 384 and 768
channels, followed by a transposed convolution of stride 4, one of stride 2, no layer, and a 3x3
convolution of stride 2. With patches of 16 px the maps have strides 4, 8, 16 and 32. These kernels
are random and frozen.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.features import vit
from cheapscale.features.layers import conv, read_linear
from cheapscale.features.network import FeatureNetwork, standardised
from cheapscale.features.weights import Weights

PyTree = Any

NAME = "deit_base_distilled"


def build(weights: Weights, input_size: int = 224, seed: int = 0) -> FeatureNetwork:
    """DeiT from timm's weights, with random re-assembly kernels drawn from `seed`; its outputs are
    "features" [b, width] and, if the file has the heads, "logits" [b, classes]."""
    network = vit.read_images(weights, "cls_token", "dist_token")
    kernel = network["patch"]["kernel"]
    patch, width = kernel.shape[0], kernel.shape[3]
    if "head.weight" in weights.arrays:
        heads = [read_linear(weights, name, width) for name in ("head", "head_dist")]
        network["heads"] = jax.tree.map(lambda *pair: np.stack(pair), *heads)
    network = jax.tree.map(jnp.asarray, network)

    def redraw(key):
        return {"vit": network, "reassembly": init_reassembly(key, width)}

    def apply(params, x):
        _, patches = encode(params["vit"], vit.sized(NAME, x, input_size, patch))
        return tuple(reassemble(params["reassembly"], patches))

    def outputs(params, x):
        return pooled(params["vit"], vit.sized(NAME, x, input_size, patch))

    def tokens(params, x):
        x = standardised(vit.sized(NAME, x, input_size, patch))
        return vit.all_tokens(params["vit"], x, resize_positions)

    params = redraw(jax.random.key(seed))
    return FeatureNetwork(
        NAME, apply, params, weights.sha256, input_size, redraw=redraw, outputs=outputs,
        tokens=tokens,
    )  # fmt: skip


def encode(network: PyTree, x: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """`vit.encode_images` of x [b, h, w, 3] in [-1, 1]."""
    return vit.encode_images(network, standardised(x), resize_positions)


def resize_positions(grid: jax.Array, h: int, w: int) -> jax.Array:
    """Positions [1, s, s, c] -> [1, h, w, c], without antialiasing, as in the published code."""
    return jax.image.resize(grid, (1, h, w, grid.shape[3]), "bilinear", antialias=False)


def pooled(network: PyTree, x: jax.Array) -> dict[str, jax.Array]:
    """Images [b, h, w, 3] in [-1, 1] -> "features" [b, width], and "logits" [b, classes] if the
    network has heads."""
    extra = vit.layer_norm(network["norm"], encode(network, x)[0][-1])
    found = {"features": jnp.mean(extra, axis=1)}
    if "heads" in network:
        heads = network["heads"]
        logits = jnp.einsum("btc,tcn->btn", extra, heads["kernel"]) + heads["bias"][None, :, :]
        found["logits"] = jnp.mean(logits, axis=1)
    return found


def init_reassembly(key: jax.Array, width: int) -> list[PyTree]:
    """Random kernels of the re-assembly, normal with variance 1 / fan-in, without biases."""
    layers = []
    for i, kernel in enumerate((4, 2, 0, 3)):
        channels = width // 8 * 2**i
        key, a, b = jax.random.split(key, 3)
        layer = {"project": jax.random.normal(a, (width, channels), jnp.float32) * width**-0.5}
        if kernel:
            # A transposed convolution as wide as its stride has one input pixel per output pixel.
            fan_in = channels * (9 if kernel == 3 else 1)
            shape = (kernel, kernel, channels, channels)
            layer["resize"] = jax.random.normal(b, shape, jnp.float32) * fan_in**-0.5
        layers.append(layer)
    return layers


def reassemble(layers: list[PyTree], tokens: list[jax.Array]) -> list[jax.Array]:
    """Four token maps of one size -> maps of four times, twice, once and half that size."""
    maps = []
    for layer, x in zip(layers, tokens):
        x = jnp.einsum("bhwc,cd->bhwd", x, layer["project"])
        kernel = layer.get("resize")
        if kernel is not None and kernel.shape[0] == 3:
            x = conv(x, {"kernel": kernel}, 2, padding=1)
        elif kernel is not None:
            b, h, w, c = x.shape
            k = kernel.shape[0]
            x = jnp.einsum("bhwc,ijcd->bhiwjd", x, kernel).reshape(b, h * k, w * k, c)
        maps.append(x)
    return maps
