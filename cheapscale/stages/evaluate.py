"""Evaluation as a job: images of a model, a folder or a file, embedded shard by shard and scored.

    for each set of images (generated; real ones whose statistics are not cached; training ones;
                            reconstructions with what they should be)
        for each shard of it
            images <- sampled or read
            for each network and view (whole, crops, base resolution)
                shards/<set>-<number>.npz <- features and logits
    scores(features, reference statistics), for each network and view

Images are looked at once for all metrics. Image i depends on the seed and i alone and shards are
written whole, so that a run may be stopped, resumed, or split over processes at will.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cheapscale.data.files import whole_or_nothing
from cheapscale.evaluation import alignment, patches
from cheapscale.evaluation import scenes as composition
from cheapscale.evaluation.naming import suffixed
from cheapscale.evaluation.perceptual import reconstruction
from cheapscale.evaluation.pixels import check_images, to_uint8
from cheapscale.evaluation.quality import checked_name, choice, outputs, unseen_by_classifier
from cheapscale.evaluation.scores import scores
from cheapscale.evaluation.statistics import (
    Identity,
    Statistics,
    cache_path,
    check_match,
    load_statistics,
    reference_statistics,
)
from cheapscale.models.features import FeatureNetwork
from cheapscale.stages.evaluate_settings import (
    Inputs,
    Settings,
    asked_by,
    check,
    networks_with_logits,
)
from cheapscale.stages.image_sets import Images, Pairs, chosen_images
from cheapscale.training.sharding import agreed
from cheapscale.training.stage import Job

GENERATED, REAL, TRAIN, PAIRS = "generated", "real", "train", "pairs"


class Part(NamedTuple):
    """One shard of one set: rows first ... last (excluded) of `images`."""

    name: str
    images: Images | Pairs
    views: tuple[str, ...]
    first: int
    last: int


class Plan(NamedTuple):
    """An evaluation laid out.

    sets: {set: (images, views)}. names: {network: its name in metrics}. wanted: {(set, network,
    view): what its statistics must be of}. given: {(network, view): published or own statistics
    that stand for the real images}. with_logits: the networks that "score" is computed of.
    """

    inputs: Inputs
    settings: Settings
    workdir: pathlib.Path
    sets: dict[str, tuple[Images | Pairs, tuple[str, ...]]]
    names: dict[str, str]
    wanted: dict[tuple[str, str, str], Identity]
    given: dict[tuple[str, str], Statistics]
    with_logits: tuple[str, ...]


def evaluation_job(inputs: Inputs, settings: Settings, workdir: str | pathlib.Path) -> Job:
    """The job. Its summary holds the scores by name and "warnings".

    Raises ValueError, before anything is sampled, on metrics that lack what they compare with.
    """
    check(inputs, settings)
    layout = plan(inputs, settings, pathlib.Path(workdir))
    parts = shards(layout)
    measure = reconstruction(inputs.lpips, batch_size=settings.batch_size)

    def run_shard(context: object, shard: int, mesh) -> dict:
        del context, mesh
        part = parts[shard]
        found = compare_pairs(part, measure) if part.name == PAIRS else look_at(layout, part)
        path = place(layout, part)
        with whole_or_nothing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **found)
        return {"images": part.last - part.first}

    return Job(
        num_shards=len(parts),
        items_per_shard=settings.per_shard,
        prepare=lambda: None,
        done=lambda shard: place(layout, parts[shard]).is_file(),
        run_shard=run_shard,
        # one process reports
        finish=lambda _: {} if jax.process_index() else conclude(layout, parts),
    )


def identity(inputs: Inputs, settings: Settings) -> dict:
    """Everything that the numbers depend on, as plain values: what a work directory belongs to."""
    networks = {n.name: f"{n.sha256} {n.variant} {n.input_size}" for n in inputs.networks}
    return settings._asdict() | {
        "generated": inputs.generated.fingerprint,
        "num": inputs.generated.num,
        "networks": networks,
        "real": inputs.real is not None and inputs.real.fingerprint(),
        "train": inputs.train is not None and inputs.train.fingerprint(),
        "references": list(inputs.references),
        "clip": inputs.clip and f"{inputs.clip.network.sha256} {inputs.clip.fingerprint}",
        "pairs": inputs.pairs and inputs.pairs.fingerprint,
        "lpips": inputs.lpips and inputs.lpips.sha256,
    }


def plan(inputs: Inputs, settings: Settings, workdir: pathlib.Path) -> Plan:
    """Which images are looked at through what, and which statistics they make."""
    measuring = [*inputs.networks, inputs.lpips, inputs.clip and inputs.clip.network]
    names = {
        network.name: checked_name(network, inputs.used_in_loss, insist=settings.insist)
        for network in filter(None, measuring)
    }
    given = read_references(inputs, settings)
    sets: dict[str, tuple[Images | Pairs, tuple[str, ...]]] = {}
    wanted = {}
    if set(settings.metrics) != {"reconstruction"}:
        sets[GENERATED] = (inputs.generated, settings.views())
        if inputs.real is not None:
            ids = choice(len(inputs.real), settings.num_reference)
            sets[REAL] = (chosen_images(inputs.real, ids), settings.views())
        if inputs.train is not None:
            ids = choice(len(inputs.train), settings.num_train)
            sets[TRAIN] = (chosen_images(inputs.train, ids), ("",))
        for name, source in ((REAL, inputs.real), (TRAIN, inputs.train)):
            for network in inputs.networks if name in sets else ():
                for view in sets[name][1]:
                    if name == TRAIN or (network.name, view) not in given:
                        key = (name, network.name, view)
                        wanted[key] = statistic(source, sets[name][0], network, view, settings)
    if "reconstruction" in settings.metrics:
        sets[PAIRS] = (inputs.pairs, ())
    with_logits = networks_with_logits(inputs, settings)
    return Plan(inputs, settings, workdir, sets, names, wanted, given, with_logits)


def read_references(inputs: Inputs, settings: Settings) -> dict[tuple[str, str], Statistics]:
    """{(network, ""): statistics} of the files given; refuses those of other networks or images."""
    given = {}
    networks = {network.name: network for network in inputs.networks}
    for path in inputs.references:
        statistics = load_statistics(path)
        owner = statistics.identity.network if statistics.identity else "inception_v3"
        if owner not in networks:
            raise ValueError(
                f"{path} holds statistics of {owner}, but the networks are "
                f"{', '.join(networks) or 'none'}: add --network={owner}=FILE"
            )
        check_match(
            statistics,
            sha256=networks[owner].sha256,
            variant="",
            resolution=inputs.generated.resolution,
            resize=resize_name(settings, networks[owner]),
        )
        needing = sorted({"kid", "prdc", "floor"} & set(settings.metrics))
        if needing and statistics.features is None:
            raise ValueError(
                f"metrics {needing} need the features of real images and {path} holds moments "
                "only: leave it out and compare with --data, or ask for fd"
            )
        given[owner, ""] = statistics
    return given


def statistic(
    source, images: Images, network: FeatureNetwork, view: str, settings: Settings
) -> Identity:
    """What the statistics of these images of `source` are known by."""
    return Identity(
        data=source.fingerprint(),
        split=source.split,
        resolution=images.resolution,
        num=images.num * (patches.CROPS if view == "patch" else 1),
        network=network.name,
        sha256=network.sha256,
        resize=resize_name(settings, network),
        variant={
            "": "",
            "patch": f"patch {settings.patch} x {patches.CROPS} seed 0",
            "base": f"base {settings.base}",
        }[view],
    )


def resize_name(settings: Settings, network: FeatureNetwork) -> str:
    """How images reach the network's input, as the identity of a statistic says it."""
    return f"{settings.resize} {network.variant} {network.input_size or ''}".strip()


