"""Fits the small classifier that serves as a feature network where no published one is at hand.

Two classifiers of one data set never share weights: the one inside a *loss* (projected
discriminator, perceptual distance) and the one that *measures* differ in seed, in width, in task
and in the images they saw: the measuring one sees only every second image of the training split.
Where a source has no labels the task is to tell by how many quarter turns an image was rotated,
and the network's name says so.

Labels alone leave such a network blind to what generators get wrong: on plain scenes a 2x blur at
32 px did not move the Frechet distance of its features (0.094 against 0.095 for real images). So
the measuring one is fitted on images of which half are blurred or noisy to a random degree, and
its features must also tell which.

Training is deterministic, takes well under a minute on two CPU cores, and its result is cached in
`$CHEAPSCALE_CACHE` (default ~/.cache/cheapscale) as weights (.npz) and a report (.json).
"""

import functools
import io
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from cheapscale.data.digest import digest
from cheapscale.data.files import whole_or_nothing
from cheapscale.models.features import classifier
from cheapscale.models.features.network import FeatureNetwork, exact
from cheapscale.training import sharding

PyTree = Any

# Of what changes the weights but not the key's other fields, here and in the network's own file.
VERSION = 4
NATIVE = 32  # images up to this size are trained on as they are,
VIEW = 16  # larger ones as crops and as reductions of this size
PURPOSES = {
    "loss": {"seed": 1, "width": 16, "subset": "all", "degradation_weight": 0.0},
    "metric": {"seed": 2, "width": 12, "subset": "even", "degradation_weight": 1.0},
}


class Fitted(NamedTuple):
    """A fitted classifier: the frozen network, and what is known about it (JSON values)."""

    network: FeatureNetwork
    report: dict


class Planned(NamedTuple):
    """A classifier that may not exist yet.

    network: as fitted where it is in the cache; else with shapes for weights, no hash, no outputs.
    recipe: how `fit` will fit it, "" where it is in the cache.
    fit: () -> Fitted, which then is in the cache.

    Of several processes only process 0 looks into its cache, fits and keeps, and only in `fit`,
    which gives its weights to all: each process calls it, from the thread and in the order in which
    it issues everything else that processes do together.
    """

    network: FeatureNetwork
    recipe: str
    fit: Callable[[], Fitted]


def fit_classifier(source: Any, *, purpose: str, **options) -> Fitted:
    """The classifier of `source` for one purpose, fitted or from the cache.

    Arguments as those of `plan_classifier`. network.outputs gives logits and 64-d features of mean
    square 1 (the cubic kernel of a kernel distance needs a scale; Frechet distances then compare
    across data sets too). report has "accuracy" and the features' rms before scaling, both on
    images held out of the fit, and what it was fitted on.
    """
    return plan_classifier(source, purpose=purpose, **options).fit()


