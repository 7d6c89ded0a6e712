"""The cells of the step-adaptive study (spec 9.3): each one an arm of the comparison, or a check.

E2, E3   specialists, of full size and pruned, against the base trained longer at equal FLOPs
E4       the same networks trained from scratch
E5       orders of the budget
E6, E7   what the search and the scores are worth, before and after fine-tuning
E8       insensitive to k
E9       the search's memory
E10      the jump between neighbours, with and without overlap
E11      T-Stitch: a small network early, the base late
E12      inversion
E13      what the specification offers beside its defaults

All arms draw the same images: the same noise, labels and grid. E1 is read off the losses by group.
"""

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from cheapscale.diffusion import process
from cheapscale.evaluation import quality
from cheapscale.evaluation.cost import param_count
from cheapscale.evaluation.fid import frechet_distance
from cheapscale.evaluation.pixels import to_uint8
from cheapscale.stages import data, specialists
from cheapscale.stages.assessment import Assessment, read_proxy
from cheapscale.stages.groups import level_loss, levels_of, make_groups
from cheapscale.stages.invert import round_trip
from cheapscale.stages.networks import fingerprint, load_model, load_teacher, make_denoiser
from cheapscale.stages.run import run
from cheapscale.stages.sampler_cost import segment_calls
from cheapscale.stages.sampling import levels, sampler
from cheapscale.training.checkpoint import Loaded, load_network
from cheapscale.training.classifier import fit_classifier
from cheapscale.training.sharding import in_batches
from cheapscale.training.state import stream_key
from configs import scenes
from launch.bench import alternate
from launch.cells import Cell
from launch.paired import with_deviation
from launch.specialists import make_set


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

    def stage(self, stage: str, seed: int):
        config = scenes.get_config(f"{self.config.scenes},stage={stage},seed={seed}")
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

    def longer(self, seed: int, steps: int, rate: float = 1.0) -> Loaded:
        """The base trained on for so many steps, at `rate` times its learning rate."""
        config = self.stage("pretrain", seed)
        config.resume = self.teacher(seed).workdir
        config.total_steps += steps
        config.optim.lr *= rate
        config.eval_every = config.save_every = config.total_steps
        place = self.workdir / f"base-{seed}-{steps}-{rate:g}"
        run(config, place)
        jax.clear_caches()
        return load_teacher(place)

    def arm(self, seed: int, name: str, changes: dict) -> tuple[Loaded, dict]:
        """(a set of specialists, its manifest), made where it is not there yet."""
        if (seed, name) in self.sets:
            return self.sets[seed, name]
        folder = self.workdir / f"set-{seed}-{re.sub(r'[^a-z0-9]+', '_', name)}"
        settings = self.config.prune.to_dict() | {
            "groups": self.config.groups,
            "mean": self.config.mean,
            "steps": self.config.steps,
            "spacing": self.config.spacing,
        }
        settings |= changes
        steps = self.config.finetune_steps // settings["groups"]
        if settings.get("start") == "scratch":
            steps = self.scratch_steps(seed)

        def configured(stage: str):
            config = self.stage(stage, seed)
            config.teacher, config.specialists = self.teacher(seed).workdir, str(folder)
            config.prune.update(settings)
            if stage == "prune":
                config.total_steps = config.save_every = steps
            return config

        make_set(configured, str(folder))
        self.sets[seed, name] = load_model(folder), specialists.read_manifest(folder)
        return self.sets[seed, name]

    def main(self, seed: int) -> tuple[Loaded, dict]:
        return self.arm(seed, "specialists", self.config.arms["specialists"][1])

    def bill(self, seed: int, loaded: Loaded) -> float:
        """Training FLOPs beyond the base's, in steps of the base."""
        base = self.teacher(seed)
        per_step = base.meta["ledger"]["flops"] / base.step
        return (loaded.meta["ledger"]["flops"] - base.meta["ledger"]["flops"]) / per_step

    def scratch_steps(self, seed: int) -> int:
        """Of each group, so that networks from scratch cost what base and specialists together."""
        trained, manifest = self.main(seed)
        total = self.teacher(seed).step + self.bill(seed, trained)
        return round(total / sum(manifest["shares"]))

    @functools.cached_property
    def source(self):
        return data.open_data(self.stage("pretrain", 0).data)

    @functools.cached_property
    def reference(self) -> quality.Reference:
        settings, num = self.stage("pretrain", 0).data, self.config.num_real
        test = data.open_data(settings, split=settings.eval_split)
        steps = 3 if self.config.scenes == "smoke" else None
        network = fit_classifier(self.source, purpose="metric", steps=steps).network
        return quality.reference(network, test, train_source=self.source, num=num, num_train=num)

    @functools.cached_property
    def held(self) -> Held:
        settings, num = self.stage("pretrain", 0).data, self.config.num_loss
        test = data.open_data(settings, split=settings.eval_split)
        items = [test[i] for i in range(num)]
        labels = np.array([item["label"] for item in items], np.int32)
        return Held(np.stack([item["image"] for item in items]), labels)

    def draw(self, loaded: Loaded, num: int):
        """Images from noise, a function of the number alone."""
        options = {k: self.config[k] for k in ("steps", "spacing", "method")}
        labels = data.class_mix(self.source, num)
        return sampler(loaded, batch_size=250, **options)(np.arange(num), labels)[0]

    def measured(self, seed: int, loaded: Loaded, manifest: dict | None = None) -> dict:
        """See `figures`; what an arm's images are worth and what it costs."""
        base = self.teacher(seed)
        features = quality.embed(
            self.reference.network, to_uint8(self.draw(loaded, self.config.num))
        )
        floor = self.reference.floor(len(features))[0]

        def distance(rows):
            return {"fd": frechet_distance(features[rows], self.reference.features) - floor}

        found = {
            "losses": self.losses(loaded),
            "share": self.compiled_share(loaded, base),
            "steps_of_base": self.bill(seed, loaded),
            "parameters": param_count(loaded.params) / param_count(base.params),
        }
        if manifest:
            groups = range(len(manifest["shares"]))
            rows = [specialists.read_assessment(loaded.workdir, group) for group in groups]
            found |= {
                "shares": manifest["shares"],
                "mean_shares": manifest["mean_shares"],
                "proxy": [row["score"] for row in rows],
                "search_steps_of_base": manifest["ledger"]["flops"]
                / (base.meta["ledger"]["flops"] / base.step),
            }
        return found | with_deviation(distance, len(features), self.config.bootstrap)

    def losses(self, loaded: Loaded) -> list[float]:
        """Held-out loss in each of the study's equal groups, from the cleanest; each level by the
        network that owns it, on the same images, levels and noise for every arm."""
        diffusion = loaded.meta["diffusion"]
        groups = make_groups(diffusion, self.config.groups)
        found = []
        for group in range(groups.count):
            first, last = groups.positions(group)
            rows = np.arange(len(self.held.images))
            positions = first + (rows * (last - first + 1)) // len(rows)
            sigma = levels_of(diffusion)[positions].astype(np.float32)
            found.append(float(owned_losses(loaded, self.held, sigma).mean()))
        return found

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

        return flops(loaded) / flops(base)


