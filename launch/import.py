"""Import a published network as a teacher: write its weights as a pretraining run's checkpoint.

    python -m launch.import --config=configs/imagenet.py:stage=pretrain,data_dir=DIR \\
        --weights=edm-imagenet-64x64.npz --format=edm --workdir=runs/teacher

The config describes the network (widths, classes, process) and its data set; a tensor that is
missing, unused or of another shape raises an error with its name.

`--format`: edm, the names of EDM's networks (DhariwalUNet, SongUNet), which also sets
model.noise_feature, or guided_diffusion (ADM, consistency models, PaGoDA). guided-diffusion's names
do not tell the order of q, k and v: `--qkv_layout=head_three_dim` for OpenAI's own release,
three_head_dim for consistency models and PaGoDA. A learned variance is left out, and the summary
says so.

A file with raw and averaged weights gives both: the network's and its EMA's. A file with one set
gives both from that one; `--weights=FILE#KEY` names one set of several, and `--weights=RAW+EMA` two
files, one of them with "ema" in its name. The file may be .npz, .safetensors or PyTorch's, whose
pickle is never executed. `launch.train` with the same config (and, for the format edm,
`--config.model.noise_feature=edm`) and work directory continues the training. The cost of the
original training is unknown, so the recorded FLOPs begin at 0.
"""

from absl import flags

from cheapscale.interop.pytorch import QKV_LAYOUTS
from cheapscale.interop.sets import FORMATS
from cheapscale.interop.teachers import import_teacher
from launch.command import config_flag, execute, required, start


def define() -> None:
    """The command's flags."""
    config_flag()
    flags.DEFINE_string("workdir", None, "Work directory of the new teacher.")
    flags.DEFINE_string("weights", None, "File with the state dict, or FILE#KEY.")
    flags.DEFINE_enum("format", "edm", list(FORMATS), "Code that the tensor names come from.")
    flags.DEFINE_enum(
        "qkv_layout", "", ["", *QKV_LAYOUTS], "Order of channels in qkv; EDM's format tells it."
    )
    flags.DEFINE_string("sha256", None, "Hash that the file must have.")
    required("config", "configs/scenes.py:stage=pretrain")
    required("workdir", "runs/teacher")
    required("weights", "edm-imagenet-64x64.npz")


def main(argv: list[str] | None = None) -> dict:
    """Import the weights that the flags name; returns the summary."""

    def body(given) -> dict:
        return execute(
            "import_teacher",
            given.workdir,
            lambda: import_teacher(
                given.config, given.workdir, given.weights, given.format, given.qkv_layout,
                given.sha256,
            ),
        )  # fmt: skip

    return start(define, body, argv)


if __name__ == "__main__":
    main()
