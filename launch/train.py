"""Run one stage: whatever `config.stage` names, training or mapping.

    python -m launch.train --config=configs/scenes.py:stage=pretrain --workdir=runs/teacher
    python -m launch.train --config=configs/scenes.py:stage=invert --workdir=runs/invert \\
        --config.teacher=runs/teacher --config.latents=runs/latents

Running the same command again resumes. SIGTERM saves and leaves with "pre-empted at step N".
The last line of stdout is one JSON object, also written to the work directory.
"""

from absl import flags
from ml_collections import config_flags

from cheapscale.stages.run import build, run
from launch import plan
from launch.command import execute, start

config_flags.DEFINE_config_file("config", None, "Config file and its argument string.")
flags.DEFINE_string("workdir", None, "Where checkpoints, logs and previews go.")
flags.DEFINE_bool("dry_run", False, "Print the plan (parameters, FLOPs, memory, disk) and stop.")
flags.DEFINE_bool("distributed", False, "Call jax.distributed.initialize() first (pods, Slurm).")
FLAGS = flags.FLAGS


def main(argv) -> None:
    del argv
    config, workdir = FLAGS.config, FLAGS.workdir
    if FLAGS.dry_run:
        config.data.cache_latents = False  # a plan reads one batch of the store, not all of it
        execute("plan", workdir, lambda: plan.describe(config, build(config), workdir), keep=False)
    else:
        execute(config.stage, workdir, lambda: run(config, workdir))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    start(main)
