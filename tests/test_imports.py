"""The layers of the package: which folder may import which, and where ConfigDicts are allowed."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A file may import its own folder and the folders of lower layers, but no other of its layer.
LAYERS = (
    {"data", "diffusion", "models"},
    {"training"},
    {"features"},
    {"teacher"},
    {"pagoda", "cascade", "experts", "evaluation", "interop"},
    {"model"},
    {"launch"},
)
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
FILES = sorted((ROOT / "cheapscale").rglob("*.py")) + sorted((ROOT / "launch").rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder(name):
    names = name.split(".")
    if names[0] == "cheapscale" and len(names) > 1:
        return names[1]
    return "launch" if names[0] == "launch" else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = folder(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imported(path):
        there = folder(name)
        if there in (None, here) or here == "__init__":
            continue
        assert LAYER[there] < LAYER[here], f"{here} may not import {there}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_configs_are_read_by_commands_alone(path):
    if folder(".".join(path.relative_to(ROOT).with_suffix("").parts)) != "launch":
        assert not any(name.split(".")[0] == "ml_collections" for name in imported(path))


def test_configs_import_nothing_but_ml_collections():
    allowed = {"ml_collections", "configs"} | sys.stdlib_module_names
    for path in (ROOT / "configs").glob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] in allowed, f"{path.name}: {name}"


def test_no_module_is_a_collection_of_helpers():
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
