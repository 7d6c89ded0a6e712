"""Step-adaptive training, stage 2: one specialist for one group of noise levels (spec section 5).

    theta_j <- the base's EMA weights, cut to the channels that the assessment kept
    for (x, y) in data:
        sigma ~ the base's own levels, cut to the group and an overlap; half of them mirrored in it
        minimise  (1 - d) L(D_j; x, sigma) + d L(D_j; D_base, sigma)
        ema   <- restarted at theta_j

The optimiser starts fresh, or with the base's moments cut alike and a rate of its own. Groups are
independent: N jobs, or one after the other. The work directory is `specialists.group_folder`, so
that the set finds its members.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.diffusion import guidance, process
from cheapscale.models.unet import unet
from cheapscale.pruning.structure import prune, prune_optimiser
from cheapscale.stages import data
from cheapscale.stages.groups import Groups, draw_levels, levels_of, weight
from cheapscale.stages.networks import fingerprint, load_teacher, make_denoiser, pruned_model
from cheapscale.stages.one_step import init_generator
from cheapscale.stages.pretrain import augmented
from cheapscale.stages.sampling import levels
from cheapscale.stages.specialists import read_assessment, read_manifest
from cheapscale.training.checkpoint import load_optimiser
from cheapscale.training.optim import make_optimiser
from cheapscale.training.stage import Stage, denoise_step, noise_bins
from cheapscale.training.state import Optimiser

PyTree = Any
STARTS = ("base", "scratch")
OPTIMISERS = ("fresh", "sliced")


def build(config) -> Stage:
    """One group's specialist. Raises ValueError where set, teacher and data do not fit."""
    settings, folder = config.prune.to_dict(), config.specialists
    manifest = read_manifest(folder)
    group, count = settings["group"], len(manifest["edges"]) - 1
    if not 0 <= group < count:
        raise ValueError(f"prune.group is {group}, but {folder} has groups 0 ... {count - 1}")
    check_training(settings)
    teacher = load_teacher(config.teacher)
    if fingerprint(teacher.params) != manifest["teacher"]:
        raise ValueError(
            f"{folder} was assessed on the teacher {manifest['teacher']}, but {config.teacher} "
            f"holds {fingerprint(teacher.params)}: name the teacher of the assessment"
        )
    source = data.open_data(config.data)
    base = teacher.meta["networks"]["net"]
    data.check_teacher(teacher, source)
    found = read_assessment(folder, group)
    keep = {name: np.asarray(channels) for name, channels in found["keep"].items()}
    whole, model = unet(**base).config, pruned_model(base, keep)
    diffusion = teacher.meta["diffusion"]
    groups = Groups(levels_of(diffusion), np.asarray(manifest["edges"]))
    optim = config.optim.to_dict()
    if not keep:
        optim["lr"] *= settings["whole_rate"]
    optimiser = Optimiser(make_optimiser(**optim))
    distil, overlap = settings["distil"], settings["overlap"]
    searched = manifest["settings"]
    grid = levels(diffusion, searched["steps"], "sample", searched["spacing"])
    positions = groups.positions(group, overlap, grid)
    pretrain = teacher.meta["config"]["pretrain"]

    def cut(params: PyTree) -> PyTree:
        if settings["start"] == "scratch":
            return params
        return {"net": prune(teacher.params, whole, keep)}

    def sliced(fresh: PyTree) -> PyTree:
        transform = make_optimiser(**teacher.meta["config"]["optim"])
        shapes = jax.eval_shape(transform.init, teacher.params)
        moments = load_optimiser(teacher.workdir, "net", shapes, step=teacher.step)
        moments = prune_optimiser(moments, teacher.params, whole, keep)
        try:
            return {"net": with_moments(fresh["net"], moments)}
        except ValueError as error:
            raise ValueError(
                f"prune.optimiser is 'sliced', but {config.teacher} was trained with "
                f"{teacher.meta['config']['optim']['name']} and optim.name is "
                f"{config.optim.name}: both must keep moments; use 'fresh'"
            ) from error

    return Stage(
        init_params=lambda key: ({"net": init_generator(model, key)}, {"net": noise_bins()}),
        optimisers={"net": optimiser},
        step=functools.partial(
            denoise_step,
            loss_fn=functools.partial(
                group_loss,
                bind=make_denoiser(model, diffusion),
                bind_base=make_denoiser(base, diffusion),
                diffusion=diffusion,
                groups=groups,
                positions=positions,
                distil=distil,
                null_label=base["num_classes"],
                label_dropout=pretrain["label_dropout"],
            ),
            optimiser=optimiser,
            ema_decay=config.ema.decay,
        ),
        batches=data.stream(
            config,
            source,
            functools.partial(augmented, flips=config.data.flip, probability=pretrain["augment"]),
        ),
        load_frozen=lambda: ({"base": teacher.params} if distil else {}, {}),
        frozen_shapes=lambda: (
            {"base": jax.eval_shape(lambda p: p, teacher.params)} if distil else {}
        ),
        warm_start=cut,
        evals={},
        meta={
            "stage": "prune",
            "networks": {"net": model},
            "diffusion": diffusion,
            "data": data.describe(source),
            "teacher": manifest["teacher"],
            "specialist": {
                "set": pathlib.Path(folder).name,
                "group": group,
                "identity": manifest["identity"],
                "positions": positions,
                "share": found["share"],
                "keep": found["keep"],
            },
            "ledger": teacher.meta["ledger"],
            "frozen_networks": teacher.meta.get("frozen_networks", {}),
        },
        batch_size=config.batch_size,
        fits={},
        warm_optimiser=sliced if settings["optimiser"] == "sliced" else None,
    )


