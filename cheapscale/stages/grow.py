"""Stage 3: progressive growing, x2 at a time or x4 and x8 in one jump (spec section 4).

G_R <- G_{R/2}'s EMA by name and shape, plus per doubling: up-block, block, block
       (second convolutions zero: at step 0 the new part only enlarges the old features)
frozen: encoder, middle, time and label maps, and the decoder up to the first block of the level
        below the base's top one
each iteration: as in stage 2, at resolution R with a fresh discriminator, lambda = 1, and
        L_rec = d(G_R(z, y), x_hi) with the latent z of the base-resolution image

The teacher is not needed any more; the latents must be those of the teacher that `base` came from.
"""

from typing import Any

from cheapscale.models import generator
from cheapscale.models.unet import unet
from cheapscale.stages import data
from cheapscale.stages.one_step import generator_stage
from cheapscale.training.checkpoint import load_network, read_meta
from cheapscale.training.stage import Stage

PyTree = Any


def build(config) -> Stage:
    """Stage 3 from its config. Raises ValueError where base, data and resolution do not fit."""
    source = data.open_data(config.data)
    if not config.base:
        raise ValueError("config.base is empty: name the work directory of the smaller generator")
    base = read_meta(config.base)[1]
    if "generator" not in base["networks"]:
        raise ValueError(
            f"config.base {config.base!r} holds {list(base['networks'])}, not a generator: "
            "point it at the work directory of a distill or grow run"
        )
    loss = config.grow.to_dict()
    model = dict(base["networks"]["generator"])
    model["growth"] = (*model["growth"], *loss["widths"])
    reached = model["resolution"] * 2 ** len(model["growth"])
    if reached != source.resolution:
        raise ValueError(
            f"growing {config.base} by {len(loss['widths'])} doublings reaches {reached} px, but "
            f"data.resolution is {source.resolution}: give grow.widths one width for each doubling"
        )
    if loss["pairs"] != "inverted":
        raise ValueError("grow.pairs must be 'inverted': a teacher has no high-resolution samples")
    plan = unet(**model).config

    def grow(params: PyTree) -> PyTree:
        old = load_network(config.base, "generator").params
        grown, _ = generator.grow_params(params["generator"], old, plan)
        return params | {"generator": grown}

    return generator_stage(
        config,
        source,
        name="grow",
        model=model,
        upstream=base,
        loss=loss,
        warm_start=grow,
        trainable=generator.trainable(plan),
        adaptive_layer=generator.last_layer(plan) if loss["adaptive"] else None,
        teacher=base["teacher"],
    )
