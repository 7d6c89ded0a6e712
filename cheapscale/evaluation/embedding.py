"""Features and logits of eight-bit images in a frozen network."""

import functools

import jax.numpy as jnp
import numpy as np

from cheapscale.data.pixels import check_images
from cheapscale.evaluation.resize import MODES
from cheapscale.features.network import FeatureNetwork
from cheapscale.training.compiler import for_depthwise
from cheapscale.training.mesh import in_batches


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
    or "clean" or "tf1" (evaluation.resize).
    """
    check_network(network, resize)
    if images.dtype != np.uint8:
        raise ValueError(f"embed takes uint8 images, got {images.dtype}: apply pixels.to_uint8")
    check_images(images)
    prepare = None
    if resize != "network":
        prepare = functools.partial(MODES[resize], size=network.input_size)
    run = _program(network.outputs, logits)
    return in_batches(
        run, network.params, images, batch_size=batch_size, prepare=prepare,
        compiler_options=for_depthwise(),
    )  # fmt: skip


def check_network(network: FeatureNetwork, resize: str) -> None:
    """Raise ValueError for a network without pooled features, or a resizing it cannot use."""
    if network.outputs is None:
        raise ValueError(f"{network.name} has no pooled features: measure with another network")
    if resize not in ("network", *MODES):
        raise ValueError(f"resize is {resize!r}: choose network, {' or '.join(MODES)}")
    if resize != "network" and not network.input_size:
        raise ValueError(
            f"{network.name} takes images of any size, so there is none to resize to: use "
            "resize='network'"
        )


@functools.lru_cache(maxsize=32)
def _program(apply, logits: bool):
    """The function that `in_batches` compiles, cached: the same object is compiled only once."""
    keys = ("features", "logits") if logits else ("features",)

    def run(params, x):
        out = apply(params, x.astype(jnp.float32) / 127.5 - 1.0)
        return {key: out[key].astype(jnp.float32) for key in keys}

    return run
