"""What the cells of the self-cascade study say about the paper's claims, claim by claim.

Each finding holds the figures it rests on; one whose cells are not all there is left out.
"""

import math
import re

from cheapscale.diffusion import process
from launch.paired import difference

METRICS = ("single", "objects", "fd", "patch_fd", "base_fd", "pivot_mse", "contrast")


def findings(config: dict, cells: dict) -> dict:
    """{claim: figures} of the cells {name: {"figures": ...}}."""
    # by name without the section: seeds after the first are in other sections
    held = {name.partition(" ")[2]: cell["figures"] for name, cell in cells.items()}
    found = {}
    for seed in config["seeds"]:
        found[f"composition, seed {seed}"] = composition(held, seed)
        found[f"tuning, seed {seed}"] = tuning(config, held, seed)
    found["best K by schedule"] = best_k(config, held)
    found["two stages against one jump"] = jump(config, held)
    found["against the cascade from K"] = against_cascade(config, held)
    found["seconds"] = held.get("seconds")
    return {claim: figures for claim, figures in found.items() if figures}


def value(held: dict, name: str, metric: str):
    """A cell's figure, None where it is not there."""
    return held[name][metric][0] if name in held and metric in held[name] else None


def by_k(held: dict, schedule: str, seed: int, metric: str) -> dict:
    """{K: figure} of one teacher."""
    start = f"{schedule} seed {seed}: K "
    return {
        name.removeprefix(start): figures[metric][0]
        for name, figures in held.items()
        if name.startswith(start) and metric in figures
    }


def composition(held: dict, seed: int) -> dict | None:
    """E1, E2: the share of single objects of base, direct sampling and the cascade."""
    start = f"edm seed {seed}"
    rates = {
        "base": value(held, f"{start}: base", "single"),
        "direct": value(held, f"{start}: direct", "single"),
        "enlarged pivot": value(held, f"{start}: enlarged pivot", "single"),
    }
    if None in rates.values():
        return None
    rates |= {f"K {k}": rate for k, rate in by_k(held, "edm", seed, "single").items()}
    distance = by_k(held, "edm", seed, "fd")
    if len(distance) > 1:
        best = min(distance, key=distance.get)
        rates |= {"best K by fd": best, "at the best K": rates[f"K {best}"]}
        rates["points below the base"] = 100 * (rates["base"] - rates[f"K {best}"])
    return rates


def best_k(config: dict, held: dict) -> dict | None:
    """E3, E4: where the distances are least, in decibels and in each schedule's own time, and
    which K are not surely worse, by the paired interval."""
    rows = {}
    for schedule in ("edm", *config["vp"]):
        row = {}
        for metric in ("fd", "patch_fd", "base_fd"):
            figures = by_k(held, schedule, config["seeds"][0], metric)
            if len(figures) < max(2, len(config["ks"])):
                continue
            start = f"{schedule} seed {config['seeds'][0]}: K"
            best = min(figures, key=figures.get)
            sigma = held[f"{start} {best}"]["restart_sigma"]
            row[metric] = {
                "k": best,
                "decibels": float(process.decibels(sigma)),
                "not surely worse": [
                    k
                    for k in figures
                    if difference(held[f"{start} {k}"], held[f"{start} {best}"])[metric][1] <= 0
                ],
            }
            if schedule != "edm":
                time = process.vp_schedule(schedule).time_of_sigma(sigma)
                row[metric]["own_time"] = float(time) / 1000
        if row:
            rows[schedule] = row
    return rows if len(rows) > 1 else None


def jump(config: dict, held: dict) -> dict | None:
    """E5: at four times the size."""
    titles = ("two stages", "one jump", "direct", "enlarged pivot")
    start = f"edm seed {config['seeds'][0]}: 4x"
    rows = {title: held.get(f"{start} {title}") for title in titles}
    if None in rows.values():
        return None
    return {
        title: {metric: row[metric][0] for metric in METRICS if metric in row}
        for title, row in rows.items()
    } | {"two stages - one jump": difference(rows["two stages"], rows["one jump"])}


