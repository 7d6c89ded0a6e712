"""A language model as the proposer of the width search, as in the paper (arXiv 2312.13307).

It works with any service that answers POST <url>/chat/completions like OpenAI's interface. As in
GENIUS (arXiv 2304.10970), each prompt contains the task and the whole memory bank, the list of
(widths, share, score), so the conversation does not grow from round to round. If a reply has no
JSON, unknown widths or a wrong budget, the model gets an error message and may try again; after
`attempts` replies the search ends with ValueError.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cheapscale.data.chat import chat, check_address
from cheapscale.experts.search import TOLERANCE, Entry, Task, Widths, move_to_target

REMEDY = (
    "check --config.prune.llm_url and --config.prune.llm_model, or give "
    "--config.prune.proposer=greedy and another folder"
)


class LanguageModel:
    """A `search.Proposer` that asks a language model.

    url: for example "http://localhost:8000/v1", as in `chat`. attempts: replies per proposal,
        corrections included.
    """

    def __init__(self, url: str, model: str, *, attempts: int = 4):
        check_address(url, "--config.prune.llm_url")
        if not model:
            raise ValueError(
                "prune.llm_model is empty: name a model of the service as --config.prune.llm_model"
            )
        self.url, self.model, self.attempts = url, model, attempts

    def propose(
        self, task: Task, memory: Sequence[Entry], count: int, rng: np.random.Generator
    ) -> list[Widths]:
        """`count` proposals; each prompt shows the memory and the proposals of this round."""
        found: list[Widths] = []
        for _ in range(count):
            found.append(self._one(task, memory, found))
        return found

    def _one(self, task: Task, memory: Sequence[Entry], proposed: Sequence[Widths]) -> Widths:
        messages = [{"role": "user", "content": prompt(task, memory, proposed)}]
        known = [*(entry.widths for entry in memory), *proposed]
        for _ in range(self.attempts):
            body = {"model": self.model, "messages": messages, "temperature": 0}
            reply = chat(self.url, body, remedy=REMEDY)
            try:
                return checked(task, reply, known)
            except ValueError as wrong:
                messages += [
                    {"role": "assistant", "content": reply},
                    {"role": "user", "content": f"{wrong} Reply with the corrected JSON object."},
                ]
        raise ValueError(
            f"the language model {self.model!r} gave no usable widths in {self.attempts} attempts; "
            f"its last reply was {reply[:200]!r}: use another model, or "
            "--config.prune.proposer=greedy in another folder"
        )


def prompt(task: Task, memory: Sequence[Entry], proposed: Sequence[Widths] = ()) -> str:
    """The text of a prompt: the task, every allowed width and every result so far."""
    menus = "\n".join(f"  {name}: {list(menu)}" for name, menu in task.menus.items())
    past = "\n".join(
        f"  score {entry.score:.6g} at share {entry.share:.4f}: {json.dumps(entry.widths)}"
        for entry in memory
    )
    now = "\n".join(f"  to be scored: {json.dumps(widths)}" for widths in proposed)
    return (
        "Choose the channel widths of a pruned U-Net that denoises images at one range of noise "
        "levels.\n"
        f"Its FLOPs must be {task.target:.3f} of the full network's, within {TOLERANCE:.3f}.\n"
        "The score is its loss on a fixed set before any recovery: lower is better.\n"
        f"Allowed widths, in the order of the network:\n{menus}\n"
        f"Results so far:\n{past or '  none'}\n{now}\n"
        "Reply with one JSON object that maps every name to one of its allowed widths, and "
        "nothing else."
    )


def checked(task: Task, reply: str, known: Sequence[Widths] = ()) -> Widths:
    """The widths in a reply, moved to the budget as the search moves every candidate.

    Raises ValueError, with an error message for the model, if the reply is not usable.
    """
    start, end = reply.find("{"), reply.rfind("}")
    try:
        widths: Any = json.loads(reply[start : end + 1])
    except json.JSONDecodeError:
        raise ValueError("The reply holds no JSON object.") from None
    if not isinstance(widths, Mapping) or set(widths) != set(task.variables):
        missing = sorted(set(task.variables) - set(widths))
        extra = sorted(set(widths) - set(task.variables))
        raise ValueError(f"Names are missing ({missing}) or unknown ({extra}).")
    for name, width in widths.items():
        if type(width) is not int or width not in task.menus[name]:
            raise ValueError(
                f"{name} has the width {width!r}, not one of {list(task.menus[name])}."
            )
    share = task.share(widths)
    if not task.fits(share):
        raise ValueError(f"The FLOPs are {share:.4f} of the network's, not {task.target:.4f}.")
    widths = move_to_target(task, widths)
    if widths in known:
        raise ValueError(
            "These widths, or the nearest ones at the target, have been proposed already: choose "
            "others."
        )
    return widths
