"""Checks of the step-adaptive study beside its arms: memory, jumps, inversion, seconds.

`study`: a `pruning_experiment.Study`.
"""

import functools

import numpy as np

from cheapscale.diffusion import process
from cheapscale.pruning.search import make_task, search
from cheapscale.stages import data
from cheapscale.stages.assessment import Assessment, read_proxy
from cheapscale.stages.networks import make_denoiser, members
from cheapscale.stages.sampling import sampler
from cheapscale.training.sharding import in_batches
from launch.bench import alternate
from launch.round_trips import round_trips


def memory(study, seed: int) -> dict:
    """E9: the best proxy loss of searches with and without memory, of the most pruned group; the
    proxy and the scores are the same for all, only the search is seeded."""
    config, manifest = study.config, study.main(seed)[1]
    group = int(np.argmin(manifest["shares"]))
    settings, folder = manifest["settings"], study.workdir / "searches"
    proxy = read_proxy(study.source, max(settings["proxy_images"], settings["score_images"]))
    of = Assessment(study.teacher(seed), proxy, settings, seed, str(folder))
    task = make_task(of.net.config, float(of.targets[group]), of.scores(group), settings["plan"])
    scores: dict[str, list[float]] = {"remembered": [], "forgotten": []}
    for kind, rows in scores.items():
        for search_seed in config.memory_seeds:
            best, _ = search(
                task,
                lambda widths: of.score(task.keep(widths), group),
                of.proposer(),
                rounds=settings["rounds"],
                per_round=settings["per_round"],
                memory_path=folder / f"{kind}-{search_seed}.jsonl",
                seed=search_seed,
                remember=kind == "remembered",
            )
            rows.append(best.score)
    return {
        kind: {"scores": rows, "mean": float(np.mean(rows)), "deviation": float(np.std(rows))}
        for kind, rows in scores.items()
    }


def jumps(study, seed: int) -> dict:
    """E10: root mean square of the difference of two neighbours' estimates at their border, over
    that of the base's own error there; of specialists with overlap and without."""
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
            model, params = members(loaded)[index]
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


def inversion(study, seed: int) -> dict:
    """E12. These specialists overlap by a step of the study's grid, not of inversion's."""
    num = study.config.round_trip
    images, labels = study.held.images[:num], study.held.labels[:num]
    specialists, _ = study.main(seed)
    return round_trips(study.teacher(seed), specialists, images, labels, without_rule=True)


def seconds(study, seed: int) -> dict:
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
