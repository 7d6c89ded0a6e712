"""The cells of the self-cascade study (spec 7.4): each one a small experiment with a name.

E1, E2, E3   direct sampling, the enlarged pivot, and the cascade from K, at twice the size
E4           the same K under other noise schedules
E5           two stages against one jump
E6, E7, E8   tuned: designs and sizes, adapters and fine-tuning, by optimiser steps
E9           seconds
E10          few high-resolution images (photographs)
E11          the released code's variants
E12          other baselines, alone and on top of the cascade
E13          real images as pivots (photographs)

All cells of one teacher share pivots, labels and noise: image i of each starts from the same.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from cheapscale.data.files import whole_or_nothing
from cheapscale.data.resize import area_mean
from cheapscale.evaluation.cost import param_count
from cheapscale.evaluation.memorisation import nearest_features
from cheapscale.evaluation.pixels import to_uint8
from cheapscale.evaluation.quality import embed
from cheapscale.stages import data
from cheapscale.stages.cascade_baselines import BASELINES, baseline
from cheapscale.stages.cascade_sampler import cascade_plan, cascade_sampler
from cheapscale.stages.networks import load_teacher
from cheapscale.stages.run import build, run
from cheapscale.stages.sampling import sampler
from cheapscale.stages.tuned import Tuned, load_tuned, tuned_cascade
from cheapscale.training.checkpoint import Loaded
from cheapscale.training.loop import fresh_state
from cheapscale.training.sharding import make_mesh
from configs import clothing, scenes
from launch.cascade_measures import Judge, make_judge, measure
from launch.cascade_seconds import seconds
from launch.cells import Cell
from launch.judge import metric_network

FILES = {"scenes": scenes, "photographs": clothing}


class Base(NamedTuple):
    """What all cells of one teacher share: its samples, which are the pivots, and the features of
    more of them."""

    labels: np.ndarray
    pivots: np.ndarray
    features: np.ndarray


class Study:
    """Teachers, pivots and judges, each made once and kept in `workdir`."""

    def __init__(self, config, workdir: str):
        self.config, self.workdir = config, pathlib.Path(workdir)
        self.ids = np.arange(config.num)
        for name in FILES:  # missing data end the study at once, not after hours
            data.open_data(self.stage(name, "stage=pretrain", 0).data)
        self.teacher = functools.cache(self._teacher)
        self.base = functools.cache(self._base)
        self.judge = functools.cache(self._judge)

    def stage(self, data_name: str, arg: str, seed: int):
        common = getattr(self.config, data_name)
        if data_name == "photographs" and self.config.data_dir:
            common += f",data_dir={self.config.data_dir}"
        return FILES[data_name].get_config(f"{common},seed={seed},{arg}")

    def _teacher(self, data_name: str, process: str, seed: int) -> Loaded:
        """Trained where it is not there yet."""
        config = self.stage(data_name, "stage=pretrain", seed)
        if process != "edm":
            changes = {"process": process, "prediction": "v", "sigma_min": 0.02}
            config.diffusion.update(changes)
        config.eval_every = config.total_steps // 2
        place = self.workdir / f"{data_name}-{process}-seed{seed}"
        run(config, place)
        jax.clear_caches()
        return load_teacher(place)

    def _base(self, *key) -> Base:
        teacher, num = self.teacher(*key), self.config.num + self.config.num_base
        path = self.workdir / f"pivots-{'-'.join(map(str, key))}.npz"
        if not path.is_file():
            draw = sampler(teacher, steps=self.config.steps, method=self.config.method)
            settings = self.stage(key[0], "stage=pretrain", 0).data
            test = data.open_data(settings, split=settings.eval_split)
            images, labels = draw(np.arange(num), data.class_mix(test, num))
            with whole_or_nothing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, images=images, labels=labels)
        with np.load(path) as stored:
            images, labels = stored["images"], stored["labels"]
        few = self.config.num
        network = self.judge(key[0], images.shape[1]).reference.network
        return Base(labels[:few], images[:few], embed(network, to_uint8(images[few:])))

    def _judge(self, data_name: str, resolution: int) -> Judge:
        config, settings = self.config, self.stage(data_name, "stage=pretrain", 0).data
        network, train, test = metric_network(settings, resolution, 3 if config.smoke else None)
        crop = min(config.crop, resolution)
        return make_judge(network, train, test, num=config.num, num_real=config.num_real, crop=crop)

    def measured(self, images: np.ndarray, key: tuple) -> dict:
        base = self.base(*key)
        return measure(
            images,
            base.pivots,
            self.judge(key[0], images.shape[1]),
            self.judge(key[0], base.pivots.shape[1]),
            base.features,
            counted=key[0] == "scenes",
            resamples=self.config.bootstrap,
        )

    def plan(self, key: tuple, scales: str, k: str, given: bool = True, **options):
        teacher = self.teacher(*key)
        side = teacher.meta["networks"]["net"]["resolution"]
        return cascade_plan(
            teacher.meta, scales, k=(k,), steps=self.config.steps,
            pivot_size=(side, side) if given else None, **options,
        )  # fmt: skip

    def draw(self, key: tuple, scales: str = "2x", k: str = "", tuned: tuple = (), direct=False):
        """Images of the last scale from the shared pivots, or directly from noise."""
        teacher, base, method = self.teacher(*key), self.base(*key), self.config.method
        plan = self.plan(key, scales, k or self.config.k)
        options = {}
        if tuned:
            teacher, options = tuned_cascade(teacher, tuned, plan)
        cascade = cascade_sampler(teacher, plan, method=method, batch_size=64, **options)
        if direct:
            return cascade.direct(self.ids, base.labels)[0]
        return cascade.draw(self.ids, base.labels, base.pivots)[0][-1]

    def tuning(self, key: tuple, arg: str, changes: dict, **limits):
        """The config of one tuned run at twice the base size."""
        data_name, _, seed = key
        teacher = self.teacher(*key)
        config = self.stage(data_name, f"stage=cascade,{arg}", seed)
        side = 2 * teacher.meta["networks"]["net"]["resolution"]
        config.data.resolution = side
        config.teacher = teacher.workdir
        config.batch_size = self.config.batch_size
        config.total_steps = limits["steps"]
        config.save_every = 50 if config.total_steps >= 50 else 1
        config.optim.lr = limits.get("lr", 0.0) or config.optim.lr
        config.keep = 1 + config.total_steps // config.save_every
        config.eval_every = config.total_steps
        for field in ("options", "split"):
            if field in limits:
                config.data[field] = limits[field]
        with config.unlocked():
            config.cascade.update(changes)
        return config

    def tune(self, key: tuple, name: str, arg: str, changes: dict, **limits) -> tuple[str, dict]:
        """(work directory, its summary) of one tuned run."""
        config = self.tuning(key, arg, changes, **limits)
        folder = name.replace(" ", "_").replace(":", "")
        place = self.workdir / f"{'-'.join(map(str, key))}-{folder}"
        summary = run(config, place)
        jax.clear_caches()
        return str(place), summary

    def untuned(self, key: tuple, arg: str, changes: dict, **limits) -> Tuned:
        """A tuned run's weights as they start."""
        stage = build(self.tuning(key, arg, changes, **limits))
        (params,) = fresh_state(stage, make_mesh(), key[2]).ema_params.values()
        return Tuned(params, stage.meta, stage.meta["cascade"]["tune"])


