"""What one assessment knows: groups, budgets, the importance of channels and the proxy loss.

Stage `assess` (the job, one group a shard) asks it for a group's widths and channels.
"""

import functools
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from cheapscale.evaluation.cost import Billed, cost_of_call
from cheapscale.models.unet import UNet, unet
from cheapscale.pruning import budget, importance, search
from cheapscale.pruning.language_model import LanguageModel
from cheapscale.pruning.partition import step_owners
from cheapscale.pruning.structure import masked, prune, pruned_config
from cheapscale.stages import sensitivity
from cheapscale.stages.data import read
from cheapscale.stages.groups import (
    Groups,
    anchor_positions,
    draw_levels,
    level_loss,
    levels_of,
    make_groups,
    weight,
)
from cheapscale.stages.networks import denoiser_of, fingerprint
from cheapscale.stages.recovery import Recovery
from cheapscale.stages.sampling import levels
from cheapscale.training import sharding
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.state import stream_key

PyTree = Any


class Proxy(NamedTuple):
    """Images and noise that are the same for every candidate."""

    images: np.ndarray
    labels: np.ndarray


def read_proxy(source, num: int) -> Proxy:
    """The first images of a fixed shuffle."""
    return Proxy(*read(source, np.random.default_rng(0).permutation(len(source))[:num]))


