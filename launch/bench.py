"""Ours against other people's on CPU, with a profile; and what the large statistics cost.

    OMP_WAIT_POLICY=passive python -m launch.bench --workdir=runs/bench \\
        --record=notebooks/results/bench_cpu.json
    OMP_WAIT_POLICY=passive python -m launch.bench --what=features --what=statistics \\
        --workdir=runs/bench --record=notebooks/results/bench_features.json

    unet        a training step and one-step sampling against diffusers.UNet2DModel
    features    Inception-v3 features of a set and its Frechet distance, against torch-fidelity
    statistics  moments, Frechet distance, precision and recall of sets of 50,000: seconds, memory
    pruned      a specialist's training step and network call against its base's

Both sides of a comparison are the same function with the same weights, and the record holds how far
their outputs are apart. They take turns, call by call, so that whatever else the machine does falls
on both; a ratio is their seconds over ours in the same round.

Seconds are wall clock. A second set counts CPU seconds of all threads; where these are no more than
the wall's on several cores, other work had the rest of the machine. Waiting OpenMP threads spin by
default, which makes PyTorch many times slower on such a machine: hence OMP_WAIT_POLICY. `--cores=1`
gives the steadier figures.
"""

import glob
import importlib
import json
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax
from absl import flags, logging

from cheapscale.training.loop import provenance
from configs.models import preset
from launch import bench_pruned, bench_statistics
from launch.command import execute, start, write_record
from launch.memory import keep_memory


class Size(NamedTuple):
    model: dict  # fields of our U-Net; `groups` such that every norm has as many, as theirs do
    batch: int


SIZES = {
    "cifar32": Size(
        dict(
            resolution=32, channels=64, channel_mult=(1, 2, 2), num_blocks=2, attention=(16,),
            groups=16,
        ),
        16,
    ),
    "tiny16": Size(preset("tiny16", groups=8), 32),
}  # fmt: skip
SHARES = (0.6, 0.8)  # of a specialist's FLOPs
SETTINGS = ("XLA_FLAGS", "OMP_WAIT_POLICY", "GLIBC_TUNABLES")  # environment that changes seconds


def alternate(calls: dict[str, Callable], rounds: int) -> dict:
    """Seconds {side: {"wall": [..], "cpu": [..]}} of `rounds` turns, after two to warm up."""
    seconds = {side: {"wall": [], "cpu": []} for side in calls}
    for turn in range(-2, rounds):  # in the second, memory still grows
        for side, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if turn >= 0:
                seconds[side]["wall"].append(time.perf_counter() - wall)
                seconds[side]["cpu"].append(time.process_time() - cpu)
    return seconds


def summary(seconds: dict) -> dict:
    """Medians by side, and the medians of their seconds over ours in the same round."""
    ours, out = seconds["ours"], {}
    for side, clocks in seconds.items():
        row = {f"{clock}_seconds": round(statistics.median(clocks[clock]), 5) for clock in clocks}
        for clock in clocks if side != "ours" else ():
            ratios = sorted(t / o for t, o in zip(clocks[clock], ours[clock]))
            row[f"{clock}_ratio"] = round(statistics.median(ratios), 3)
            row[f"{clock}_ratio_range"] = [round(ratios[0], 3), round(ratios[-1], 3)]
        out[side] = row
    return out


def profile(compiled, call: Callable, classes: tuple, calls: int = 3) -> dict:
    """Milliseconds of a compiled program by class of operation, of the quickest of a few traces.

    classes: (name, pattern) pairs; the first pattern found in "<shape> <path of the operation>"
    names the class. A fusion carries the path of its last operation.
    """
    instruction = r"%?([\w.\-]+) = (\S+) [^\n]*?(?:op_name=\"([^\"]*)\"[^\n]*)?\n"
    kinds = {}
    for name, shape, path in re.findall(instruction, compiled.as_text()):
        text = f"{shape} {path}"
        kinds[name] = next(kind for kind, pattern in classes if re.search(pattern, text))
    traces = []
    for _ in range(calls):
        total = Counter()
        for event in traced(call):
            if event.name in kinds:
                total[kinds[event.name]] += event.duration_ns / 1e6
        traces.append(total)
    quickest = min(traces, key=Counter.total)
    return {kind: round(quickest[kind], 2) for kind, _ in classes}