def cells(study: Study) -> Iterator[Cell]:
    """All cells in the order in which they are worth having."""
    seeds = study.config.seeds
    first = ("scenes", "edm", seeds[0])
    yield from composition(study, first, study.config.ks)
    yield from tuned(study, first)
    yield from stages(study, first)
    yield Cell("E9", "seconds", lambda: seconds(study, first))  # alone on the machine
    for process in study.config.vp:
        yield from composition(study, ("scenes", process, seeds[0]), study.config.ks)
    yield from baselines(study, first)
    yield from variants(study, ("scenes", study.config.vp[0], seeds[0]))
    for seed in seeds[1:]:
        yield from composition(study, ("scenes", "edm", seed), (study.config.k,))
        yield from tuned(study, ("scenes", "edm", seed))
    yield from photographs(study)


def composition(study: Study, key: tuple, ks: tuple[str, ...]) -> Iterator[Cell]:
    """E1, E2, E3 on one teacher; E4 is the same on others."""
    name = f"{key[1]} seed {key[2]}"
    first = key[2] == study.config.seeds[0]
    direct, restored, others = ("E4",) * 3 if key[1] != "edm" else ("E1", "E2", "E3")
    if not first:  # the further seeds of E2
        direct = "E2"

    def reference():
        base = study.base(*key)
        return study.measured(base.pivots, key)

    def cell(**options):
        return lambda: study.measured(study.draw(key, **options), key)

    yield Cell(direct, f"{name}: base", reference)
    yield Cell(direct, f"{name}: direct", cell(direct=True))
    yield Cell(restored, f"{name}: enlarged pivot", cell(k="sigma0"))
    for k in ks:
        section = restored if k == study.config.k else others
        yield Cell(section, f"{name}: K {k}", functools.partial(restarted, study, key, k))


