"""Step-adaptive training, stage 2 (arXiv 2312.13307): one expert for one group of noise levels.

    theta_j <- the base's EMA weights, cut to the channels that the assessment keeps
    for (x, y) in data:
        sigma ~ the base's training distribution, restricted to the group and an overlap
        x_sigma = x + sigma eps
        minimise  w(sigma) * ((1 - b) |D_j(x_sigma) - x|^2
                              + b |D_j(x_sigma) - D_base(x_sigma)|^2)
        ema   <- average of theta_j, which starts at the cut weights

b is `base_target`. With the default b = 0 the loss is the base's own (EDM, arXiv 2206.00364, Eq. 8,
for an EDM process); b > 0 distils the base. The network gets the same noise conditioning as the
base. Groups are independent of each other, so the N runs can be distributed over machines. The work
directory of a group is `teacher.experts.group_folder`, where the set of experts loads its members.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.data.sources import open_data
from cheapscale.diffusion.guidance import drop_labels
from cheapscale.diffusion.noise import over_pixels
from cheapscale.experts.assess import read_assessment
from cheapscale.experts.partition import Groups
from cheapscale.experts.structure import cut
from cheapscale.models.growth import trainable
from cheapscale.models.unet import init_params
from cheapscale.teacher.data import check_teacher
from cheapscale.teacher.experts import read_manifest
from cheapscale.teacher.load import load_network_teacher
from cheapscale.teacher.pretrain import augmented
from cheapscale.teacher.sampling import levels
from cheapscale.teacher.teacher import Teacher
from cheapscale.training.stage import Stage, denoise_stage

PyTree = Any


def build(config) -> Stage:
    """The stage that fine-tunes the expert of group `config.prune.group`.

    Raises ValueError if the set of experts, the teacher and the data do not belong together.
    """
    settings, folder = config.prune, config.experts
    manifest = read_manifest(folder)
    group, count = settings.group, len(manifest["edges"]) - 1
    if group >= count:
        raise ValueError(f"prune.group is {group}, but {folder} has groups 0 ... {count - 1}")
    base = load_network_teacher(config.teacher, "experts are cut from one network")
    if base.fingerprint != manifest["teacher"]:
        raise ValueError(
            f"{folder} was assessed on the teacher {manifest['teacher']}, but {config.teacher} "
            f"holds {base.fingerprint}: name the teacher of the assessment"
        )
    source = open_data(config.data)
    check_teacher(base, source)

    found = read_assessment(folder, group)
    expert = cut(base, {name: np.asarray(channels) for name, channels in found["keep"].items()})
    sampler = manifest["settings"]
    grid = levels(base.process, sampler["steps"], "sample", sampler["spacing"])
    groups = Groups(base.process.levels(), np.asarray(manifest["edges"]))
    interval = groups.interval(group, settings.overlap, grid)
    trained_as = base.meta["config"]["pretrain"]
    kept = expert.params
    if settings.start == "scratch":
        kept = {name: leaf for name, leaf in kept.items() if name == "text"}
    return denoise_stage(
        config,
        source,
        init=functools.partial(init_params, expert.fields),
        loss_fn=functools.partial(
            group_loss,
            expert=expert.replace(params=None),
            base=base.replace(params=None),
            interval=interval,
            base_target=settings.base_target,
            label_dropout=trained_as["label_dropout"],
        ),
        # "scratch" keeps the U-Net's random weights: single-stage training, the paper's control.
        warm_start=lambda drawn: {"net": drawn["net"] | kept},
        trainable=trainable(expert.net.config),
        transform=functools.partial(
            augmented, flips=config.data.flip, probability=trained_as["augment"]
        ),
        frozen={"base": base.params} if settings.base_target else {},
        meta={
            "stage": "prune",
            "networks": {"net": expert.fields},
            "diffusion": base.meta["diffusion"],
            "data": source.describe(),
            "teacher": manifest["teacher"],
            "expert": {
                "set": pathlib.Path(folder).name,
                "group": group,
                "identity": manifest["identity"],
                "trained": interval,
                "steps": sampler["steps"],
                "share": found["share"],
                "keep": found["keep"],
            },
            "ledger": base.meta["ledger"],
            "frozen_networks": base.meta.get("frozen_networks", {}),
        },
    )


def group_loss(
    params: PyTree,
    frozen: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    expert: Teacher,
    base: Teacher,
    interval: tuple[float, float],
    base_target: float,
    label_dropout: float,
) -> tuple[jax.Array, jax.Array]:
    """(weighted loss [b], sigma [b]) of one batch {image [b, h, w, c], label [b][, augment]}.

    Args:
        expert, base: the networks of the weights `params` and frozen["base"].
        interval: (low, high], the range of sigma. base_target: b in the loss above, 0 to 1.
    """
    k_sigma, k_eps, k_drop, k_label = jax.random.split(key, 4)
    x, process = batch["image"], expert.process
    y = drop_labels(k_label, batch["label"], label_dropout, expert.null)
    cond = {"label": y, "augment": batch.get("augment")}
    # A group is a narrow interval of levels, and antithetic draws cover it evenly in every batch.
    sigma = process.draw_sigma(k_sigma, len(x), *interval, antithetic=True)
    x_sigma = x + over_pixels(sigma, x) * jax.random.normal(k_eps, x.shape, x.dtype)

    D = expert.replace(params=params).denoise(
        x_sigma, sigma, **cond, train=True, rngs={"dropout": k_drop}
    )
    loss = _mean_square(D - x)
    if base_target:
        D_base = base.replace(params=frozen["base"]).denoise(x_sigma, sigma, **cond)
        loss = (1 - base_target) * loss + base_target * _mean_square(D - D_base)
    return process.weight(sigma) * loss, sigma


def _mean_square(error: jax.Array) -> jax.Array:
    """The mean square [b] over pixels and channels."""
    return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
