"""Features and logits of eight-bit images in a frozen network."""

import functools

import jax.numpy as jnp
import numpy as np
from PIL import Image

from cheapscale.data.pixels import check_images
from cheapscale.features.network import FeatureNetwork
from cheapscale.training.compiler import for_depthwise
from cheapscale.training.mesh import in_batches

RESIZES = ("network", "clean")


def embed(network: FeatureNetwork, images: np.ndarray, **options) -> np.ndarray:
    """Pooled features, float32 [n, d], of uint8 images [n, R, R, 3]; options as in `outputs`."""
    return outputs(network, images, **options)["features"]


def outputs(
    network: FeatureNetwork,
    images: np.ndarray,
    *,
    batch_size: int = 250,
    resize: str = "network",
    logits: bool = False,
) -> dict[str, np.ndarray]:
    """{"features" [n, d], with `logits` also "logits" [n, classes]}, float32, of uint8 images
    [n, R, R, 3]. Each batch is split over the devices.

    resize: how images are resized to the network's input size: "network" (by the network itself),
    or "clean".
    """
    check_network(network, resize)
    if images.dtype != np.uint8:
        raise ValueError(f"embed takes uint8 images, got {images.dtype}: apply pixels.to_uint8")
    check_images(images)
    prepare = functools.partial(clean, size=network.input_size) if resize == "clean" else None
    run = _program(network.outputs, logits)
    return in_batches(
        run, network.params, images, batch_size=batch_size, prepare=prepare,
        compiler_options=for_depthwise(),
    )  # fmt: skip


def check_network(network: FeatureNetwork, resize: str) -> None:
    """Raise ValueError for a network without pooled features, or a resizing it cannot use."""
    if network.outputs is None:
        raise ValueError(f"{network.name} has no pooled features: measure with another network")
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}: choose {' or '.join(RESIZES)}")
    if resize != "network" and not network.input_size:
        raise ValueError(f"{network.name} takes images of any size: use --resize=network")


def clean(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, h, w, c] -> float32 [n, size, size, c] in 0..255, as clean-fid resizes (Parmar et
    al. 2022, arXiv 2104.11222): Pillow's antialiased bicubic on float planes, not rounded."""
    planes = np.asarray(images, np.float32).transpose(0, 3, 1, 2)
    out = np.empty((*planes.shape[:2], size, size), np.float32)
    for index in np.ndindex(planes.shape[:2]):
        plane = Image.fromarray(np.ascontiguousarray(planes[index]))
        out[index] = np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC))
    return out.clip(0, 255).transpose(0, 2, 3, 1)


@functools.lru_cache(maxsize=32)
def _program(apply, logits: bool):
    """The function that `in_batches` compiles, cached: the same object is compiled only once."""
    keys = ("features", "logits") if logits else ("features",)

    def run(params, x):
        out = apply(params, x.astype(jnp.float32) / 127.5 - 1.0)
        return {key: out[key].astype(jnp.float32) for key in keys}

    return run
