"""What the cells of the step-adaptive study say about the paper's claims, claim by claim.

Intervals are of the images drawn, paired between arms; what other training runs would have given is
seen in the seeds alone.
"""

import numpy as np
from scipy import stats

from launch.paired import difference

CONTROLS = ("base longer", "one network")
SCORES = ("all-time scores", "magnitudes", "summed scores", "random channels")


def findings(config: dict, cells: dict) -> dict:
    """{claim: figures} of the cells {name: {"figures": ...}}; a claim whose cells are not there is
    left out."""
    held = {name.partition(" ")[2]: cell["figures"] for name, cell in cells.items()}
    by_seed = {
        seed: {
            name.removeprefix(f"seed {seed}: "): row
            for name, row in held.items()
            if name.startswith(f"seed {seed}: ")
        }
        for seed in config["seeds"]
    }
    found: dict = {}
    for seed, rows in by_seed.items():
        for claim, figures in of_seed(rows, config["finetune_steps"]).items():
            found[f"{claim}, seed {seed}"] = figures
    found |= over_seeds(list(by_seed.values()))
    for name in ("memory", "jumps", "inversion", "seconds"):
        if name in held:
            found[name] = held[name]
    return found


def of_seed(rows: dict, updates: int) -> dict:
    """The arms {name: figures} of one seed; updates: of the specialists together."""
    found: dict = {}
    ours = rows.get("specialists")
    controls = {name: rows[name] for name in CONTROLS if name in rows}
    if ours and controls:
        found["specialists against the base"] = costs(ours) | {
            f"minus {name}": difference(ours, row) for name, row in controls.items()
        }
        if "base" in rows:  # section 5.5: had the base taken as many updates
            alone = rows["base"]["steps_of_base"] + updates
            paid, search = ours["steps_of_base"], ours.get("search_steps_of_base", 0.0)
            found["specialists against the base"] |= {
                "training FLOPs, without the search": (paid - search) / alone,
                "training FLOPs, with the search": paid / alone,
            }
    if ours and len(rows) > 1:
        found["arms against the specialists"] = {
            name: difference(row, ours) | costs(row)
            for name, row in rows.items()
            if name != "specialists"
        }
    full = rows.get("full size")
    if full and controls:  # E2: does specialisation itself help?
        found["full-size specialists against the base"] = {
            name: difference(full, row) | {"losses": over(full, row)}
            for name, row in controls.items()
        }
    narrow = {name: row for name, row in rows.items() if name.startswith("flat ")}
    if full and narrow:  # E1: what the same cut costs each group, after as many updates
        found["excess loss of an equal cut by group"] = {
            name: (np.array(over(row, full)) - 1).tolist() for name, row in narrow.items()
        }
    same, scored = rows.get("uniform widths"), [name for name in SCORES if name in rows]
    if same and scored:  # E7: at the same widths, for as many updates
        found["other scores against the group's, at uniform widths"] = {
            name: difference(rows[name], same)
            | {
                "losses": over(rows[name], same),
                "losses before fine-tuning": over(rows[name], same, "before"),
            }
            for name in scored
        }
    cut = {name: row["before"] for name, row in rows.items() if row.get("before")}
    if cut:  # E6, E7
        found["losses before fine-tuning by group"] = cut
    return found


def over_seeds(seeds: list[dict]) -> dict:
    """What each arm's fd is above the specialists', over the seeds: mean and range; "images", the
    mean's interval had these networks drawn other images; "runs", Student's, of the seeds."""
    names = {name for rows in seeds for name in rows if "specialists" in rows}
    found = {}
    for name in sorted(names - {"specialists"}):
        apart = [
            difference(rows[name], rows["specialists"])["fd"]
            for rows in seeds
            if name in rows and "specialists" in rows
        ]
        if len(apart) < 2:
            continue
        values = [value for value, *_ in apart]
        mean, n = float(np.mean(values)), len(values)
        images = float(np.sqrt(np.sum([(high - value) ** 2 for value, _, high in apart]))) / n
        runs = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        found[name] = {
            "mean": mean, "least": min(values), "most": max(values), "seeds": n,
            "images": [mean - images, mean + images], "runs": [mean - runs, mean + runs],
        }  # fmt: skip
    return {"fd above the specialists' over seeds": found} if found else {}


def costs(row: dict) -> dict:
    """What an arm costs, in the three meanings of "80 %" of section 5.5, and its mean shares."""
    return {
        "sampling FLOPs": row["share"],
        "training, in steps of the base": row["steps_of_base"],
        "parameters": row["parameters"],
    } | ({"mean shares": row["mean_shares"]} if "mean_shares" in row else {})


def over(row: dict, other: dict, losses: str = "losses") -> list[float]:
    """Ratio of two arms' losses by group."""
    return [a / b for a, b in zip(row[losses], other[losses])]


def table(cells: dict) -> str:
    """The arms as text."""
    lines = [f"{'':44}{'fd':>20}{'share':>8}{'steps':>8}   loss by group"]
    for name, cell in cells.items():
        row = cell["figures"]
        if "fd" in row:
            fd = f"{row['fd'][0]:10.3f} ±{1.96 * row['fd'][1]:7.3f}"
            losses = " ".join(f"{loss:8.4f}" for loss in row["losses"])
            cost = f"{row['share']:8.3f}{row['steps_of_base']:8.0f}"
            lines.append(f"{name:44}{fd:>20}{cost}   {losses}")
    return "\n".join(lines)
