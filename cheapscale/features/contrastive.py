"""A small image-text network, fitted on a data set's captions as CLIP is (Radford et al. 2021,
arXiv 2103.00020): which images and captions of a batch belong together?

    logits = exp(s) u v'        u, v: normalised embeddings of n images and of their n captions
    loss   = (cross-entropy over each row + over each column) / 2

It measures the alignment of images with captions where no published CLIP knows the images, and is
never called CLIP. As with the classifier of fitted.py, that of a loss and that of a metric differ
in seed, width and images, and both are kept in the cache.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cheapscale.data.digest import digest
from cheapscale.data.files import cache_folder
from cheapscale.data.pixels import from_uint8, to_uint8
from cheapscale.data.tokens import tokeniser, train_vocabulary, vocabulary_size
from cheapscale.features.classifier import Classifier
from cheapscale.features.fitted import NATIVE, PURPOSES, from_process_0, read_or_fit
from cheapscale.features.network import FeatureNetwork, full_precision
from cheapscale.models.text import TextConfig, TextEncoder

PyTree = Any

VERSION = 1  # raise it when the code changes what weights a fit gives
DIM = 64  # of the common embedding
TEXT = {"kind": "transformer", "length": 32, "width": 64, "depth": 2, "heads": 2, "mlp": 256}
CHOICES = 32  # captions among which a held-out image has to find its own


class Contrastive(NamedTuple):
    """network: the image tower, whose outputs are "features" [b, 64]. texts: captions -> [n, 64].
    accuracy: how often a held-out image finds its caption among CHOICES."""

    network: FeatureNetwork
    texts: Callable[[Sequence[str]], np.ndarray]
    accuracy: float


class Towers(nn.Module):
    """Image tower and text tower."""

    text: TextConfig
    width: int

    def setup(self) -> None:
        self.eye, self.reader = Classifier(1, self.width), TextEncoder(self.text)
        self.of_image, self.of_text = nn.Dense(DIM), nn.Dense(DIM)
        self.scale = self.param("scale", nn.initializers.constant(2.0), ())

    def images(self, x: jax.Array) -> jax.Array:
        """[b, DIM] of images [b, h, w, 3], reduced to at most NATIVE px by means of blocks."""
        b, side, k = len(x), x.shape[1], max(1, x.shape[1] // NATIVE)
        x = x.reshape(b, side // k, k, side // k, k, 3).mean(axis=(2, 4))
        return self.of_image(self.eye(x)[2])

    def texts(self, ids: jax.Array) -> jax.Array:
        """[b, DIM] of token numbers [b, n]."""
        return self.of_text(self.reader(ids).pooled)

    def __call__(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """The logits [b, b] of every image with every caption."""
        u, v = (e / jnp.linalg.norm(e, axis=1, keepdims=True) for e in (
            self.images(x), self.texts(ids)
        ))  # fmt: skip
        return jnp.exp(self.scale) * u @ v.T


def fit_contrastive(
    source: Any,
    *,
    purpose: str,
    steps: int = 1500,
    batch_size: int = 64,
    max_images: int = 10_000,
    cache_dir: str | pathlib.Path | None = None,
) -> Contrastive:
    """The network of the training split `source` for "loss" or "metric", fitted or from the cache.

    Raises ValueError for images without captions.
    """
    if not any(source.caption(i) for i in range(min(len(source), 100))):
        raise ValueError(f"{source.name}:{source.split} has no captions to fit on: give --clip")
    spec = PURPOSES[purpose] | {
        "version": VERSION,
        "source": source.fingerprint(),
        "resolution": source.resolution,
        "purpose": purpose,
        "task": "caption",
        "steps": steps,
        "batch_size": batch_size,
        "max_images": max_images,
    }
    name = f"{purpose}-captions-{source.resolution}px-{digest(spec)}.npz"
    path = pathlib.Path(cache_dir or cache_folder()) / "classifiers" / name
    return contrastive(*from_process_0(lambda: read_or_fit(path, source, spec, _fit)))


def contrastive(params: PyTree, report: dict) -> Contrastive:
    """The Contrastive of weights and the report that belongs to them."""
    net, tokenise = towers(report), tokeniser(report["vocabulary"], TEXT["length"])
    params = jax.tree.map(jnp.asarray, params)

    def outputs(params, x):
        return {"features": net.apply({"params": params}, x, method="images")}

    @jax.jit
    @full_precision
    def embed(params, ids):
        return net.apply({"params": params}, ids, method="texts")

    name = "contrastive" if report["purpose"] == "metric" else "loss_contrastive"
    network = FeatureNetwork(
        name, lambda params, x: (), params, report["sha256"], outputs=full_precision(outputs)
    )
    return Contrastive(
        network,
        lambda captions: np.asarray(embed(params, tokenise(list(captions)))),
        report["accuracy"],
    )


def towers(report: dict) -> Towers:
    """The module that a report describes."""
    text = TextConfig(**TEXT, vocab=vocabulary_size(report["vocabulary"]))
    return Towers(text, report["width"])


def _fit(source: Any, spec: dict) -> tuple[PyTree, dict]:
    """The fitted weights, and {"accuracy", "images", "vocabulary"} for the report."""
    ids = np.arange(len(source))[:: 2 if spec["subset"] == "even" else 1]
    ids = np.random.default_rng(0).permutation(ids)[: spec["max_images"]]
    images = to_uint8(np.stack([source[int(i)]["image"] for i in ids]))
    captions = [source.captions(int(i)) or ("",) for i in ids]
    vocabulary = train_vocabulary((text for several in captions for text in several), 1000)
    net, tokenise = towers(spec | {"vocabulary": vocabulary}), tokeniser(vocabulary, TEXT["length"])
    rows = [tokenise(several) for several in captions]
    held_out = min(32 * CHOICES, len(images) // 5 // CHOICES * CHOICES)
    if not held_out:
        raise ValueError(
            f"{len(images)} images of {source.name!r} are too few to fit captions on: give "
            f"{5 * CHOICES}"
        )

    def batch(pick, rng):
        chosen = [rows[i][int(rng.integers(len(rows[i])))] for i in pick]
        return from_uint8(images[pick]), np.stack(chosen)

    rng = np.random.default_rng(spec["seed"])
    first = batch(np.arange(2), rng)
    params = jax.jit(net.init)(jax.random.key(spec["seed"]), *first)["params"]
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, spec["steps"] // 10 + 1, spec["steps"] + 1)
    tx = optax.adam(rate)
    opt_state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x, ids):
        def loss(params):
            logits, own = net.apply({"params": params}, x, ids), jnp.arange(len(x))
            both = (logits, logits.T)
            ce = optax.softmax_cross_entropy_with_integer_labels
            return sum(ce(one, own).mean() for one in both) / 2

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(spec["steps"]):
        pick = rng.integers(held_out, len(images), spec["batch_size"])
        params, opt_state = step(params, opt_state, *batch(pick, rng))
    logits = jax.jit(lambda params, x, ids: net.apply({"params": params}, x, ids))
    right = [
        np.argmax(logits(params, *batch(np.arange(n, n + CHOICES), rng)), axis=1)
        == np.arange(CHOICES)
        for n in range(0, held_out, CHOICES)
    ]
    return jax.tree.map(np.asarray, params), {
        "accuracy": float(np.mean(right)),
        "images": len(images),
        "vocabulary": vocabulary,
    }
