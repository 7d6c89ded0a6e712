"""A published network as a teacher: a file of weights becomes a pretraining run's work directory.

    python -m launch.import_teacher --config=configs/imagenet.py:stage=pretrain,data_dir=DIR \\
        --config.model.noise_feature=edm --weights=edm-imagenet-64x64.npz --format=edm \\
        --workdir=runs/teacher

The config says what the network is (widths, classes, process) and which images it knows; a tensor
that is missing, left over or of another shape is refused by name. `--format`: edm, the state dict
of an EDM network (DhariwalUNet, SongUNet; .npz, .safetensors or .pt), or guided_diffusion (ADM,
consistency models, PaGoDA; `--qkv_layout=head_three_dim` for the original release). The weights are
both the network's and its average, at step 0: `launch.train` with the same config and work
directory trains it further. What its training has cost is not known, so the bill begins at 0.
"""

import jax
from absl import flags
from ml_collections import config_flags

from cheapscale.interop.pytorch import QKV_LAYOUTS
from cheapscale.interop.unet_weights import from_edm, from_guided_diffusion
from cheapscale.models.features.weights import read_weights
from cheapscale.models.unet import unet
from cheapscale.stages.networks import fingerprint
from cheapscale.stages.run import build
from cheapscale.training import checkpoint, loop
from cheapscale.training.sharding import make_mesh
from launch.command import execute, start

FORMATS = {"edm": from_edm, "guided_diffusion": from_guided_diffusion}


def import_teacher(
    config, workdir: str, weights: str, form: str, qkv_layout: str = "", sha256: str | None = None
) -> dict:
    """Write the checkpoint; returns the command's summary. ValueError where the file does not fit
    the config, or the work directory holds a run already."""
    if config.stage != "pretrain":
        raise ValueError(f"config.stage is {config.stage!r}: a teacher is one of stage=pretrain")
    stage, file = build(config), read_weights(weights, sha256)
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


def main(argv) -> None:
    del argv
    given = flags.FLAGS
    execute(
        "import_teacher",
        given.workdir,
        lambda: import_teacher(
            given.config, given.workdir, given.weights, given.format, given.qkv_layout, given.sha256
        ),
    )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file and its argument string.")
    flags.DEFINE_string("workdir", None, "Where the teacher goes.")
    flags.DEFINE_string("weights", None, "File of the state dict.")
    flags.DEFINE_enum("format", "edm", list(FORMATS), "Whose names the tensors have.")
    flags.DEFINE_enum(
        "qkv_layout", "", ["", *QKV_LAYOUTS], "Order of a joint projection; default: the format's."
    )
    flags.DEFINE_string("sha256", None, "Refuse a file with another hash.")
    flags.mark_flags_as_required(["config", "workdir", "weights"])
    start(main)
