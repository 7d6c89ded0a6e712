"""A tiny teacher and tuned runs beside it, none of them ever saved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.models import upsampler
from cheapscale.models.unet import unet
from cheapscale.stages import cascade, tuned
from cheapscale.stages.cascade_sampler import cascade_plan, cascade_sampler
from cheapscale.stages.networks import complete
from cheapscale.training.checkpoint import Loaded
from configs import common

UNET = complete({"resolution": 8, "channels": 8, "channel_mult": (1, 2), "attention": (4,),
                 "num_blocks": 1, "groups": 4, "num_classes": 3})  # fmt: skip
EDM = {"process": "edm", "prediction": "x0", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0,
       "sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}  # fmt: skip
VP = EDM | {"process": "linear", "prediction": "eps", "sigma_min": 0.02, "sigma_max": 150.0}


@functools.cache
def weights(seed=0):
    """Weights that do something, without compiling an initialisation."""
    net, rng = unet(**UNET), np.random.default_rng(seed)
    shapes = jax.eval_shape(
        lambda key: net.init(key, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), label=jnp.zeros(1, int)),
        jax.random.key(0),
    )
    fill = lambda s: rng.normal(0.02, 0.25, s.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(fill, shapes["params"])


def teacher(diffusion=EDM):
    meta = {
        "stage": "pretrain",
        "networks": {"net": UNET},
        "diffusion": diffusion,
        "config": {"pretrain": {"label_dropout": 0.1}},
    }
    return Loaded(weights(), meta, 0, "nowhere")


def settings(tune="neck", **changes):
    resolved = {"times": "all" if tune in ("lora", "ft") else "to_k", "label_dropout": 0.0}
    return common.cascade(tune).to_dict() | {"width": 4, "lora_rank": 2} | resolved | changes


def tuned_run(tune="neck", seed=None, **changes):
    """A tuned run that was never saved: fresh weights, or noise of a seed."""
    chosen = settings(tune, **changes)
    fields = cascade.network_fields(chosen, UNET)
    params = upsampler.init_upsamplers(upsampler.from_fields(fields), jax.random.key(1))
    if seed is not None:
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), params)
    meta = {"networks": {"upsampler": fields}, "cascade": chosen, "diffusion": EDM}
    return tuned.Tuned(params, meta, tune)


def images_of(run, pivots, *, cfg_scale=1.0, steps=10, diffusion=EDM, **options):
    loaded = teacher(diffusion)
    plan = cascade_plan(loaded.meta, "2x", steps=steps, pivot_size=(8, 8))
    subject, denoisers = tuned.tuned_cascade(loaded, [run], plan, cfg_scale)
    sampler = cascade_sampler(
        subject, plan, method="euler", cfg_scale=cfg_scale, **denoisers, **options
    )
    return sampler.draw(np.arange(2), np.array([0, 2]), pivots)[0][1]
