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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from cheapscale.features.fitted import (
    NATIVE,
    PURPOSES,
    LazyClassifier,
    from_process_0,
    read_or_fit,
)
from cheapscale.features.network import FeatureNetwork, full_precision
from cheapscale.models.text import TextConfig, TextEncoder

PyTree = Any

VERSION = 1  # raise it when the code changes what weights a fit gives
DIM = 64  # of the common embedding
TEXT: dict[str, Any] = {
    "kind": "transformer",
    "length": 32,
    "width": 64,
    "depth": 2,
    "heads": 2,
    "mlp": 256,
}
MOST_READ = 10_000  # images whose captions make the vocabulary
CHOICES = 32  # most captions among which a held-out image has to find its own


class Contrastive(NamedTuple):
    """network: an image tower with outputs "features" [b, 64]. texts: captions -> [n, 64]."""

    network: FeatureNetwork
    texts: Callable[[Sequence[str]], np.ndarray]


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


def fit_contrastive(source: Any, *, purpose: str, **options: Any) -> Contrastive:
    """The network of the training split `source`, fitted or from the cache, with a vocabulary of
    its captions; arguments as of `lazy_contrastive`."""
    length = TEXT["length"]
    vocabulary = train_vocabulary(_texts(source, range(min(len(source), MOST_READ))), 1000)
    network = lazy_contrastive(source, vocabulary, length, purpose=purpose, **options).fit()
    read, tokenise = jax.jit(text_features(vocabulary, length)), tokeniser(vocabulary, length)
    return Contrastive(
        network, lambda captions: np.asarray(read(network.params, tokenise(list(captions))))
    )


def lazy_contrastive(
    source: Any,
    vocabulary: str,
    length: int,
    *,
    purpose: str,
    steps: int = 1500,
    batch_size: int = 64,
    max_images: int = 10_000,
    cache_dir: str | pathlib.Path | None = None,
) -> LazyClassifier:
    """The network of the training split `source` for "loss" or "metric"; nothing is fitted yet.

    vocabulary, length: the tokens that it reads (data.tokens). Raises ValueError for images without
    captions.
    """
    if not any(_texts(source, range(min(len(source), 100)))):
        raise ValueError(f"{source.name}:{source.split} has no captions to fit on: give --clip")
    spec: dict[str, Any] = PURPOSES[purpose] | {
        "version": VERSION,
        "source": source.fingerprint(),
        "resolution": source.resolution,
        "vocabulary": vocabulary,
        "length": length,
        "purpose": purpose,
        "task": "caption",
        "steps": steps,
        "batch_size": batch_size,
        "max_images": max_images,
    }
    net = towers(vocabulary, length, spec["width"])
    path = pathlib.Path(cache_dir or cache_folder()) / "classifiers"
    path /= f"{purpose}-captions-{source.resolution}px-{digest(spec)}.npz"

    def outputs(params, x):
        return {"features": net.apply({"params": params}, x, method="images")}

    def fit() -> FeatureNetwork:
        params, report = from_process_0(lambda: read_or_fit(path, source, spec, _fit))
        params = jax.tree.map(jnp.asarray, params)
        return planned._replace(params=params, sha256=report["sha256"])

    x, ids = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, length), jnp.int32)
    planned = FeatureNetwork(
        "contrastive" if purpose == "metric" else f"loss_contrastive_{source.resolution}px",
        lambda params, x: (),
        jax.eval_shape(net.init, jax.random.key(0), x, ids)["params"],
        outputs=full_precision(outputs),
    )
    recipe = f"{steps} updates of {batch_size} images and captions, kept in {path}"
    return LazyClassifier(planned, recipe, fit)


def text_features(vocabulary: str, length: int) -> Callable[[PyTree, jax.Array], jax.Array]:
    """The function (params, token numbers [b, n]) -> [b, DIM] of the networks of a vocabulary."""

    @full_precision
    def read(params, ids):
        return net.apply({"params": params}, ids, method="texts")

    net = towers(vocabulary, length)
    return read


def towers(vocabulary: str, length: int, width: int = 16) -> Towers:
    """The module for a vocabulary; width: of the image tower."""
    return Towers(
        TextConfig(**TEXT | {"length": length, "vocab": vocabulary_size(vocabulary)}), width
    )


def _texts(source: Any, ids: Iterable[int]) -> Iterator[str]:
    """The captions of these images."""
    return (text for i in ids for text in source.captions(int(i)))


def _fit(source: Any, spec: dict) -> tuple[PyTree, dict]:
    """The fitted weights, and {"accuracy", "images"} for the report."""
    ids = np.arange(len(source))[:: 2 if spec["subset"] == "even" else 1]
    ids = np.random.default_rng(0).permutation(ids)[: spec["max_images"]]
    images = to_uint8(np.stack([source[int(i)]["image"] for i in ids]))
    words = spec["vocabulary"], spec["length"]
    net, tokenise = towers(*words, spec["width"]), tokeniser(*words)
    rows = [tokenise(source.captions(int(i)) or ("",)) for i in ids]
    held_out = min(1000, len(images) // 5)
    if not held_out:
        raise ValueError(f"{len(images)} images of {source.name!r} are too few to fit on: give 10")

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
    choices = min(CHOICES, held_out)
    logits = jax.jit(lambda params, x, ids: net.apply({"params": params}, x, ids))
    right = [
        np.argmax(logits(params, *batch(np.arange(n, n + choices), rng)), axis=1)
        == np.arange(choices)
        for n in range(0, held_out - choices + 1, choices)
    ]
    return jax.tree.map(np.asarray, params), {
        "accuracy": float(np.mean(right)),
        "images": len(images),
    }
