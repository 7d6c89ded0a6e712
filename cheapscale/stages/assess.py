"""Step-adaptive training, between its two stages: groups, budgets, widths (spec sections 2 to 4).

    groups    <- contiguous noise levels, counted from the cleanest
    F_i       <- (i/N + (1 - i/N) k) F0,   i = N at the highest SNR
    for each group:
        S     <- importance of every channel on the group's own levels          eq. of importance.py
        R     <- search of widths within F_i: propose, check FLOPs, prune, proxy loss, remember
        keep  <- the best channels of each variable, equally many in every norm group

One shard is one group. Everything is pruned from the same base, from its EMA weights; what is
written is which channels stay. `stage=prune` then fine-tunes one group after another.
"""

import json
import pathlib
import time

import jax
import numpy as np

from cheapscale.data.digest import digest
from cheapscale.data.files import whole_or_nothing
from cheapscale.pruning import budget
from cheapscale.pruning.language_model import LanguageModel
from cheapscale.pruning.structure import PLANS
from cheapscale.stages import data
from cheapscale.stages.assessment import Assessment, read_proxy
from cheapscale.stages.groups import KINDS
from cheapscale.stages.networks import fingerprint, load_teacher
from cheapscale.stages.prune import check_training
from cheapscale.stages.sampling import SPACINGS
from cheapscale.stages.specialists import (
    SHARED,
    assessment_path,
    read_assessment,
    write_manifest,
)
from cheapscale.training import sharding
from cheapscale.training.checkpoint import checkpoints_folder, differing_keys
from cheapscale.training.stage import Job

SCORES = ("taylor", "accumulated", "all_times", "diff_pruning", "magnitude", "chance")
BUDGETS = ("linear", "snr", "loss", "flat", "sensitivity")
PROPOSERS = ("greedy", "evolution", "chance", "uniform", "llm")
# Of fields of config.prune.
LEAST = {
    "groups": 1, "steps": 2, "score_batches": 1, "score_images": 1, "proxy_images": 1,
    "proxy_levels": 1, "rounds": 1, "per_round": 1, "finalists": 0, "trial": 0, "recovery": 0,
}  # fmt: skip
# Fields of config.prune that only stage=prune reads.
OF_TRAINING = ("group", "overlap", "distil", "start", "optimiser", "whole_rate")


