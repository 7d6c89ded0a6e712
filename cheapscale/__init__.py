"""cheapscale: train a diffusion model once, small; buy resolution and speed afterwards.

import cheapscale
model = cheapscale.load("runs/quickstart/pretrain")
images, labels = model.sample(16)
z = model.invert(images, labels)
large = model.cascade("2x", num=16).scales[-1]
"""

import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cheapscale.model import Model


def load(workdir: str | pathlib.Path, **options: Any) -> "Model":
    """The `cheapscale.model.Model` of a work directory or a set of experts; see there."""
    from cheapscale.model import load  # a top-level import would be circular

    return load(workdir, **options)


def pretrained() -> dict[str, dict]:
    """{name: card} of the models that ship with the package; load("pretrained:NAME") reads one."""
    from cheapscale.training.exported import pretrained  # loads no JAX before it is needed

    return pretrained()