def restarted(study: Study, key: tuple, k: str) -> dict:
    """The cascade from K, and the level that its grid really restarts at."""
    grid = study.plan(key, "2x", k).restarts[0]
    share = (len(grid) - 1) / study.config.steps
    found = study.measured(study.draw(key, k=k), key)
    return {"restart_sigma": float(grid[0]), "share_of_steps": share} | found


def stages(study: Study, key: tuple) -> Iterator[Cell]:
    """E5; E1's direct sampling at four times the size."""
    for title, options in (
        ("two stages", {"scales": "2x,4x"}),
        ("one jump", {"scales": "4x"}),
        ("direct", {"scales": "4x", "direct": True}),
        ("enlarged pivot", {"scales": "4x", "k": "sigma0"}),
    ):
        run_cell = functools.partial(lambda o: study.measured(study.draw(key, **o), key), options)
        yield Cell("E5", f"edm seed {key[2]}: 4x {title}", run_cell)


def tuned(study: Study, key: tuple) -> Iterator[Cell]:
    """E6, E7, E8: every design by optimiser steps, from the pivot; adapters and fine-tuned weights
    also without one."""
    config = study.config
    for name, (arg, changes, lr, last) in config.tunings.to_dict().items():
        if key[2] != config.seeds[0] and name not in config.repeated:
            continue
        started = (0,) if name in config.as_they_start else ()
        for after in (*started, *(steps for steps in config.eval_steps if steps <= last)):
            for direct in (False, True) if of_base_weights(name) else (False,):
                title = f"edm seed {key[2]}: {name} {'direct ' * direct}after {after}"
                run_cell = functools.partial(
                    tuned_cell, study, key, name, arg, changes, after, direct, lr=lr, steps=last
                )
                yield Cell("E6", title, run_cell)


def of_base_weights(name: str) -> bool:
    """Whether a tuned run changes the base's own weights, so that it can do without a pivot."""
    return name.startswith(("lora", "ft"))


def tuned_cell(study, key, name, arg, changes, after, direct=False, **limits) -> dict:
    """One tuned run after so many steps; limits: of the run, see `Study.tuning`."""
    if after:
        place, _ = study.tune(key, name, arg, changes, **limits)
        found = load_tuned(place, study.teacher(*key), step=after)
    else:
        found = study.untuned(key, arg, changes, **limits)
    images = study.draw(key, tuned=(found,), direct=direct)
    return {"parameters": param_count(found.params)} | study.measured(images, key)


def variants(study: Study, key: tuple) -> Iterator[Cell]:
    """E11, of the released code's design."""
    steps = study.config.variant_steps
    for name, changes in study.config.variants.to_dict().items():
        whole = {"init": "identity"} | changes
        run_cell = functools.partial(
            tuned_cell, study, key, name, "tune=full", whole, steps, steps=steps
        )
        yield Cell("E11", f"{name} after {steps}", run_cell)


def baselines(study: Study, key: tuple) -> Iterator[Cell]:
    """E12, and the other baselines of the paper's table."""
    for name in BASELINES:
        for added in (False, True):
            title = f"{name}, {'on top of the cascade' if added else 'alone'}"
            yield Cell("E12", title, functools.partial(baseline_cell, study, key, name, added))