def traced(call: Callable) -> list:
    """The events of all threads during one call."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        trace = jax.profiler.ProfileData.from_file(path)
    return [event for plane in trace.planes for line in plane.lines for event in line.events]


def counterpart(name: str, needs: str):
    """The module of a comparison, PyTorch given one thread a core. Raises ValueError where it
    cannot be imported."""
    try:
        module = importlib.import_module(f"launch.{name}")
    except ImportError as error:
        raise ValueError(f"the comparison needs {needs} ({error}): pip install {needs}") from None
    module.torch.set_num_threads(len(os.sched_getaffinity(0)))
    return module


class Figures(NamedTuple):
    """What one part of the benchmark found: for the record, as text, for the closing line; and
    the versions of what it compared with."""

    record: dict
    text: str
    summary: dict
    versions: dict


def against_diffusers(sizes: dict[str, Size], rounds: int) -> Figures:
    """The U-Net, at every size."""
    pair, found = counterpart("bench_diffusers", "diffusers torch"), {}
    for name, size in sizes.items():
        facts, calls, flops, compiled = pair.prepare(size.model, size.batch)
        uses = {use: summary(alternate(calls[use], rounds)) for use in calls}
        found[name] = facts | {
            "uses": {use: row | {"flops": flops[use]} for use, row in uses.items()},
            "profile_ms": profile(compiled, calls["training"]["ours"], pair.CLASSES),
        }
    text = "\n".join(table(name, row) for name, row in found.items())
    record = {"differences": pair.DIFFERENCES, "sizes": found}
    return Figures(
        record, text, {"theirs_over_ours": {n: ratios(f) for n, f in found.items()}}, pair.VERSIONS
    )


def against_torch_fidelity(size: dict, rounds: int) -> Figures:
    """Inception's features and the Frechet distance; size: arguments of bench_features.prepare."""
    pair = counterpart("bench_features", "torch-fidelity torch torchvision")
    facts, calls, program = pair.prepare(**size)
    seconds = {use: alternate(calls[use], rounds) for use in calls}
    seconds["both"] = total(*seconds.values())
    uses = {use: summary(clocks) for use, clocks in seconds.items()}
    for row in uses["both"].values():
        row["images_per_second"] = round(size["num"] / row["wall_seconds"], 2)
    found = facts | {"uses": uses, "profile_ms": profile(*program, pair.CLASSES)}
    return Figures(
        {"features": found},
        table("features", found),
        {"features_theirs_over_ours": ratios(found)},
        pair.VERSIONS,
    )


def large_statistics(rows: int, dimension: int = 2048) -> Figures:
    """Moments, Frechet distance, precision and recall of sets of `rows` features."""
    found = bench_statistics.measure(rows, dimension)
    return Figures({"statistics": found}, bench_statistics.table(found), {"statistics": found}, {})


def pruned(size: Size, shares: tuple[float, ...], rounds: int) -> Figures:
    """Specialists of some shares of the base's FLOPs; "ours" is the base, so that a ratio is a
    specialist's seconds over the base's."""
    facts, calls = bench_pruned.prepare(size.model, size.batch, shares)
    uses = {use: summary(alternate(sides, rounds)) for use, sides in calls.items()}
    found = facts | {"uses": uses}
    rates = {
        use: {side: row["wall_ratio"] for side, row in rows.items() if side != "ours"}
        for use, rows in uses.items()
    }
    lines = [
        f"{side:>10} {use:<10} {seconds:.2f} of the base's seconds; FLOPs "
        f"{facts['compiled'][side][use]:.3f} compiled, {facts['analytic'][side]:.3f} analytic"
        for use, row in rates.items()
        for side, seconds in row.items()
    ]
    return Figures({"pruned": found}, "\n".join(lines), {"specialist_over_base": rates}, {})


def total(*parts: dict) -> dict:
    """Seconds by side and clock, added up over the parts round by round."""
    return {
        side: {
            clock: [sum(turn) for turn in zip(*(p[side][clock] for p in parts))] for clock in row
        }
        for side, row in parts[0].items()
    }


def ratios(figures: dict) -> dict:
    """Their seconds over ours by use, PyTorch in its default layout."""
    return {use: row["contiguous"]["wall_ratio"] for use, row in figures["uses"].items()}


