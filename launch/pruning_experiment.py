"""The cells of the step-adaptive study (spec 9.3): each one an arm of the comparison, or a check.

E1       what each group loses with its width, by its losses
E2, E3   specialists, of full size and pruned, against the base trained longer at equal FLOPs: as it
         was ("base longer"), and as they are, fresh optimiser, falling rate ("one network")
E4       the same networks trained from scratch
E5       orders of the budget
E6, E7   what the search and the scores are worth, before and after fine-tuning
E8       insensitive to k
E9       the search's memory
E10      the jump between neighbours, with and without overlap
E11      T-Stitch: a small network early, the base late
E12      inversion
E13      what the specification offers beside its defaults

All arms draw the same images: the same noise, labels and grid, and all but E1's cost as much to
train, the search included.
"""

import functools
import importlib
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from cheapscale.evaluation import quality
from cheapscale.evaluation.cost import param_count
from cheapscale.models.unet import unet
from cheapscale.pruning.partition import owners
from cheapscale.pruning.structure import prune
from cheapscale.stages import data, specialists
from cheapscale.stages.assess import OF_TRAINING
from cheapscale.stages.groups import level_loss, levels_of, make_groups
from cheapscale.stages.networks import (
    fingerprint,
    load_model,
    load_teacher,
    make_denoiser,
    members,
    pruned_model,
)
from cheapscale.stages.run import run
from cheapscale.stages.sampler_cost import segment_calls
from cheapscale.stages.sampling import levels, sampler
from cheapscale.training.checkpoint import Loaded, load_network
from cheapscale.training.sharding import in_batches
from cheapscale.training.state import stream_key
from launch import pruning_checks as checks
from launch.cells import Cell
from launch.judge import distance, make_judge
from launch.paired import with_deviation
from launch.specialists import anneal, make_set


class Held(NamedTuple):
    """Held-out images: what losses are taken on."""

    images: np.ndarray
    labels: np.ndarray