def owned_losses(loaded: Loaded, held: Held, sigma: np.ndarray) -> np.ndarray:
    """The teacher's loss [n] at the levels sigma [n], each by the network that owns it."""
    diffusion = loaded.meta["diffusion"]
    of_set = diffusion.get("specialists")
    models = of_set["models"] if of_set else [loaded.meta["networks"]["net"]]
    params = loaded.params if of_set else (loaded.params,)
    owner = np.searchsorted(of_set["borders"] if of_set else [], sigma * (1 - 1e-6))
    out = np.zeros(len(sigma))
    for j in np.unique(owner):
        bind, rows = make_denoiser(models[j], diffusion), owner == j

        def loss(params, x, label, sigma, ids, bind=bind):
            def of_image(x, label, sigma, i):
                return level_loss(
                    bind(params), x[None], sigma[None], stream_key(0, "study loss", i), diffusion,
                    label=label[None],
                )[0]  # fmt: skip

            return jax.vmap(of_image)(x, label, sigma, ids)

        out[rows] = in_batches(
            loss, params[j], held.images[rows], held.labels[rows], sigma[rows],
            np.flatnonzero(rows).astype(np.int32), batch_size=128,
        )  # fmt: skip
    return out


def cells(study: Study) -> Iterator[Cell]:
    """All cells in the order in which they are worth having."""
    config = study.config
    first = config.seeds[0]
    for seed in config.seeds:
        yield from headline(study, seed)
    yield Cell("E9", "memory", functools.partial(memory, study, first))
    for name, (section, changes) in config.choices.to_dict().items():
        yield Cell(section, f"seed {first}: {name}", arm_cell(study, first, name, changes))
    yield Cell("E10", "jumps", functools.partial(jumps, study, first))
    yield Cell("E12", "inversion", functools.partial(inversion, study, first))
    yield Cell("E3", "seconds", functools.partial(seconds, study, first))


