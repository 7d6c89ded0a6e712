"""A tiny teacher, with or without weights, and tuned runs beside it, all of them only in memory."""

import functools

import jax
import numpy as np

from cheapscale.cascade import tune, upsampler
from cheapscale.cascade.tuned import Tuned
from cheapscale.models.unet import init_params
from cheapscale.teacher.teacher import Origin, make_teacher
from cheapscale.training.checkpoint import Checkpoints
from cheapscale.training.state import create_state
from configs import fields

UNET = {"resolution": 8, "channels": 8, "channel_mult": (1, 2), "attention": (), "num_blocks": 1,
        "groups": 4, "num_classes": 3}  # fmt: skip
SMALL = {"channel_mult": (1,)}  # one level, which compiles fastest; too few places for upsamplers
EDM = {"process": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "sigma_data": 0.5,
       "P_mean": -1.2, "P_std": 1.2}  # fmt: skip
VP = EDM | {"process": "linear", "prediction": "eps", "sigma_min": 0.02, "sigma_max": 150.0}


@functools.cache
def weights(seed=0, **fields):
    """Random weights without zeros, made without compiling an initialisation."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init_params, UNET | fields), jax.random.key(0))
    return jax.tree.map(lambda s: rng.normal(0.02, 0.25, s.shape).astype(np.float32), shapes)


def teacher(params=None, diffusion=EDM, label_dropout=0.1, std=1.0, **fields):
    """The toy teacher; its data have deviation `std`, so that K = t0.7 is sigma 3.32 std."""
    meta = {
        "stage": "pretrain",
        "networks": {"net": UNET | fields},
        "diffusion": diffusion,
        "data": {"std": std},
        "ledger": {"flops": 5.0, "device_seconds": 1.0},
        "config": {"pretrain": {"label_dropout": label_dropout}},
    }
    return make_teacher(weights(**fields) if params is None else params, meta, workdir="nowhere")


def save(workdir, network, params, meta):
    """Write a checkpoint of one network."""
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(0, create_state({network: params}, {}, {}, [network]), meta)
        checkpoints.wait()
    return str(workdir)


# A teacher without weights, for tests that pass their own denoiser.
GREY = teacher({}, in_channels=1, out_channels=1, num_classes=0)


def settings(design="neck", model=None, **changes):
    """config.cascade after `tune.resolve_settings`."""
    sizes = changes.pop("sizes", ())
    chosen = fields.defaults("cascade").cascade.to_dict()
    chosen |= {"tune": design, "width": 4, "lora_rank": 2} | changes
    return tune.resolve_settings(chosen | {"sizes": sizes}, model or teacher(), max(sizes or (16,)))


def tuned_run(design="neck", seed=None, model=None, **changes):
    """A tuned run that was never saved: fresh weights, or noise of a seed."""
    model = model or teacher()
    chosen = settings(design, model, **changes)
    fields = tune.network_fields(chosen, model)
    meta = {"networks": {tune.NETS[design]: fields}, "cascade": chosen}
    params = tune.init_tuned(meta, model, jax.random.key(1))
    if seed is not None:
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), params)
    return Tuned(params, Origin(meta))


def places(run):
    return upsampler.from_fields(run.origin.meta["networks"]["upsampler"]).places
