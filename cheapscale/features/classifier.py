"""A small norm-free classifier of a data set's labels, used as a feature network.

`fitted.py` fits it. It is a pre-activation residual network without batch statistics (Brock et al.
2021, arXiv 2101.08692): every kernel W is standardised over its fan-in n,
W' = g (W - mean) / (std sqrt(n)), so that a unit-variance input gives an output of unit variance,
and residual sums are divided by sqrt(1 + alpha^2). Nothing is normalised over space, channels or
the batch: absolute colour and contrast stay visible in the maps, one sample never sees another, and
the forward pass is convolutions only, which XLA:CPU runs well.
"""

import hashlib
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cheapscale.data.files import read_json
from cheapscale.features.layers import conv
from cheapscale.features.network import FeatureNetwork, enlarge, full_precision
from cheapscale.features.weights import Weights, read_weights

PyTree = Any

PENULTIMATE = 64
WIDTHS = (1, 2, 3, 4)  # multiples of `width` at strides 1, 2, 4, 8
ALPHA = 0.5  # weight of a residual branch
SWISH_GAIN = 1.7881293  # 1 / std of swish(N(0, 1))
DEGRADATIONS = ("blur", "noise")  # each has one more logit, used only while fitting


def activate(x: jax.Array) -> jax.Array:
    """Swish scaled to keep unit variance."""
    return nn.swish(x) * SWISH_GAIN


class StandardConv(nn.Module):
    """3x3 convolution with a kernel standardised over its fan-in, a learned gain and a bias."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        gain = self.param("gain", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        mean = jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
        variance = jnp.var(kernel, axis=(0, 1, 2), keepdims=True)
        fan_in = 9 * x.shape[-1]
        scale = jax.lax.rsqrt(jnp.maximum(variance * fan_in, 1e-4)) * gain[None, None, None, :]
        return conv(x, {"kernel": (kernel - mean) * scale, "bias": bias}, self.stride)


class Classifier(nn.Module):
    """Classifier with feature maps.

    width: channels at stride 1; strides 2, 4 and 8 have two, three and four times as many.
    input_size: a multiple of 8, to which images with a shorter side are first enlarged (bilinear).
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
        if self.input_size % 8:
            raise ValueError(f"classifier input_size={self.input_size} is not a multiple of 8")
        x = enlarge(x, self.input_size)
        # Pixels in [-1, 1] have a standard deviation near 1/2: the factor 2 makes it 1.
        x = StandardConv(self.width, name="stem")(x * 2.0)
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
        last = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="logits")
        return last(penultimate), tuple(maps), penultimate


def module(report: dict, input_size: int = 16) -> Classifier:
    """The network that a report, or the specification of a fit, describes."""
    return Classifier(report["num_classes"] + len(DEGRADATIONS), report["width"], input_size)


def param_shapes(report: dict) -> PyTree:
    """The shapes of that network's parameters."""
    shapes = jax.eval_shape(module(report).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    return shapes["params"]


def feature_network(params: PyTree, report: dict, input_size: int = 16) -> FeatureNetwork:
    """The FeatureNetwork of weights and the report that belongs to them.

    Its name is "classifier" for a metric and "loss_classifier_<resolution>px" for a loss (a grown
    model's losses use one for each resolution), followed by "(rotation)" if there were no labels.
    Its outputs are logits and 64-d features of mean square 1: the cubic kernel of a kernel distance
    needs a fixed scale, and Frechet distances become comparable across data sets. With the
    specification of a fit instead of a report, `params` are shapes and the network has no outputs
    and no hash.
    """
    net, scale = module(report, input_size), report.get("feature_rms")
    metric = report["purpose"] == "metric"
    name = "classifier" if metric else f"loss_classifier_{report['resolution']}px"

    def apply(params, x):
        return net.apply({"params": params}, x)[1]

    def outputs(params, x):
        logits, _, penultimate = net.apply({"params": params}, x)
        return {"features": penultimate / scale, "logits": logits[:, : -len(DEGRADATIONS)]}

    if scale:
        params = jax.tree.map(jnp.asarray, params)
    return FeatureNetwork(
        name + "(rotation)" * (report["task"] == "rotation"),
        apply,
        params,
        report.get("sha256", ""),
        input_size,
        outputs=full_precision(outputs) if scale else None,
    )


def build(weights: Weights, input_size: int = 16) -> FeatureNetwork:
    """The network of a cached .npz file and the report (.json) beside it."""
    params, report = read_classifier(pathlib.Path(weights.path))
    return feature_network(params, report, input_size)


def read_classifier(path: pathlib.Path) -> tuple[PyTree, dict]:
    """(params, report) of a cached .npz file; ValueError where the report (.json) beside it is
    missing or belongs to other weights."""
    report_path = path.with_suffix(".json")
    if not report_path.is_file():
        raise ValueError(f"there is no report {report_path}: copy it from where {path} was fitted")
    arrays, report = read_weights(path).arrays, read_json(report_path, "sha256")
    params = unflatten_dict(arrays, sep="/")
    if weights_hash(params) != report["sha256"]:
        raise ValueError(f"{report_path} does not describe {path}: copy both again, or delete both")
    return params, report


def weights_hash(params: PyTree) -> str:
    """SHA-256 of the parameters' names and values."""
    hashed = hashlib.sha256()
    for name, leaf in sorted(flatten_dict(params, sep="/").items()):
        hashed.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()
