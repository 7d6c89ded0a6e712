"""Executes every notebook's code cells in one namespace: what continuous integration runs.

CHEAPSCALE_FAST=1 python -m pytest notebooks/run_notebooks.py
"""

import json
import os
import pathlib

import pytest

HERE = pathlib.Path(__file__).resolve().parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
assert NOTEBOOKS, f"no notebooks in {HERE}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="notebooks need the notebook extra")
    matplotlib.use("Agg")
    monkeypatch.setenv("CHEAPSCALE_FAST", os.environ.get("CHEAPSCALE_FAST", "1"))
    monkeypatch.setenv("CHEAPSCALE_RUNS", str(tmp_path))
    monkeypatch.chdir(HERE.parent)
    namespace: dict = {"__name__": "__main__"}
    cells = json.loads(path.read_text())["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"{path.name}, cell {number}: commit without outputs"
            source = "".join(cell["source"])
            exec(compile(source, f"{path.name}[{number}]", "exec"), namespace)
