"""A tiny EDM teacher for sets of experts, and configs of the stages that make the experts."""

import jax
import numpy as np

from cheapscale.data.sources import open_data
from cheapscale.models.unet import init_params
from cheapscale.teacher.teacher import Teacher, make_teacher, resolve_model
from cheapscale.training import checkpoint, loop
from configs import scenes

DIFFUSION = {"process": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0,
             "sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}  # fmt: skip
LEDGER = {"flops": 5.0, "device_seconds": 1.0}


def base_meta():
    # One level of five blocks compiles in half the time; wide blocks leave widths to search.
    small = {"groups": 4, "channels": 24, "channel_mult": (1,)}
    model = scenes.get_config("stage=pretrain,smoke").model.to_dict() | small
    return {
        "stage": "pretrain", "networks": {"net": resolve_model(model)}, "diffusion": DIFFUSION,
        "config": {"pretrain": {"label_dropout": 0.0, "augment": 0.0}}, "ledger": LEDGER,
        "data": open_data(scenes.get_config("stage=invert,smoke").data).describe(),
    }  # fmt: skip


def weights(seed=0):
    rng, fields = np.random.default_rng(seed), base_meta()["networks"]["net"]
    shapes = jax.eval_shape(lambda key: init_params(fields, key), jax.random.key(0))
    return jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype("f"), shapes)


def toy_teacher(seed=0, **meta) -> Teacher:
    return make_teacher(weights(seed), base_meta() | meta, 7, "base")


def save_teacher(workdir):
    with checkpoint.Checkpoints(workdir) as checkpoints:
        state = loop.create_state({"net": weights()}, {}, {}, ["net"])
        checkpoints.save(0, state, base_meta())
        checkpoints.wait()
    return str(workdir)


def configured(stage, teacher, folder, **changes):
    config = scenes.get_config(f"stage={stage},smoke")
    config.teacher, config.experts = teacher, str(folder)
    config.lock()  # no other fields than the stage has
    config.prune.update(changes)
    return config.unlock()
