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

import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cheapscale.data.digest import digest
from cheapscale.data.files import whole_or_nothing
from cheapscale.evaluation.cost import cost_of_call
from cheapscale.models.unet import UNet, unet
from cheapscale.pruning import budget, importance, search
from cheapscale.pruning.language_model import LanguageModel
from cheapscale.pruning.partition import step_owners
from cheapscale.pruning.structure import PLANS, masked, prune, pruned_config
from cheapscale.stages import data
from cheapscale.stages.groups import (
    KINDS,
    Groups,
    anchor_positions,
    draw_levels,
    level_loss,
    levels_of,
    make_groups,
    weight,
)
from cheapscale.stages.networks import denoiser_of, fingerprint, load_teacher
from cheapscale.stages.sampling import levels
from cheapscale.stages.specialists import assessment_path, read_assessment, write_manifest
from cheapscale.training.checkpoint import Loaded, claim_workdir
from cheapscale.training.stage import Job
from cheapscale.training.state import stream_key

PyTree = Any
SCORES = ("taylor", "accumulated", "all_times", "diff_pruning", "magnitude", "chance")
BUDGETS = ("linear", "snr", "loss", "flat")
PROPOSERS = ("greedy", "evolution", "chance", "uniform", "llm")
# Fields of config.prune that only stage=prune reads.
OF_TRAINING = ("group", "overlap", "distil", "start", "optimiser")


class Proxy(NamedTuple):
    """Images and noise that are the same for every candidate."""

    images: np.ndarray
    labels: np.ndarray


def build(config) -> Job:
    """The job of one set of specialists, into the folder `config.specialists`."""
    settings, folder = config.prune.to_dict(), config.specialists
    if not folder:
        raise ValueError("config.specialists is empty: name the folder of the set")
    check_settings(settings)
    teacher = load_teacher(config.teacher)
    if "specialists" in teacher.meta["diffusion"]:
        raise ValueError(f"{config.teacher} is a set of specialists: prune its base")
    source = data.open_data(config.data)
    data.check_teacher(teacher, source)

    origin = {
        "teacher": fingerprint(teacher.params), "data": source.fingerprint(), "seed": config.seed,
        "settings": {k: v for k, v in settings.items() if k not in OF_TRAINING},
    }  # fmt: skip
    same = digest(origin)

    def done(group: int) -> bool:
        if not assessment_path(folder, group).is_file():
            return False
        if read_assessment(folder, group)["identity"] != same:
            raise ValueError(
                f"{assessment_path(folder, group)} is of another teacher, data set or "
                "config.prune: name another config.specialists"
            )
        return True

    def prepare() -> "Assessment":
        claim_workdir(folder, origin, ())  # the searches of another origin are not gone on with
        proxy = read_proxy(source, max(settings["proxy_images"], settings["score_images"]))
        return Assessment(teacher, proxy, settings, config.seed, folder)

    def run_shard(assessment: "Assessment", group: int, mesh) -> dict:
        began, before = time.monotonic(), assessment.flops()
        found = assessment.assess(group) | {"identity": same}
        # what every group shares, such as losses at anchors, is the first one's
        before = 0.0 if group == 0 else before
        found["ledger"] = {
            "flops": assessment.flops() - before, "device_seconds": time.monotonic() - began,
        }  # fmt: skip
        with whole_or_nothing(assessment_path(folder, group)) as temporary:
            temporary.write_text(json.dumps(found) + "\n")
        return {"share": found["share"], "score": found["score"]}

    def finish(assessment: "Assessment") -> dict:
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


def read_proxy(source, num: int) -> Proxy:
    """The first images of a fixed shuffle."""
    pick = np.random.default_rng(0).permutation(len(source))[:num]
    items = [source[int(i)] for i in pick]
    labels = np.array([item.get("label", 0) for item in items], np.int32)
    return Proxy(np.stack([item["image"] for item in items]), labels)


class Billed:
    """A compiled function that keeps account of the FLOPs of its calls."""

    def __init__(self, fn: Callable):
        self.fn, self.programs, self.flops = jax.jit(fn), {}, 0.0

    def __call__(self, *args):
        shapes = jax.tree.map(jax.typeof, args)
        leaves, tree = jax.tree.flatten(shapes)
        program = self.programs.get((tree, *leaves))
        if program is None:
            program = self.programs[tree, *leaves] = self.fn.lower(*args).compile()
        self.flops += float((program.cost_analysis() or {}).get("flops", 0.0))
        return program(*args)