def plan_classifier(
    source: Any,
    *,
    purpose: str,
    seed: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    max_images: int = 10_000,
    cache_dir: str | pathlib.Path | None = None,
) -> Planned:
    """The classifier of `source` (its training split) for one purpose; nothing is fitted yet.

    Args:
        source: items {"image": [R, R, 3] in [-1, 1], "label"}, and `num_classes`, `resolution`,
            `fingerprint()`.
        purpose: "loss" or "metric"; sets the defaults of seed and width, and the images used.
        steps, batch_size: by default 300 updates of 128 images or, at 17 to 32 px, 500 of 32 (the
            same time; with fewer updates the noise is not learned there).
        max_images: a fixed random choice of at most so many is read.

    Returns:
        Planned. network.name is "classifier" (metric) or "loss_classifier_<resolution>px": a grown
        model's losses used one at each resolution. "(rotation)" follows where there are no labels.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"unknown purpose {purpose!r}: choose one of {tuple(PURPOSES)}")
    default = PURPOSES[purpose]
    few = 16 < source.resolution <= NATIVE
    rotation = source.num_classes < 2
    spec = {
        "version": VERSION,
        "source": source.fingerprint(),
        "resolution": source.resolution,
        "num_classes": 4 if rotation else source.num_classes,
        "task": "rotation" if rotation else "label",
        "purpose": purpose,
        "subset": default["subset"],
        "degradation_weight": default["degradation_weight"],
        "seed": default["seed"] if seed is None else seed,
        "width": default["width"] if width is None else width,
        "steps": steps or (500 if few else 300),
        "batch_size": batch_size or (32 if few else 128),
        "max_images": max_images,
    }
    path = _cache(cache_dir) / f"{purpose}-{source.resolution}px-{digest(spec)}"
    alone = jax.process_count() == 1
    cached = _read(path, spec) if alone else None  # of several processes, see `_from_first`
    if cached is not None:
        fitted = _fitted(*cached)
        return Planned(fitted.network, "", lambda: fitted)

    def fit_and_keep() -> tuple[PyTree, dict]:
        params, found = _fit(source, spec)
        report = spec | found | {"sha256": classifier.weights_hash(params)}
        _write(path, params, report)
        logging.info(
            "fitted a classifier (%s, %s) on %d images: held-out accuracy %.3f",
            purpose, spec["task"], found["images"], found["accuracy"],
        )  # fmt: skip
        return params, report

    def fit() -> Fitted:
        if alone:
            return _fitted(*fit_and_keep())
        return _fitted(*_from_first(lambda: _read(path, spec) or fit_and_keep()))

    net = classifier.module(spec)
    shape = (1, source.resolution, source.resolution, 3)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape))["params"]
    recipe = f"{spec['steps']} updates of {spec['batch_size']} images of {source.resolution} px"
    recipe = f"{recipe}, kept in {path}.npz"
    return Planned(classifier.feature_network(shapes, spec), recipe, fit)


def _fitted(params: PyTree, report: dict) -> Fitted:
    params = jax.tree.map(jnp.asarray, params)
    return Fitted(classifier.feature_network(params, report), report)


def _from_first(make: Callable[[], tuple[PyTree, dict]]) -> tuple[PyTree, dict]:
    """Process 0's make() -> (params, report), on every process.

    Two processes that fit the same do not get the same bits everywhere, and one may have another's
    weights in its cache: the hash says which network judged a run, so there has to be one.
    """
    packed = io.BytesIO()
    with sharding.together("fitting the classifier"):
        if jax.process_index() == 0:
            params, report = make()
            np.savez(packed, report=json.dumps(report), **classifier.flat(params))
    packed = sharding.agreed(np.frombuffer(packed.getvalue(), np.uint8))
    with np.load(io.BytesIO(packed.tobytes())) as stored:
        arrays = dict(stored)
    report = json.loads(str(arrays.pop("report")))
    return _nested(arrays), report


def _fit(source, spec):
    images, labels = _read_images(source, spec)
    rotation = spec["task"] == "rotation"
    held_out = min(1000, len(images) // 5)
    if held_out < 1:
        raise ValueError(
            f"{len(images)} images of {source.name!r} are too few to fit a classifier on: give 10"
        )
    net = classifier.module(spec)
    view = source.resolution if source.resolution <= NATIVE else VIEW
    shape = (1, view, view, 3)
    params = jax.jit(net.init)(jax.random.key(spec["seed"], impl="rbg"), jnp.zeros(shape))["params"]
    steps = spec["steps"]
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10 + 1, steps + 1))
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x, label, degraded):
        def loss(params):
            logits = net.apply({"params": params}, x)[0]
            logits, marks = jnp.split(logits, [spec["num_classes"]], axis=1)
            which = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            how = optax.sigmoid_binary_cross_entropy(marks, degraded).sum(axis=1)
            return jnp.mean(which + spec["degradation_weight"] * how)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for n in range(steps):
        rng = np.random.default_rng((spec["seed"], n))
        pick = rng.integers(held_out, len(images), spec["batch_size"])
        x, label = _augment(images[pick], labels[pick], rng, rotation, view)
        x, degraded = _degrade(x, rng, half=spec["degradation_weight"] > 0)
        params, opt_state = step(params, opt_state, x, label, degraded)

    # what is reported is measured on held-out images at full size, as the network will be used
    look = jax.jit(exact(functools.partial(classifier.outputs, net, 1.0)))
    rng, right, squares = np.random.default_rng(spec["seed"]), [], []
    for start in range(0, held_out, 100):
        part = slice(start, min(start + 100, held_out))
        x, label = images[part], labels[part]
        if rotation:
            x, label = _rotate(x, rng)
        count = len(x)
        x = np.concatenate([x, np.zeros((100 - count, *x.shape[1:]), x.dtype)])  # one compilation
        out = look(params, _float(x))
        right.append(np.argmax(out["logits"][:count], axis=-1) == label)
        squares.append(np.square(out["features"][:count]))
    found = {
        "accuracy": float(np.concatenate(right).mean()),
        "feature_rms": max(float(np.concatenate(squares).mean() ** 0.5), 1e-6),
        "images": len(images),
    }
    return jax.tree.map(np.asarray, params), found


def _read_images(source, spec):
    """uint8 [n, R, R, 3] and labels [n] in one fixed random order."""
    ids = np.arange(len(source))
    if spec["subset"] == "even":
        ids = ids[::2]
    ids = np.random.default_rng(0).permutation(ids)[: spec["max_images"]]
    images = np.empty((len(ids), source.resolution, source.resolution, 3), np.uint8)
    labels = np.empty(len(ids), np.int32)
    for row, i in enumerate(ids):
        item = source[int(i)]
        images[row] = np.clip(np.round((item["image"] + 1) * 127.5), 0, 255)
        labels[row] = item["label"]
    return images, labels


def _augment(images, labels, rng, rotation, view):
    # mirror first, turn second: a mirrored quarter turn would be the opposite quarter turn
    mirrored = rng.random(len(images)) < 0.5
    images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    if rotation:
        images, labels = _rotate(images, rng)
    size = images.shape[1]
    if size == view:
        return _float(images), labels
    # half the batch shows the whole image, half a crop of it at any finer scale
    half, whole = len(images) // 2, size // view
    finer = 2 ** int(rng.integers(0, max(1, math.ceil(math.log2(whole)))))
    crops = _reduce(images[:half], finer)
    corner = rng.integers(0, crops.shape[1] - view + 1, (half, 2))
    crops = [image[r : r + view, c : c + view] for image, (r, c) in zip(crops, corner)]
    return np.concatenate([np.stack(crops), _reduce(images[half:], whole)[:, :view, :view]]), labels


def _reduce(images, factor):
    """Means of factor x factor blocks, as float in [-1, 1]; a remainder at the edge is cut."""
    n, side = len(images), images.shape[1] // factor
    cut = images[:, : side * factor, : side * factor]
    return _float(cut.reshape(n, side, factor, side, factor, 3).mean(axis=(2, 4), dtype=np.float32))


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


def _float(images):
    return images.astype(np.float32) / 127.5 - 1


def _cache(folder):
    if folder is None:
        folder = os.environ.get("CHEAPSCALE_CACHE", "~/.cache/cheapscale")
    return pathlib.Path(folder).expanduser() / "classifiers"


def _write(path, params, report):
    # weights first, report last: a report on disk means that the weights beside it are whole
    with whole_or_nothing(path.with_name(path.name + ".npz")) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, **classifier.flat(params))
    with whole_or_nothing(path.with_name(path.name + ".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=1))


def _read(path, spec):
    report_path = path.with_name(path.name + ".json")
    if not report_path.exists():
        return None
    report = json.loads(report_path.read_text())
    with np.load(path.with_name(path.name + ".npz")) as stored:
        params = _nested(dict(stored))
    matching = classifier.weights_hash(params) == report["sha256"]
    if not matching or any(report[k] != v for k, v in spec.items()):
        raise ValueError(f"{report_path} does not describe the weights beside it: delete both")
    return params, report


def _nested(arrays: dict[str, np.ndarray]) -> PyTree:
    """`classifier.flat`, undone."""
    params: dict = {}
    for name, array in arrays.items():
        *outer, last = name.split("/")
        functools.reduce(lambda d, key: d.setdefault(key, {}), outer, params)[last] = array
    return params
