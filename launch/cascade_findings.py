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
        found[f"composition, seed {seed}"] = composition(config, held, seed)
        found[f"tuning, seed {seed}"] = tuning(config, held, seed)
    found["over seeds"] = over_seeds(config, held)
    found["best K by schedule"] = best_k(config, held)
    found["two stages against one jump"] = jump(config, held)
    found["designs"] = designs(config, held)
    found["variants, baselines, photographs"] = compared(config, held)
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


def composition(config: dict, held: dict, seed: int) -> dict | None:
    """E1, E2: the share of single objects of base, direct sampling and the cascade, and how the
    cascade differs from what it should be better than."""
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
    cascade = held.get(f"{start}: K {config['k']}")
    if cascade:
        for other in ("direct", "enlarged pivot"):
            apart = difference(cascade, held[f"{start}: {other}"])
            rates[f"K {config['k']} minus {other}"] = apart
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


def designs(config: dict, held: dict) -> dict:
    """E6: one design against another after as many steps, {"this - that after n": differences}."""
    start, found = f"edm seed {config['seeds'][0]}", {}
    # mode, start, and each size against the next smaller one
    pairs = ("neck M", "neck"), ("full identity", "full"), ("full", "neck"), ("neck", "gain")
    for this, that in (*pairs, ("gain", "2k")):
        for steps in config["eval_steps"]:
            rows = [held.get(f"{start}: {name} after {steps}") for name in (this, that)]
            if None not in rows:
                found[f"{this} - {that} after {steps}"] = difference(*rows)
    return found


def compared(config: dict, held: dict) -> dict:
    """E10, E11, E12: {cell: {"minus another of the same teacher": paired difference}}."""
    first, k = config["seeds"][0], config["k"]
    cascade, direct = (f"edm seed {first}: {name}" for name in (f"K {k}", "direct"))
    variant, photograph = r"(code: .+|zero gate)", r"photographs: .+ images after \d+"
    pairs = (
        (r".+, (alone|on top of the cascade)", cascade, "tuning-free"),
        (r".+, alone", direct, "direct"),
        (
            rf"({variant}|identity start) after \d+",
            f"{config['vp'][0]} seed {first}: K {k}",
            "tuning-free",
        ),
        (
            rf"{variant} after \d+",
            f"identity start after {config['variant_steps']}",
            "plain",
        ),
        (photograph, "photographs: tuning-free", "tuning-free"),
        (rf"{photograph}|photographs: tuning-free", "photographs: enlarged pivot", "its pivot"),
    )
    found: dict = {}
    for pattern, other, title in pairs:
        for name, figures in held.items():
            if re.fullmatch(pattern, name) and other in held:
                found.setdefault(name, {})[f"minus {title}"] = difference(figures, held[other])
    return found


def over_seeds(config: dict, held: dict) -> dict:
    """E2, E6: {"cell, minus tuning-free": {metric: [difference of each seed]}}."""
    k, found = config["k"], {}
    names = {name.partition(": ")[2] for name in held if re.match(r"edm seed \d+: ", name)}
    for name in sorted(names - {f"K {k}"}):
        rows = [
            (held.get(f"edm seed {seed}: {name}"), held.get(f"edm seed {seed}: K {k}"))
            for seed in config["seeds"]
        ]
        if all(cell and cascade for cell, cascade in rows):
            apart = [difference(cell, cascade) for cell, cascade in rows]
            found[f"{name}, minus tuning-free"] = {
                metric: [row[metric][0] for row in apart] for metric in apart[0]
            }
    return found if len(config["seeds"]) > 1 else {}


def tuning(config: dict, held: dict, seed: int) -> dict | None:
    """E6, E7, E8: figures by steps, and their differences from the tuning-free cascade; and the
    steps and seconds that each method takes to reach what an upsampler has after each of its
    numbers of steps (the paper's claim: fine-tuning takes five times as many)."""
    start = f"edm seed {seed}"
    free = held.get(f"{start}: K {config['k']}", {})
    pivot = held.get(f"{start}: enlarged pivot", {})
    pattern = rf"edm seed {seed}: (.+?) after (\d+)"
    rows: dict = {}
    cells: dict = {}
    for name, figures in held.items():
        match = re.fullmatch(pattern, name)
        if match:
            cells.setdefault(match[1], {})[match[2]] = figures
            row = {metric: figures[metric][0] for metric in METRICS if metric in figures}
            row |= {"parameters": figures["parameters"]} if "parameters" in figures else {}
            row |= {"minus tuning-free": difference(figures, free)} if free else {}
            row |= {"minus its pivot": difference(figures, pivot)} if pivot else {}
            rows.setdefault(match[1], {})[match[2]] = row
    if not rows:
        return None
    a_step = held.get("seconds", {}).get("training_step", {})
    reached = {}
    for design in ("full", "neck", "gain", "2k"):
        for after in rows.get(design, {}):
            target = cells[design][after]
            reached[f"{design} after {after}"] = {
                metric: {
                    method: steps_to_reach(by_steps, target, metric, seconds_of(method, a_step))
                    for method, by_steps in cells.items()
                }
                for metric in ("patch_fd", "fd")
            }
    return {"by steps": rows, "steps to reach": reached}


def seconds_of(method: str, a_step: dict) -> float | None:
    """Seconds of a method's training step, as E9 measured them side by side."""
    design, _, kind = method.rpartition(" ")
    if method not in a_step and kind in ("direct", "identity", "fast", "slow"):
        return seconds_of(design, a_step)  # "ft slow direct" takes as long as "ft"
    return a_step.get(method)


def steps_to_reach(by_steps: dict, target: dict, metric: str, a_step: float | None = None) -> dict:
    """{"steps": from which on all that were measured are at most the target's distance, "earliest":
    the first not surely above it, "latest": from which on all are surely not above, both by the
    paired interval; "seconds" of training for "steps", of `a_step` each}; None where there are
    none. A curve goes up and down: to have touched the target once is not to have reached it.
    """
    apart = {
        int(steps): difference(figures, target).get(metric, (math.nan,) * 3)
        for steps, figures in by_steps.items()
    }
    apart |= {int(s): (0.0, 0.0, 0.0) for s, figures in by_steps.items() if figures is target}
    below = {
        name: {steps: row[at] <= 0 for steps, row in apart.items()}
        for name, at in (("steps", 0), ("earliest", 1), ("latest", 2))
    }
    found = {name: for_good(below[name]) for name in ("steps", "latest")}
    found["earliest"] = min((steps for steps, so in below["earliest"].items() if so), default=None)
    known = found["steps"] is not None and a_step is not None
    return found | {"seconds": round(found["steps"] * a_step, 1) if known else None}


def for_good(so: dict[int, bool]) -> int | None:
    """The first steps from which on it is so."""
    return min((s for s in so if all(so[later] for later in so if later >= s)), default=None)


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