def shards(layout: Plan) -> list[Part]:
    """The work, the same list on every process: statistics that are cached need no images."""
    cached = np.asarray([cache_path(identity).exists() for identity in layout.wanted.values()])
    cached = dict(zip(layout.wanted, agreed(cached)))  # the caches of processes may differ
    parts = []
    for name, (images, views) in layout.sets.items():
        known = [there for (owner, *_), there in cached.items() if owner == name]
        if name in (REAL, TRAIN) and all(known) and not composes(layout, name):
            continue
        for first in range(0, images.num, layout.settings.per_shard):
            last = min(first + layout.settings.per_shard, images.num)
            parts.append(Part(name, images, views, first, last))
    return parts


def composes(layout: Plan, name: str) -> bool:
    """Whether the compositions of this set are read; of real images they are the ceiling."""
    return "composition" in layout.settings.metrics and name in (GENERATED, REAL)


def place(layout: Plan, part: Part) -> pathlib.Path:
    """Where a shard goes."""
    return layout.workdir / "shards" / f"{part.name}-{part.first:07d}.npz"


def compare_pairs(part: Part, measure) -> dict[str, np.ndarray]:
    """One shard of reconstructions: every measure of each, and the first few with their targets."""
    images, targets = part.images.read(np.arange(part.first, part.last))
    found = measure(images, targets)
    if part.first == 0:
        found["preview"] = to_uint8(np.concatenate([targets[:8], images[:8]]))
    return found


