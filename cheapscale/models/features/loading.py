"""Frozen feature networks by name, from weight files that the user names."""

import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cheapscale.models.features import (
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
from cheapscale.models.features.network import FeatureNetwork, exact
from cheapscale.models.features.weights import Weights, default_paths, read_weights

BUILDERS = {
    "mobilenet_v2": mobilenet.build,
    "deit_base_distilled": deit.build,
    "efficientnet_lite0": efficientnet.build,
    "vgg16_lpips": vgg.build,
    "inception_v3": inception.build,
}
for family in (dinov2, clip, resnet):  # one architecture at several sizes
    BUILDERS |= {
        name: functools.partial(family.build, name=name, **size)
        for name, size in family.SIZES.items()
    }


def load(
    name: str,
    path: str | pathlib.Path | Sequence[str | pathlib.Path] | None = None,
    *,
    sha256: str | None = None,
    input_size: int | None = None,
    **options,
) -> FeatureNetwork:
    """The feature network `name` with the weights at `path`.

    Args:
      name: one of `BUILDERS`, or "classifier" (the .npz that training/classifier.py writes,
        its .json beside it; the network is called as that says).
      path: .npz, .safetensors or a PyTorch file; several are merged (VGG16 and the LPIPS heads),
        as a sequence or as one string, joined by "+". By default what the environment variable
        CHEAPSCALE_WEIGHTS_<NAME> names, for example CHEAPSCALE_WEIGHTS_INCEPTION_V3.
      sha256: refuse a file with another hash (hashes joined by "+" for several files).
      input_size: images with a shorter side are enlarged to it; by default the network's own (299
        for Inception, which resizes every image to it; 224, CIFAR's 32, 16 for the classifier). 0
        enlarges none, where the network takes images of any size.
      options: "pooling" of vgg16_lpips, "seed" of deit_base_distilled's random re-assembly,
        "inputs" of inception_v3, "position_offset" of DINOv2.

    Raises:
      ValueError: unknown name, no such file, wrong hash, or a file of another network.
    """
    names = (*BUILDERS, "classifier")
    if name not in names:
        raise ValueError(f"unknown feature network {name!r}: choose one of {names}")
    weights = read_weights(default_paths(name) if path is None else path, sha256)
    build = BUILDERS.get(name, build_classifier)
    if input_size is not None:
        options["input_size"] = input_size
    network = build(weights, **options)
    return network._replace(outputs=network.outputs and exact(network.outputs))


def build_classifier(weights: Weights, input_size: int = 16) -> FeatureNetwork:
    """The small classifier, with the report (.json) that was written beside its weights; names
    are paths in its parameters ("stem/kernel")."""
    path = pathlib.Path(weights.path).with_suffix(".json")
    if not path.is_file():
        raise ValueError(f"there is no report {path}: copy it from where {weights.path} was fitted")
    report = json.loads(path.read_text())
    image = jnp.zeros((1, input_size, input_size, 3))
    net = classifier.module(report, input_size)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            weights.take("/".join(part.key for part in path), *leaf.shape)
        ),
        jax.eval_shape(net.init, jax.random.key(0), image)["params"],
    )
    if classifier.weights_hash(params) != report["sha256"]:
        raise ValueError(f"{path} does not describe {weights.path}: copy both again")
    return classifier.feature_network(params, report, input_size)