class Study:
    """Teachers, sets and references, each made once and kept in `workdir`."""

    def __init__(self, config, workdir: str):
        self.config, self.workdir = config, pathlib.Path(workdir)
        self.teacher = functools.cache(self._teacher)
        self.sets: dict[tuple[int, str], tuple[Loaded, dict]] = {}
        self.base_flops = 0.0  # of sampling with a base; all are one network

    def stage(self, stage: str, seed: int):
        images = importlib.import_module(f"configs.{self.config.images}")
        config = images.get_config(f"{self.config.images_arg},stage={stage},seed={seed}")
        if stage == "pretrain":
            config.diffusion.update({"process": self.config.process})
            if self.config.process != "edm":
                config.diffusion.update({"prediction": "eps", "sigma_min": 0.02})
            config.pretrain.antithetic = True  # as specialists train
            config.eval_every = config.total_steps
        return config

    def _teacher(self, seed: int) -> Loaded:
        place = self.workdir / f"base-{seed}"
        run(self.stage("pretrain", seed), place)
        jax.clear_caches()
        return load_teacher(place)

    def longer(self, seed: int, steps: int) -> Loaded:
        """The base trained on for so many steps, as it was before."""
        config = self.stage("pretrain", seed)
        config.resume = self.teacher(seed).workdir
        config.total_steps += steps
        config.eval_every = config.save_every = config.total_steps
        place = self.workdir / f"base-{seed}-{steps}"
        run(config, place)
        jax.clear_caches()
        return load_teacher(place)

    def arm(self, seed: int, name: str, changes: dict, part: float = 1.0) -> tuple[Loaded, dict]:
        """(a set of specialists, its manifest), made where it is not there yet.

        The specialists of the headline take `finetune_steps`, shared by the groups; every other arm
        as many as cost the same FLOPs, or a part of them. All rates fall to 0.
        changes: of config.prune; "seed" is added to that of the training alone, "decay" is the
        optimiser's, "equal": "updates" asks for as many of them instead of FLOPs.
        """
        if (seed, name) in self.sets:
            return self.sets[seed, name]
        changes = dict(changes)
        training_seed, decay = seed + changes.pop("seed", 0), changes.pop("decay", "cosine")
        as_many = changes.pop("equal", "flops") == "updates" or name == "specialists"
        folder = self.workdir / f"set-{seed}-{re.sub(r'[^a-z0-9]+', '_', name)}"
        settings = self.config.prune.to_dict() | {
            "groups": self.config.groups,
            "mean": self.config.mean,
            "steps": self.config.steps,
            "spacing": self.config.spacing,
        }
        settings |= changes
        scratch = settings.get("start") == "scratch"
        if name != "specialists" and not set(changes) - set(OF_TRAINING):
            self.assessed_alike(seed, folder)

        def configured(stage: str, group: int):
            config = self.stage(stage, training_seed if stage == "prune" else seed)
            config.teacher, config.specialists = self.teacher(seed).workdir, str(folder)
            config.prune.update({k: v for k, v in settings.items() if k in config.prune})
            if stage == "prune":
                steps = self.config.finetune_steps // settings["groups"]
                if not as_many:
                    manifest = specialists.read_manifest(folder)
                    steps = self.equal_steps(
                        seed, manifest, group,
                        scratch=scratch, distil=settings.get("distil", 0) > 0, part=part,
                    )  # fmt: skip
                if scratch:
                    config.optim = self.stage("pretrain", seed).optim
                config.total_steps = config.save_every = steps
                config.optim.decay = decay
                anneal(config.optim, steps)
            return config

        make_set(configured, str(folder))
        self.sets[seed, name] = load_model(folder), specialists.read_manifest(folder)
        return self.sets[seed, name]

    def main(self, seed: int) -> tuple[Loaded, dict]:
        return self.arm(seed, "specialists", self.config.arms["specialists"][1])

    def in_steps(self, seed: int, flops: float) -> float:
        """FLOPs of training in steps of the base."""
        base = self.teacher(seed)
        return flops / (base.meta["ledger"]["flops"] / base.step)

    def bill(self, seed: int, loaded: Loaded) -> float:
        """Training beyond the base's, in steps of the base."""
        before = self.teacher(seed).meta["ledger"]["flops"]
        return self.in_steps(seed, loaded.meta["ledger"]["flops"] - before)

    def equal_steps(
        self,
        seed: int,
        manifest: dict,
        group: int,
        *,
        scratch: bool = False,
        distil: bool = False,
        part: float = 1.0,
    ) -> int:
        """Updates of a group, so that a set costs (a part of) what the headline's does: search and
        fine-tuning, from scratch also the base's own training. Groups take them by their size, so
        that every noise level is trained as much. distil: each of them also calls the base, which
        is a third of what an update of it costs."""
        trained, _ = self.main(seed)
        total = part * self.bill(seed, trained) + scratch * self.teacher(seed).step
        left, sizes = total - self.search(seed, manifest), np.diff(manifest["edges"])
        if left <= 0:
            raise ValueError(
                f"the search alone costs {self.search(seed, manifest):.0f} steps of the base and "
                f"the specialists all in all {total:.0f}: nothing is left to train with"
            )
        an_update = np.array(manifest["shares"]) + distil / 3
        return max(1, round(left * sizes[group] / float(np.dot(an_update, sizes))))

    def search(self, seed: int, manifest: dict) -> float:
        """What the assessment cost, in steps of the base."""
        return self.in_steps(seed, manifest["ledger"]["flops"])

    def assessed_alike(self, seed: int, folder: pathlib.Path) -> None:
        """An arm that differs in its training alone takes the headline's assessment."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in pathlib.Path(self.main(seed)[0].workdir).glob("assessment-*.json"):
            shutil.copy(path, folder)

    @functools.cached_property
    def source(self):
        return data.open_data(self.stage("pretrain", 0).data)

    @functools.cached_property
    def reference(self) -> quality.Reference:
        settings, num = self.stage("pretrain", 0).data, self.config.num_real
        steps = 3 if self.config.images_arg.startswith("smoke") else None
        return make_judge(settings, settings.resolution, num_real=num, steps=steps)

    @functools.cached_property
    def held(self) -> Held:
        settings, num = self.stage("pretrain", 0).data, self.config.num_loss
        test = data.open_data(settings, split=settings.eval_split)
        return Held(*data.read(test, range(num)))

    def draw(self, loaded: Loaded, num: int):
        """Images from noise, a function of the number alone."""
        options = {k: self.config[k] for k in ("steps", "spacing", "method")}
        labels = data.class_mix(self.source, num)
        return sampler(loaded, batch_size=250, **options)(np.arange(num), labels)[0]

    def measured(self, seed: int, loaded: Loaded, manifest: dict | None = None) -> dict:
        """What an arm's images are worth and what it costs.

        fd              distance of its images above the floor
        losses          held-out loss in each of the study's groups, from the cleanest
        loss 0 ...      the same with deviations, over the images
        before          the same before fine-tuning
        proxy           what the search minimised
        share           compiled FLOPs of sampling over the base's
        steps_of_base   all of its training, search included, in steps of the base
        parameters      over the base's
        """
        base = self.teacher(seed)
        scratch = bool(manifest) and manifest["settings"].get("start") == "scratch"
        losses = self.losses(loaded)
        found = {
            "losses": losses.mean(1).tolist(),
            "share": self.compiled_share(loaded, base),
            "steps_of_base": self.bill(seed, loaded) + (0 if scratch else base.step),
            "parameters": param_count(loaded.params) / param_count(base.params),
        }
        if manifest:
            groups = range(len(manifest["shares"]))
            rows = [specialists.read_assessment(loaded.workdir, group) for group in groups]
            found |= {
                "shares": manifest["shares"],
                "mean_shares": manifest["mean_shares"],
                "proxy": [row["score"] for row in rows],
                "search_steps_of_base": self.search(seed, manifest),
            }
            if not scratch:
                cut = self.before(seed, rows, manifest["borders"])
                found["before"] = cut.mean(1).tolist()
        images = self.draw(loaded, self.config.num)
        measured = distance(self.reference, images, self.config.bootstrap)
        names = [f"loss {group}" for group in range(len(losses))]
        by_group = with_deviation(
            lambda pick: dict(zip(names, losses[:, pick].mean(1))),
            losses.shape[1], self.config.bootstrap, names,
        )  # fmt: skip
        draws = measured["draws"] | by_group["draws"]
        return found | measured | by_group | {"draws": draws}

    def losses(self, loaded: Loaded) -> np.ndarray:
        """Held-out losses [groups, images] in each of the study's equal groups, from the cleanest;
        each level by the network that owns it, on the same images, levels and noise for every
        arm."""
        diffusion, count = loaded.meta["diffusion"], len(self.held.images)
        groups = make_groups(diffusion, self.config.groups)
        rows, positions = np.arange(count), []
        for group in range(groups.count):
            first, last = groups.positions(group)
            positions.append(first + (rows * (last - first + 1)) // count)
        sigma = levels_of(diffusion)[np.concatenate(positions)].astype(np.float32)
        tiled = Held(*(np.tile(a, (groups.count,) + (1,) * (a.ndim - 1)) for a in self.held))
        return owned_losses(loaded, tiled, sigma).reshape(groups.count, count)

    def before(self, seed: int, rows: list[dict], borders: list[float]) -> np.ndarray:
        """Held-out losses of the cut networks as they are, rows: the groups' assessments."""
        base = self.teacher(seed)
        model = base.meta["networks"]["net"]
        whole, members = unet(**model).config, []
        for row in rows:
            keep = {name: np.asarray(channels) for name, channels in row["keep"].items()}
            meta = base.meta | {"networks": {"net": pruned_model(model, keep)}}
            members.append(base._replace(params=prune(base.params, whole, keep), meta=meta))
        cut = specialists.joined(base.meta, fingerprint(base.params), borders, members)
        return self.losses(cut)

    def compiled_share(self, loaded: Loaded, base: Loaded) -> float:
        """FLOPs of sampling an image over the base's, of compiled calls on the study's grid."""
        diffusion, model = base.meta["diffusion"], base.meta["networks"]["net"]
        grid = levels(diffusion, self.config.steps, "sample", self.config.spacing)
        shape = (8, model["resolution"], model["resolution"], model["in_channels"])

        def flops(subject: Loaded) -> float:
            rows = segment_calls(
                model, subject.meta["diffusion"], subject.params, shape, grid,
                method=self.config.method,
            )  # fmt: skip
            return sum(count * each for count, each in rows)

        if not self.base_flops:
            self.base_flops = flops(base)
        return flops(loaded) / self.base_flops


