"""A study as cells: small experiments with names, each kept as soon as it is measured.

The same command goes on where it stopped, also from its record alone (what the cells share, such
as teachers, is then made again where the work directory is new). What the cells say of the claims
is worked out anew each time and stands first in the record.
"""

import json
import pathlib
import re
import time
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import NamedTuple

from absl import flags, logging
from ml_collections import config_flags

from cheapscale.data.files import whole_or_nothing
from cheapscale.training.checkpoint import claim_workdir, differing_keys
from cheapscale.training.loop import Diverged, provenance
from launch.command import execute, write_record

PLACES = ("data_dir",)  # a study may go on, or be continued, with the data elsewhere
MORE = ("arms", "choices")  # or with further ones of these


class Cell(NamedTuple):
    """section: the experiment's number in the specification. run() -> {name: figures}."""

    section: str
    name: str
    run: Callable[[], dict]


def run_cells(
    config,
    workdir: str,
    experiment: ModuleType,
    conclusions: ModuleType,
    *,
    record: str = "",
    only: Iterable[str] = (),
    minutes: float = 0.0,
) -> dict:
    """Run what is missing and write the record; returns the summary, with the findings where there
    is no record to read them in. A ValueError of cells, or divergence, is kept until all others
    have run.

    experiment: has Study(config, workdir), made once the work directory is claimed, and
    cells(study), all of them in the order in which they are worth having.
    conclusions: has findings(config, {cell: {"figures": ...}}), and table(the same) as text.
    only: how the names of the cells to run begin; minutes: start no cell after so many.
    """
    began, folder = time.monotonic(), pathlib.Path(workdir) / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(config.to_dict()))
    shown = {name: value for name, value in plain.items() if name not in PLACES}
    # cells of another config would be taken for these
    begun = any(folder.iterdir()) or len([p for p in folder.parent.iterdir() if p.is_dir()]) > 1
    claim_workdir(workdir, without_further(plain, read_config(workdir)), PLACES, begun=begun)
    known = from_record(record, plain)
    cells = experiment.cells(experiment.Study(config, workdir))
    planned = {f"{cell.section} {cell.name}": cell for cell in cells}
    check_chosen(only, planned)

    def keep() -> dict:
        done = {name: known[name] for name in planned if name in known}
        found = conclusions.findings(plain, done)
        write_record(record, {"findings": found, "config": shown, "cells": done})
        return done

    refused = []
    for name, cell in planned.items():
        path = folder / (re.sub(r"[^\w.]+", "_", name) + ".json")
        if path.is_file():
            known[name] = json.loads(path.read_text())
            continue
        late = minutes and time.monotonic() - began > 60 * minutes
        if name in known or late or (only and not any(begins(name, start) for start in only)):
            continue
        logging.info("%s", name)
        started = time.monotonic()
        try:
            figures = cell.run()
        except (ValueError, Diverged) as error:  # the other cells may still be measured
            logging.error("%s: %s", name, error)
            refused.append(f"{name} ({error})")
            continue
        known[name] = {"section": cell.section, "figures": figures}
        known[name] |= {"seconds": time.monotonic() - started, "provenance": provenance()}
        with whole_or_nothing(path) as temporary:
            temporary.write_text(json.dumps(known[name]) + "\n")
        keep()
    done = keep()
    print(conclusions.table(done), flush=True)
    if refused:
        raise ValueError(f"{len(refused)} cells could not be measured: {'; '.join(refused)}")
    found = {} if record else {"findings": conclusions.findings(plain, done)}
    return {"cells": len(done), "of": len(planned), "record": record} | found


def check_chosen(only: Iterable[str], planned: Iterable[str]) -> None:
    """Refuse the beginning of no cell's name."""
    for start in only:
        if not any(begins(name, start) for name in planned):
            sections = sorted({name.split()[0] for name in planned}, key=lambda s: int(s[1:]))
            raise ValueError(
                f"--only names {start}, with which no cell begins: choose among "
                f"{', '.join(sections)}, or whole words of a cell's name after these"
            )


def begins(name: str, start: str) -> bool:
    """Whether a cell's name starts with these whole words: not E10 with E1."""
    return re.match(rf"{re.escape(start)}(?!\w)", name) is not None


def from_record(record: str, config: dict) -> dict:
    """The cells of a record that is there already; ValueError where it is of another config."""
    if not record or not pathlib.Path(record).is_file():
        return {}
    held = json.loads(pathlib.Path(record).read_text())
    rows = differing_keys(held["config"], without_further(config, held["config"]), PLACES)
    if rows:
        raise ValueError(
            f"{record} was measured under another config ({'; '.join(rows)}): name another file"
        )
    return dict(held["cells"])


def read_config(workdir: str) -> dict:
    """The config that a work directory was claimed with, {} of a fresh one."""
    path = pathlib.Path(workdir) / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def without_further(config: dict, old: dict) -> dict:
    """The config without what it only has more of: further arms make further cells."""
    kept = {
        field: {name: row for name, row in config[field].items() if name in old[field]}
        for field in MORE
        if field in config and field in old
    }
    return config | kept


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Config file and its argument string.")
    flags.DEFINE_string("workdir", None, "Where networks and cells go.")
    flags.DEFINE_string("record", "", "Also keep all cells and what they say in this file.")
    flags.DEFINE_list("only", [], "Cells whose names begin so, as E1,'E6 edm seed 1'; all if none.")
    flags.DEFINE_float("minutes", 0, "Start no cell after so many minutes; 0: no limit.")
    flags.mark_flags_as_required(["config", "workdir"])


def main(name: str, experiment: ModuleType, conclusions: ModuleType) -> None:
    """`run_cells` as the flags say."""
    given = flags.FLAGS
    execute(
        name,
        given.workdir,
        lambda: run_cells(
            given.config,
            given.workdir,
            experiment,
            conclusions,
            record=given.record,
            only=given.only,
            minutes=given.minutes,
        ),
    )
