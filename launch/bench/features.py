"""Inception-v3 features and their Frechet distance, in this package and in torch-fidelity.

Both sides have the same random weights: torch-fidelity's network is initialised and stored, and
ours reads that file. Our side does what launch/evaluate.py does with a set of images: features in
batches, moments, distance to the moments of another set. The other side runs the extractor on the
same batches, and the two functions that compute torch-fidelity's FID. Both start from uint8 images
and enlarge them as TensorFlow 1 does.

Differences: torch-fidelity runs eagerly in NCHW (and a second time in channels_last), ours is
compiled in NHWC with batch norm folded into the kernels; torch-fidelity uses numpy.cov and the
eigenvalues of the product of covariances, ours sums chunks of rows and solves symmetric
eigenproblems.
"""

import copy
import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
import torch

from cheapscale import features
from cheapscale.evaluation.embedding import embed
from cheapscale.evaluation.fid import frechet, moments
from cheapscale.features import FeatureNetwork

try:
    import torchvision  # noqa: F401  torch-fidelity imports it
except RuntimeError:
    # A torchvision for another version of torch cannot register two operators of object detection.
    # Once they are declared, it imports; they are never called.
    DECLARED = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        DECLARED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import torch_fidelity
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def prepare(
    num: int, batch: int, resolution: int = 32, side: int = 299, dimension: int = 2048
) -> tuple[dict, dict]:
    """(facts for the record, {use: {side: call}}).

    "extraction" embeds `num` images of `resolution` px in batches, enlarged to `side` px;
    "statistics" computes the distance from `dimension` of the 2048 features.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    theirs, ours = networks(side)
    shape = (2, num, resolution, resolution, 3)
    images, others = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    extraction = {"ours": lambda: embed(ours, images, batch_size=batch)}
    extraction |= {layout: their_extraction(theirs, images, batch, layout) for layout in LAYOUTS}

    found, expected = extraction["ours"](), extraction["contiguous"]()
    apart = float(np.abs(found - expected.numpy()).max() / expected.abs().max())
    found, expected = found[:, :dimension], expected[:, :dimension]
    reference = their_extraction(theirs, others, batch, "contiguous")()[:, :dimension]
    our_moments, their_moments = moments(reference.numpy()), fid_features_to_statistics(reference)

    def our_distance():
        return frechet(moments(found), our_moments).distance

    def their_distance():
        mine = fid_features_to_statistics(expected)
        return fid_statistics_to_metric(mine, their_moments, verbose=False)[KEY_METRIC_FID]

    facts = {
        "images": num,
        "batch": batch,
        "output_difference": apart,
        "distance": {"ours": our_distance(), "theirs": their_distance()},
    }
    statistics = {"ours": our_distance, "theirs": their_distance}
    return facts, {"extraction": extraction, "statistics": statistics}


def networks(side: int) -> tuple[torch.nn.Module, FeatureNetwork]:
    """(torch-fidelity's network, ours) with the same random weights, for inputs of `side` px."""

    class Random(torch_fidelity.FeatureExtractorInceptionV3):
        INPUT_IMAGE_SIZE = side

        def load_state_dict(self, state_dict):
            """Keep the random weights, so that no published file is needed."""

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights.pth"
        torch.save({}, path)
        theirs = Random("random", ["2048"], feature_extractor_weights_path=path)
        draw_weights(theirs)
        torch.save(theirs.state_dict(), path)
        return theirs, features.load("inception_v3", path, input_size=side)


def draw_weights(network: torch.nn.Module, seed: int = 0) -> None:
    """Set weights that keep activations of order one, and batch norms that are not the identity."""
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
    """A function that returns the features [n, 2048] of `images`, in one memory layout."""
    network = copy.deepcopy(network).to(memory_format=LAYOUTS[layout])
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous(memory_format=LAYOUTS[layout])

    @torch.no_grad()
    def extract():
        return torch.cat([network(part)[0] for part in x.split(batch)])

    return extract
