"""Stage 2: the one-step generator at the base resolution (spec section 3).

    G <- copy of the teacher, called once at sigma_max, raw output
    each iteration:
        D:  hinge on real images against G(z', y), z' ~ N(0, sigma_max^2) fresh
        G:  L_rec = d(G(z, y), x) on data-latent pairs  +  lambda L_adv on fresh noise
            lambda = 0.2 |grad L_rec| / |grad L_adv| at the last residual block's second convolution
        ema <- 0.999 ema + 0.001 G

With `distill.pairs` "teacher" and a store of teacher samples (`invert.direction` "sample"), the
first term becomes the L_dstl baseline of section 3.2(d).
"""

from typing import Any

import jax

from cheapscale.models.generator import last_layer
from cheapscale.models.unet import unet
from cheapscale.stages import data
from cheapscale.stages.networks import fingerprint, load_teacher
from cheapscale.stages.one_step import generator_stage
from cheapscale.training.stage import Stage

PyTree = Any


def build(config) -> Stage:
    """Stage 2 from its config. Raises ValueError where teacher, data and latents do not fit."""
    source = data.open_data(config.data)
    teacher = load_teacher(config.teacher)
    if "specialists" in teacher.meta["diffusion"]:
        raise ValueError(
            f"config.teacher {config.teacher!r} is a set of specialists, which may invert, but the "
            "generator starts as a copy of one network: name the work directory of its base"
        )
    model = teacher.meta["networks"]["net"] | {"dropout": 0.0}
    data.check_model(model, source)
    loss = config.distill.to_dict()

    def copy_teacher(params: PyTree) -> PyTree:
        if jax.tree.structure(teacher.params) != jax.tree.structure(params["generator"]):
            raise ValueError(f"the teacher in {config.teacher} has other weights than its model")
        return params | {"generator": teacher.params}

    return generator_stage(
        config,
        source,
        name="distill",
        model=model,
        upstream=teacher.meta,
        loss=loss,
        warm_start=copy_teacher,
        trainable=None,  # all of it
        adaptive_layer=last_layer(unet(**model).config) if loss["adaptive"] else None,
        teacher=fingerprint(teacher.params),
    )
