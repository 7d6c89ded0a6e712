"""Arms of a study against its control, seed by seed.

Runs of one seed share data, initial weights where they can, and the noise of evaluation, so that
the differences between them vary less than the runs do:

    d_s = x_s(arm) - x_s(control),    mean(d) +- t(0.975, n - 1) sd(d) / sqrt(n)
"""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from cheapscale.training.log import markdown


class Paired(NamedTuple):
    """The mean of an arm, its mean difference from the control, half of that difference's 95 %
    interval (None for one seed), and the number of seeds that both have."""

    mean: float
    difference: float
    half: float | None
    seeds: int


def paired(arm: dict[int, float], control: dict[int, float]) -> Paired:
    """The comparison of one figure, {seed: value} of both; ValueError without a common seed."""
    seeds = sorted(arm.keys() & control.keys())
    if not seeds:
        raise ValueError(f"the arm has the seeds {sorted(arm)}, the control {sorted(control)}")
    d = np.asarray([arm[s] - control[s] for s in seeds])
    n, half = len(seeds), None
    if n > 1:
        half = float(stdtrit(n - 1, 0.975) * d.std(ddof=1) / math.sqrt(n))
    return Paired(float(np.mean([arm[s] for s in seeds])), float(d.mean()), half, n)


def compare(rows: list[dict[str, Any]]) -> dict[str, dict[str, Paired]]:
    """{arm: {figure: comparison with the first arm}}, as far as runs have both.

    rows: [{"arm": text, "seed": int, "figures": {name: number}}], one for each run.
    """
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for name, value in row["figures"].items():
            values.setdefault(row["arm"], {}).setdefault(name, {})[row["seed"]] = value
    if not values:
        return {}
    control = next(iter(values.values()))
    return {
        arm: {
            name: paired(found, control[name])
            for name, found in figures.items()
            if found.keys() & control.get(name, {}).keys()
        }
        for arm, figures in values.items()
    }


def table(compared: dict[str, dict[str, Paired]]) -> str:
    """The comparisons as a Markdown table: means, and differences with their intervals in brackets;
    a difference is bold if its interval has no 0."""
    control = next(iter(compared), None)
    names = list(compared[control]) if control else []
    rows: list[list[Any]] = [["run", "seeds", *names]]
    for arm, figures in compared.items():
        seeds = min((found.seeds for found in figures.values()), default=0)
        cells = [cell(figures.get(name), arm == control) for name in names]
        rows.append([arm, seeds, *cells])
    return markdown(rows)


def cell(found: Paired | None, control: bool) -> str:
    """The text of one figure: "0.31", or "0.35 (+0.04 ± 0.02)"."""
    if found is None:
        return ""
    if control or found.half is None:
        return f"{found.mean:.4g}" + f" ({found.difference:+.2g})" * (not control)
    text = f"{found.difference:+.2g} ± {found.half:.2g}"
    text = f"**{text}**" if abs(found.difference) > found.half else text
    return f"{found.mean:.4g} ({text})"
