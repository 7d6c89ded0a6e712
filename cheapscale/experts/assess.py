"""Step-adaptive training (arXiv 2312.13307), between its two training stages: for each expert, its
FLOPs and the channels of the base network that it keeps.

    groups    <- contiguous noise levels, counted from the cleanest          partition.py
    F_i       <- (i/N + (1 - i/N) k) F_0,   i = N at the highest SNR         budget.py
    for each group i:
        S     <- importance of every channel on the group's noise levels     importance.py
        R     <- search of widths within F_i by the loss on proxy images     search.py
        keep  <- the R channels of highest S in each layer                   structure.py

Each shard of the job assesses one group and writes the channels of the base's EMA weights that its
expert keeps. Stage "prune" then fine-tunes each expert separately.
"""

import functools
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from cheapscale.data.digest import digest
from cheapscale.data.files import atomic_write, read_json
from cheapscale.data.sources import open_data
from cheapscale.diffusion.denoiser import denoising_loss
from cheapscale.experts import budget, importance, search
from cheapscale.experts.language_model import LanguageModel
from cheapscale.experts.partition import Groups, anchor_positions, make_groups
from cheapscale.experts.structure import masked
from cheapscale.teacher.data import check_teacher
from cheapscale.teacher.experts import SHARED, expert_of_steps, write_manifest
from cheapscale.teacher.load import load_network_teacher
from cheapscale.teacher.sampling import levels
from cheapscale.teacher.teacher import Teacher
from cheapscale.training import mesh as sharding
from cheapscale.training.checkpoint import checkpoints_folder, differing_keys
from cheapscale.training.cost import FlopCounter
from cheapscale.training.stage import Job
from cheapscale.training.state import stream_key

PyTree = Any
SCORE_BATCHES, SCORE_IMAGES = 8, 128  # gradients that the importance averages, images per gradient
PROXY_LEVELS = 16  # noise levels of a group at which candidates are compared
PROXY_BATCH = 64  # images per call of the loss