def headline(study: Study, seed: int) -> Iterator[Cell]:
    """The arms of every seed."""
    arms = study.config.arms.to_dict()
    yield Cell("E3", f"seed {seed}: base", lambda: study.measured(seed, study.teacher(seed)))
    section, changes = arms["specialists"]
    yield Cell(section, f"seed {seed}: specialists", arm_cell(study, seed, "specialists", changes))
    for rate, title in ((1.0, "base longer"), (0.5, "base longer at half the rate")):
        yield Cell("E3", f"seed {seed}: {title}", functools.partial(longer, study, seed, rate))
    for name, (section, changes) in arms.items():
        if name != "specialists":
            yield Cell(section, f"seed {seed}: {name}", arm_cell(study, seed, name, changes))
    yield Cell("E11", f"seed {seed}: T-Stitch", functools.partial(stitched, study, seed))


def arm_cell(study: Study, seed: int, name: str, changes: dict):
    return lambda: study.measured(seed, *study.arm(seed, name, changes))


def longer(study: Study, seed: int, rate: float) -> dict:
    """The base trained on for what the specialists and their search have cost."""
    steps = round(study.bill(seed, study.main(seed)[0]))
    return study.measured(seed, study.longer(seed, steps, rate))


def stitched(study: Study, seed: int) -> dict:
    """A network pruned and fine-tuned on all times for the noisy steps, the base for the rest, at
    the mean share of the study."""
    config, base = study.config, study.teacher(seed)
    changes = {"groups": 1, "budget": "flat", "mean": config.stitch, "importance": "all_times"}
    pruned, manifest = study.arm(seed, "stitch", changes)
    small = load_network(specialists.group_folder(pruned.workdir, 0), "net")
    grid = levels(base.meta["diffusion"], config.steps, "sample", config.spacing)
    # the noisiest steps are the small one's, as many as bring the mean to the study's
    early = round(config.steps * (1 - config.mean) / (1 - manifest["shares"][0]))
    border = float(grid[min(early, config.steps - 1)])
    both = specialists.joined(
        base.meta, fingerprint(base.params), [border], [base, small], paid=manifest["ledger"]
    )
    return study.measured(seed, both) | {"steps_of_small": early}


def memory(study: Study, seed: int) -> dict:
    """E9: the best proxy loss of searches with and without memory, of the most pruned group."""
    scores: dict[str, list[float]] = {"remembered": [], "forgotten": []}
    group, shape = 0, study.main(seed)[1]
    group = int(np.argmin(shape["shares"]))
    for search_seed in study.config.memory_seeds:
        for kind, remember in (("remembered", True), ("forgotten", False)):
            folder = study.workdir / f"search-{search_seed}-{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            settings = study.stage("assess", seed).prune.to_dict() | study.config.prune.to_dict()
            settings |= {
                "groups": study.config.groups, "mean": study.config.mean, "remember": remember,
                "steps": study.config.steps, "spacing": study.config.spacing,
            }  # fmt: skip
            most = max(settings["proxy_images"], settings["score_images"])
            proxy = read_proxy(study.source, most)
            searched = Assessment(study.teacher(seed), proxy, settings, search_seed, str(folder))
            scores[kind].append(searched.assess(group)["score"])
            jax.clear_caches()
    return {
        kind: {"scores": rows, "mean": float(np.mean(rows)), "deviation": float(np.std(rows))}
        for kind, rows in scores.items()
    }


