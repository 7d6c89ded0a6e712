"""Stage 3: progressive growing, x2 at a time or x4 and x8 in one jump (PaGoDA, Kim et al. 2024,
arXiv 2405.14822, section 3.3).

    G_R <- G_(R/2)'s EMA by name and shape, plus an up-block and two blocks for each doubling. Their
           second convolutions are zero: at step 0 the new part only enlarges the old features
    frozen: encoder, middle, embeddings, and the decoder up to and including the first block of the
           level below the base's top level (`models.growth`)
    each iteration (`gan.gan_step`): as in stage 2 at resolution R, with a fresh discriminator,
           lambda = 1, and L_rec = d(G_R(z, y), x_R) for the latent z of the base-resolution image

A guided generator grows likewise. Without samples at resolution R it has no L_dstl, and its
estimator of omega stays that of the base (guided.py).

Stage `regress` with a `base` comes before it in small runs: the same with the pixel term of L_rec
alone, whose update costs a fifth. The growth that names it as its `start` continues its weights.

No teacher is loaded; the latents must have been made by the teacher of the generator `base`.
"""

from typing import Any

from cheapscale.data.sources import open_data
from cheapscale.models import growth
from cheapscale.models.unet import unet
from cheapscale.pagoda.guided import initial_estimator
from cheapscale.pagoda.stage import generator_stage
from cheapscale.teacher.data import match_classes
from cheapscale.training.checkpoint import load_network, read_meta
from cheapscale.training.stage import Stage

PyTree = Any


def build(config) -> Stage:
    """Stage 3, or `regress` with a base, from its config. Raises ValueError where base, start, data
    and resolution do not fit."""
    source = open_data(config.data)
    if not config.base:
        raise ValueError("base is empty: give --config.base=DIR, the smaller generator's run")
    base = read_meta(config.base)[1]
    if "generator" not in base["networks"]:
        raise ValueError(
            f"config.base {config.base!r} holds {list(base['networks'])}, not a generator: "
            "give --config.base=DIR, a distill or grow run"
        )
    widths = config.grow.widths
    model = dict(base["networks"]["generator"])
    match_classes(base, model["num_classes"], source, config.base)
    model["growth"] = (*model["growth"], *widths)
    plan = unet(**model).config
    if plan.output_resolution != source.resolution:
        raise ValueError(
            f"growing {config.base} by {len(widths)} doublings reaches {plan.output_resolution} "
            f"px, but data.resolution is {source.resolution}: give --config.grow.widths "
            "one width for each doubling"
        )
    start, upstream = config.get("start", ""), base
    if start:
        upstream = read_meta(start)[1]
        grown = tuple(upstream["networks"].get("generator", {}).get("growth", ()))
        if upstream.get("teacher") != base["teacher"] or grown != model["growth"]:
            raise ValueError(
                f"start is {start}, which is no growth of {config.base} to {source.resolution} px: "
                "give --config.start=DIR, the work directory of its stage regress"
            )
    if config[config.stage].pairs != "inverted":
        raise ValueError(
            f"a teacher has no high-resolution samples: give --config.{config.stage}.pairs=inverted"
        )

    # The discriminator keeps its fresh weights: it sees another resolution.
    def grow(params: PyTree) -> PyTree:
        grown = load_network(start or config.base, "generator").params
        if not start:
            grown, _ = growth.grow_params(params["generator"], grown, plan)
        if "estimator" in params:
            phi = initial_estimator(params["estimator"], start or config.base, {})
            params = params | {"estimator": phi}
        return params | {"generator": grown}

    return generator_stage(
        config,
        source,
        model=model,
        upstream=upstream,
        warm_start=grow,
        trainable=growth.trainable(plan, config.grow.freeze),
        adaptive_layer=growth.last_layer(plan),
        teacher=base["teacher"],
    )
