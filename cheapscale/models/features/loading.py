"""Frozen feature networks by name, from weight files that the user names."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cheapscale.models.features import deit, efficientnet, mobilenet, vgg
from cheapscale.models.features.classifier import Classifier
from cheapscale.models.features.network import FeatureNetwork
from cheapscale.models.features.weights import Weights, read_weights

BUILDERS = {
    "mobilenet_v2": mobilenet.build,
    "deit_base_distilled": deit.build,
    "efficientnet_lite0": efficientnet.build,
    "vgg16_lpips": vgg.build,
}


def load(
    name: str,
    path: str | pathlib.Path | Sequence[str | pathlib.Path],
    *,
    sha256: str | None = None,
    input_size: int | None = None,
    **options,
) -> FeatureNetwork:
    """The feature network `name` with the weights at `path`.

    Args:
      name: "mobilenet_v2", "deit_base_distilled", "efficientnet_lite0", "vgg16_lpips", or
        "classifier" (the .npz that training/classifier.py writes).
      path: .npz, .safetensors or a PyTorch file; a sequence of files is merged (VGG16 and the
        LPIPS heads).
      sha256: refuse a file with another hash (hashes joined by "+" for several files).
      input_size: images with a shorter side are enlarged to it; by default 224, 16 for the
        classifier.
      options: "pooling" of vgg16_lpips, "seed" of deit_base_distilled's random re-assembly.

    Raises:
      ValueError: unknown name, no such file, wrong hash, or a file of another network.
    """
    names = (*BUILDERS, "classifier")
    if name not in names:
        raise ValueError(f"unknown feature network {name!r}: choose one of {names}")
    weights = read_weights(path, sha256)
    build = BUILDERS.get(name, build_classifier)
    if input_size is not None:
        options["input_size"] = input_size
    return build(weights, **options)


def build_classifier(weights: Weights, input_size: int = 16) -> FeatureNetwork:
    """The small classifier; names are paths in its parameters ("stem/kernel")."""
    width = weights.take("stem/kernel", 3, 3, 3, -1).shape[3]
    num_classes = weights.take("logits/bias", -1).shape[0]
    model = Classifier(num_classes, width, input_size)
    image = jnp.zeros((1, input_size, input_size, 3))
    expected = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            weights.take("/".join(part.key for part in path), *leaf.shape)
        ),
        expected,
    )

    def apply(params, x):
        return model.apply({"params": params}, x)[1]

    def outputs(params, x):
        logits, _, penultimate = model.apply({"params": params}, x)
        return {"features": penultimate, "logits": logits}

    return FeatureNetwork("classifier", apply, params, weights.sha256, input_size, outputs=outputs)
