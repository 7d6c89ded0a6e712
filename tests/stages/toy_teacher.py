"""A tiny EDM teacher for sets of specialists, and the configs that make one of it."""

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models.unet import unet
from cheapscale.stages.data import describe, open_data
from cheapscale.stages.networks import complete
from cheapscale.training import checkpoint, loop
from configs import scenes

DIFFUSION = {"process": "edm", "prediction": "x0", "sigma_min": 0.002, "sigma_max": 80.0,
             "rho": 7.0, "sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}  # fmt: skip
LEDGER = {"flops": 5.0, "device_seconds": 1.0}


def base_meta():
    model = complete(scenes.get_config("stage=pretrain,smoke").model.to_dict() | {"groups": 4})
    return {
        "stage": "pretrain", "networks": {"net": model}, "diffusion": DIFFUSION,
        "config": {"pretrain": {"label_dropout": 0.0, "augment": 0.0}}, "ledger": LEDGER,
        "data": describe(open_data(scenes.get_config("stage=invert,smoke").data)),
    }  # fmt: skip


def weights(seed=0):
    net, rng = unet(**base_meta()["networks"]["net"]), np.random.default_rng(seed)
    shapes = jax.eval_shape(
        lambda key: net.init(key, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), label=jnp.zeros(1, int)),
        jax.random.key(0),
    )
    return jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype("f"), shapes["params"])


def save_teacher(workdir):
    with checkpoint.Checkpoints(workdir) as checkpoints:
        state = loop.create_state({"net": weights()}, {}, {}, ["net"])
        checkpoints.save(0, state, base_meta())
        checkpoints.wait()
    return str(workdir)


def configured(stage, teacher, folder, **changes):
    config = scenes.get_config(f"stage={stage},smoke")
    config.teacher, config.specialists = teacher, str(folder)
    config.lock()  # no other fields than the stage has
    config.prune.update(changes)
    return config.unlock()
