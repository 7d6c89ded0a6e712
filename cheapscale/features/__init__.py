"""Frozen feature networks: `load` one by name; `FeatureNetwork` is what it returns."""

import functools
import pathlib
from collections.abc import Sequence

from cheapscale.features import (
    classifier,
    clip,
    deit,
    dinov2,
    efficientnet,
    inception,
    mobilenet,
    resnet,
    vgg,
)
from cheapscale.features.network import FeatureNetwork, full_precision
from cheapscale.features.weights import default_paths, read_weights

__all__ = ["BUILDERS", "FeatureNetwork", "load"]

BUILDERS = {
    "mobilenet_v2": mobilenet.build,
    "deit_base_distilled": deit.build,
    "efficientnet_lite0": efficientnet.build,
    "vgg16_lpips": vgg.build,
    "inception_v3": inception.build,
    "classifier": classifier.build,
} | {
    name: functools.partial(family.build, name=name, **size)
    for family in (dinov2, clip, resnet)  # one architecture at several sizes
    for name, size in family.SIZES.items()
}


def load(
    name: str,
    path: str | pathlib.Path | Sequence[str | pathlib.Path] | None = None,
    *,
    sha256: str | None = None,
    **options,
) -> FeatureNetwork:
    """The feature network `name` with the weights at `path`.

    Args:
      name: one of `BUILDERS`. "classifier" reads what `fitted.fit_classifier` left in the cache.
      path: an .npz, .safetensors or PyTorch file, or several that are merged (VGG16 and the LPIPS
        heads): a sequence, or one string joined by "+". The default is the value of the environment
        variable CHEAPSCALE_WEIGHTS_<NAME>, or the file of the extra `features`.
      sha256: refuse a file with another hash (hashes joined by "+" for several files).
      options: arguments of the network's own `build`, as "pooling" of vgg16_lpips, and for all
        "input_size": images with a shorter side are enlarged to it (default: the network's own);
        0 enlarges no image, if the network takes images of any size.

    Raises ValueError for an unknown name, no such file, a wrong hash, a file of another network.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown feature network {name!r}: choose one of {tuple(BUILDERS)}")
    options = {key: value for key, value in options.items() if value is not None}
    if path is None:
        path, known = default_paths(name)
        sha256 = sha256 or known
    weights = read_weights(path, sha256)
    network = BUILDERS[name](weights, **options)
    return network._replace(outputs=network.outputs and full_precision(network.outputs))