def flattened(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


class Assessment:
    """What all groups of a set share: the base, its levels, the proxy images, one compiled loss."""

    def __init__(
        self,
        teacher: Loaded,
        proxy: Proxy,
        settings: dict,
        seed: int,
        folder: str,
        begun: Mapping[str, Any] = MappingProxyType({}),
    ):
        """begun: what `shared` said of the same assessment. ValueError where a budget is out of
        the network's reach."""
        began = time.monotonic()
        self.teacher, self.proxy, self.settings, self.seed = teacher, proxy, settings, seed
        self.folder = folder
        self.diffusion = teacher.meta["diffusion"]
        self.net = unet(**teacher.meta["networks"]["net"])
        self.levels = levels_of(self.diffusion)
        self.anchors = anchor_positions(self.levels)
        self.loss = Billed(self.level_loss)
        self.grad = Billed(jax.grad(self._mean_loss))
        self.others = 0.0  # FLOPs of programs that served one candidate
        if begun:
            self.groups = Groups(self.levels, np.asarray(begun["edges"]))
            self.targets = np.asarray(begun["targets"])
            self.others = begun["flops"]
        else:
            # what is measured may differ between processes in its last digits
            edges = sharding.agreed(self._groups().edges)
            self.groups = Groups(self.levels, edges)
            self.targets = sharding.agreed(self._targets())
        for target in self.targets[self.targets < 1]:  # before hours go into the others
            search.uniform(search.make_task(self.net.config, float(target), {}, settings["plan"]))
        # of what the groups share
        self.seconds = begun["seconds"] if begun else time.monotonic() - began

    def shared(self) -> dict:
        """What all groups share and what it has cost, to be kept."""
        return {
            "edges": self.groups.edges.tolist(),
            "targets": np.asarray(self.targets).tolist(),
            "flops": self.flops(),
            "seconds": self.seconds,
        }

    def level_loss(self, variables, x, label, sigma, key, net: UNet | None = None):
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
        resumed, trials = 0, []
        if settings["proposer"] == "uniform":
            widths = search.uniform(task)
        else:
            path = f"{self.folder}/memory-{group}.jsonl"
            resumed = len(search.read_memory(path, task)[0])
            best, memory = search.search(
                task,
                lambda candidate: self.score(task.keep(candidate), group),
                self.proposer(),
                rounds=settings["rounds"],
                per_round=settings["per_round"],
                memory_path=path,
                seed=(self.seed, group),
                remember=settings["remember"],
            )
            widths = best.widths
            if settings["finalists"]:
                trials = self.tried(memory, task, group)
                widths = min(trials, key=lambda row: row["loss"])["widths"]
        before, keep = self.flops(), task.keep(widths)
        score = self.score(keep, group)
        # what was remembered of a search that was cut short has cost as much an entry
        self.others += resumed * (self.flops() - before)
        return {
            "widths": widths,
            "keep": {name: np.asarray(channels).tolist() for name, channels in keep.items()},
            "share": task.share(widths),
            "compiled_share": self.compiled_flops(keep) / self.base_flops,
            "score": score,
        } | ({"trials": trials} if trials else {})

    def tried(self, memory: list[search.Entry], task: search.Task, group: int) -> list[dict]:
        """The finalists of a search with their loss after a trial, no number being the worst."""
        finalists = sorted(memory, key=lambda entry: entry.score)[: self.settings["finalists"]]
        losses = [self.trial(group, task.keep(entry.widths)) for entry in finalists]
        return [
            {"widths": entry.widths, "loss": loss if np.isfinite(loss) else float("inf")}
            for entry, loss in zip(finalists, losses)
        ]

    @functools.cached_property
    def trial(self) -> Recovery:
        return Recovery(self, self.settings["trial"])

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

    def masked(self, keep: dict) -> PyTree:
        """Variables of the whole network that compute what the one cut to `keep` does."""
        return masked(self.teacher.params, self.net.config, keep)

    def score(self, keep: dict, group: int) -> float:
        """Proxy loss of the network cut to `keep`."""
        if self.settings["plan"] == "inner":  # one program for all candidates
            return self.proxy_loss(self.masked(keep), group)
        # narrower streams regroup the norms behind concatenations: each candidate its own program
        config = self.net.config
        loss = Billed(functools.partial(self.level_loss, net=UNet(pruned_config(config, keep))))
        variables = {"params": prune(self.teacher.params, config, keep)}
        score = self.proxy_loss(variables, group, loss)
        self.others += loss.flops
        return score

    def proxy_loss(
        self,
        variables: PyTree,
        group: int,
        loss: Callable | None = None,
        proxy: Proxy | None = None,
    ) -> float:
        """The same of given variables: fixed images, noise and stratified levels. proxy: other
        images."""
        num = self.settings["proxy_images"]
        first, last = self.groups.positions(group)
        count = min(self.settings["proxy_levels"], last - first + 1)
        strata = first + (np.arange(count) + 0.5) * (last - first + 1) / count
        sigma = self.groups.levels[np.floor(strata).astype(int)]
        sigma = np.resize(sigma, num).astype(np.float32)
        return float(np.mean(self._in_batches(variables, sigma, "proxy", loss=loss, proxy=proxy)))

    def _in_batches(self, variables, sigma, stream, size=64, loss=None, proxy=None):
        run, proxy, out = loss or self.loss, proxy or self.proxy, []
        for start in range(0, len(sigma), size):
            rows = np.arange(start, start + size) % len(sigma)  # one shape, one program
            pick = rows % len(proxy.images)  # a small set serves several times
            key = stream_key(self.seed, stream, start)
            images, labels = proxy.images[pick], proxy.labels[pick]
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
        if kind in ("taylor", "accumulated"):
            return self._taylor(self.groups, group, accumulated=kind == "accumulated")
        return self.scores_of_all_levels

    @functools.cached_property
    def scores_of_all_levels(self) -> importance.Scores:
        """The same for every group: over all levels, or those that Diff-Pruning listens to."""
        count, early = len(self.levels), self.settings["importance"] == "diff_pruning"
        if early:
            cut = importance.informative_levels(self.anchor_losses, self.settings["threshold"])
            count = self.anchors[max(cut, 1) - 1] + 1
        edges = np.unique([0, count, len(self.levels)])
        return self._taylor(Groups(self.levels, edges), 0, accumulated=early)

    def _taylor(self, groups: Groups, group: int, *, accumulated: bool) -> importance.Scores:
        params = self.teacher.params
        grads = importance.gradients(self.grad, params, self.batches(groups, group))
        return importance.taylor(grads, params, self.net.config, accumulated=accumulated)

    def _mean_loss(self, params, x, label, sigma, key):
        return self.level_loss({"params": params}, x, label, sigma, key).mean()

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
        elif kind == "scores":
            measured = self.anchor_ranks()
        return make_groups(
            self.diffusion,
            settings["groups"],
            kind,
            edges=settings["edges"],
            grid=self.grid(),
            anchors=self.anchors,
            measured=measured,
        )

    def anchor_gradients(self) -> np.ndarray:
        """The loss's gradient at every anchor, [anchors, weights]."""
        return np.stack([flattened(grads) for grads in self._at_anchors()])

    def anchor_ranks(self) -> np.ndarray:
        """Which channels matter at every anchor: the centred ranks of their scores, [anchors,
        channels], whose cosines are Spearman's correlations (section 2.4)."""
        params, config = self.teacher.params, self.net.config
        scores = (importance.taylor([grads], params, config) for grads in self._at_anchors())
        ranks = np.stack([flattened(row).argsort().argsort() for row in scores]).astype(float)
        return ranks - ranks.mean(axis=1, keepdims=True)

    def _at_anchors(self):
        """The loss's gradient at every anchor, on the same images and noise."""
        size = self.settings["score_images"]
        images, labels = self.proxy.images[:size], self.proxy.labels[:size]
        key = stream_key(self.seed, "anchor", 0)
        batches = (
            (images, labels, np.full(len(images), self.levels[anchor], np.float32), key)
            for anchor in self.anchors
        )
        return importance.gradients(self.grad, self.teacher.params, batches)

    def _targets(self) -> np.ndarray:
        """F_i / F0 of every group, from the cleanest."""
        settings, count = self.settings, self.settings["groups"]
        kind, mean = settings["budget"], settings["mean"]
        by_steps = settings["weigh"] == "steps"
        weights = self.sampler_steps() if by_steps else np.diff(self.groups.edges)
        if kind == "flat":
            return np.full(count, mean or 0.8)
        if kind == "sensitivity":
            return sensitivity.targets(self, mean or 0.8)
        if kind == "linear":
            k = settings["k"]
            if mean:
                k = budget.solve_k(count, mean, order=settings["order"], weights=weights)
            return budget.shares(count, k, settings["order"])
        if kind == "snr":
            difficulty = np.clip(self.groups.decibels(), -20, 20)
        else:
            losses, owner = np.log(self.anchor_losses), self.anchors
            between = np.interp(np.arange(len(self.levels)), owner, losses)

            def of_group(first: int, end: int) -> float:
                inside = (owner >= first) & (owner < end)
                # a group narrower than the anchors' spacing may hold none
                return float((losses[inside] if inside.any() else between[first:end]).mean())

            edges = self.groups.edges
            difficulty = np.array([of_group(*ends) for ends in zip(edges, edges[1:])])
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
            "memories": [
                f"memory-{j}.jsonl"
                for j, row in enumerate(found)
                if row["keep"] and self.settings["proposer"] != "uniform"
            ],
            "settings": self.settings,
        }