def against_cascade(config: dict, held: dict) -> dict:
    """E10, E11, E12: {cell: its paired difference from tuning-free cascade of the same teacher}."""
    first, k = config["seeds"][0], config["k"]
    free = {
        r"(.+), (alone|on top of the cascade)": f"edm seed {first}: K {k}",
        r"(code: .+|zero gate|identity start) after \d+": f"{config['vp'][0]} seed {first}: K {k}",
        r"photographs: .+ images after \d+": "photographs: tuning-free",
    }
    return {
        name: difference(figures, held[other])
        for pattern, other in free.items()
        for name, figures in held.items()
        if re.fullmatch(pattern, name) and other in held
    }


def tuning(config: dict, held: dict, seed: int) -> dict | None:
    """E6, E7, E8: figures by steps, and their differences from the tuning-free cascade; and the
    steps and seconds that each method takes to reach what an upsampler has after each of its
    numbers of steps (the paper's claim: fine-tuning takes five times as many)."""
    free = held.get(f"edm seed {seed}: K {config['k']}", {})
    pattern = rf"edm seed {seed}: (.+?) after (\d+)"
    rows: dict = {}
    cells: dict = {}
    for name, figures in held.items():
        match = re.fullmatch(pattern, name)
        if match:
            cells.setdefault(match[1], {})[match[2]] = figures
            row = {metric: figures[metric][0] for metric in METRICS if metric in figures}
            row |= {k: figures[k] for k in ("parameters", "steps_per_second") if k in figures}
            row |= {"minus tuning-free": difference(figures, free)} if free else {}
            rows.setdefault(match[1], {})[match[2]] = row
    if not rows:
        return None
    # a run's rate stands in the first cell that was measured of it
    rates = {
        method: row["steps_per_second"]
        for method, by_steps in rows.items()
        for row in by_steps.values()
        if "steps_per_second" in row
    }
    reached = {}
    for design in ("full", "neck", "gain", "2k"):
        for after in rows.get(design, {}):
            target = cells[design][after]
            reached[f"{design} after {after}"] = {
                metric: {
                    method: steps_to_reach(
                        by_steps, target, metric, rates.get(method.removesuffix(" direct"))
                    )
                    for method, by_steps in cells.items()
                }
                for metric in ("patch_fd", "fd")
            }
    return {"by steps": rows, "steps to reach": reached}


def steps_to_reach(by_steps: dict, target: dict, metric: str, rate: float | None = None) -> dict:
    """{"steps": the fewest whose distance is at most the target's, "earliest" and "latest": the
    fewest whose distance is not surely above it, and those that are surely below, by the paired
    interval; "seconds" of training for "steps", at `rate` a second}; None where none of those
    measured is."""
    apart = {
        int(steps): difference(figures, target).get(metric, (math.nan,) * 3)
        for steps, figures in by_steps.items()
    }
    apart |= {int(s): (0.0, 0.0, 0.0) for s, figures in by_steps.items() if figures is target}
    found = {
        name: min((steps for steps, row in apart.items() if row[at] <= 0), default=None)
        for name, at in (("steps", 0), ("earliest", 1), ("latest", 2))
    }
    seconds = round(found["steps"] / rate, 1) if found["steps"] and rate else None
    return found | {"seconds": seconds}


def table(cells: dict) -> str:
    """The cells as text."""
    lines = [f"{'':58}" + "".join(f"{metric:>18}" for metric in METRICS)]
    for name, cell in cells.items():
        figures = cell["figures"]
        row = [
            f"{figures[m][0]:10.3f} ±{1.96 * figures[m][1]:6.3f}" if m in figures else " " * 18
            for m in METRICS
        ]
        lines.append(f"{name:58}" + "".join(row))
    return "\n".join(lines)
