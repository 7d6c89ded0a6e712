"""The arrows of the house: who may import whom, and who may hold a ConfigDict."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Rank of each part: a file may import its own part and parts of a lower rank.
RANK = {"data": 0, "diffusion": 0, "models": 0}
RANK |= {"training": 1, "evaluation": 1, "pruning": 1, "interop": 1}
RANK |= {"stages": 2, "report": 3, "editing": 3, "launch": 4}
FILES = sorted((ROOT / "cheapscale").rglob("*.py")) + sorted((ROOT / "launch").glob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name):
    names = name.split(".")
    if names[0] == "cheapscale" and len(names) > 1:
        return names[1]
    return "launch" if names[0] == "launch" else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imported(path):
        there = part(name)
        if here in RANK and there in RANK and there != here:
            lower = RANK[there] < RANK[here]
            peers = RANK[there] == RANK[here] == 1
            assert lower or peers, f"{here} may not import {there}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_stages_and_launch_see_a_config(path):
    here = part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if here not in ("stages", "launch", "report"):
        assert not any(name.startswith("ml_collections") for name in imported(path))


def test_configs_import_nothing_but_ml_collections():
    for path in (ROOT / "configs").glob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] in ("ml_collections", "configs"), f"{path.name}: {name}"


def test_no_file_is_a_drawer():
    names = {p.stem for p in FILES}
    assert not names & {"utils", "util", "helpers", "helper", "misc"}


def test_tensorflow_and_pytorch_are_not_runtime_dependencies():
    code = (
        "import sys, importlib, pkgutil\n"
        "sys.modules['tensorflow'] = sys.modules['torch'] = None  # as where they are missing\n"
        "import cheapscale\n"
        "for m in pkgutil.walk_packages(cheapscale.__path__, 'cheapscale.'):\n"
        "    importlib.import_module(m.name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