class Assessment:
    """The assessment of all groups: teacher, proxy images, groups and budgets.

    settings: config.prune. begun: content of the file SHARED, if an earlier process of the same
    assessment has written it.
    """

    def __init__(
        self,
        teacher: Teacher,
        images: np.ndarray,
        labels: np.ndarray,
        settings: dict,
        *,
        seed: int,
        folder: str,
        begun: dict | None = None,
    ):
        began = time.monotonic()
        self.teacher, self.images, self.labels = teacher, images, labels
        self.settings, self.seed, self.folder = settings, seed, folder
        self.loss, self.gradient = FlopCounter(level_loss), FlopCounter(jax.grad(mean_loss))
        self.resumed_flops = 0.0  # estimated FLOPs of the searches' rounds in earlier processes
        begun = begun or {}
        if begun:
            self.groups = Groups(teacher.process.levels(), np.asarray(begun["edges"]))
        else:
            groups = self._groups()
            # All processes must use the same groups, but curves that each one measures may differ
            # in their last digits.
            self.groups = groups._replace(edges=sharding.broadcast_from_host0(groups.edges))
        k, mean, order = (settings[name] for name in ("k", "mean", "order"))
        self.targets = budget.targets(k, mean, order, self.groups.sizes)  # F_i / F_0
        # An unreachable budget raises ValueError here, before the first group's search.
        for target in self.targets:
            search.make_task(teacher.net.config, float(target), {})
        self.shared = {
            "edges": self.groups.edges.tolist(),
            "targets": self.targets.tolist(),
            "flops": begun.get("flops", self.flops()),
            "seconds": begun.get("seconds", time.monotonic() - began),
        }

    def _groups(self) -> Groups:
        """The groups of `settings`; measures the teacher's curve if the partition needs one."""
        count, kind, measured = self.settings["groups"], self.settings["partition"], None
        levels = self.teacher.process.levels()
        if kind == "loss":
            # The loss spans orders of magnitude, so its logarithm is clustered.
            anchors = levels[anchor_positions(len(levels))]
            measured = np.log([self._anchor_loss(sigma) for sigma in anchors])
        return make_groups(self.teacher.process, count, kind, measured)

    def _anchor_loss(self, sigma: float) -> float:
        """The teacher's mean squared error of the predicted noise eps at the level sigma."""
        sigmas = np.full(len(self.images[:SCORE_IMAGES]), sigma, np.float32)
        loss = self._losses({}, sigmas, "anchor").mean()
        # The loss is w(sigma) |D - x0|^2. From x0 = x_sigma - sigma eps, the squared error of x0 is
        # sigma^2 times the squared error of eps.
        return loss / (sigma**2 * self.teacher.process.weight(sigma))

    def scores(self, group: int) -> importance.Scores:
        """The importance of every channel of the teacher for a group, as config.prune sets it."""
        params, config = self.teacher.params, self.teacher.net.config
        if self.settings["importance"] == "magnitude":
            return importance.magnitude(params, config)
        gradients = (self._gradient(*batch) for batch in self.score_batches(group))
        return importance.taylor(gradients, params, config)

    def score_batches(self, group: int) -> Iterator[tuple]:
        """Yields (rows of the images, sigma of the group's levels, key) for each gradient."""
        interval = self.groups.interval(group)
        for i in range(SCORE_BATCHES):
            k_sigma, k_eps = jax.random.split(stream_key(self.seed, f"score {group}", i))
            rng = np.random.default_rng((self.seed, i))
            rows = rng.permutation(len(self.images))[:SCORE_IMAGES]
            process = self.teacher.process
            # Antithetic levels reduce the variance of the gradient.
            yield rows, process.draw_sigma(k_sigma, len(rows), *interval, antithetic=True), k_eps

    def _gradient(self, rows, sigma: np.ndarray, key: jax.Array) -> PyTree:
        """The gradient of the mean loss with respect to the weights, as NumPy arrays."""
        grads = self.gradient(self._placed, {}, self.images[rows], self.labels[rows], sigma, key)
        return jax.device_get(grads.params)

    @functools.cached_property
    def _placed(self) -> Teacher:
        return jax.device_put(self.teacher)  # copied to the device once, not in every call

    def score(self, keep: dict, group: int) -> float:
        """The proxy loss of the network cut to `keep`.

        Every candidate of a group is evaluated on the same images, noise and levels, so that the
        difference of two losses has little variance.
        """
        first, end = self.groups.edges[group : group + 2]
        # One level from the middle of each of `count` equal parts of the group's positions.
        count = min(PROXY_LEVELS, end - first)
        strata = first + (np.arange(count) + 0.5) * (end - first) / count
        sigma = self.groups.levels[np.floor(strata).astype(int)]
        sigma = np.resize(sigma, len(self.images)).astype(np.float32)
        return float(self._losses(keep, sigma, "proxy").mean())

    def _losses(self, keep: dict, sigma: np.ndarray, stream: str) -> np.ndarray:
        """The losses [n] of the network cut to `keep`, with the level sigma [n] for each image."""
        teacher = self.teacher
        # Masks instead of smaller weights: one compiled program evaluates every candidate.
        params, masks = masked(teacher.params, teacher.net.config, keep)
        network, masks = jax.device_put((teacher.replace(params=params), masks))
        size, losses = min(PROXY_BATCH, len(sigma)), []
        for start in range(0, len(sigma), size):
            # The last batch wraps around to keep its shape, since a new shape compiles again.
            rows = np.arange(start, start + size) % len(sigma)
            key = stream_key(self.seed, stream, start)
            images, labels = self.images[rows], self.labels[rows]
            batch = self.loss(network, masks, images, labels, sigma[rows], key)
            losses.append(np.asarray(batch)[: len(sigma) - start])
        return np.concatenate(losses)

    def assess(self, group: int) -> dict:
        """{widths, keep, share, score} of one group: its widths, its channels, F / F_0 and loss."""
        target, settings = float(self.targets[group]), self.settings
        if target >= 1:  # this group keeps the whole network
            return {"widths": {}, "keep": {}, "share": 1.0, "score": self.score({}, group)}
        task = search.make_task(self.teacher.net.config, target, self.scores(group))
        resumed = 0
        if settings["proposer"] == "uniform":
            widths = search.uniform(task)
        else:
            path = f"{self.folder}/memory-{group}.jsonl"
            resumed = len(search.read_memory(path, task)[0])
            best, _ = search.search(
                task,
                lambda candidate: self.score(task.keep(candidate), group),
                make_proposer(settings),
                rounds=settings["rounds"],
                per_round=settings["per_round"],
                memory_path=path,
                seed=(self.seed, group),
                remember=settings["remember"],
            )
            widths = best.widths
        before, keep = self.flops(), task.keep(widths)
        score = self.score(keep, group)
        # Every entry of a resumed memory has cost as much as this one evaluation.
        self.resumed_flops += resumed * (self.flops() - before)
        return {
            "widths": widths,
            "keep": {name: channels.tolist() for name, channels in keep.items()},
            "share": task.share(widths),
            "score": score,
        }

    def flops(self) -> float:
        """The FLOPs of all network calls so far, including those of resumed searches."""
        return self.loss.flops + self.gradient.flops + self.resumed_flops

    def manifest(self, found: list[dict]) -> dict:
        """The content of the set's manifest.json, from the groups' assessments, cleanest first."""
        settings, shares = self.settings, [row["share"] for row in found]
        grid = levels(self.teacher.process, settings["steps"], "sample", settings["spacing"])
        experts = expert_of_steps(grid, self.groups.boundaries)
        steps = np.bincount(experts, minlength=self.groups.count)
        return {
            "teacher": self.teacher.fingerprint,
            "base": self.teacher.meta,
            "edges": self.groups.edges.tolist(),
            "boundaries": self.groups.boundaries,
            "decibels": self.groups.decibels().tolist(),
            "targets": self.targets.tolist(),
            "shares": shares,
            # How often a sampler calls each expert depends on its grid, and so does the mean.
            "mean_shares": {
                name: float(np.average(shares, weights=weights))
                for name, weights in (
                    ("positions", self.groups.sizes),
                    (f"{settings['steps']} {settings['spacing']} steps", steps),
                )
            },
            "sampler_steps": steps.tolist(),
            "ledger": {
                unit: sum(row["ledger"][unit] for row in found) for unit in found[0]["ledger"]
            },
            "settings": settings,
        }