def jumps(study: Study, seed: int) -> dict:
    """E10: root mean square of the difference of two neighbours' estimates at their border, over
    that of the base's own error there; of specialists with overlap, without, and before tuning."""
    with_overlap, manifest = study.main(seed)
    name = "no overlap"
    without, _ = study.arm(seed, name, study.config.choices[name][1])
    base, rows = study.teacher(seed), []
    diffusion = base.meta["diffusion"]
    for j, border in enumerate(manifest["borders"]):
        sigma = np.full(len(study.held.images), border, np.float32)
        noise = np.random.default_rng(j).standard_normal(study.held.images.shape).astype("f")
        noisy = study.held.images + border * noise

        def estimate(loaded, index, noisy=noisy, sigma=sigma):
            of_set = loaded.meta["diffusion"].get("specialists")
            model = of_set["models"][index] if of_set else loaded.meta["networks"]["net"]
            params = loaded.params[index] if of_set else loaded.params
            bind = make_denoiser(model, diffusion)

            def D(params, x, label, sigma):
                return bind(params)(x, sigma, label=label)

            return in_batches(D, params, noisy, study.held.labels, sigma, batch_size=128)

        own = rms(estimate(base, 0) - study.held.images)
        rows.append(
            {"decibels": float(process.decibels(border)), "base_error": own}
            | {
                title: rms(estimate(loaded, j) - estimate(loaded, j + 1)) / own
                for title, loaded in (("overlap", with_overlap), ("no overlap", without))
            }
        )
    return {"borders": rows}


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def inversion(study: Study, seed: int) -> dict:
    """E12: images inverted and solved back, and how Gaussian the latents are."""
    num, found = study.config.round_trip, {}
    images, labels = study.held.images[:num], study.held.labels[:num]
    for title, loaded in (("base", study.teacher(seed)), ("specialists", study.main(seed)[0])):
        z, back = round_trip(loaded, nodes=40)(images, labels)
        scaled = z / loaded.meta["diffusion"]["sigma_max"]
        centred = scaled - scaled.mean(axis=0)
        error = np.mean(np.square(back - images), axis=(1, 2, 3))
        found[title] = {
            "psnr": float(np.mean(10 * np.log10(4 / error))),
            "mean": float(np.abs(scaled.mean(axis=0)).mean()),
            "deviation": float(scaled.std()),
            "kurtosis": float(np.mean(centred**4) / np.mean(centred**2) ** 2),
        }
    return found


def seconds(study: Study, seed: int) -> dict:
    """Sampling a batch, in turns; and FLOPs beside it."""
    timing, ids = study.config.timing, np.arange(study.config.timing.batch)
    options = {k: study.config[k] for k in ("steps", "spacing", "method")}
    subjects = {"base": study.teacher(seed), "specialists": study.main(seed)[0]}
    labels = data.class_mix(study.source, len(ids))
    calls = {
        title: functools.partial(sampler(loaded, batch_size=len(ids), **options), ids, labels)
        for title, loaded in subjects.items()
    }
    walls = {side: np.array(t["wall"]) for side, t in alternate(calls, timing.rounds).items()}
    return {
        "batch": len(ids),
        "seconds": {side: float(np.median(wall)) for side, wall in walls.items()},
        "over_base": float(np.median(walls["specialists"] / walls["base"])),
        "share": study.compiled_share(subjects["specialists"], subjects["base"]),
    }
