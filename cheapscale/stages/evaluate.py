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
from typing import Any, NamedTuple

import jax
import numpy as np

from cheapscale.data.files import whole_or_nothing
from cheapscale.evaluation import alignment, patches
from cheapscale.evaluation import scenes as composition
from cheapscale.evaluation.naming import metric_name
from cheapscale.evaluation.perceptual import reconstruction
from cheapscale.evaluation.pixels import check_images, to_uint8
from cheapscale.evaluation.quality import (
    check_resize,
    checked_name,
    choice,
    outputs,
    unseen_by_classifier,
)
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
from cheapscale.stages.image_sets import Images, Pairs, chosen_images
from cheapscale.training.stage import Job

FEATURE_METRICS = ("fd", "kid", "score", "prdc", "memorisation", "floor")
VIEW_METRICS = ("patch", "base")  # the distances once more, on crops and on reduced images
METRICS = (*FEATURE_METRICS, *VIEW_METRICS, "composition", "clip", "reconstruction")


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
    images: Images | Pairs
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
    pairs: Pairs | None = None,
    lpips: FeatureNetwork | None = None,
) -> Job:
    """The job. Its summary holds the scores by name and "warnings".

    Args:
        real, train: sources (data.sources) to compare with, and for "memorisation" and "floor" the
            training images; a fixed random choice of at most num_reference and num_train is read.
        references: published or own .npz statistics to use in place of `real`, each of the network
            it names.
        used_in_loss: {name: sha256} of the networks of the model's losses.
        clip: CLIP and the text features [classes, d] of its prompts, for "clip".
        pairs, lpips: what "reconstruction" measures, and its VGG16 with heads; without, no LPIPS.

    Raises ValueError, before anything is sampled, on metrics that lack what they compare with.
    """
    workdir = pathlib.Path(workdir)
    check_settings(settings, generated, networks, real, train, references, clip, pairs)
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
        check_match(
            statistics,
            sha256=chosen[0].sha256,
            variant="",
            resolution=generated.resolution,
            resize=resize_name(settings, chosen[0]),
        )
        needing = sorted({"kid", "prdc", "floor"} & set(settings.metrics))
        if needing and statistics.features is None:
            raise ValueError(
                f"metrics {needing} need the features of real images and {path} holds moments "
                "only: leave it out and compare with --data, or ask for fd"
            )
        given[owner, ""] = statistics

    # "reconstruction" alone looks at no other images
    compares = set(settings.metrics) != {"reconstruction"}
    reference_set = train_set = None
    if compares and real is not None:
        reference_set = chosen_images(real, choice(len(real), num_reference))
    if compares and train is not None:
        train_set = chosen_images(train, choice(len(train), num_train))

    def identity(source, images, network, view):
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

    wanted: dict[tuple, Identity] = {}  # (set, network, view) -> what its statistics must be of
    sets = {}
    if compares:
        sets["generated"] = (generated, settings.views())
    if "reconstruction" in settings.metrics:
        sets["pairs"] = (pairs, ())
        measure = reconstruction(lpips, batch_size=settings.batch_size)
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
        if name in ("real", "train") and all(cached) and not composes(settings, name):
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
        if part.name == "pairs":
            images, targets = part.images.read(ids)
            shown = np.concatenate([targets[:8], images[:8]])
            preview = {"preview": to_uint8(shown)} if part.first == 0 else {}
            write_whole(place(part), preview | measure(images, targets))
            return {"images": len(images)}
        images, labels = part.images.read(ids)
        check_images(images)
        found = {"ids": ids, "labels": labels}
        if part.first == 0:
            found["preview"] = images[:64]
        for view in part.views:
            seen = look(images, ids, view, settings)
            for network in networks:
                out = look_through(network, seen, settings, logits="score" in settings.metrics)
                found |= {f"{network.name}/{view}/{key}": value for key, value in out.items()}
        if composes(settings, part.name):
            verdicts = [
                composition.judge(composition.read(image), int(label))
                for image, label in zip(images, labels)
            ]
            found |= {f"composition/{k}": np.asarray([v[k] for v in verdicts]) for k in verdicts[0]}
        if clip is not None and part.name == "generated":
            network, texts = clip
            features = look_through(network, images, settings)["features"]
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
        for network in networks if "generated" in sets else ():
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
        if "pairs" in sets:
            last = [part for part in parts if part.name == "pairs"][-1]
            with np.load(place(last)) as stored:
                kinds = [key for key in stored.files if key != "preview"]
            values = {kind: read("pairs", kind) for kind in kinds}
            result |= {f"reconstruction_{kind}": float(v.mean()) for kind, v in values.items()}
            result["num_reconstructions"] = pairs.num
            if "lpips" not in kinds:
                warnings.append("no LPIPS of the reconstructions: give --lpips=vgg16_lpips=FILE")
        if "clip" in settings.metrics:
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
        real_features = reference.features if reference is not None else None
        if view == "" and "memorisation" in metrics and real_features is not None:
            real_scores = scores(
                real_features,
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


def check_settings(settings, generated, networks, real, train, references, clip, pairs) -> None:
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
    if "reconstruction" in asked and pairs is None:
        raise ValueError("reconstruction needs images with what they should be: give pairs")
    for network in networks:
        if network.outputs is None:
            raise ValueError(f"{network.name} has no pooled features: measure with another network")
        check_resize(network, settings.resize)
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


def look(images: np.ndarray, ids: np.ndarray, view: str, settings: Settings) -> np.ndarray:
    """Images as one view sees them: whole, as random crops, or reduced to the base resolution."""
    if view == "patch":
        return patches.random_crops(images, ids, settings.patch)
    if view == "base":
        return patches.base_images(images, settings.base)
    return images


def look_through(
    network: FeatureNetwork, images: np.ndarray, settings: Settings, *, logits: bool = False
) -> dict[str, np.ndarray]:
    """`quality.outputs` with the settings' batch size and resizing."""
    return outputs(
        network, images, batch_size=settings.batch_size, resize=settings.resize, logits=logits
    )


def resize_name(settings: Settings, network: FeatureNetwork) -> str:
    """How images reach the network's input, as the identity of a statistic says it."""
    return f"{settings.resize} {network.variant}".strip()


def write_whole(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz that appears whole or not at all."""
    with whole_or_nothing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
