"""Proxy-based assessment: which widths a group's network gets under its FLOPs (spec 4.1 to 4.3).

    memory <- []                                             every (widths, share, score) so far
    for round in 1 .. rounds:
        for widths in proposer(task, memory):                not in the memory yet
            repair them: step by step as near to the target as steps lead, within 2 % of F0
            score <- loss of the pruned network on a fixed set of images, levels and noise
            memory += (widths, share, score)
    the widths of least score

All candidates cost the same but for a step: inside a band the least score would be at its dear end.

The paper's proposer is a language model with a memory bank; here it is one of three behind one
interface, and none needs another. The memory is written to a file line by line: it is the audit
trail, and a search that was interrupted goes on from it.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from cheapscale.data.files import whole_or_nothing
from cheapscale.models.plan import UNetConfig
from cheapscale.pruning.structure import PLANS, Variable, flops, keep_best, layout, pruned_config

Widths = dict[str, int]
BAND = 0.02
ASKED = 4  # times at most that a round asks for proposals
CHOICES = 8  # widths of a variable at most: finer steps change neither FLOPs nor the loss by much


class Task(NamedTuple):
    """What is searched: the widths of `variables` whose share of F0 meets the target.

    scores: {variable: importance of its channels}; they choose the channels once a width is set,
    and tell what a step down loses. menus: the widths of each variable that are tried, increasing.
    """

    config: UNetConfig
    variables: dict[str, Variable]
    target: float
    scores: Mapping[str, np.ndarray]
    menus: dict[str, tuple[int, ...]]
    band: float = BAND

    def share(self, widths: Mapping[str, int]) -> float:
        """F / F0; ValueError where the widths do not fit together."""
        return _share(self.config, _key(widths))

    def fits(self, share: float) -> bool:
        return abs(share - self.target) <= self.band

    def keep(self, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
        """The channels that stay: the best of each variable."""
        return {
            name: keep_best(self.variables[name], self.scores[name], width)
            for name, width in widths.items()
        }

    def lost(self, name: str, width: int) -> float:
        """Importance that a variable of that width has lost."""
        kept = keep_best(self.variables[name], self.scores[name], width)
        return float(np.sum(self.scores[name]) - np.sum(np.asarray(self.scores[name])[kept]))


class Entry(NamedTuple):
    """One line of the memory."""

    round: int
    widths: Widths
    share: float
    score: float


class Proposer(Protocol):
    def propose(
        self, task: Task, memory: Sequence[Entry], count: int, rng: np.random.Generator
    ) -> list[Widths]: ...


def make_task(
    config: UNetConfig, target: float, scores: Mapping[str, np.ndarray], kinds: str = "inner"
) -> Task:
    """kinds: a row of structure.PLANS. ValueError where the target is out of reach."""
    variables = {
        name: variable
        for name, variable in layout(config).variables.items()
        if variable.kind in PLANS[kinds] and len(variable.menu) > 1
    }
    menus = {name: coarse(variable.menu) for name, variable in variables.items()}
    task = Task(config, variables, target, scores, menus)
    least = task.share({name: menu[0] for name, menu in menus.items()})
    if not least - task.band <= target <= 1:
        raise ValueError(
            f"a share of {target:.3f} is out of reach: pruning {', '.join(PLANS[kinds])} leaves "
            f"{least:.3f} at least; raise prune.k, or prune.plan='all'"
        )
    return task


def coarse(menu: tuple[int, ...]) -> tuple[int, ...]:
    """At most CHOICES of a menu, from end to end."""
    at = np.linspace(0, len(menu) - 1, min(CHOICES, len(menu))).round().astype(int)
    return tuple(menu[i] for i in at)


def uniform(task: Task) -> Widths:
    """One ratio for all variables, as near to the target as their menus let it, then repaired by
    their numbers of channels: no score has a say."""
    task = unscored(task)

    def at(ratio):
        return {
            name: max((w for w in menu if w <= ratio * menu[-1] + 1e-9), default=menu[0])
            for name, menu in task.menus.items()
        }

    ratios = sorted({w / menu[-1] for menu in task.menus.values() for w in menu})
    starts = sorted(map(at, ratios), key=lambda widths: abs(task.share(widths) - task.target))
    for widths in starts[:-1]:
        with contextlib.suppress(ValueError):  # a ratio from which nothing leads into the band
            return repair(task, widths)
    return repair(task, starts[-1])


def unscored(task: Task) -> Task:
    """The task with every channel as important as any other."""
    return task._replace(scores={name: np.ones(v.width) for name, v in task.variables.items()})


def repair(task: Task, widths: Mapping[str, int]) -> Widths:
    """The widths moved step by step for as long as a step comes closer to the target: each time the
    one that loses least importance for the FLOPs it saves, or regains most for those it costs.

    ValueError where that ends outside the band, as from a start whose streams are too narrow.
    """
    widths, share = dict(widths), task.share(widths)
    while closer := [
        step
        for step in steps(task, widths, -1 if share > task.target else 1)
        if abs(step.share - task.target) < abs(share - task.target)
    ]:
        best = min(closer)
        widths, share = widths | {best.name: best.width}, best.share
    if not task.fits(share):
        raise ValueError(
            f"no widths come within {task.band:.0%} of the share {task.target:.3f}: the nearest "
            f"has {share:.3f}; use a wider network, or fewer norm groups"
        )
    return widths


class Step(NamedTuple):
    """One variable one width up or down. lost: importance for the FLOPs it changes, negative where
    it is regained."""

    lost: float
    name: str
    width: int
    share: float


def steps(task: Task, widths: Widths, direction: int) -> list[Step]:
    """All single steps up (1) or down (-1)."""
    share, found = task.share(widths), []
    for name, menu in task.menus.items():
        i = menu.index(widths[name]) + direction
        if 0 <= i < len(menu):
            changed = task.share(widths | {name: menu[i]})
            lost = task.lost(name, menu[i]) - task.lost(name, widths[name])
            found.append(Step(lost / abs(changed - share), name, menu[i], changed))
    return found


class Greedy:
    """The best so far, at first the uniform one, after one to three swaps of one variable up and
    another down by chance, or one as the scores say. The last of a round is altogether random."""

    def propose(self, task, memory, count, rng):
        start = min(memory, key=lambda e: e.score).widths if memory else uniform(task)
        swaps = [swapped(task, start, rng, rng.integers(1, 4)) for _ in range(max(1, count - 2))]
        if not memory:
            return [start, *swaps, random_widths(task, rng)][:count]
        return [*swaps, guided(task, start), random_widths(task, rng)][:count]


class Evolution:
    """Crossover and mutation of the better half of the memory."""

    def propose(self, task, memory, count, rng):
        proposals = [] if memory else [uniform(task)]
        parents = sorted(memory, key=lambda entry: entry.score)[: max(2, len(memory) // 2)]
        while len(proposals) < count:
            if len(parents) < 2:
                proposals.append(random_widths(task, rng))
                continue
            a, b = (parents[i].widths for i in rng.choice(len(parents), 2, replace=False))
            child = {name: (a if rng.random() < 0.5 else b)[name] for name in a}
            proposals.append(swapped(task, child, rng))
        return proposals


class Chance:
    """Random widths, in whose repair no score has a say: the control."""

    def propose(self, task, memory, count, rng):
        found = []
        for _ in range(count):
            with contextlib.suppress(ValueError):  # nothing leads from it into the band
                found.append(repair(unscored(task), random_widths(task, rng)))
        return found


def random_widths(task: Task, rng: np.random.Generator) -> Widths:
    return {name: int(rng.choice(menu)) for name, menu in task.menus.items()}


def guided(task: Task, widths: Widths) -> Widths:
    """The variable that loses least importance for its FLOPs a step down, and of the others the one
    that regains most a step up."""
    down = min(steps(task, widths, -1), default=None)
    up = min((s for s in steps(task, widths, 1) if not down or s.name != down.name), default=None)
    return dict(widths) | {step.name: step.width for step in (down, up) if step}


def swapped(task: Task, widths: Widths, rng: np.random.Generator, pairs: int = 1) -> Widths:
    """So many times one variable a step up and another one, which was not moved yet, down."""
    widths, moved = dict(widths), set()
    for step in (1, -1) * pairs:
        places = {name: menu.index(widths[name]) + step for name, menu in task.menus.items()}
        able = [n for n, i in places.items() if 0 <= i < len(task.menus[n]) and n not in moved]
        if able:
            name = able[rng.integers(len(able))]
            widths[name] = task.menus[name][places[name]]
            moved.add(name)
    return widths


def search(
    task: Task,
    evaluate: Callable[[Widths], float],
    proposer: Proposer,
    *,
    rounds: int,
    per_round: int,
    memory_path: str | os.PathLike,
    seed: int | tuple[int, ...] = 0,
    remember: bool = True,
) -> tuple[Entry, list[Entry]]:
    """(the best entry, all of them). Rounds that the file holds already are not run again.

    evaluate(widths) -> score, the lower the better, on a set that is the same for all candidates.
    remember: False shows each round an empty memory, which is the control for its use.
    """
    memory, done = read_memory(memory_path, task)
    for number in range(done, rounds):
        rng = np.random.default_rng([*np.atleast_1d(seed), number])
        known = {_key(entry.widths) for entry in memory}
        fresh: list[Entry] = []
        for _ in range(ASKED):  # many a proposal is repaired into what is known
            wanted = per_round - len(fresh)
            if not wanted:
                break
            for proposal in proposer.propose(task, memory if remember else [], wanted, rng):
                try:
                    widths = repair(task, proposal)
                except ValueError:  # nothing leads from it into the band: proposed in vain
                    continue
                if _key(widths) not in known:
                    known.add(_key(widths))
                    score = float(evaluate(widths))
                    # a loss that is no number is the worst there is
                    score = score if math.isfinite(score) else math.inf
                    fresh.append(Entry(number, widths, task.share(widths), score))
        memory += fresh
        lines = [*(json.dumps(entry._asdict()) for entry in fresh), json.dumps({"done": number})]
        with open(memory_path, "a") as file:
            file.write("".join(f"{line}\n" for line in lines))
    if not memory:
        raise ValueError(f"{rounds} rounds of {per_round} proposals found nothing: raise them")
    best = min(memory, key=lambda entry: entry.score)
    if not math.isfinite(best.score):
        raise ValueError(f"no candidate of {memory_path} has a finite loss: check the teacher")
    return best, memory


def read_memory(path: str | os.PathLike, task: Task) -> tuple[list[Entry], int]:
    """(entries of a file, rounds that are done); a round that was cut short is left out.

    ValueError where the entries are of another network or target.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        return [], 0
    lines = path.read_text().splitlines()
    held = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the last one of a writer that was killed
            held.append(json.loads(line))
    done = max((row["done"] for row in held if "done" in row), default=-1) + 1
    entries = [Entry(**row) for row in held if "done" not in row and row["round"] < done]
    for entry in entries:
        known = set(entry.widths) == set(task.variables) and all(
            width in task.menus[name] for name, width in entry.widths.items()
        )
        if not known or not task.fits(entry.share):
            raise ValueError(
                f"{path} remembers the search of another network or target: name another folder"
            )
    if len(entries) + sum("done" in row for row in held) < len(lines):  # a round was cut short
        rows = [*(entry._asdict() for entry in entries), *([{"done": done - 1}] if done else [])]
        with whole_or_nothing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return entries, done


def _key(widths: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(widths.items()))


@functools.lru_cache(maxsize=2**14)  # candidates of a search are neighbours: most come again
def _share(config: UNetConfig, widths: tuple[tuple[str, int], ...]) -> float:
    keep = {name: np.arange(width) for name, width in widths}
    return flops(pruned_config(config, keep)) / flops(config)
