"""The step-adaptive study: one command, cell by cell, into one record.

    python -m launch.pruning_study --config=configs/pruning_study.py --workdir=runs/pruning \\
        --record=notebooks/results/pruning.json
    python -m launch.pruning_study ... --only="E3 seed 0",E8 --minutes=60

The same command goes on where it stopped. Two processes with different `--only`, each on a core of
its own, may share a work directory as long as neither needs what the other is just making, such as
a teacher (then one last run with a record collects the cells).
"""

from absl import flags

from launch import cells, pruning_experiment, pruning_findings
from launch.command import start


def main(argv) -> None:
    del argv
    cells.main("pruning_study", pruning_experiment, pruning_findings)


if __name__ == "__main__":
    cells.define_flags()
    flags.adopt_module_key_flags(cells)
    start(main)
