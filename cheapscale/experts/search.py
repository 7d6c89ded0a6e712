"""The search of the widths of one group's network within its budget ("proxy-based" assessment).

    memory <- []                                          every (widths, share, score) so far
    for round in 1 ... rounds:
        for widths in proposer(task, memory):
            widths <- the widths after steps towards the budget, |F - F_i| <= 0.02 F_0
            score  <- loss of the pruned network on fixed images, noise levels and noise
            memory <- memory + (widths, share, score)
    return the widths of least score

In the paper (arXiv 2312.13307) a language model with a memory bank decides over several rounds; the
rest of this protocol follows GENIUS (Zheng et al. 2023, arXiv 2304.10970). `language_model` is this
proposer; `Greedy` is a proposer that needs no service. A wider network has a lower loss, so without
the steps towards the budget the search would drift to the upper end of the tolerance.

The memory is a file with one JSON object per line, from which an interrupted search continues.
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

from cheapscale.data.files import atomic_write
from cheapscale.experts.structure import Variable, flops, keep_best, pruned_config, variables
from cheapscale.models.plan import UNetConfig

Widths = dict[str, int]
TOLERANCE = 0.02  # largest |F - F_i| / F_0
ATTEMPTS = 4  # calls of the proposer per round, since it may propose known widths
CHOICES = 8  # most widths in a variable's menu; finer steps hardly change FLOPs or loss


class Task(NamedTuple):
    """The search problem of one group: widths with FLOPs `target` * F_0.

    scores: {variable: importance of its channels}, which determine the channels that a width keeps
        and the importance that it loses. menus: {variable: allowed widths, ascending}.
    """

    config: UNetConfig
    target: float
    scores: Mapping[str, np.ndarray]
    variables: dict[str, Variable]
    menus: dict[str, tuple[int, ...]]

    def share(self, widths: Widths) -> float:
        """F / F_0 of the network with these widths."""
        return _share(self.config, _key(widths))

    def fits(self, share: float) -> bool:
        """Whether a share F / F_0 is within the tolerance of the target."""
        return abs(share - self.target) <= TOLERANCE

    def keep(self, widths: Widths) -> dict[str, np.ndarray]:
        """{variable: the channels of highest score, as many as its width}."""
        return {
            name: keep_best(self.variables[name], self.scores[name], width)
            for name, width in widths.items()
        }

    def lost(self, name: str, width: int) -> float:
        """The importance that the variable `name` loses at this width."""
        scores = np.asarray(self.scores[name])
        return float(scores.sum() - scores[keep_best(self.variables[name], scores, width)].sum())


class Entry(NamedTuple):
    """One line of the memory."""

    round: int
    widths: Widths
    share: float
    score: float


class Proposer(Protocol):
    """What `search` asks for: at most `count` widths, which need not meet the budget."""

    def propose(
        self, task: Task, memory: Sequence[Entry], count: int, rng: np.random.Generator
    ) -> list[Widths]: ...


def make_task(config: UNetConfig, target: float, scores: Mapping[str, np.ndarray]) -> Task:
    """The task of one group; ValueError if the network cannot become as small as the target."""
    found = {name: v for name, v in variables(config).items() if len(v.menu) > 1}
    menus = {name: _thinned(variable.menu) for name, variable in found.items()}
    task = Task(config, target, scores, found, menus)
    least = task.share({name: menu[0] for name, menu in menus.items()})
    if target < least - TOLERANCE:
        raise ValueError(
            f"a group's budget is {target:.3f} of the teacher's FLOPs, but the widths inside its "
            f"blocks shrink to {least:.3f} at least: raise --config.prune.k or --config.prune.mean"
        )
    return task


def uniform(task: Task) -> Widths:
    """Widths with one ratio for all variables, moved to the target; ignores the importance."""
    # Equal scores make the steps towards the target independent of the importance.
    task = task._replace(scores={name: np.ones(v.width) for name, v in task.variables.items()})

    def at(ratio: float) -> Widths:
        return {
            name: max((w for w in menu if w <= ratio * menu[-1] + 1e-9), default=menu[0])
            for name, menu in task.menus.items()
        }

    ratios = sorted({w / menu[-1] for menu in task.menus.values() for w in menu})
    starts = sorted(map(at, ratios), key=lambda widths: abs(task.share(widths) - task.target))
    for widths in starts[:-1]:
        with contextlib.suppress(ValueError):  # from some ratios no steps reach the target
            return move_to_target(task, widths)
    return move_to_target(task, starts[-1])


class Step(NamedTuple):
    """A change of one variable by one width. price: importance lost per change of F / F_0, negative
    for a step up, which regains importance."""

    price: float
    name: str
    width: int
    share: float


def steps(task: Task, widths: Widths, direction: int) -> list[Step]:
    """All steps from `widths` in one direction: 1 is wider, -1 is narrower."""
    share, found = task.share(widths), []
    for name, menu in task.menus.items():
        i = menu.index(widths[name]) + direction
        if 0 <= i < len(menu):
            changed = task.share(widths | {name: menu[i]})
            lost = task.lost(name, menu[i]) - task.lost(name, widths[name])
            found.append(Step(lost / abs(changed - share), name, menu[i], changed))
    return found


def move_to_target(task: Task, widths: Widths) -> Widths:
    """The widths after greedy steps of lowest price, each of which comes closer to the target.

    Raises ValueError if the last step ends outside the tolerance.
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
            f"no widths come within {TOLERANCE:.0%} of the share {task.target:.3f}, the nearest "
            f"have {share:.3f}: prune a wider network, or one with fewer norm groups"
        )
    return widths