def look_at(layout: Plan, part: Part) -> dict[str, np.ndarray]:
    """One shard: "<network>/<view>/features" and "/logits", "composition/<part>", "clip"."""
    inputs, settings = layout.inputs, layout.settings
    ids = np.arange(part.first, part.last)
    images, labels = part.images.read(ids)
    check_images(images)
    found = {"ids": ids, "labels": labels}
    if part.first == 0:
        found["preview"] = images[:64]
    for view in part.views:
        seen = see(images, ids, view, settings)
        for network in inputs.networks:
            logits = network.name in layout.with_logits and view == "" and part.name == GENERATED
            out = outputs(
                network,
                seen,
                batch_size=settings.batch_size,
                resize=settings.resize,
                logits=logits,
            )
            found |= {f"{network.name}/{view}/{key}": value for key, value in out.items()}
    kind = asked_by(inputs)
    if composes(layout, part.name):
        asked = part.images.captions(ids) if kind == "caption" else labels
        found |= compositions(images, asked)
    if "clip" in settings.metrics and part.name == GENERATED:
        clip = inputs.clip
        texts = part.images.captions(ids) if kind == "caption" else None
        texts = texts or [clip.prompts[label] for label in labels]
        # CLIP resizes as it was published, whatever the others do
        features = outputs(clip.network, images, batch_size=settings.batch_size)["features"]
        found["clip"] = alignment.clip_scores(features, clip.texts(texts))
    return found


def see(images: np.ndarray, ids: np.ndarray, view: str, settings: Settings) -> np.ndarray:
    """Images as one view sees them: whole, as random crops, or reduced to the base resolution."""
    if view == "patch":
        return patches.random_crops(images, ids, settings.patch)
    if view == "base":
        return patches.base_images(images, settings.base)
    return images


def compositions(images: np.ndarray, asked: Sequence) -> dict[str, np.ndarray]:
    """{"composition/<part>": right or wrong, for each image} against its label or caption."""
    verdicts = [
        composition.judge(composition.read(image), wish if isinstance(wish, str) else int(wish))
        for image, wish in zip(images, asked)
    ]
    return {f"composition/{k}": np.asarray([v[k] for v in verdicts]) for k in verdicts[0]}


def read(layout: Plan, parts: list[Part], name: str, key: str) -> np.ndarray:
    """One array of all shards of a set, in order."""
    stored = []
    for part in parts:
        if part.name == name:
            with np.load(place(layout, part)) as file:
                stored.append(file[key])
    return np.concatenate(stored)


def keys(layout: Plan, parts: list[Part], name: str, prefix: str = "") -> list[str]:
    """The arrays that every shard of a set holds."""
    last = [part for part in parts if part.name == name][-1]  # the first has a preview as well
    with np.load(place(layout, last)) as stored:
        return [key for key in stored.files if key.startswith(prefix) and key != "preview"]


