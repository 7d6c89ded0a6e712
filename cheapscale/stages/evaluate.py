"""Evaluation as a job: images of a model, a folder or a file, embedded shard by shard and scored.

    for each set of images (generated; real ones whose statistics are not cached; training ones)
        for each shard of it
            images <- sampled or read
            for each network and view (whole, crops, base resolution)
                shards/<set>-<number>.npz <- features and logits
    scores(features, reference statistics), for each network and view

Images are looked at once for all metrics. Image i depends on the seed and i alone and shards are
written whole, so that a run may be stopped, resumed, or split over processes at will.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.evaluation import alignment, patches, resize
from cheapscale.evaluation import scenes as composition
from cheapscale.evaluation.naming import metric_name
from cheapscale.evaluation.pixels import check_images, to_uint8
from cheapscale.evaluation.quality import checked_name, choice, unseen_by_classifier
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
from cheapscale.stages.sampling import in_batches
from cheapscale.training.stage import Job

PyTree = Any

FEATURE_METRICS = ("fd", "kid", "score", "prdc", "memorisation", "floor")
VIEW_METRICS = ("patch", "base")  # the distances once more, on crops and on reduced images
METRICS = (*FEATURE_METRICS, *VIEW_METRICS, "composition", "clip")


class Images(NamedTuple):
    """A set of `num` images. read(ids [n]) -> (uint8 [n, R, R, 3], labels [n])."""

    num: int
    resolution: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Settings(NamedTuple):
    """How to measure.

    metrics: some of METRICS. resize: "network", "clean" or "tf1" (evaluation.resize). patch: side
    of the crops. base: resolution of the view "base". prompt: text for "clip", with {} for the
    class. insist: score even with a network that a loss used, and have the names say so.
    """

    metrics: tuple[str, ...]
    batch_size: int = 250
    per_shard: int = 1000
    resize: str = "network"
    patch: int = 0
    base: int = 0
    prompt: str = "a photo of a {}"
    insist: bool = False

    def views(self) -> tuple[str, ...]:
        return ("", *(view for view in VIEW_METRICS if view in self.metrics))


class Part(NamedTuple):
    """One shard of one set: rows first ... last (excluded) of `images`."""

    name: str
    images: Images
    views: tuple[str, ...]
    first: int
    last: int


def evaluation_job(
    generated: Images,
    networks: Sequence[FeatureNetwork],
    settings: Settings,
    workdir: str | pathlib.Path,
    *,
    real: Any = None,
    train: Any = None,
    num_reference: int = 50_000,
    num_train: int = 10_000,
    references: Sequence[str] = (),
    used_in_loss: dict[str, str] | None = None,
    clip: tuple[FeatureNetwork, np.ndarray] | None = None,
) -> Job:
    """The job. Its summary holds the scores by name and "warnings".

    Args:
        real, train: sources (data.sources) to compare with, and for "memorisation" and "floor" the
            training images; a fixed random choice of at most num_reference and num_train is read.
        references: published or own .npz statistics to use in place of `real`, each of the network
            it names.
        used_in_loss: {name: sha256} of the networks of the model's losses.
        clip: CLIP and the text features [classes, d] of its prompts, for "clip".

    Raises ValueError, before anything is sampled, on metrics that lack what they compare with.
    """
    workdir = pathlib.Path(workdir)
    check_settings(settings, generated, networks, real, train, references, clip)
    names = {n.name: checked_name(n, used_in_loss or {}, insist=settings.insist) for n in networks}
    given = {}
    for path in references:
        statistics = load_statistics(path)
        owner = statistics.identity.network if statistics.identity else "inception_v3"
        chosen = [n for n in networks if n.name == owner]
        if not chosen:
            raise ValueError(
                f"{path} holds statistics of {owner}, but the networks are "
                f"{', '.join(names) or 'none'}: add --network={owner}=FILE"
            )
        check_match(statistics, sha256=chosen[0].sha256, variant="")
        given[owner, ""] = statistics

    reference_set = chosen_images(real, num_reference) if real is not None else None
    train_set = chosen_images(train, num_train) if train is not None else None

    def identity(source, images, network, view):
        return Identity(
            data=source.fingerprint(),
            split=source.split,
            resolution=images.resolution,
            num=images.num * (patches.CROPS if view == "patch" else 1),
            network=network.name,
            sha256=network.sha256,
            resize=f"{settings.resize} {network.variant}".strip(),
            variant={
                "": "",
                "patch": f"patch {settings.patch} x {patches.CROPS} seed 0",
                "base": f"base {settings.base}",
            }[view],
        )

    wanted: dict[tuple, Identity] = {}  # (set, network, view) -> what its statistics must be of
    sets = {"generated": (generated, settings.views())}
    if reference_set is not None:
        for network in networks:
            for view in settings.views():
                if (network.name, view) not in given:
                    wanted["real", network.name, view] = identity(
                        real, reference_set, network, view
                    )
        sets["real"] = (reference_set, settings.views())
    if train_set is not None:
        for network in networks:
            wanted["train", network.name, ""] = identity(train, train_set, network, "")
        sets["train"] = (train_set, ("",))

    parts = []
    for name, (images, views) in sets.items():
        cached = [cache_path(i).exists() for (owner, *_), i in wanted.items() if owner == name]
        if name != "generated" and all(cached) and not composes(settings, name):
            continue
        for first in range(0, images.num, settings.per_shard):
            last = min(first + settings.per_shard, images.num)
            parts.append(Part(name, images, views, first, last))

    def place(part: Part) -> pathlib.Path:
        return workdir / "shards" / f"{part.name}-{part.first:07d}.npz"

    def run_shard(context: Any, shard: int, mesh) -> dict:
        del context, mesh
        part = parts[shard]
        ids = np.arange(part.first, part.last)
        images, labels = part.images.read(ids)
        check_images(images)
        found = {"ids": ids, "labels": labels}
        if part.first == 0:
            found["preview"] = images[:64]
        for view in part.views:
            seen = look(images, ids, view, settings)
            for network in networks:
                out = embed(network, seen, settings, logits="score" in settings.metrics)
                found |= {f"{network.name}/{view}/{key}": value for key, value in out.items()}
        if composes(settings, part.name):
            verdicts = [
                composition.judge(composition.read(image), int(label))
                for image, label in zip(images, labels)
            ]
            found |= {f"composition/{k}": np.asarray([v[k] for v in verdicts]) for k in verdicts[0]}
        if clip is not None and part.name == "generated":
            network, texts = clip
            features = embed(network, images, settings, logits=False)["features"]
            found["clip"] = alignment.clip_scores(features, texts[labels])
        write_whole(place(part), found)
        return {"images": len(images)}

    def read(name: str, key: str) -> np.ndarray:
        stored = []
        for part in parts:
            if part.name == name:
                with np.load(place(part)) as file:
                    stored.append(file[key])
        return np.concatenate(stored)

    def statistics_of(name: str, network: str, view: str) -> Statistics | None:
        if name == "real" and (network, view) in given:
            return given[network, view]
        found = wanted.get((name, network, view))
        if found is None:
            return None
        return reference_statistics(found, lambda: [read(name, f"{network}/{view}/features")])

    def finish(context: Any) -> dict:
        del context
        if jax.process_index():
            return {}
        result: dict = {"num": generated.num, "networks": {n.name: n.sha256 for n in networks}}
        warnings: list[str] = []
        for network in networks:
            for view in settings.views():
                result |= score_view(network, view, names[network.name], warnings)
        for name in ("generated", "real"):
            if composes(settings, name) and name in sets:
                keys = [k for k in np.load(place(parts[0])).files if k.startswith("composition/")]
                suffix = "" if name == "generated" else "_real"
                result |= {
                    f"{key.replace('/', '_')}{suffix}": float(read(name, key).mean())
                    for key in keys
                }
        if clip is not None:
            result[f"clip_score_{clip[0].name}"] = float(read("generated", "clip").mean())
        return result | {"warnings": warnings}

    def score_view(network, view, name, warnings) -> dict:
        features = read("generated", f"{network.name}/{view}/features")
        kinds = ("fd", "kid") if view else ("fd", "kid", "score", "prdc", "memorisation")
        metrics = [kind for kind in kinds if kind in settings.metrics or view]
        reference = statistics_of("real", network.name, view)
        training = statistics_of("train", network.name, "")
        shared = {"network": name, "sha256": network.sha256, "variant": view}
        found = {}
        if metrics:
            found = scores(
                features,
                reference,
                metrics=metrics,
                logits=read("generated", f"{network.name}//logits") if "score" in metrics else None,
                train_features=training.features if "memorisation" in metrics else None,
                **shared,
            )
            for key in ("num", "num_reference"):
                found.pop(key, None)
            warnings.extend(found.pop("warnings"))
        if view == "" and "memorisation" in metrics and reference is not None:
            real_scores = scores(
                reference.features,
                metrics=["memorisation"],
                train_features=training.features,
                **shared,
            )
            found |= {f"{k}_real": v for k, v in real_scores.items() if k.startswith("memor")}
        if view == "" and "floor" in settings.metrics:
            # as many images on the left as were generated: a Frechet distance's bias depends on it
            unseen = training.features[unseen_rows(network, len(train), train_set.num)]
            floor = scores(unseen[: len(features)], reference, metrics=["fd", "kid"], **shared)
            for kind in ("fd", "kid"):
                key = metric_name(kind, name, network.sha256)
                found[f"{key}_floor"] = floor[key]
        return found

    return Job(
        num_shards=len(parts),
        items_per_shard=settings.per_shard,
        prepare=lambda: None,
        done=lambda shard: place(parts[shard]).is_file(),
        run_shard=run_shard,
        finish=finish,
    )


def check_settings(settings, generated, networks, real, train, references, clip) -> None:
    """Refuse metrics that are unknown or lack what they compare with."""
    unknown = sorted(set(settings.metrics) - set(METRICS))
    if unknown or not settings.metrics:
        raise ValueError(f"unknown metrics {unknown}: choose some of {', '.join(METRICS)}")
    if generated.num < 2:
        raise ValueError(f"num is {generated.num}: a distribution needs at least 2 images")
    asked = set(settings.metrics)
    if asked & {*FEATURE_METRICS, *VIEW_METRICS} and not networks:
        raise ValueError(f"metrics {sorted(asked)} need a feature network: give --network")
    if asked & {"kid", "prdc", "floor", *VIEW_METRICS} and real is None:
        raise ValueError(f"metrics {sorted(asked)} compare with real images: give --data")
    if "fd" in asked and real is None and not references:
        raise ValueError("fd compares with real images: give --data or --reference")
    if asked & {"memorisation", "floor"} and train is None:
        raise ValueError("memorisation and floor need training images: give --train_split")
    if real is not None and real.resolution != generated.resolution:
        raise ValueError(
            f"the images are {generated.resolution} px, the real ones {real.resolution}: compare "
            "at one resolution"
        )
    if "patch" in asked and not 1 <= settings.patch <= generated.resolution:
        raise ValueError(
            f"patch is {settings.patch}, the images are {generated.resolution} px: choose a side "
            "between 1 and that"
        )
    if "base" in asked and (settings.base < 1 or generated.resolution % settings.base):
        raise ValueError(
            f"base is {settings.base}: it has to divide the images' {generated.resolution} px"
        )
    if "clip" in asked and clip is None:
        raise ValueError("clip needs a CLIP network: give --clip and --vocabulary")
    if settings.resize != "network" and settings.resize not in resize.MODES:
        raise ValueError(
            f"resize is {settings.resize!r}: choose network, {' or '.join(resize.MODES)}"
        )
    for network in networks:
        if network.outputs is None:
            raise ValueError(f"{network.name} has no pooled features: measure with another network")
        if settings.resize != "network" and not network.input_size:
            raise ValueError(f"{network.name} takes any size: use resize=network")
    if "composition" in asked and real is not None and real.name != "scenes":
        raise ValueError(f"composition is known for scenes, not for {real.name}: leave it out")


def composes(settings: Settings, name: str) -> bool:
    """Whether the compositions of this set are read; of real images they are the ceiling."""
    return "composition" in settings.metrics and name in ("generated", "real")


def unseen_rows(network: FeatureNetwork, length: int, num: int) -> np.ndarray:
    """Which rows of the chosen training images the network was not itself fitted on."""
    ids = choice(length, num)
    fitted_here = network.name.startswith("classifier")
    return np.flatnonzero(unseen_by_classifier(ids)) if fitted_here else np.arange(len(ids))


def chosen_images(source, num: int) -> Images:
    """A fixed random choice of at most `num` images of a source."""
    order = choice(len(source), num)

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        items = [source[int(order[i])] for i in ids]
        images = to_uint8(np.stack([item["image"] for item in items]))
        return images, np.asarray([item["label"] for item in items], np.int32)

    return Images(len(order), source.resolution, read)


def look(images: np.ndarray, ids: np.ndarray, view: str, settings: Settings) -> np.ndarray:
    """Images as one view sees them: whole, as random crops, or reduced to the base resolution."""
    if view == "patch":
        return patches.random_crops(images, ids, settings.patch)
    if view == "base":
        return patches.base_images(images, settings.base)
    return images


def embed(
    network: FeatureNetwork, images: np.ndarray, settings: Settings, *, logits: bool
) -> dict[str, np.ndarray]:
    """{"features" [n, d], and "logits"} of uint8 images, split over the devices."""
    if settings.resize != "network":
        images = resize.resize(images, network.input_size, settings.resize)
    keys = ("features", "logits") if logits else ("features",)

    def run(params: PyTree, x: jax.Array) -> dict:
        out = network.outputs(params, x.astype(jnp.float32) / 127.5 - 1.0)
        missing = [key for key in keys if key not in out]
        if missing:
            raise ValueError(f"{network.name} has no {missing[0]}: leave out 'score'")
        return {key: out[key].astype(jnp.float32) for key in keys}

    return in_batches(run, network.params, images, batch_size=settings.batch_size)


def write_whole(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)
