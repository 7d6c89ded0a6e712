"""Imports a published network as a teacher: a weight file becomes a pretraining work directory."""

import jax

from cheapscale.features.weights import read_weights
from cheapscale.interop.unet_weights import from_edm, from_guided_diffusion
from cheapscale.models.unet import unet
from cheapscale.teacher import pretrain
from cheapscale.teacher.teacher import fingerprint
from cheapscale.training import checkpoint, loop
from cheapscale.training.mesh import make_mesh

FORMATS = {"edm": from_edm, "guided_diffusion": from_guided_diffusion}


def import_teacher(
    config, workdir: str, weights: str, form: str, qkv_layout: str = "", sha256: str | None = None
) -> dict:
    """Write the checkpoint and return the command's summary.

    Raises ValueError if the file does not fit the config, or if the work directory holds a run.
    """
    if config.stage != "pretrain":
        raise ValueError(f"config.stage is {config.stage!r}: a teacher is one of stage=pretrain")
    stage, file = pretrain.build(config), read_weights(weights, sha256)
    net = unet(**stage.meta["networks"]["net"])
    layout = {"qkv_layout": qkv_layout} if qkv_layout else {}
    params = FORMATS[form](file.arrays, net.config, **layout)
    mesh = make_mesh(**config.mesh.to_dict())
    with checkpoint.Checkpoints(workdir) as checkpoints, jax.set_mesh(mesh):
        if checkpoints.latest_step() is not None:
            raise ValueError(f"{workdir} holds a run already: use a new work directory")
        checkpoint.claim_workdir(workdir, config.to_dict(), begun=False)
        with_weights = stage._replace(warm_start=lambda fresh: {"net": params})
        state = loop.fresh_state(with_weights, mesh, config.seed)
        origin = {"path": file.path, "sha256": file.sha256, "format": form}
        meta = stage.meta | {"config": config.to_dict(), "provenance": loop.provenance()}
        meta |= {"ledger": {"flops": 0.0, "device_seconds": 0.0}, "imported": origin}
        checkpoints.save(0, state, meta)
    return {"workdir": str(workdir), "teacher": fingerprint(params)} | origin
