"""The seconds and the peak memory of statistics of large sets, each measured in its own process.

python -m launch.bench.statistics moments|frechet|prdc ROWS DIMENSION
"""

import json
import pathlib
import re
import subprocess
import sys
import time

import numpy as np

from cheapscale.evaluation.coverage import prdc
from cheapscale.evaluation.fid import frechet, moments
from launch.command import keep_memory


def measure(rows: int, dimension: int = 2048) -> dict:
    """{"moments" of one set, "frechet" between moments, "prdc" between two sets: seconds, GiB}."""
    found: dict = {"rows": rows, "dimension": dimension}
    for kind in ("moments", "frechet", "prdc"):
        command = [sys.executable, "-m", "launch.bench.statistics", kind, str(rows), str(dimension)]
        child = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True)
        if child.returncode:
            raise OSError(f"{kind} of {rows} features failed: {child.stderr.decode()}")
        found[kind] = json.loads(child.stdout)
        print(f"{kind:>12} {found[kind]['seconds']:9.1f} s, {found[kind]['peak_gib']:.2f} GiB")
    return found


def run(kind: str, rows: int, dimension: int) -> dict:
    """Seconds of one statistic of random features, and the peak memory of this process."""
    rng = np.random.default_rng(0)

    def draw(number):
        return rng.standard_normal((number, dimension), np.float32)

    if kind == "frechet":  # the covariances have full rank for any `rows`
        inputs, statistic = [moments(draw(2 * dimension)) for _ in range(2)], frechet
    else:
        one = kind == "moments"
        inputs, statistic = [draw(rows) for _ in range(1 if one else 2)], moments if one else prdc
    began = time.perf_counter()
    statistic(*inputs)
    seconds = time.perf_counter() - began
    # ru_maxrss of getrusage would begin with the peak of the parent process
    peak = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
    return {"seconds": round(seconds, 3), "peak_gib": round(int(peak) / 2**20, 3)}


if __name__ == "__main__":
    keep_memory()  # as launch/evaluate.py does
    print(json.dumps(run(sys.argv[1], *map(int, sys.argv[2:]))))
