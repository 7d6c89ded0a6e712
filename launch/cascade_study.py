"""The self-cascade study: one command, cell by cell, into one record.

    python -m launch.cascade_study --config=configs/cascade_study.py --workdir=runs/cascade \\
        --record=notebooks/results/cascade.json
    python -m launch.cascade_study ... --only=E1,E2,E3 --minutes=60

Every cell is kept as soon as it is measured: the same command goes on where it stopped, also from
the record alone (teachers and tuned weights are trained again where the work directory is new).
`--minutes` starts no cell after that time. What the cells say of the paper's claims is worked out
anew each time and stands first in the record.
"""

import json
import pathlib
import re
import time

from absl import app, flags, logging
from ml_collections import config_flags

from cheapscale.data.files import whole_or_nothing
from cheapscale.training.checkpoint import claim_workdir
from cheapscale.training.loop import provenance
from launch.cascade_experiment import Study, cells, timed
from launch.cascade_findings import findings, table
from launch.command import execute, write_record


def study(config, workdir: str, record: str, only: list[str], minutes: float) -> dict:
    """Run what is missing and write the record; returns the summary."""
    began, folder = time.monotonic(), pathlib.Path(workdir) / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(config.to_dict()))
    claim_workdir(workdir, plain, ())  # cells of another config would be taken for these
    known = from_record(record, plain)
    planned = list(cells(Study(config, workdir)))
    unknown = set(only) - {cell.section for cell in planned}
    if unknown:
        sections = sorted({cell.section for cell in planned}, key=lambda s: int(s[1:]))
        raise ValueError(f"--only names {', '.join(unknown)}: choose among {', '.join(sections)}")
    names = [f"{cell.section} {cell.name}" for cell in planned]
    for cell, name in zip(planned, names):
        path = folder / (re.sub(r"[^\w.]+", "_", name) + ".json")
        if path.is_file():
            known[name] = json.loads(path.read_text())
            continue
        late = minutes and time.monotonic() - began > 60 * minutes
        if name in known or late or (only and cell.section not in only):
            continue
        logging.info("%s", name)
        known[name] = timed(cell) | {"provenance": provenance()}
        with whole_or_nothing(path) as temporary:
            temporary.write_text(json.dumps(known[name]) + "\n")
        keep(record, plain, {name: known[name] for name in names if name in known})
    done = {name: known[name] for name in names if name in known}
    keep(record, plain, done)
    print(table(done), flush=True)
    return {"cells": len(done), "of": len(names), "findings": findings(plain, done)}


def keep(record: str, config: dict, done: dict) -> None:
    write_record(record, {"findings": findings(config, done), "config": config, "cells": done})


def from_record(record: str, config: dict) -> dict:
    """The cells of a record that is there already; ValueError where it is of another config."""
    if not record or not pathlib.Path(record).is_file():
        return {}
    held = json.loads(pathlib.Path(record).read_text())
    if held["config"] != config:
        keys = [k for k in config if held["config"].get(k) != config[k]]
        raise ValueError(
            f"{record} was measured under another config ({', '.join(keys)}): name another file"
        )
    return dict(held["cells"])


def main(argv) -> None:
    del argv
    options = flags.FLAGS
    execute(
        "cascade_study",
        options.workdir,
        lambda: study(
            options.config, options.workdir, options.record, options.only, options.minutes
        ),
    )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file and its argument string.")
    flags.DEFINE_string("workdir", None, "Where teachers, tuned weights and cells go.")
    flags.DEFINE_string("record", "", "Also keep all cells and what they say in this file.")
    flags.DEFINE_list("only", [], "Sections to run, such as E1,E3; default: all.")
    flags.DEFINE_float("minutes", 0, "Start no cell after so many minutes; 0: no limit.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