def table(name: str, figures: dict) -> str:
    """One comparison as text."""
    lines = []
    for use, sides in figures["uses"].items():
        lines.append(f"{name:>10} {use:<10} ours {1e3 * sides['ours']['wall_seconds']:9.1f} ms")
        for side, row in sides.items():
            if "wall_ratio" in row:
                lines.append(
                    f"{side:>33} {1e3 * row['wall_seconds']:9.1f} ms  "
                    f"theirs / ours: {row['wall_ratio']:.2f} (CPU seconds: {row['cpu_ratio']:.2f})"
                )
    whole = sum(figures["profile_ms"].values())
    lines += [
        f"{kind:>40} {value:9.1f} ms {100 * value / whole:5.1f} %"
        for kind, value in figures["profile_ms"].items()
    ]
    return "\n".join(lines)


def run(
    parts: dict[str, Callable[[], Figures]], rounds: int, workdir: str, record: str = ""
) -> dict:
    """Measure every part, write the record, and return the figures for the closing line."""
    if rounds < 1:
        raise ValueError(f"--rounds={rounds} measures nothing: give 1 or more")
    began, load, cores = time.monotonic(), os.getloadavg()[0], len(os.sched_getaffinity(0))
    found = []
    for name, part in parts.items():
        logging.info("bench: %s, %d rounds on %d cores", name, rounds, cores)
        found.append(part())
        print(found[-1].text, flush=True)
    content = {"provenance": provenance()}
    for figures in found:
        content["provenance"] |= figures.versions
    content |= {
        "cores": cores,
        "load_before": round(load, 2),
        "rounds": rounds,
        "settings": {name: os.environ.get(name, "") for name in SETTINGS}
        | {"memory": "freed memory stays in the process (launch/memory.py), for both sides"},
    }
    for figures in found:
        content |= figures.record
    content["seconds"] = round(time.monotonic() - began, 1)
    path = pathlib.Path(record or pathlib.Path(workdir) / "record.json")
    runs = json.loads(path.read_text()) if path.exists() else {}
    runs |= {f"{cores}_cores": content}  # a record holds one run for each number of cores
    write_record(path, runs)
    closing = {"record": str(path), "seconds": content["seconds"]}
    for figures in found:
        closing |= figures.summary
    return closing


def main(argv) -> None:
    del argv
    options = flags.FLAGS
    allowed = sorted(os.sched_getaffinity(0))
    if 0 < options.cores < len(allowed):
        # Anew, because libraries count the cores, and start their threads, when they are loaded.
        os.sched_setaffinity(0, allowed[: options.cores])
        os.execv(sys.executable, sys.orig_argv)
    keep_memory()
    jax.config.update("jax_platforms", "cpu")  # also where there is an accelerator
    sizes = {name: SIZES[name] for name in options.sizes}
    images = {"num": options.images, "batch": options.batch}
    rounds = options.rounds
    parts = {
        "unet": lambda: against_diffusers(sizes, rounds),
        "features": lambda: against_torch_fidelity(images, rounds),
        "statistics": lambda: large_statistics(options.rows),
        "pruned": lambda: pruned(sizes[options.sizes[0]], SHARES, rounds),
    }
    chosen = {name: part for name, part in parts.items() if name in options.what}
    execute("bench", options.workdir, lambda: run(chosen, rounds, options.workdir, options.record))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Where the summary goes.")
    flags.DEFINE_string("record", "", "Where the record (.json) goes instead.")
    flags.DEFINE_multi_enum(
        "what", ["unet"], ["unet", "features", "statistics", "pruned"], "What to measure."
    )
    flags.DEFINE_integer("rounds", 10, "Turns of each side.")
    flags.DEFINE_integer("cores", 0, "Cores to use; 0 = all.")
    flags.DEFINE_multi_enum("sizes", list(SIZES), list(SIZES), "unet: which; pruned: the first.")
    flags.DEFINE_integer("images", 128, "features: images in the set.", lower_bound=2)
    flags.DEFINE_integer("batch", 64, "features: images per call of the network.", lower_bound=1)
    flags.DEFINE_integer("rows", 50_000, "statistics: features in each set.", lower_bound=6)
    flags.mark_flags_as_required(["workdir"])
    start(main)
