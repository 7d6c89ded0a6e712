"""A small norm-free classifier: the feature network to train where no published one is at hand.

Trained for a few minutes on a data set's own labels, it serves as the frozen backbone of the
projected discriminator at 8-32 px, as the network of a feature distance, or (another seed, other
images) as the embedding of a Frechet or kernel distance.

Pre-activation residual network without batch statistics, after Brock et al. 2021 (arXiv
2101.08692): every kernel W is standardised over its fan-in n, W' = g (W - mean) / (std sqrt(n)),
so that a unit-variance input gives an output of unit variance, and residual sums are divided by
sqrt(1 + alpha^2). Nothing is normalised over space, channels or the batch: absolute colour and
contrast stay visible in the maps, one sample never sees another, and the forward pass is
convolutions only, which XLA:CPU runs well.

training/classifier.py fits it and writes a report beside the weights; what the two make together,
fitted just now or read from files, is one `feature_network`.
"""

import functools
import hashlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models.features.network import FeatureNetwork, exact

PyTree = Any

PENULTIMATE = 64
STRIDES = (1, 2, 4, 8)
WIDTHS = (1, 2, 3, 4)  # multiples of `width`, one per stride
ALPHA = 0.5  # weight of a residual branch
SWISH_GAIN = 1.7881293  # 1 / std of swish(N(0, 1))
DEGRADATIONS = ("blur", "noise")  # one more logit each, dropped from the network's outputs


def activate(x: jax.Array) -> jax.Array:
    """Swish scaled to keep unit variance."""
    return nn.swish(x) * SWISH_GAIN


class StandardConv(nn.Module):
    """Convolution whose kernel is standardised over its fan-in, with a learned gain and bias."""

    features: int
    kernel: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        gain = self.param("gain", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        fan_in = shape[0] * shape[1] * shape[2]
        mean = jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
        variance = jnp.var(kernel, axis=(0, 1, 2), keepdims=True)
        scale = jax.lax.rsqrt(jnp.maximum(variance * fan_in, 1e-4)) * gain[None, None, None, :]
        out = jax.lax.conv_general_dilated(
            x,
            (kernel - mean) * scale,
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out + bias[None, None, None, :]


class Classifier(nn.Module):
    """Classifier with feature maps.

    Attributes:
      num_classes: number of logits.
      width: channels at stride 1; strides 2, 4 and 8 have two, three and four times as many.
      input_size: images with a shorter side are first enlarged (bilinear) to it; larger images are
        taken as they are. A multiple of 8.
    """

    num_classes: int
    width: int = 24
    input_size: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
        """Images [b, h, w, 3] in [-1, 1] -> (logits [b, num_classes], maps, penultimate [b, 64]).

        `maps` holds [b, h/s, w/s, m*width] for the strides s = 1, 2, 4, 8 (finest first) and
        m = 1, 2, 3, 4, before the activation.
        """
        if x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(f"classifier input has shape {x.shape}: give images [b, h, w, 3]")
        if self.input_size % STRIDES[-1]:
            raise ValueError(
                f"classifier input_size={self.input_size} is not a multiple of {STRIDES[-1]}"
            )
        height, width = (max(side, self.input_size) for side in x.shape[1:3])
        if (height, width) != x.shape[1:3]:
            x = jax.image.resize(x, (x.shape[0], height, width, 3), "bilinear")
        x = StandardConv(self.width, name="stem")(x * 2.0)  # image pixels have std near 1/2
        maps = [x]
        for level, multiple in enumerate(WIDTHS[1:], start=1):
            channels = multiple * self.width
            x = StandardConv(channels, stride=2, name=f"down{level}")(activate(x))
            h = StandardConv(channels, name=f"block{level}_conv0")(activate(x))
            h = StandardConv(channels, name=f"block{level}_conv1")(activate(h))
            x = (x + ALPHA * h) * (1.0 + ALPHA**2) ** -0.5
            maps.append(x)
        pooled = jnp.mean(activate(x), axis=(1, 2))
        penultimate = activate(nn.Dense(PENULTIMATE, name="penultimate")(pooled))
        logits = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="logits")(
            penultimate
        )
        return logits, tuple(maps), penultimate


def network_name(report: dict) -> str:
    """What the network is called: "classifier" where it measures, otherwise
    "loss_classifier_<resolution>px"; "(rotation)" follows where there were no labels."""
    metric = report["purpose"] == "metric"
    name = "classifier" if metric else f"loss_classifier_{report['resolution']}px"
    return name + "(rotation)" * (report["task"] == "rotation")


def module(report: dict, input_size: int = 16) -> Classifier:
    """The network that a report, or the plan of one, describes."""
    return Classifier(report["num_classes"] + len(DEGRADATIONS), report["width"], input_size)


def feature_network(params: PyTree, report: dict, input_size: int = 16) -> FeatureNetwork:
    """FeatureNetwork of weights and the report that came with them.

    Without "feature_rms" and "sha256" the report is a plan, `params` are shapes and the network has
    no outputs and no hash.
    """
    net = module(report, input_size)
    scale = report.get("feature_rms")
    return FeatureNetwork(
        name=network_name(report),
        apply=functools.partial(_maps, net),
        params=params,
        sha256=report.get("sha256", ""),
        input_size=input_size,
        outputs=exact(functools.partial(outputs, net, scale)) if scale else None,
    )


def _maps(net, params, x):
    return net.apply({"params": params}, x)[1]


def outputs(net: Classifier, scale: float, params: PyTree, x: jax.Array) -> dict[str, jax.Array]:
    """Images [b, h, w, 3] -> "features" [b, 64], divided by `scale`, and "logits" [b, classes]."""
    logits, _, penultimate = net.apply({"params": params}, x)
    return {"features": penultimate / scale, "logits": logits[:, : -len(DEGRADATIONS)]}


def flat(params: PyTree) -> dict[str, np.ndarray]:
    """Parameters by their paths ("stem/kernel"), as they are stored."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}


def weights_hash(params: PyTree) -> str:
    """SHA-256 of the parameters' names and values."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flat(params).items()):
        digest.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