class Assessment:
    """What all groups of a set share: the base, its levels, the proxy images, one compiled loss."""

    def __init__(self, teacher: Loaded, proxy: Proxy, settings: dict, seed: int, folder: str):
        self.teacher, self.proxy, self.settings, self.seed = teacher, proxy, settings, seed
        self.folder = folder
        self.diffusion = teacher.meta["diffusion"]
        self.net = unet(**teacher.meta["networks"]["net"])
        self.levels = levels_of(self.diffusion)
        self.anchors = anchor_positions(self.levels)
        self.loss = Billed(self._loss)
        self.grad = Billed(jax.grad(self._mean_loss))
        self.others = 0.0  # FLOPs of programs that served one candidate
        self.groups = self._groups()
        self.targets = self._targets()

    def _loss(self, variables, x, label, sigma, key, net: UNet | None = None):
        """[b] at given levels; variables may carry masks. net: a narrower one."""
        D = denoiser_of(net or self.net, variables, self.diffusion)
        return level_loss(D, x, sigma, key, self.diffusion, label=label)

    def assess(self, group: int) -> dict:
        """Widths and channels of one group."""
        target, settings = float(self.targets[group]), self.settings
        if target >= 1:  # the whole network, only fine-tuned
            whole = {"share": 1.0, "compiled_share": 1.0, "score": self.score({}, group)}
            return {"widths": {}, "keep": {}} | whole
        task = search.make_task(self.net.config, target, self.scores(group), settings["plan"])
        widths = search.uniform(task)
        if settings["proposer"] != "uniform":
            best, _ = search.search(
                task,
                lambda candidate: self.score(task.keep(candidate), group),
                self.proposer(),
                rounds=settings["rounds"],
                per_round=settings["per_round"],
                memory_path=f"{self.folder}/memory-{group}.jsonl",
                seed=self.seed,
                remember=settings["remember"],
            )
            widths = best.widths
        keep = task.keep(widths)
        return {
            "widths": widths,
            "keep": {name: np.asarray(channels).tolist() for name, channels in keep.items()},
            "share": task.share(widths),
            "compiled_share": self.compiled_flops(keep) / self.base_flops,
            "score": self.score(keep, group),
        }

    def compiled_flops(self, keep: dict) -> float:
        """FLOPs of one call for one image of the network cut to `keep`, as compiled."""
        net = UNet(pruned_config(self.net.config, keep)) if keep else self.net
        image = jax.ShapeDtypeStruct(self.proxy.images[:1].shape, np.float32)
        label = jax.ShapeDtypeStruct((1,), np.int32)
        shapes = jax.eval_shape(
            lambda x, y: net.init(jax.random.key(0), x, x[:, 0, 0, 0], label=y), image, label
        )

        def call(variables, x, label):
            return denoiser_of(net, variables, self.diffusion)(x, 1.0, label=label)

        return cost_of_call(call, shapes, image, label).flops

    @functools.cached_property
    def base_flops(self) -> float:
        return self.compiled_flops({})

    def flops(self) -> float:
        """What the calls so far have cost."""
        return self.loss.flops + self.grad.flops + self.others

    def proposer(self) -> search.Proposer:
        name = self.settings["proposer"]
        if name == "llm":
            return LanguageModel(self.settings["llm_url"], self.settings["llm_model"])
        return {"greedy": search.Greedy, "evolution": search.Evolution, "chance": search.Chance}[
            name
        ]()

    def score(self, keep: dict, group: int) -> float:
        """Proxy loss of the network cut to `keep`: fixed images, noise and stratified levels."""
        num = self.settings["proxy_images"]
        first, last = self.groups.positions(group)
        count = min(self.settings["proxy_levels"], last - first + 1)
        strata = first + (np.arange(count) + 0.5) * (last - first + 1) / count
        sigma = self.groups.levels[np.floor(strata).astype(int)]
        sigma = np.resize(sigma, num).astype(np.float32)
        params, config = self.teacher.params, self.net.config
        if self.settings["plan"] == "inner":  # one program for all candidates
            return float(np.mean(self._in_batches(masked(params, config, keep), sigma, "proxy")))
        # narrower streams regroup the norms behind concatenations: each candidate its own program
        narrow = UNet(pruned_config(config, keep))
        loss = Billed(functools.partial(self._loss, net=narrow))
        variables = {"params": prune(params, config, keep)}
        score = float(np.mean(self._in_batches(variables, sigma, "proxy", loss=loss)))
        self.others += loss.flops
        return score

    def _in_batches(self, variables, sigma, stream, size=64, loss=None):
        run, out = loss or self.loss, []
        for start in range(0, len(sigma), size):
            rows = np.arange(start, start + size) % len(sigma)  # one shape, one program
            pick = rows % len(self.proxy.images)  # a small set serves several times
            key = stream_key(self.seed, stream, start)
            images, labels = self.proxy.images[pick], self.proxy.labels[pick]
            losses = run(variables, images, labels, sigma[rows], key)
            out.append(np.asarray(losses)[: len(sigma) - start])
        return np.concatenate(out)

    def scores(self, group: int) -> importance.Scores:
        """Importance of every channel, by the chosen criterion."""
        kind, config, params = self.settings["importance"], self.net.config, self.teacher.params
        if kind == "magnitude":
            return importance.magnitude(params, config)
        if kind == "chance":
            return importance.chance(config, (self.seed, group))
        whole = Groups(self.levels, np.array([0, len(self.levels)]))
        if kind == "diff_pruning":
            cut = importance.informative_levels(self.anchor_losses, self.settings["threshold"])
            last = self.anchors[max(cut, 1) - 1] + 1
            whole = Groups(self.levels, np.array([0, last, len(self.levels)]))
        where = (self.groups, group) if kind in ("taylor", "accumulated") else (whole, 0)
        grads = importance.gradients(self.grad, params, self.batches(*where))
        summed = kind in ("accumulated", "diff_pruning")
        return (importance.accumulated if summed else importance.taylor)(grads, params, config)

    def _mean_loss(self, params, x, label, sigma, key):
        return self._loss({"params": params}, x, label, sigma, key).mean()

    def batches(self, groups: Groups, group: int):
        """The fixed batches that channels are scored on."""
        count, size = self.settings["score_batches"], self.settings["score_images"]
        for i in range(count):
            k_level, k_noise = jax.random.split(stream_key(self.seed, f"score {group}", i))
            rows = np.random.default_rng((self.seed, i)).permutation(len(self.proxy.images))[:size]
            sigma = draw_levels(k_level, len(rows), self.diffusion, groups, groups.positions(group))
            yield self.proxy.images[rows], self.proxy.labels[rows], sigma, k_noise

    @functools.cached_property
    def anchor_losses(self) -> np.ndarray:
        """The base's squared error of predicted noise at every anchor."""
        variables, size = {"params": self.teacher.params}, self.settings["score_images"]
        found = []
        for anchor in self.anchors:
            sigma = np.full(size, self.levels[anchor], np.float32)
            weighted = self._in_batches(variables, sigma, "anchor").mean()
            # from the teacher's own weight to the error of predicted noise, x0's over sigma^2
            found.append(weighted / (sigma[0] ** 2 * weight(self.diffusion, sigma[0])))
        return np.array(found)

    def _groups(self) -> Groups:
        settings, kind = self.settings, self.settings["partition"]
        measured = None
        if kind == "loss":
            measured = np.log(self.anchor_losses)
        elif kind == "gradient":
            measured = self.anchor_gradients()
        return make_groups(
            self.diffusion,
            settings["groups"],
            kind,
            grid=self.grid(),
            anchors=self.anchors,
            measured=measured,
        )

    def anchor_gradients(self) -> np.ndarray:
        """The loss's gradient at every anchor, [anchors, weights]."""
        size = self.settings["score_images"]
        images, labels = self.proxy.images[:size], self.proxy.labels[:size]
        key = stream_key(self.seed, "anchor", 0)
        batches = (
            (images, labels, np.full(len(images), self.levels[anchor], np.float32), key)
            for anchor in self.anchors
        )
        return np.stack([
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
            for grads in importance.gradients(self.grad, self.teacher.params, batches)
        ])  # fmt: skip

    def _targets(self) -> np.ndarray:
        """F_i / F0 of every group, from the cleanest."""
        settings, count = self.settings, self.settings["groups"]
        kind, mean = settings["budget"], settings["mean"]
        by_steps = settings["weigh"] == "steps"
        weights = self.sampler_steps() if by_steps else np.diff(self.groups.edges)
        if kind == "flat":
            return np.full(count, mean or 0.8)
        if kind == "linear":
            k = settings["k"]
            if mean:
                k = budget.solve_k(count, mean, order=settings["order"], weights=weights)
            return budget.shares(count, k, settings["order"])
        if kind == "snr":
            difficulty = np.clip(self.groups.decibels(), -20, 20)
        else:
            losses, owner = np.log(self.anchor_losses), self.anchors
            difficulty = np.array([
                losses[(owner >= a) & (owner < b)].mean()
                for a, b in zip(self.groups.edges, self.groups.edges[1:])
            ])  # fmt: skip
        return budget.by_difficulty(difficulty, mean or 0.8, weights)

    def grid(self) -> np.ndarray:
        """The levels of the sampler that the set is for."""
        settings = self.settings
        return levels(self.diffusion, settings["steps"], "sample", settings["spacing"])

    def sampler_steps(self) -> np.ndarray:
        """Steps of the sampler's grid that each group owns."""
        owners = step_owners(self.grid(), self.groups.borders)
        return np.bincount(owners, minlength=self.groups.count)

    def manifest(self, found: list[dict]) -> dict:
        """What the set says of itself; found: the assessments of its groups."""
        steps, sizes = self.sampler_steps(), np.diff(self.groups.edges)
        shares = [row["share"] for row in found]
        units = found[0]["ledger"]
        return {
            "teacher": fingerprint(self.teacher.params),
            "base": self.teacher.meta,
            "owner": "a step belongs to the group of its noisier end",
            "edges": self.groups.edges.tolist(),
            "borders": list(self.groups.borders),
            "decibels": self.groups.decibels().tolist(),
            "targets": np.asarray(self.targets).tolist(),
            "shares": shares,
            "compiled_shares": [row["compiled_share"] for row in found],
            "compiled_flops": self.base_flops,
            "ledger": {unit: sum(row["ledger"][unit] for row in found) for unit in units},
            "mean_shares": {
                "positions": budget.mean_share(shares, sizes),
                f"{self.settings['steps']} {self.settings['spacing']} steps": budget.mean_share(
                    shares, steps
                ),
            },
            "sampler_steps": steps.tolist(),
            "settings": self.settings,
        }