class Greedy:
    """A proposer that varies the best widths so far.

    It proposes the best widths after one to three random pairs of a step up and a step down, after
    one pair that the importance chooses, and random widths. The first round begins at `uniform`.
    """

    def propose(
        self, task: Task, memory: Sequence[Entry], count: int, rng: np.random.Generator
    ) -> list[Widths]:
        start = min(memory, key=lambda entry: entry.score).widths if memory else uniform(task)
        swaps = [
            swapped(task, start, rng, int(rng.integers(1, 4))) for _ in range(max(1, count - 2))
        ]
        if not memory:
            return [start, *swaps, random_widths(task, rng)][:count]
        return [*swaps, guided(task, start), random_widths(task, rng)][:count]


def random_widths(task: Task, rng: np.random.Generator) -> Widths:
    """Independent widths from the menus."""
    return {name: int(rng.choice(menu)) for name, menu in task.menus.items()}


def guided(task: Task, widths: Widths) -> Widths:
    """The widths after the step down that loses least importance per FLOPs, and the step up of
    another variable that regains most."""
    down = min(steps(task, widths, -1), default=None)
    up = min((s for s in steps(task, widths, 1) if not down or s.name != down.name), default=None)
    return widths | {step.name: step.width for step in (down, up) if step}


def swapped(task: Task, widths: Widths, rng: np.random.Generator, pairs: int = 1) -> Widths:
    """The widths after `pairs` random steps up and `pairs` down, each of a different variable."""
    widths, moved = dict(widths), set()
    for direction in (1, -1) * pairs:
        places = {name: menu.index(widths[name]) + direction for name, menu in task.menus.items()}
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
    seed: tuple[int, ...] = (0,),
    remember: bool = True,
) -> tuple[Entry, list[Entry]]:
    """(the best entry, the whole memory); rounds that are in the file are not repeated.

    Args:
        evaluate: function from widths to their score; lower is better.
        remember: False gives the proposer an empty memory in every round, as a control.
    """
    memory, done = read_memory(memory_path, task)
    for number in range(done, rounds):
        rng = np.random.default_rng([*seed, number])
        known = {_key(entry.widths) for entry in memory}
        fresh: list[Entry] = []
        for _ in range(ATTEMPTS):
            missing = per_round - len(fresh)
            shown = memory if remember else []
            for proposal in proposer.propose(task, shown, missing, rng) if missing else ():
                try:
                    widths = move_to_target(task, proposal)
                except ValueError:  # no steps lead from the proposal to the target
                    continue
                if _key(widths) not in known:
                    known.add(_key(widths))
                    score = float(evaluate(widths))
                    # min() of scores with a NaN depends on their order.
                    score = score if math.isfinite(score) else math.inf
                    fresh.append(Entry(number, widths, task.share(widths), score))
        memory += fresh
        lines = [*(entry._asdict() for entry in fresh), {"done": number}]
        with open(memory_path, "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
    if not memory:
        raise ValueError(
            f"{rounds} rounds of {per_round} proposals found no widths: raise --config.prune.rounds"
        )
    best = min(memory, key=lambda entry: entry.score)
    if not math.isfinite(best.score):
        raise ValueError(f"no candidate of {memory_path} has a finite loss: check the teacher")
    return best, memory


def read_memory(path: str | os.PathLike, task: Task) -> tuple[list[Entry], int]:
    """(entries, number of finished rounds) in a memory's file; deletes an unfinished round in it.

    Raises ValueError if the entries belong to another network or budget.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        return [], 0
    rows, content = [], path.read_text()
    for line in content.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last line, if its writer was killed
            rows.append(json.loads(line))
    done = max((row["done"] for row in rows if "done" in row), default=-1) + 1
    rows = [row for row in rows if row.get("round", row.get("done")) < done]
    entries = [Entry(**row) for row in rows if "done" not in row]
    for entry in entries:
        if entry.widths.keys() != task.variables.keys() or not task.fits(entry.share):
            raise ValueError(
                f"{path} holds the search of another network or budget: give another "
                "folder as --config.experts"
            )
    finished = "".join(json.dumps(row) + "\n" for row in rows)
    if finished != content:
        with atomic_write(path) as temporary:
            temporary.write_text(finished)
    return entries, done


def _thinned(menu: tuple[int, ...]) -> tuple[int, ...]:
    """At most CHOICES evenly spaced entries of a menu, with both ends."""
    at = np.linspace(0, len(menu) - 1, min(CHOICES, len(menu))).round().astype(int)
    return tuple(menu[i] for i in at)


def _key(widths: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Widths as a hashable value."""
    return tuple(sorted(widths.items()))


@functools.lru_cache(maxsize=2**14)  # most widths recur among neighbours of candidates
def _share(config: UNetConfig, widths: tuple[tuple[str, int], ...]) -> float:
    """F / F_0 of the network with these widths."""
    return flops(pruned_config(config, dict(widths))) / flops(config)