def level_loss(teacher: Teacher, masks: PyTree, x, label, sigma, key) -> jax.Array:
    """The teacher's loss [b] at the levels sigma [b].

    masks: the second result of `structure.masked`, or {} for the whole network.
    """
    variables = {"keep": masks} if masks else {}
    D = functools.partial(teacher.denoise, label=label, variables=variables)
    return denoising_loss(D, teacher.process, x, sigma, key)


def mean_loss(*args) -> jax.Array:
    """The mean of `level_loss` over the batch."""
    return level_loss(*args).mean()


def make_proposer(settings: dict) -> search.Proposer:
    """The search's proposer, by config.prune."""
    if settings["proposer"] == "llm":
        return LanguageModel(settings["llm_url"], settings["llm_model"])
    return search.Greedy()


def build(config) -> Job:
    """The job that assesses a set of experts, one group per shard, in the folder config.experts."""
    settings, folder = config.prune.to_dict(), config.experts
    if not folder:
        raise ValueError("experts is empty: give --config.experts=DIR, the folder of the set")
    if checkpoints_folder(folder).is_dir():
        raise ValueError(f"config.experts={folder} holds a training run: name a new folder")
    make_proposer(settings)  # raises ValueError now if the language model is not configured
    teacher = load_network_teacher(config.teacher, "experts are pruned from one network")
    source = open_data(config.data)
    check_teacher(teacher, source)
    origin = {
        "teacher": teacher.fingerprint,
        "data": source.fingerprint(),
        "seed": config.seed,
        "settings": {name: value for name, value in settings.items() if name != "llm_url"},
    }
    identity, shared = digest(origin), pathlib.Path(folder) / SHARED

    def done(group: int) -> bool:
        path = assessment_path(folder, group)
        return path.is_file() and bool(_read_checked(path, shared, origin))

    def prepare() -> Assessment:
        ids = np.random.default_rng(0).permutation(len(source))[: settings["images"]]
        begun = _read_checked(shared, shared, origin) if shared.is_file() else {}
        # A late process may already find the file that process 0 has just written, while the
        # others found none: process 0 decides for all.
        begun = json.loads(str(sharding.broadcast_from_host0(np.array(json.dumps(begun)))))
        assessment = Assessment(
            teacher, *source.read(ids), settings, seed=config.seed, folder=folder, begun=begun
        )
        if not begun and jax.process_index() == 0:
            write_json(shared, assessment.shared | {"identity": identity, "origin": origin})
        return assessment

    def run_shard(assessment: Assessment, group: int, mesh) -> dict:
        began, before = time.monotonic(), assessment.flops()
        found = assessment.assess(group) | {"identity": identity}
        # The cost that all groups share, such as measured curves, is counted with group 0.
        shared_cost = assessment.shared if group == 0 else {"flops": 0.0, "seconds": 0.0}
        found["ledger"] = {
            "flops": assessment.flops() - before + shared_cost["flops"],
            "device_seconds": time.monotonic() - began + shared_cost["seconds"],
        }
        write_json(assessment_path(folder, group), found)
        return {"share": found["share"], "score": found["score"]}

    def finish(assessment: Assessment) -> dict:
        found = [read_assessment(folder, group) for group in range(settings["groups"])]
        manifest = assessment.manifest(found) | {"identity": identity}
        write_manifest(folder, manifest)
        names = ("edges", "targets", "shares", "mean_shares")
        return {"experts": folder} | {name: manifest[name] for name in names}

    return Job(
        num_shards=settings["groups"],
        items_per_shard=1,
        prepare=prepare,
        done=done,
        run_shard=run_shard,
        finish=finish,
    )


def assessment_path(folder: str, group: int) -> pathlib.Path:
    """The path of one group's assessment."""
    return pathlib.Path(folder) / f"assessment-{group}.json"


def read_assessment(folder: str, group: int) -> dict:
    """The assessment of one group: {widths, keep, share, score, ledger, identity}."""
    return read_json(assessment_path(folder, group))


def write_json(path: pathlib.Path, value: dict) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value) + "\n")


def _read_checked(path: pathlib.Path, shared: pathlib.Path, origin: dict) -> dict:
    """The content of a file; ValueError if an assessment with another `origin` has written it."""
    content = read_json(path, "identity")
    if content["identity"] != digest(origin):
        before = read_json(shared, "origin")["origin"] if shared.is_file() else {}
        rows = differing_keys(before, json.loads(json.dumps(origin)), ())
        raise ValueError(
            f"{path} was written with other settings ({'; '.join(rows)}): give another "
            "folder as --config.experts"
        )
    return content
