"""Evaluation as a job: images of a model, a folder or a file are embedded in shards, then scored.

    for each set (generated; real and training images without cached statistics; reconstructions)
        for each shard of the set
            images <- sampled or read
            for each network and view (whole image, crops, base resolution)
                shards/<set>-<number>.npz <- features and logits
    for each network and view: scores(features, reference statistics)

Every image is generated or read once, for all metrics. Image i depends only on the seed and on i,
and shards are written atomically, so a run can be stopped, resumed or split over processes.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from cheapscale.data.arrays import read_npz
from cheapscale.data.files import atomic_write
from cheapscale.data.pixels import check_images, to_uint8
from cheapscale.evaluation import measure, patches
from cheapscale.evaluation import scenes as composition
from cheapscale.evaluation.alignment import clip_scores
from cheapscale.evaluation.embedding import outputs
from cheapscale.evaluation.image_sets import choice
from cheapscale.evaluation.perceptual import reconstruction
from cheapscale.evaluation.request import (
    FEATURE_METRICS,
    GENERATED,
    PAIRS,
    REAL,
    TRAIN,
    Evaluation,
    mistakes,
)
from cheapscale.evaluation.statistics import Statistics, cache_path, reference_statistics
from cheapscale.features import FeatureNetwork
from cheapscale.teacher.sampling import check_labels
from cheapscale.training.mesh import broadcast_from_host0
from cheapscale.training.stage import Job


class Part(NamedTuple):
    """One shard: the images first ... last - 1 of a set, and the path of its file."""

    set: str
    first: int
    last: int
    path: pathlib.Path


def evaluation_job(e: Evaluation, workdir: str | pathlib.Path) -> Job:
    """The job; its summary holds the numbers by name and "warnings".

    Raises ValueError, before anything is sampled, if a metric lacks an input that it needs.
    """
    for mistake in mistakes(e):
        raise ValueError(mistake)
    parts = shards(e, pathlib.Path(workdir) / "shards")
    compare = reconstruction(e.lpips, batch_size=e.batch_size)

    def run_shard(context: object, shard: int, mesh) -> dict:
        del context, mesh
        part = parts[shard]
        found = compare_pairs(e, part, compare) if part.set == PAIRS else embed_part(e, part)
        with atomic_write(part.path) as temporary, temporary.open("wb") as file:
            np.savez(file, **found)
        return {"images": part.last - part.first}

    return Job(
        num_shards=len(parts),
        items_per_shard=e.per_shard,
        prepare=lambda: None,
        done=lambda shard: parts[shard].path.is_file(),
        run_shard=run_shard,
        # All shards are on a shared disk, so process 0 alone reads them and reports.
        finish=lambda _: {} if jax.process_index() else summarise(e, parts),
    )


def shards(e: Evaluation, folder: pathlib.Path) -> list[Part]:
    """The shards to write, in the same order on every process.

    A set of real images whose statistics are all cached has no shards.
    """
    cached = np.asarray([cache_path(identity).exists() for identity in e.wanted.values()])
    # The processes may have different caches, so process 0 decides for all.
    cached = dict(zip(e.wanted, broadcast_from_host0(cached)))
    parts = []
    for name, images in e.sets.items():
        known = all(found for (set_name, *_), found in cached.items() if set_name == name)
        if name in (REAL, TRAIN) and known and not reads_compositions(e, name):
            continue
        for first in range(0, images.num, e.per_shard):
            last = min(first + e.per_shard, images.num)
            parts.append(Part(name, first, last, folder / f"{name}-{first:07d}.npz"))
    return parts


def reads_compositions(e: Evaluation, name: str) -> bool:
    """Whether "composition" reads this set. The score of the real images is its upper limit."""
    return "composition" in e.metrics and name in (GENERATED, REAL)


def compare_pairs(e: Evaluation, part: Part, compare: Callable) -> dict[str, np.ndarray]:
    """One shard of reconstructions: {metric: [n]}, and a "preview" in the first shard."""
    images, targets = e.pairs.read(np.arange(part.first, part.last))
    found = compare(images, targets)
    if part.first == 0:
        found["preview"] = to_uint8(np.concatenate([targets[:8], images[:8]]))
    return found


def embed_part(e: Evaluation, part: Part) -> dict[str, np.ndarray]:
    """The arrays of one shard: "ids", "labels", "<network>/<view>/features", "<network>/<view>/
    logits", "composition/<name>", "clip", and a "preview" in the first shard."""
    ids, source = np.arange(part.first, part.last), e.sets[part.set]
    images, labels = source.read(ids)
    check_images(images)
    found = {"ids": ids, "labels": labels}
    if part.first == 0:
        found["preview"] = images[:64]
    seen = {"": lambda: images, "patch": lambda: patches.random_crops(images, ids, e.patch),
            "base": lambda: patches.base_images(images, e.base)}  # fmt: skip
    for view in e.views if part.set != TRAIN else ("",):
        view_images = seen[view]()
        for network in e.networks:
            logits = part.set == GENERATED and view == "" and network.name in e.with_logits
            options = {"batch_size": e.batch_size, "resize": e.resize, "logits": logits}
            out = outputs(network, view_images, **options)
            found |= {f"{network.name}/{view}/{key}": value for key, value in out.items()}
    captions = source.captions(ids) if e.condition == "caption" and source.captions else None
    known = reads_compositions(e, part.set) or ("clip" in e.metrics and part.set == GENERATED)
    if known and not captions and e.real is not None:  # the class's name is what is asked for
        check_labels(np.asarray(labels), e.real.num_classes)
    if reads_compositions(e, part.set):
        wanted = captions or [int(label) for label in labels]
        compared = composition.compare_images(images, wanted)
        found |= {f"composition/{key}": value for key, value in compared.items()}
    if "clip" in e.metrics and part.set == GENERATED:
        texts = captions or [e.clip.prompts[label] for label in labels]
        # CLIP always uses its published resizing; e.resize applies to the other networks.
        features = outputs(e.clip.network, images, batch_size=e.batch_size)["features"]
        found["clip"] = clip_scores(features, e.clip.texts(texts))
    return found