def owned_losses(loaded: Loaded, held: Held, sigma: np.ndarray) -> np.ndarray:
    """The teacher's loss [n] at the levels sigma [n], each by the network that owns it."""
    diffusion, networks = loaded.meta["diffusion"], members(loaded)
    borders = diffusion.get("specialists", {"borders": []})["borders"]
    owner = owners(sigma, borders)
    out = np.zeros(len(sigma))
    for j in np.unique(owner):
        model, params = networks[j]
        bind, rows = make_denoiser(model, diffusion), owner == j

        def loss(params, x, label, sigma, ids, bind=bind):
            def of_image(x, label, sigma, i):
                return level_loss(
                    bind(params), x[None], sigma[None], stream_key(0, "study loss", i), diffusion,
                    label=label[None],
                )[0]  # fmt: skip

            return jax.vmap(of_image)(x, label, sigma, ids)

        out[rows] = in_batches(
            loss, params, held.images[rows], held.labels[rows], sigma[rows],
            np.flatnonzero(rows).astype(np.int32), batch_size=128,
        )  # fmt: skip
    return out


def cells(study: Study) -> Iterator[Cell]:
    """All cells in the order in which they are worth having."""
    config = study.config
    first = config.seeds[0]
    for seed in config.seeds:
        yield from headline(study, seed)
    yield Cell("E9", "memory", functools.partial(checks.memory, study, first))
    for name, (section, changes) in config.choices.to_dict().items():
        yield Cell(section, f"seed {first}: {name}", arm_cell(study, first, name, changes))
    yield Cell("E10", "jumps", functools.partial(checks.jumps, study, first))
    yield Cell("E12", "inversion", functools.partial(checks.inversion, study, first))
    yield Cell("E3", "seconds", functools.partial(checks.seconds, study, first))


