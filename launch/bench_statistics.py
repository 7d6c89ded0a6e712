"""The statistics of large sets: seconds and peak memory of each, for launch/bench.py.

Every one runs on random features in a process of its own, started as

    python -m launch.bench_statistics KIND ROWS DIMENSION

which imports NumPy alone, treats freed memory as launch/evaluate.py does, and prints one JSON line.
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
from launch.memory import keep_memory

KINDS = ("moments", "frechet", "prdc")
GIB = 2**30


def measure(rows: int, dimension: int) -> dict:
    """{kind: seconds and memory} of sets of `rows` features.

    "moments" is of one set, "frechet" between the moments of two, whatever their rows, "prdc"
    between two sets. Peaks are of the whole process, with the features that it was given.
    """
    root = pathlib.Path(__file__).resolve().parent.parent
    found: dict = {"rows": rows, "dimension": dimension}
    for kind in KINDS:
        command = [sys.executable, "-m", "launch.bench_statistics", kind, str(rows), str(dimension)]
        child = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if child.returncode:
            raise OSError(
                f"{kind} of {rows} features ended with {child.returncode}: {child.stderr}"
            )
        found[kind] = json.loads(child.stdout)
    return found


def table(figures: dict) -> str:
    """The figures as text."""
    lines = [f"{figures['rows']} features of dimension {figures['dimension']}"]
    for kind in KINDS:
        row = figures[kind]
        lines.append(f"{kind:>12} {row['wall_seconds']:9.1f} s, peak {row['peak_gib']:.2f} GiB")
    return "\n".join(lines)


def run(kind: str, rows: int, dimension: int) -> dict:
    """One statistic in this process."""
    call = prepare(kind, rows, dimension)
    before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    call()
    return {
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "before_gib": round(before / GIB, 3),
        "peak_gib": round(memory("VmHWM") / GIB, 3),
    }


def prepare(kind: str, rows: int, dimension: int):
    """The call to measure, its input made."""
    rng = np.random.default_rng(0)

    def draw(number):
        return rng.standard_normal((number, dimension), np.float32)

    if kind == "moments":
        one = draw(rows)
        return lambda: moments(one)
    if kind == "frechet":  # between covariances of full rank
        a, b = (moments(draw(2 * dimension)) for _ in range(2))
        return lambda: frechet(a, b)
    real, fake = draw(rows), draw(rows)
    return lambda: prdc(real, fake)


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most so far.

    Not getrusage's ru_maxrss, which begins with the peak of the process that started this one.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    keep_memory()
    print(json.dumps(run(sys.argv[1], *map(int, sys.argv[2:]))))
