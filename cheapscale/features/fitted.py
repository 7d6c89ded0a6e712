"""Fits a small classifier in under a minute, for use where no published feature network is given.

It serves as the frozen backbone of the projected discriminator at 8-32 px, as the network of a
feature distance, or as the embedding of a Frechet or kernel distance. The classifier of a *loss*
and the classifier of a *metric* never share weights: they differ in seed, width, task and training
images (the metric's sees every second image of the training split). Without labels the task is to
predict by how many quarter turns an image was rotated, and the network's name says so.

A classifier of labels alone does not notice typical errors of generators: on plain scenes, a 2x
blur at 32 px did not change the Frechet distance of its features (0.094 against 0.095 for real
images). Therefore half of the images that the metric's classifier sees are blurred or noisy to a
random degree, and the classifier must also predict which.

Fitting is deterministic. The result is cached in `$CHEAPSCALE_CACHE` (default ~/.cache/cheapscale)
as weights (.npz) and a report (.json).
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import serialization
from flax.traverse_util import flatten_dict

from cheapscale.data.digest import digest
from cheapscale.data.files import atomic_write, cache_folder, write_json
from cheapscale.data.pixels import from_uint8
from cheapscale.features.classifier import (
    feature_network,
    module,
    param_shapes,
    read_classifier,
    weights_hash,
)
from cheapscale.features.network import FeatureNetwork
from cheapscale.training import mesh as sharding

PyTree = Any

VERSION = 4  # raise it when the code changes what weights a fit gives
NATIVE = 32  # images up to this size are trained on as they are,
VIEW = 16  # larger ones as crops and as reductions of this size
DIVERGED = 1000.0  # root mean square of features; usually 3 to 30
PURPOSES = {
    "loss": {"seed": 1, "width": 16, "subset": "all", "degradation_weight": 0.0},
    "metric": {"seed": 2, "width": 12, "subset": "even", "degradation_weight": 1.0},
}


class LazyClassifier(NamedTuple):
    """A classifier that may not be fitted yet.

    network: the fitted network if it is in the cache; otherwise one with shapes in place of weights
      and without hash and outputs.
    recipe: a description of what `fit` will do, "" if the classifier is in the cache.
    fit: () -> the fitted network, and writes it to the cache: a collective operation, in which
      process 0 reads the cache, fits, writes and broadcasts.
    """

    network: FeatureNetwork
    recipe: str
    fit: Callable[[], FeatureNetwork]


def fit_classifier(source: Any, *, purpose: str, **options) -> FeatureNetwork:
    """The classifier of `source`, fitted or from the cache; arguments as of `lazy_classifier`."""
    return lazy_classifier(source, purpose=purpose, **options).fit()


def lazy_classifier(
    source: Any,
    *,
    purpose: str,
    seed: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    max_images: int = 10_000,
    cache_dir: str | pathlib.Path | None = None,
) -> LazyClassifier:
    """The classifier of the training split `source` for one purpose; nothing is fitted yet.

    Args:
      purpose: "loss" or "metric"; sets the images used and the defaults of seed and width.
      steps, batch_size: by default 300 updates of 128 images or, at 17 to 32 px, 500 of 32, which
        take the same time; fewer updates do not suffice to learn the noise there.
      max_images: at most this many images are read, in a fixed random choice.
    """
    few, rotation = 16 < source.resolution <= NATIVE, source.num_classes < 2
    spec = PURPOSES[purpose] | {
        "version": VERSION,
        "source": source.fingerprint(),
        "resolution": source.resolution,
        "num_classes": 4 if rotation else source.num_classes,
        "task": "rotation" if rotation else "label",
        "purpose": purpose,
        "steps": steps or (500 if few else 300),
        "batch_size": batch_size or (32 if few else 128),
        "max_images": max_images,
    }
    spec |= {k: v for k, v in (("seed", seed), ("width", width)) if v is not None}
    name = f"{purpose}-{source.resolution}px-{digest(spec)}.npz"
    path = pathlib.Path(cache_dir or cache_folder()) / "classifiers" / name
    # Of several processes only process 0 looks into its cache, and only in `fit`.
    if jax.process_count() == 1 and path.is_file():
        network = feature_network(*read_classifier(path))
        return LazyClassifier(network, "", lambda: network)
    return LazyClassifier(
        feature_network(param_shapes(spec), spec),
        f"{spec['steps']} updates of {spec['batch_size']} images of {source.resolution} px, "
        f"kept in {path}",
        lambda: feature_network(*from_process_0(lambda: read_or_fit(path, source, spec, _fit))),
    )


def read_or_fit(
    path: pathlib.Path, source: Any, spec: dict, fit: Callable[[Any, dict], tuple[PyTree, dict]]
) -> tuple[PyTree, dict]:
    """(weights, report) of a cached file, or of fit(source, spec), which is then kept there."""
    if path.is_file():
        return read_classifier(path)
    params, found = fit(source, spec)
    report = spec | found | {"sha256": weights_hash(params)}
    # The weights are written last: if they exist, the report is complete.
    write_json(path.with_suffix(".json"), report)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **flatten_dict(params, sep="/"))
    logging.info(
        "fitted a network on %d images of %d px: %.0f%% of held-out %ss are right",
        found["images"], spec["resolution"], 100 * found["accuracy"], spec["task"],
    )  # fmt: skip
    return params, report


def from_process_0(make: Callable[[], tuple[PyTree, dict]]) -> tuple[PyTree, dict]:
    """Process 0's make() -> (params, report), on every process: what two processes fit may differ
    in the last bits, but a run records one hash for each network."""
    if jax.process_count() == 1:
        return make()
    packed = b""
    with sharding.barrier("fitting the classifier"):
        if jax.process_index() == 0:
            params, report = make()
            params = jax.tree.map(np.asarray, params)
            packed = serialization.msgpack_serialize([params, json.dumps(report)])
    packed = sharding.broadcast_from_host0(np.frombuffer(packed, np.uint8))
    params, report = serialization.msgpack_restore(packed.tobytes())
    return params, json.loads(report)


def _fit(source: Any, spec: dict) -> tuple[PyTree, dict]:
    """The fitted weights, and {"accuracy", "feature_rms", "images"} for the report."""
    images, labels = _read_images(source, spec)
    rotation = spec["task"] == "rotation"
    held_out = min(1000, len(images) // 5)
    if held_out < 1:
        raise ValueError(
            f"{len(images)} images of {source.name!r} are too few to fit a classifier on: give 10"
        )
    view = source.resolution if source.resolution <= NATIVE else VIEW
    net, key = module(spec), jax.random.key(spec["seed"], impl="rbg")
    params = jax.jit(net.init)(key, jnp.zeros((1, view, view, 3)))["params"]
    steps = spec["steps"]
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10 + 1, steps + 1))
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x, label, degraded):
        def loss(params):
            logits = net.apply({"params": params}, x)[0]
            logits, marks = jnp.split(logits, [spec["num_classes"]], axis=1)
            class_loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            degradation_loss = optax.sigmoid_binary_cross_entropy(marks, degraded).sum(axis=1)
            return jnp.mean(class_loss + spec["degradation_weight"] * degradation_loss)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for n in range(steps):
        rng = np.random.default_rng((spec["seed"], n))
        pick = rng.integers(held_out, len(images), spec["batch_size"])
        x, label = _augment(images[pick], labels[pick], rng, rotation, view)
        x, degraded = _degrade(x, rng, half=spec["degradation_weight"] > 0)
        params, opt_state = step(params, opt_state, x, label, degraded)

    x, label = images[:held_out], labels[:held_out]
    if rotation:
        x, label = _rotate(x, np.random.default_rng(spec["seed"]))
    outputs = jax.jit(feature_network(params, spec | {"feature_rms": 1.0}).outputs)
    # Images at full size, as the network will be used, in parts to limit memory.
    parts = [outputs(params, from_uint8(part)) for part in np.array_split(x, -(-held_out // 100))]
    guessed = np.concatenate([part["logits"].argmax(axis=1) for part in parts])
    features = np.concatenate([part["features"] for part in parts])
    if not np.mean(features**2) < DIVERGED**2:
        raise ValueError(
            f"a classifier fitted on {len(images)} images of {source.name!r} has diverged: give "
            "more images, or the weights of a network (--network or --config.features.names)"
        )
    return jax.tree.map(np.asarray, params), {
        "accuracy": float(np.mean(guessed == label)),
        "feature_rms": max(float(np.mean(features**2) ** 0.5), 1e-6),
        "images": len(images),
    }


def _read_images(source: Any, spec: dict) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, R, R, 3] and labels [n] in one fixed random order."""
    ids = np.arange(len(source))[:: 2 if spec["subset"] == "even" else 1]
    ids = np.random.default_rng(0).permutation(ids)[: spec["max_images"]]
    images, labels = [], []
    for item in (source[int(i)] for i in ids):
        images.append(np.clip(np.round((item["image"] + 1) * 127.5), 0, 255).astype(np.uint8))
        labels.append(item["label"])
    return np.stack(images), np.asarray(labels, np.int32)


