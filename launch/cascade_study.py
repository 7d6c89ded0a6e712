"""The self-cascade study: one command, cell by cell, into one record.

    python -m launch.cascade_study --config=configs/cascade_study.py --workdir=runs/cascade \\
        --record=notebooks/results/cascade.json
    python -m launch.cascade_study ... --only=E1,"E6 edm seed 1" --minutes=60

The same command goes on where it stopped. Two processes with different `--only`, each on a core of
its own, may share a work directory as long as neither needs what the other is just making, such as
a teacher (then one last run with a record collects the cells).
"""

from absl import flags

from launch import cascade_experiment, cascade_findings, cells
from launch.command import start


def main(argv) -> None:
    del argv
    cells.main("cascade_study", cascade_experiment, cascade_findings)


if __name__ == "__main__":
    cells.define_flags()
    flags.adopt_module_key_flags(cells)
    start(main)