def headline(study: Study, seed: int) -> Iterator[Cell]:
    """The arms of every seed."""
    arms = study.config.arms.to_dict()
    yield Cell("E3", f"seed {seed}: base", lambda: study.measured(seed, study.teacher(seed)))
    section, changes = arms["specialists"]
    yield Cell(section, f"seed {seed}: specialists", arm_cell(study, seed, "specialists", changes))
    yield Cell("E3", f"seed {seed}: base longer", functools.partial(longer, study, seed))
    for name, (section, changes) in arms.items():
        if name != "specialists":
            yield Cell(section, f"seed {seed}: {name}", arm_cell(study, seed, name, changes))
    yield Cell("E11", f"seed {seed}: T-Stitch", functools.partial(stitched, study, seed))


def arm_cell(study: Study, seed: int, name: str, changes: dict):
    return lambda: study.measured(seed, *study.arm(seed, name, changes))


def longer(study: Study, seed: int) -> dict:
    """The base trained on for what the specialists and their search have cost."""
    steps = round(study.bill(seed, study.main(seed)[0]))
    return study.measured(seed, study.longer(seed, steps))


def stitched(study: Study, seed: int) -> dict:
    """A network pruned and fine-tuned on all times for the noisy steps, the whole one fine-tuned
    alike for the rest, at the specialists' share of the sampling FLOPs; each for half of their
    training's."""
    config, base = study.config, study.teacher(seed)
    changes = {"groups": 1, "budget": "flat", "mean": config.stitch, "importance": "all_times"}
    pruned, manifest = study.arm(seed, "stitch, small", changes, part=0.5)
    tuned, other = study.arm(seed, "stitch, whole", changes | {"mean": 1.0}, part=0.5)
    small, whole = (
        load_network(specialists.group_folder(each.workdir, 0), "net") for each in (pruned, tuned)
    )
    grid = levels(base.meta["diffusion"], config.steps, "sample", config.spacing)
    # the noisiest steps are the small one's, as many as bring the mean to the specialists'
    share = study.compiled_share(study.main(seed)[0], base)
    early = round(config.steps * (1 - share) / (1 - manifest["compiled_shares"][0]))
    if early >= config.steps:
        raise ValueError(
            f"stitch is {config.stitch}: with the small network at every step sampling still costs "
            f"more than the specialists' {share:.3f}; lower it"
        )
    border = float(grid[early])
    paid = {unit: cost + other["ledger"][unit] for unit, cost in manifest["ledger"].items()}
    both = specialists.joined(
        base.meta, fingerprint(base.params), [border], [whole, small], paid=paid
    )
    return study.measured(seed, both) | {"steps_of_small": early}