def _augment(images, labels, rng, rotation, view):
    """A batch of float [b, view, view, 3], mirrored, turned and cropped at random; its labels."""
    # Mirror first, turn second: a mirrored quarter turn would be the opposite quarter turn.
    mirrored = rng.random(len(images)) < 0.5
    images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    if rotation:
        images, labels = _rotate(images, rng)
    size = images.shape[1]
    if size == view:
        return from_uint8(images), labels
    # Half the batch shows the whole image, half a crop of it at any finer scale.
    half, whole = len(images) // 2, size // view
    finer = 2 ** int(rng.integers(0, max(1, math.ceil(math.log2(whole)))))
    crops = _reduce(images[:half], finer)
    corner = rng.integers(0, crops.shape[1] - view + 1, (half, 2))
    crops = [image[r : r + view, c : c + view] for image, (r, c) in zip(crops, corner)]
    return np.concatenate([np.stack(crops), _reduce(images[half:], whole)[:, :view, :view]]), labels


def _reduce(images, factor):
    """Means of factor x factor blocks, as float in [-1, 1]; incomplete blocks are dropped."""
    n, side = len(images), images.shape[1] // factor
    cut = images[:, : side * factor, : side * factor]
    return from_uint8(
        cut.reshape(n, side, factor, side, factor, 3).mean(axis=(2, 4), dtype=np.float32)
    )


def _degrade(x, rng, half=True):
    """A quarter of the images blurred, another made noisy; and [n, 2] marks that say which."""
    kind = rng.integers(0, 4, len(x)) if half else np.zeros(len(x))
    marks = np.stack([kind == 1, kind == 2], axis=1).astype(np.float32)
    amount = rng.uniform(0.4, 1.0, len(x)).astype(np.float32) * marks[:, 0]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    blurred = (blurred[:, :, :-2] + 2 * blurred[:, :, 1:-1] + blurred[:, :, 2:]) / 4
    x = x + amount[:, None, None, None] * (blurred - x)
    scale = np.exp(rng.uniform(np.log(0.03), np.log(0.3), len(x))).astype(np.float32) * marks[:, 1]
    noise = rng.standard_normal(x.shape, np.float32)
    return np.clip(x + scale[:, None, None, None] * noise, -1, 1), marks


def _rotate(images, rng):
    turns = rng.integers(0, 4, len(images)).astype(np.int32)
    return np.stack([np.rot90(image, k) for image, k in zip(images, turns)]), turns
