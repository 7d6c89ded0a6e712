"""The speed of our networks on CPU.

    python -m launch.bench --workdir=runs/bench --cores=1
    python -m launch.bench --workdir=runs/bench --cores=1 --what=pruned

    unet        a training step and one-step sampling against diffusers.UNet2DModel
    pruned      an expert's training step and network call against its base's
    one_step    an image of the generator --model against its teachers' samplers

Both sides of a comparison compute the same function with the same weights; the record has the
difference of their outputs. The sides take turns, call by call, so that other load on the machine
affects both; a ratio divides the seconds of a side by those of the first side in the same round.

CPU seconds are those of all threads: on a busy machine they vary less than the clock. OpenMP
threads spin by default while they wait, which makes PyTorch many times slower there, so the command
sets OMP_WAIT_POLICY=passive. All threads of both sides share the first --cores cores.
"""

import importlib
import importlib.metadata
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
from absl import flags, logging

from cheapscale.training.loop import provenance
from configs.models import preset
from launch.command import execute, required, start, write_record

# (fields of our U-Net, batch size); `groups` sets one number of groups for all norms, as diffusers
# does
SIZES = {
    "cifar32": (
        dict(
            resolution=32, channels=64, channel_mult=(1, 2, 2), num_blocks=2, attention=(16,),
            groups=16,
        ),
        16,
    ),
    "tiny16": (preset("tiny16", groups=8), 32),
}  # fmt: skip
SHARES = (0.6, 0.8)  # shares of the base's FLOPs that the experts keep


def paired(calls: dict[str, Callable], rounds: int) -> dict:
    """The `summary` of the seconds of all sides, which take turns for `rounds` rounds."""
    seconds, cpu = ({side: [] for side in calls} for _ in range(2))
    for turn in range(-2, rounds):  # two warm-up rounds: memory still grows in the second
        for side, call in calls.items():
            began = time.perf_counter(), time.process_time()
            call()
            if turn >= 0:
                seconds[side].append(time.perf_counter() - began[0])
                cpu[side].append(time.process_time() - began[1])
    return summary(seconds, cpu)


def summary(seconds: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict:
    """{side: {"seconds": median, "ratio": median, "range": [least, largest]}}, and the same of the
    seconds that all threads computed as "cpu_seconds", "cpu_ratio" and "cpu_range".

    A ratio divides the seconds of a side by those of the first side in the same round.
    """
    rows = {side: {} for side in seconds}
    for prefix, clock in (("", seconds), ("cpu_", cpu)):
        first = next(iter(clock.values()))
        for side, taken in clock.items():
            ratios = sorted(t / f for t, f in zip(taken, first, strict=True))
            rows[side] |= {
                f"{prefix}seconds": round(statistics.median(taken), 5),
                f"{prefix}ratio": round(statistics.median(ratios), 3),
                f"{prefix}range": [round(ratios[0], 3), round(ratios[-1], 3)],
            }
    return rows


def compare(name: str, rounds: int, *args) -> dict:
    """The figures of the module launch.bench.`name`: its facts, and {use: `summary`}.

    Raises ValueError if the other package is not installed.
    """
    try:
        module = importlib.import_module(f"launch.bench.{name}")
    except ImportError as error:
        raise ValueError(
            f"the comparison needs another package ({error}): pip install diffusers torch"
        ) from None
    facts, calls = module.prepare(*args)
    figures = facts | {"uses": {use: paired(sides, rounds) for use, sides in calls.items()}}
    for use, rows in figures["uses"].items():
        for side, row in rows.items():
            times = [f"x {row[kind]:.2f}" for kind in ("ratio", "cpu_ratio")]
            print(f"{use:>12} {side:>15} {1e3 * row['seconds']:10.1f} ms", *times, "(CPU)")
    return figures


def run(parts: dict[str, Callable[[], dict]], rounds: int, record: pathlib.Path) -> dict:
    """The figures of all parts, which are also written to the record."""
    versions = {}
    for package in ("diffusers", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    cores = len(os.sched_getaffinity(0))
    content = {"provenance": provenance() | versions, "cores": cores, "rounds": rounds}
    for name, part in parts.items():
        logging.info("bench: %s, %d rounds on %d cores", name, rounds, cores)
        content[name] = part()
    runs = json.loads(record.read_text()) if record.exists() else {}
    write_record(record, runs | {f"{cores}_cores": content})  # one entry for each number of cores
    return {"record": str(record)} | content


def define() -> None:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, "Folder of the summary.")
    flags.DEFINE_string("record", "", "Path of the record (.json); default: record.json there.")
    flags.DEFINE_multi_enum(
        "what", ["unet"], ["unet", "pruned", "one_step"],
        "What to measure."
    )  # fmt: skip
    flags.DEFINE_string("model", None, "one_step: the work directory of a generator.")
    flags.DEFINE_integer("steps", 40, "one_step: sigma levels of the teacher's sampler.", 2, 10_000)
    flags.DEFINE_integer("cores", None, "Cores for all sides; default: all.", 1, 1024)
    flags.DEFINE_integer("rounds", 10, "Rounds, in which each side runs once.", 1, 10_000)
    flags.DEFINE_multi_enum(
        "sizes", list(SIZES), list(SIZES), "unet: these networks; pruned: the first one."
    )
    flags.DEFINE_integer("batch", 64, "one_step: images per call of the network.", 1, 1_000_000)
    required("workdir", "runs/bench")


def body(given) -> dict:
    jax.config.update("jax_platforms", "cpu")  # even if there is an accelerator
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before PyTorch is imported
    cores = sorted(os.sched_getaffinity(0))
    if given.cores and given.cores > len(cores):
        raise ValueError(f"--cores={given.cores}: there are {len(cores)}: give at most that")
    # XLA and PyTorch take as many threads as the process has cores.
    os.sched_setaffinity(0, cores[: given.cores])
    from launch.bench import one_step

    if ("one_step" in given.what) != bool(given.model):
        raise ValueError("--what=one_step measures the generator in --model=DIR: give both")

    parts = {
        "unet": lambda: {s: compare("unet", given.rounds, *SIZES[s]) for s in given.sizes},
        "pruned": lambda: compare("pruned", given.rounds, *SIZES[given.sizes[0]], SHARES),
        "one_step": lambda: one_step.measure(
            given.model, steps=given.steps, batch=given.batch, rounds=given.rounds, paired=paired
        ),
    }
    chosen = {name: part for name, part in parts.items() if name in given.what}
    record = pathlib.Path(given.record or pathlib.Path(given.workdir) / "record.json")
    return execute("bench", given.workdir, lambda: run(chosen, given.rounds, record))


def main(argv: list[str] | None = None) -> dict:
    """Run the benchmark; returns its figures."""
    return start(define, body, argv)


if __name__ == "__main__":
    main()