def check_training(settings: dict) -> None:
    """Refuse choices of fine-tuning that cannot be; the assessment does before it begins."""
    for field, known in (("start", STARTS), ("optimiser", OPTIMISERS)):
        if settings[field] not in known:
            raise ValueError(
                f"prune.{field} is {settings[field]!r}: choose one of {', '.join(known)}"
            )
    if settings["optimiser"] == "sliced" and settings["start"] == "scratch":
        raise ValueError(
            "prune.optimiser is 'sliced' with prune.start 'scratch': the base's moments go with "
            "its weights; use 'fresh'"
        )
    distil, overlap = settings["distil"], settings["overlap"]
    if not 0 <= distil <= 1 or overlap < 0:
        raise ValueError(
            f"prune.distil is {distil} and prune.overlap {overlap}: distil is a weight from 0 to "
            "1, overlap a number of sampler steps"
        )
    if not settings["whole_rate"] > 0:
        raise ValueError(f"prune.whole_rate is {settings['whole_rate']}: a factor above 0")


def with_moments(fresh: PyTree, trained: PyTree) -> PyTree:
    """A fresh optimiser's state with the moments of a trained one, and how many steps these have
    seen; the count of a schedule stays fresh, so that the rate rises and falls anew. ValueError
    where either has none."""

    def adam(node: Any) -> bool:
        return hasattr(node, "mu") and hasattr(node, "nu")

    held = [node for node in jax.tree.leaves(trained, is_leaf=adam) if adam(node)]
    if len(held) != 1 or not any(map(adam, jax.tree.leaves(fresh, is_leaf=adam))):
        raise ValueError("no moments")
    return jax.tree.map(lambda node: held[0] if adam(node) else node, fresh, is_leaf=adam)


def group_loss(
    params: PyTree,
    frozen: PyTree,
    batch: PyTree,
    key: jax.Array,
    *,
    bind,
    bind_base,
    diffusion: dict,
    groups: Groups,
    positions: tuple[int, int],
    distil: float,
    null_label: int,
    label_dropout: float,
) -> tuple[jax.Array, jax.Array]:
    """(weighted loss [b], sigma [b]) of one batch {image, label[, augment]} (section 5.2, 5.3)."""
    k_level, k_noise, k_drop, k_label = jax.random.split(key, 4)
    x = batch["image"]
    condition = {"label": guidance.dropped(k_label, batch["label"], label_dropout, null_label)}
    if "augment" in batch:
        condition["augment"] = batch["augment"]
    sigma = draw_levels(k_level, len(x), diffusion, groups, positions)
    noisy = x + process.over_pixels(sigma, x) * jax.random.normal(k_noise, x.shape, x.dtype)
    estimate = bind(params, train=True, rngs={"dropout": k_drop})(noisy, sigma, **condition)

    def error(target):
        return jnp.mean(jnp.square(estimate - target), axis=tuple(range(1, x.ndim)))

    loss = error(x)
    if distil:
        theirs = jax.lax.stop_gradient(bind_base(frozen["base"])(noisy, sigma, **condition))
        loss = (1 - distil) * loss + distil * error(theirs)
    return weight(diffusion, sigma) * loss, sigma