def build(config) -> Job:
    """The job of one set of specialists, into the folder `config.specialists`."""
    settings, folder = config.prune.to_dict(), config.specialists
    if not folder:
        raise ValueError("config.specialists is empty: name the folder of the set")
    if checkpoints_folder(folder).is_dir():
        raise ValueError(f"config.specialists={folder} holds a run of its own: name a new folder")
    check_settings(settings)
    check_training(settings)
    teacher = load_teacher(config.teacher)
    if "specialists" in teacher.meta["diffusion"]:
        raise ValueError(f"{config.teacher} is a set of specialists: prune its base")
    source = data.open_data(config.data)
    data.check_teacher(teacher, source)

    origin = {
        "teacher": fingerprint(teacher.params), "data": source.fingerprint(), "seed": config.seed,
        "settings": {k: v for k, v in settings.items() if k not in (*OF_TRAINING, "llm_url")},
    }  # fmt: skip
    same, shared = digest(origin), pathlib.Path(folder) / SHARED

    def ours(path: pathlib.Path) -> dict:
        held = json.loads(path.read_text())
        if held["identity"] != same:
            rows = ["another teacher, data set, seed or config.prune"]
            if shared.is_file():
                before = json.loads(shared.read_text()).get("origin", {})
                rows = differing_keys(before, json.loads(json.dumps(origin)), ()) or rows
            raise ValueError(
                f"{path} is of another assessment ({'; '.join(rows)}): name another set folder"
            )
        return held

    def done(group: int) -> bool:
        path = assessment_path(folder, group)
        return path.is_file() and bool(ours(path))

    def prepare() -> Assessment:
        proxy = read_proxy(source, max(settings["proxy_images"], settings["score_images"]))
        begun = ours(shared) if shared.is_file() else {}
        # a process that comes late may find the file that the first has just written
        begun = json.loads(str(sharding.agreed(np.array(json.dumps(begun)))))
        found = Assessment(teacher, proxy, settings, config.seed, folder, begun)
        if not begun and jax.process_index() == 0:
            with whole_or_nothing(shared) as temporary:
                of_all = found.shared() | {"identity": same, "origin": origin}
                temporary.write_text(json.dumps(of_all) + "\n")
        return found

    def run_shard(assessment: Assessment, group: int, mesh) -> dict:
        began, before = time.monotonic(), assessment.flops()
        found = assessment.assess(group) | {"identity": same}
        # what every group shares, such as losses at anchors, is the first one's
        before = 0.0 if group == 0 else before
        found["ledger"] = {
            "flops": assessment.flops() - before,
            "device_seconds": time.monotonic() - began + (assessment.seconds if group == 0 else 0),
        }
        with whole_or_nothing(assessment_path(folder, group)) as temporary:
            temporary.write_text(json.dumps(found) + "\n")
        return {"share": found["share"], "score": found["score"]}

    def finish(assessment: Assessment) -> dict:
        found = [read_assessment(folder, group) for group in range(settings["groups"])]
        manifest = assessment.manifest(found) | {"identity": same}
        write_manifest(folder, manifest)
        return {"specialists": folder} | {
            name: manifest[name] for name in ("edges", "targets", "shares", "mean_shares")
        }

    return Job(
        num_shards=settings["groups"],
        items_per_shard=1,
        prepare=prepare,
        done=done,
        run_shard=run_shard,
        finish=finish,
    )


def check_settings(settings: dict) -> None:
    """Refuse unknown choices before anything is read."""
    for field, known in (
        ("importance", SCORES),
        ("budget", BUDGETS),
        ("proposer", PROPOSERS),
        ("partition", KINDS),
        ("order", budget.ORDERS),
        ("plan", tuple(PLANS)),
        ("weigh", ("positions", "steps")),
        ("spacing", SPACINGS),
    ):
        if settings[field] not in known:
            raise ValueError(
                f"prune.{field} is {settings[field]!r}: choose one of {', '.join(known)}"
            )
    if settings["proposer"] == "llm":
        if not settings["llm_url"] or not settings["llm_model"]:
            raise ValueError(
                "prune.proposer is 'llm': name the model's prune.llm_url and llm_model"
            )
        LanguageModel(settings["llm_url"], settings["llm_model"])
    if not 0 < settings["k"] <= 1 or not 0 <= settings["mean"] <= 1:
        raise ValueError(
            f"prune.k is {settings['k']} and prune.mean {settings['mean']}: k lies above 0 and at "
            "most at 1, a mean between 0 (as k says) and 1"
        )
    for field, least in LEAST.items():
        if settings[field] < least:
            raise ValueError(f"prune.{field} is {settings[field]}: at least {least}")
    if not 0 < settings["threshold"] < 1:
        raise ValueError(f"prune.threshold is {settings['threshold']}: between 0 and 1")
    if settings["finalists"] and settings["proposer"] == "uniform":
        raise ValueError(
            f"prune.finalists is {settings['finalists']} with prune.proposer 'uniform': they are "
            "the best candidates of a search; use 0"
        )
    if (settings["partition"] == "edges") != bool(settings["edges"]):
        raise ValueError(
            f"prune.edges is {tuple(settings['edges'])} with prune.partition "
            f"{settings['partition']!r}: partition='edges' is cut there, and no other"
        )
    for field, used in (
        ("budget", settings["budget"] == "sensitivity"),
        ("finalists", settings["finalists"] > 0),
    ):
        if used and settings["plan"] != "inner":
            raise ValueError(
                f"prune.{field} is {settings[field]!r} with prune.plan {settings['plan']!r}: it "
                "fine-tunes masked networks, so use plan 'inner'"
            )