def conclude(layout: Plan, parts: list[Part]) -> dict:
    """The summary, from the shards and the cached statistics."""
    inputs, settings = layout.inputs, layout.settings
    result: dict = {
        "num": inputs.generated.num,
        "networks": {network.name: network.sha256 for network in inputs.networks},
    }
    for name, key in ((REAL, "num_reference"), (TRAIN, "num_train")):
        if name in layout.sets:
            result[key] = layout.sets[name][0].num
    warnings: list[str] = []
    for network in inputs.networks if GENERATED in layout.sets else ():
        for view in settings.views():
            found, more = score_view(layout, parts, network, view)
            result |= found
            warnings += more
    for name, suffix in ((GENERATED, ""), (REAL, "_real")):
        if composes(layout, name) and name in layout.sets:
            for key in keys(layout, parts, name, "composition/"):
                value = float(read(layout, parts, name, key).mean())
                result[key.replace("/", "_") + suffix] = value
    if PAIRS in layout.sets:
        kinds = keys(layout, parts, PAIRS)
        for kind in kinds:
            name = f"reconstruction_{kind}"
            if kind == "lpips":
                name += f"_vgg16{mark(layout.names[inputs.lpips.name])}"
            result[name] = float(read(layout, parts, PAIRS, kind).mean())
        result["num_reconstructions"] = inputs.pairs.num
        if "lpips" not in kinds:
            warnings.append("no LPIPS of the reconstructions: give --lpips=vgg16_lpips=FILE")
    if "clip" in settings.metrics:
        score = float(read(layout, parts, GENERATED, "clip").mean())
        result[f"clip_score_{layout.names[inputs.clip.network.name]}"] = score
    return result | {"warnings": warnings}


def mark(name: str) -> str:
    """ "(used in the loss)" of a network's name in metrics, or ""."""
    return "".join(name.partition("(")[1:])


def score_view(
    layout: Plan, parts: list[Part], network: FeatureNetwork, view: str
) -> tuple[dict, list[str]]:
    """(scores of the generated images in one network and view, warnings)."""
    settings = layout.settings
    features = read(layout, parts, GENERATED, f"{network.name}/{view}/features")
    reference, training = (
        statistics_of(layout, parts, name, network.name, view) for name in (REAL, TRAIN)
    )
    shared = {
        "network": layout.names[network.name],
        "sha256": network.sha256,
        "variant": view,
        "resize": settings.resize,
    }
    if view:
        found = scores(features, reference, metrics=("fd", "kid"), **shared)
        return plain(found), found["warnings"]
    metrics = [kind for kind in ("fd", "kid", "prdc", "memorisation") if kind in settings.metrics]
    logits = None
    if network.name in layout.with_logits:
        metrics.append("score")
        logits = read(layout, parts, GENERATED, f"{network.name}//logits")
    result, warnings = {}, []
    if metrics:
        known = training.features if "memorisation" in metrics else None
        found = scores(
            features, reference, metrics=metrics, logits=logits, train_features=known, **shared
        )
        result, warnings = plain(found), found["warnings"]
    if "memorisation" in metrics and reference is not None and reference.features is not None:
        held_out = scores(
            reference.features, metrics=["memorisation"], train_features=known, **shared
        )
        result |= {suffixed(key, "_real"): value for key, value in plain(held_out).items()}
    if "floor" in settings.metrics:
        # as many images on the left as were generated: a Frechet distance's bias depends on it
        images, _ = layout.sets[TRAIN]
        unseen = training.features[unseen_rows(network, len(layout.inputs.train), images.num)]
        floor = scores(unseen[: len(features)], reference, metrics=["fd", "kid"], **shared)
        result |= {suffixed(key, "_floor"): value for key, value in plain(floor).items()}
        if len(unseen) < len(features):
            warnings.append(
                f"the floor in {network.name} is of {len(unseen)} training images, the score of "
                f"{len(features)}: compare each after taking off its bias"
            )
    return result, warnings


def plain(found: dict) -> dict:
    """The scores alone."""
    return {k: v for k, v in found.items() if k not in ("num", "num_reference", "warnings")}


def statistics_of(
    layout: Plan, parts: list[Part], name: str, network: str, view: str
) -> Statistics | None:
    """Of a set of real images: from a file that was given, the cache, or the shards."""
    if name == REAL and (network, view) in layout.given:
        return layout.given[network, view]
    wanted = layout.wanted.get((name, network, view))
    if wanted is None:
        return None
    key = f"{network}/{view}/features"
    return reference_statistics(wanted, lambda: [read(layout, parts, name, key)])


def unseen_rows(network: FeatureNetwork, length: int, num: int) -> np.ndarray:
    """Which rows of the chosen training images the network was not itself fitted on."""
    ids = choice(length, num)
    fitted_here = network.name.startswith("classifier")
    return np.flatnonzero(unseen_by_classifier(ids)) if fitted_here else np.arange(len(ids))
