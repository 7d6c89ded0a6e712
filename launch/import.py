"""Import a published network as a teacher: write its weights as a pretraining run's checkpoint.

    python -m launch.import --config=configs/imagenet.py:stage=pretrain,data_dir=DIR \\
        --config.model.noise_feature=edm --weights=edm-imagenet-64x64.npz --format=edm \\
        --workdir=runs/teacher

The config describes the network (widths, classes, process) and its data set; a tensor that is
missing, unused or of another shape raises an error with its name. `--format`: edm, the state dict
of an EDM network (DhariwalUNet, SongUNet; .npz, .safetensors or .pt), or guided_diffusion (ADM,
consistency models, PaGoDA; `--qkv_layout=head_three_dim` for the original release). The weights
become both the raw and the EMA weights at step 0, and `launch.train` with the same config and work
directory continues their training. The cost of the original training is unknown, so the recorded
FLOPs begin at 0.
"""

from absl import flags

from cheapscale.interop.pytorch import QKV_LAYOUTS
from cheapscale.interop.teachers import FORMATS, import_teacher
from launch.command import config_flag, execute, start


def run(given) -> None:
    execute(
        "import_teacher",
        given.workdir,
        lambda: import_teacher(
            given.config, given.workdir, given.weights, given.format, given.qkv_layout, given.sha256
        ),
    )


def define() -> None:
    config_flag()
    flags.DEFINE_string("workdir", None, "Work directory of the new teacher.")
    flags.DEFINE_string("weights", None, "File with the state dict.")
    flags.DEFINE_enum("format", "edm", list(FORMATS), "Code that the tensor names come from.")
    flags.DEFINE_enum(
        "qkv_layout", "", ["", *QKV_LAYOUTS], "Order of channels in qkv; default: the format's."
    )
    flags.DEFINE_string("sha256", None, "Hash that the file must have.")
    flags.mark_flags_as_required(["config", "workdir", "weights"])


if __name__ == "__main__":
    start(define, run)
