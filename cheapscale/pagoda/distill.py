"""Stage 2: the one-step generator at the base resolution (PaGoDA, Kim et al. 2024, arXiv
2405.14822, section 3.2).

    G <- copy of the teacher's EMA, called once at sigma_max, raw output
    each iteration (`gan.gan_step`):
        D:  real images against G(z', y), z' ~ N(0, sigma_max^2) fresh
        G:  L_rec + lambda L_adv,  lambda = 0.2 |grad L_rec| / |grad L_adv| at the last layer
    ema <- 0.999 ema + 0.001 G

Stage `regress` comes before it in small runs: the same with the pixel term of L_rec alone, whose
update costs a fifth or less. G starts from its weights if `start` names them, or from those of
another distillation, as an unguided one to which guidance is added.

With `samples`, the guided samples of the teacher, G also takes the guidance scale omega, and L_dstl
is added to L_rec (guided.py). With `distill.pairs` "teacher" and a store of unguided samples
(`invert.direction` "sample"), L_rec becomes the baseline L_dstl (Eq. 1), which regresses the
teacher's images instead of the data.
"""

from typing import Any

import jax

from cheapscale.data.sources import open_data
from cheapscale.models.growth import last_layer, trainable
from cheapscale.models.unet import unet
from cheapscale.pagoda.guided import initial_estimator, with_omega
from cheapscale.pagoda.stage import generator_stage
from cheapscale.teacher.data import check_teacher
from cheapscale.teacher.load import load_network_teacher
from cheapscale.training.checkpoint import load_network, read_meta
from cheapscale.training.stage import Stage

PyTree = Any


def build(config) -> Stage:
    """Stage 2, or `regress`, from its config. Raises ValueError where teacher, start, data and
    latents do not fit."""
    source = open_data(config.data)
    teacher = load_network_teacher(config.teacher, "the generator starts as a copy of one network")
    model = teacher.fields | {"dropout": 0.0, "extra_conditions": int(bool(config.samples))}
    check_teacher(teacher, source)

    upstream, start = teacher.meta, config.get("start", "")
    if start:
        upstream = read_meta(start)[1]
        known = upstream["stage"] in ("regress", "distill")
        if upstream.get("teacher") != teacher.fingerprint or not known:
            raise ValueError(
                f"start is {start}, which is no generator of the teacher in {config.teacher}: give "
                "--config.start=DIR, the work directory of its stage regress or distill"
            )

    def initial(params: PyTree) -> PyTree:
        first = load_network(start, "generator").params if start else teacher.params
        if config.samples:
            first = with_omega(params["generator"], first)
            phi = initial_estimator(params["estimator"], start, teacher.params)
            params = params | {"estimator": phi}
        if jax.tree.structure(first) != jax.tree.structure(params["generator"]):
            raise ValueError(
                f"the weights in {start or config.teacher} do not fit the teacher's U-Net: use the "
                "version of cheapscale that trained it"
            )
        return params | {"generator": first}

    return generator_stage(
        config,
        source,
        model=model,
        upstream=upstream,
        warm_start=initial,
        trainable=trainable(unet(**model).config),
        adaptive_layer=last_layer(unet(**model).config),
        teacher=teacher.fingerprint,
    )
