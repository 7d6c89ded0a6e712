"""Imports a published network as a teacher: a weight file becomes a pretraining work directory."""

from typing import Any

import jax

from cheapscale.features.weights import Weights, check_finite, read_weights
from cheapscale.interop.sets import choose
from cheapscale.interop.unet_weights import has_learned_variance, qkv_layout_of, to_params
from cheapscale.models.plan import UNetConfig
from cheapscale.models.unet import unet
from cheapscale.teacher import pretrain
from cheapscale.teacher.teacher import fingerprint
from cheapscale.training import checkpoint, loop
from cheapscale.training.mesh import make_mesh

PyTree = Any


def import_teacher(
    config, workdir: str, weights: str, form: str, qkv_layout: str = "", sha256: str | None = None
) -> dict:
    """Write the checkpoint and return the command's summary: what was read, and what was taken.

    Raises ValueError if the file does not fit the config, if it does not say something that is
    needed and not given, or if the work directory holds a run.
    """
    if config.stage != "pretrain":
        raise ValueError(f"config.stage is {config.stage!r}: give --arg=stage=pretrain")
    if config.text.encoder:
        raise ValueError(
            f"text.encoder is {config.text.encoder!r}, but these weights know no captions: leave "
            "it out"
        )
    if form == "edm":
        _set_noise_feature(config)
    stage, file = pretrain.build(config), read_weights(weights, sha256, every=True)
    net = unet(**stage.meta["networks"]["net"]).config
    params, average, origin = read_network(file, net, form, qkv_layout)
    diffusion = config.diffusion
    if origin["learned_variance"] != "none" and (
        diffusion.process == "edm" or diffusion.prediction != "eps"
    ):
        raise ValueError(
            f"{file.path} is of a network with learned variances, which predicts noise of a "
            "variance-preserving process: give --config.diffusion.process=linear (or cosine), "
            "--config.diffusion.prediction=eps and --config.diffusion.sigma_min=0.02"
        )
    mesh = make_mesh(**config.mesh.to_dict())
    with checkpoint.Checkpoints(workdir) as checkpoints, jax.set_mesh(mesh):
        if checkpoints.latest_step() is not None:
            raise ValueError(f"{workdir} holds a run already: use a new work directory")
        checkpoint.claim_workdir(workdir, config.to_dict(), begun=False)
        with_weights = stage._replace(warm_start=lambda fresh: {"net": params})
        state = loop.fresh_state(with_weights, mesh, config.seed)
        places = jax.tree.map(lambda leaf: leaf.sharding, state.ema_params["net"])
        state = state.replace(ema_params={"net": jax.device_put(average, places)})
        meta = stage.meta | {"config": config.to_dict(), "provenance": loop.provenance()}
        meta |= {"ledger": {"flops": 0.0, "device_seconds": 0.0}, "imported": origin}
        checkpoints.save(0, state, meta)
    return {"workdir": str(workdir), "teacher": fingerprint(average)} | origin


def _set_noise_feature(config) -> None:
    """EDM's networks get ln(sigma) / 4, which the family's default may not be."""
    given = config.model.get("noise_feature") or "edm"
    if given != "edm":
        raise ValueError(f"EDM's networks need --config.model.noise_feature=edm, not {given!r}")
    with config.unlocked():
        config.model.noise_feature = given


def read_network(
    file: Weights, net: UNetConfig, form: str, qkv_layout: str = ""
) -> tuple[PyTree, PyTree, dict]:
    """(raw parameters, averaged parameters, what was taken of the file) of a U-Net."""
    chosen = choose(file, form)
    layout = qkv_layout_of(form, net, qkv_layout)
    found = []
    for arrays in (chosen.raw, chosen.average):
        check_finite(arrays, file.path)
        found.append(to_params(arrays, net, form, qkv_layout=layout))
    variance = has_learned_variance(chosen.raw, form, net)
    return *found, {
        "path": file.path,
        "sha256": file.sha256,
        "format": form,
        "qkv_layout": layout,
        "noise_feature": net.noise_feature,
        "weights": chosen.names,
        "left_out": chosen.left_out,
        "learned_variance": "left out" if variance else "none",
    }
