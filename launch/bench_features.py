"""Inception-v3 features and their Frechet distance, ours and torch-fidelity's, for launch/bench.py.

One random network: theirs is drawn, its weights are stored, and ours are read from that file, so
that features and distances can be compared. Ours is what launch/evaluate.py does with a set of
images: `embed` in batches, `moments`, `frechet` against the moments of another set. Theirs is the
extractor called on the same batches, and the two functions of torch-fidelity behind its FID. Both
start from uint8 images and enlarge them as TensorFlow 1 does. Needs torch and torch-fidelity.
"""

import copy
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from cheapscale.evaluation.fid import frechet, moments
from cheapscale.evaluation.quality import embed
from cheapscale.models import features
from cheapscale.models.features import FeatureNetwork

try:
    import torchvision  # noqa: F401  torch-fidelity imports it
except RuntimeError:
    # Built for another torch, it fails at two operators of object detection: declared, it imports.
    DECLARED = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        DECLARED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import torch_fidelity
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)

VERSIONS = {"torch": torch.__version__, "torch_fidelity": torch_fidelity.__version__}
FORMATS = ("contiguous", "channels_last")  # PyTorch's default layout, torch-fidelity's; and ours

# What the two sides of the comparison do not share, for its record.
DIFFERENCES = (
    "theirs runs eagerly in NCHW (and once more in channels_last, which torch-fidelity does not "
    "do), ours compiled by XLA in NHWC",
    "theirs runs batch norm after each convolution, ours has it in the kernels",
    "theirs has the covariance from numpy.cov, ours from chunks of 4096 rows; both in float64",
    "theirs takes the eigenvalues of the product of the covariances, ours two symmetric "
    "eigenproblems and the singular values of the product of the roots",
    "ours also checks that features are finite and estimates the distance's bias",
)

# The first pattern found in "<shape> <path of the operation>" names the class of a compiled
# operation; sides are those of the maps at 299 px.
CLASSES = (
    ("convolutions, maps of 149 to 71 px", r"^\w+\[\d+,(149|147|73|71),.*/conv_general"),
    ("convolutions, maps of 35 px", r"^\w+\[\d+,35,.*/conv_general"),
    ("convolutions, maps of 17 px", r"^\w+\[\d+,17,.*/conv_general"),
    ("convolutions, maps of 8 px", r"^\w+\[\d+,8,.*/conv_general"),
    ("convolutions, other maps", r"/conv_general"),
    ("resizing", r"/dot_general"),
    ("pools, biases, relus", r"/(max|reduce_sum|add|div)$"),
    ("padding, concatenation, the rest", r""),
)


def prepare(
    num: int, batch: int, resolution: int = 32, side: int = 299, dimension: int = 2048
) -> tuple[dict, dict, tuple]:
    """What the record says of both sides, {use: {side: call}}, and our `program` for the profile.

    "extraction" takes `num` images of `resolution` px, `batch` at a time, `side` px at the
    network's input; "statistics" begins where that ends, with `dimension` of the 2048 features.
    """
    theirs, ours = networks(side)
    shape = (2, num, resolution, resolution, 3)
    images, others = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    extraction = {"ours": lambda: embed(ours, images, batch_size=batch)}
    extraction |= {form: their_extraction(theirs, images, batch, form) for form in FORMATS}

    found, expected = extraction["ours"](), extraction[FORMATS[0]]()
    apart = float(np.abs(found - expected.numpy()).max() / expected.abs().max())
    found, expected = found[:, :dimension], expected[:, :dimension]
    reference = their_extraction(theirs, others, batch, FORMATS[0])()[:, :dimension]
    our_moments = moments(reference.numpy())
    their_moments = fid_features_to_statistics(reference)

    def our_distance():
        return frechet(moments(found), our_moments).distance

    def their_distance():
        mine = fid_features_to_statistics(expected)
        return fid_statistics_to_metric(mine, their_moments, verbose=False)[KEY_METRIC_FID]

    facts = {
        "images": num,
        "batch": batch,
        "resolution": resolution,
        "dimension": dimension,
        "output_difference": float(f"{apart:.2g}"),
        "distance": {"ours": our_distance(), "theirs": their_distance()},
        "differences": DIFFERENCES,
    }
    statistics = {"ours": our_distance} | dict.fromkeys(FORMATS, their_distance)
    calls = {"extraction": extraction, "statistics": statistics}
    return facts, calls, program(ours, images[:batch])


def networks(side: int) -> tuple[torch.nn.Module, FeatureNetwork]:
    """torch-fidelity's network with random weights, and ours with the same; images at `side` px."""

    class Random(torch_fidelity.FeatureExtractorInceptionV3):
        INPUT_IMAGE_SIZE = side

        def load_state_dict(self, state_dict):
            """Keeps the fresh weights: no published file is needed."""

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights.pth"
        torch.save({}, path)
        theirs = Random("random", ["2048"], feature_extractor_weights_path=path)
        draw_weights(theirs)
        torch.save(theirs.state_dict(), path)
        return theirs, features.load("inception_v3", path, input_size=side)


def draw_weights(network: torch.nn.Module, seed: int = 0) -> None:
    """Weights that keep activations of order one, and batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif not name.endswith("num_batches_tracked"):
            value.normal_(0, 0.05, generator=generator)


def their_extraction(
    network: torch.nn.Module, images: np.ndarray, batch: int, layout: str
) -> Callable[[], torch.Tensor]:
    """A call that gives the features [n, 2048] of `images`, in one memory layout."""
    layout = getattr(torch, {"contiguous": "contiguous_format"}.get(layout, layout))
    network = copy.deepcopy(network).to(memory_format=layout)
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous(memory_format=layout)

    @torch.no_grad()
    def extract():
        return torch.cat([network(part)[0] for part in x.split(batch)])

    return extract


def program(network: FeatureNetwork, images: np.ndarray) -> tuple[Any, Callable]:
    """Our network compiled for one batch, as `embed` does, and a call of it."""

    def run(params, x):
        return network.outputs(params, x.astype(np.float32) / 127.5 - 1.0)["features"]

    compiled = jax.jit(run).lower(network.params, images).compile()
    return compiled, lambda: jax.block_until_ready(compiled(network.params, images))