def baseline_cell(study: Study, key: tuple, name: str, added: bool) -> dict:
    teacher, base = study.teacher(*key), study.base(*key)
    plan = study.plan(key, "2x", study.config.k, shifted=name == "shifted")
    denoiser = baseline(name, teacher.meta, plan.sizes[-1])
    cascade = cascade_sampler(
        teacher, plan, method=study.config.method, batch_size=64,
        denoisers=[denoiser, denoiser], direct_denoiser=denoiser,
    )  # fmt: skip
    if added:
        images = cascade.draw(study.ids, base.labels, base.pivots)[0][-1]
    else:
        images, _ = cascade.direct(study.ids, base.labels)
    return study.measured(images, key)


def photographs(study: Study) -> Iterator[Cell]:
    """E10 and E13, on real images."""
    key = ("photographs", "edm", study.config.seeds[0])
    steps = study.config.variant_steps

    def cell(**options):
        return lambda: study.measured(study.draw(key, **options), key)

    yield Cell("E10", "photographs: direct", cell(direct=True))
    yield Cell("E10", "photographs: enlarged pivot", cell(k="sigma0"))
    yield Cell("E10", "photographs: tuning-free", cell())
    for few in study.config.few:
        for tune in ("neck", "lora", "ft"):
            for direct in (False, True) if of_base_weights(tune) else (False,):
                run_cell = functools.partial(few_cell, study, key, tune, few, steps, direct)
                title = f"{tune} {'direct ' * direct}of {few} images after {steps}"
                yield Cell("E10", f"photographs: {title}", run_cell)
    yield Cell("E13", "photographs: real pivots", lambda: real_pivots(study, key))


def few_cell(study: Study, key: tuple, tune: str, few: int, steps: int, direct: bool) -> dict:
    """A run on the first `few` photographs alone.

    memorised: median distance, in features, to the nearest of these, over the same of held-out
    photographs; far below 1 where the run copies.
    """
    limits = {"options": {"size": few}} if study.config.smoke else {"split": f"train[:{few}]"}
    run = (f"{tune} of {few}", f"tune={tune}", {})
    place, _ = study.tune(key, *run, steps=steps, **limits)
    images = study.draw(key, tuned=(load_tuned(place, study.teacher(*key)),), direct=direct)
    judge = study.judge(key[0], images.shape[1]).reference
    settings = study.stage(key[0], "stage=pretrain", 0).data
    settings.update(limits)
    seen = data.open_data(settings, resolution=images.shape[1])
    real = embed(judge.network, to_uint8(data.read(seen, range(len(seen)))[0]))
    ours, held_out = (
        np.median(nearest_features(features, real).distance)
        for features in (embed(judge.network, to_uint8(images)), judge.features)
    )
    return {"memorised": float(ours / held_out)} | study.measured(images, key)


def real_pivots(study: Study, key: tuple) -> dict:
    """Test images shrunk to the base size and enlarged again, PSNR in dB [mean, standard error]: to
    the pivot, to the photograph itself (and of the pivot merely enlarged), from seed to seed."""
    settings = study.stage(key[0], "stage=pretrain", 0).data
    teacher = study.teacher(*key)
    side = 2 * teacher.meta["networks"]["net"]["resolution"]
    source = data.open_data(settings, resolution=side, split=settings["eval_split"])
    images, labels = data.read(source, range(min(len(source), study.config.num)))
    pivots, ids = np.asarray(area_mean(images, side // 2)), np.arange(len(images))

    def drawn(k: str, seed: int) -> np.ndarray:
        cascade = cascade_sampler(
            teacher, study.plan(key, "2x", k), seed=seed, method=study.config.method, batch_size=64
        )
        return cascade.draw(ids, labels, pivots)[0][-1]

    def psnr(a, b):
        rows = 10 * np.log10(4 / np.mean((a - b) ** 2, axis=(1, 2, 3)))
        return [float(rows.mean()), float(rows.std() / np.sqrt(len(rows)))]

    first, second = drawn(study.config.k, 0), drawn(study.config.k, 1)
    return {
        "num": len(images),
        "psnr_to_pivot": psnr(np.asarray(area_mean(first, side // 2)), pivots),
        "psnr_to_photograph": psnr(first, images),
        "psnr_of_enlarged_pivot": psnr(drawn("sigma0", 0), images),
        "psnr_between_seeds": psnr(first, second),
    }