def read(parts: list[Part], name: str, prefix: str) -> dict[str, np.ndarray]:
    """{name: array over all shards of a set}, for the names that begin with `prefix`."""
    stored: dict[str, list[np.ndarray]] = {}
    for part in parts:
        if part.set == name:
            for key, array in read_npz(part.path).items():
                if key.startswith(prefix) and key != "preview":
                    stored.setdefault(key, []).append(array)
    return {key: np.concatenate(arrays) for key, arrays in stored.items()}


def summarise(e: Evaluation, parts: list[Part]) -> dict:
    """The summary, computed from the shards and the cached statistics."""
    result: dict = {"num": e.generated.num, "networks": {n.name: n.sha256 for n in e.networks}}
    for name, key in ((REAL, "num_reference"), (TRAIN, "num_train")):
        if name in e.sets:
            result[key] = e.sets[name].num
    warnings: list[str] = []
    for network in e.networks if GENERATED in e.sets else ():
        for view in e.views:
            numbers, more = score_view(e, parts, network, view)
            result |= {k: v for k, v in numbers.items() if k not in ("num", "num_reference")}
            warnings += more
    for name, suffix in ((GENERATED, ""), (REAL, "_real")):
        for key, values in read(parts, name, "composition/").items():
            result[key.replace("/", "_") + suffix] = float(values.mean())
    if PAIRS in e.sets:
        found = read(parts, PAIRS, "")
        for kind, values in found.items():
            name = f"reconstruction_{kind}"
            if kind == "lpips":
                name += "_vgg16" + "".join(e.names[e.lpips.name].partition("(")[1:])
            result[name] = float(values.mean())
        result["num_reconstructions"] = e.pairs.num
        if "lpips" not in found:
            warnings.append("no LPIPS of the reconstructions: give --lpips=vgg16_lpips=FILE")
    if "clip" in e.metrics:
        score = read(parts, GENERATED, "clip")["clip"]
        result[f"{e.clip.metric}_{e.names[e.clip.network.name]}"] = float(score.mean())
    return result | {"warnings": warnings}


def score_view(
    e: Evaluation, parts: list[Part], network: FeatureNetwork, view: str
) -> tuple[dict, list[str]]:
    """(numbers, warnings) of the generated images in one network and view."""
    metrics = [kind for kind in FEATURE_METRICS if kind in e.metrics]
    if network.name not in e.with_logits and "score" in metrics:
        metrics.remove("score")
    if view:  # crops and reduced images have the two distances only
        metrics = ["fd", "kid"]
    if not metrics:
        return {}, []
    stored = read(parts, GENERATED, f"{network.name}/{view}/")
    reference, train = (statistics_of(e, parts, name, network, view) for name in (REAL, TRAIN))
    known = unseen = None
    if train is not None:
        known = train.features
        unseen = known[unseen_rows(network, len(e.train), e.num_train)]
    return measure.scores(
        stored[f"{network.name}/{view}/features"],
        reference,
        network=e.names[network.name],
        sha256=network.sha256,
        metrics=metrics,
        logits=stored.get(f"{network.name}/{view}/logits"),
        train=known,
        unseen=unseen,
        variant=view,
        resize=e.resize,
    )


def statistics_of(
    e: Evaluation, parts: list[Part], name: str, network: FeatureNetwork, view: str
) -> Statistics | None:
    """Statistics of a set of real images, from --reference, the cache or the shards; else None."""
    if name == REAL and (network.name, view) in e.given:
        return e.given[network.name, view]
    wanted = e.wanted.get((name, network.name, view))
    if wanted is None:
        return None
    key = f"{network.name}/{view}/features"
    return reference_statistics(wanted, lambda: read(parts, name, key)[key])


def unseen_rows(network: FeatureNetwork, length: int, num: int) -> np.ndarray:
    """The rows of `choice(length, num)` whose training images the network was not fitted on.

    The fitted classifier (features.fitted) was trained on the images with even ids. Its features
    separate them from held-out images, so a floor computed from them would be too high.
    """
    ids = choice(length, num)
    fitted_here = network.name.startswith("classifier")
    return np.flatnonzero(ids % 2 == 1) if fitted_here else np.arange(len(ids))
