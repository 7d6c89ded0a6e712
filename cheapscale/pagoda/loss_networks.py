"""The networks of both losses, built from config values: the discriminator and the distance d.

Both use frozen feature networks. The run's summary records the networks' names and the hashes of
their weights, because evaluation refuses to measure a model with a network that trained it.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from cheapscale import features
from cheapscale.data.arrays import read_npz
from cheapscale.features.distances import feature_distance, lpips_distance, pixel_distance
from cheapscale.features.fitted import LazyClassifier, lazy_classifier
from cheapscale.features.mixing import Projections, projections
from cheapscale.features.weights import check_finite
from cheapscale.models.autoencoder import Autoencoder
from cheapscale.pagoda.alignment import Aligner
from cheapscale.pagoda.discriminator import projected_discriminator

PyTree = Any


class LossNetworks(NamedTuple):
    """The functions that a GAN stage needs.

    init: key -> (discriminator params, spectral-norm vectors).
    load: key -> (frozen weights of both networks, {network: hash}); fits the classifiers in `fits`.
    shapes: () -> the frozen weights as shapes.
    see, discriminate, distance: as `gan.gan_step` calls them.
    fits: {network: description} of the classifiers that `load` will fit.
    """

    init: Callable
    load: Callable
    shapes: Callable
    see: Callable
    discriminate: Callable
    distance: Callable
    fits: dict[str, str]


def load_features(
    settings: dict, source
) -> tuple[list[features.FeatureNetwork], dict[str, LazyClassifier]]:
    """(the frozen networks that `config.features` names, {name: network that must be fitted}).

    "classifier" is the small classifier of the source's labels, or of rotations if there are none,
    read from the cache if it is there; a warning says that it stands in. Every other network is
    read from the files that `settings["paths"]` names (several joined by "+"), by default those
    that `features.load` finds.
    """
    networks, unfitted = [], {}
    for name in settings["names"]:
        if name == "classifier":
            logging.warning(
                "the discriminator and L_rec see a classifier fitted to these images, not features "
                "of photographs: --config.features.names=efficientnet_lite0 gives sharper images"
            )
            steps = settings["fit_steps"] or None
            planned = lazy_classifier(source, purpose="loss", steps=steps)
            networks.append(planned.network)
            if planned.recipe:
                unfitted[planned.network.name] = planned
            continue
        # The published code's LPIPS pools by averages (piq's variant), LPIPS itself by maxima.
        pooling = {"pooling": "avg"} if name == "vgg16_lpips" else {}
        networks.append(
            features.load(
                name,
                settings["paths"].get(name) or None,
                sha256=settings["sha256"].get(name) or None,
                input_size=settings["input_size"] or None,
                **pooling,
            )
        )
    return networks, unfitted


def read_table(path: str) -> np.ndarray:
    """float32 [classes, any] from an .npy file or an .npz of one array."""
    if not pathlib.Path(path).is_file():
        raise ValueError(f"discriminator.class_table: there is no file {path}")
    arrays = read_npz(path)
    check_finite(arrays, path)
    if len(arrays) != 1:
        raise ValueError(f"{path} holds {', '.join(arrays)}: give an .npz of one array")
    (table,) = arrays.values()
    if table.ndim != 2:
        raise ValueError(f"{path} holds an array of shape {table.shape}: give [classes, any]")
    return np.asarray(table, np.float32)


def check_discriminator(
    backbones: list[features.FeatureNetwork], tokens: bool, table: str, conditional: bool
) -> None:
    """Raises ValueError where the discriminator's settings do not fit its networks or the data."""
    if tokens and not any(network.tokens for network in backbones):
        names = [network.name for network in backbones]
        raise ValueError(
            f"discriminator.tokens is True, but no network in {names} has tokens: give "
            "--config.features.names=dino_vits16 and its file, or leave it out"
        )
    if table and not conditional:
        raise ValueError(
            f"discriminator.class_table is {table}, but the data have no classes: leave it empty"
        )


def make_loss_networks(
    source,
    *,
    settings: dict,
    discriminator: dict,
    weights: dict[str, float],
    conditional: bool = True,
    caption_dim: int = 0,
    guided: bool = False,
    aligner: Aligner | None = None,
    codec: Autoencoder | None = None,
) -> LossNetworks:
    """The discriminator and the reconstruction distance for one resolution, before any fitting.

    source: the pictures that are seen. codec: of a generator of latents: networks see what it
    decodes, and gradients pass through it. The pixel term is the distance of the latents.

    weights: of the terms of L_rec: "feature" as in PaGoDA's published scripts, "lpips" as in the
    paper, "pixel". A term of weight 0 is left out. conditional: the discriminator sees
    classes. caption_dim: width of the caption vectors that it sees instead; guided: it takes omega.
    aligner: of images with captions.
    """
    backbones, unfitted = load_features(settings, source)
    networks = list(backbones)
    discriminator = dict(discriminator)
    tokens = discriminator.get("tokens", False)
    table = discriminator.pop("class_table", "")
    check_discriminator(backbones, tokens, table, conditional)
    embedding = read_table(table) if table else None
    if weights["lpips"]:
        networks += load_features(settings | {"names": ("vgg16_lpips",)}, source)[0]

    if aligner:
        networks.append(aligner.planned.network)
        if aligner.planned.recipe:
            unfitted[networks[-1].name] = aligner.planned

    def project(networks: list[features.FeatureNetwork]) -> Projections:
        return projections(
            networks[: len(backbones)],
            resolution=source.resolution,
            width=discriminator["width"],
            tokens=tokens,
        )

    P = project(networks)
    D = projected_discriminator(
        backbones,
        resolution=source.resolution,
        num_classes=source.num_classes if conditional else 0,
        caption_dim=caption_dim,
        embedding=embedding,
        guided=guided,
        **discriminator,
    )
    lpips = lpips_distance(networks[len(backbones)]) if weights["lpips"] else None

    def frozen(networks: list[features.FeatureNetwork], key: jax.Array) -> PyTree:
        found = {"projections": project(networks).init_frozen(key)}
        found |= {"lpips": networks[len(backbones)].params} if lpips else {}
        found |= {"codec": codec} if codec else {}
        return found | ({"aligner": networks[-1].params} if aligner else {})

    def load(key: jax.Array) -> tuple[PyTree, dict[str, str]]:
        fitted = [unfitted[n.name].fit() if n.name in unfitted else n for n in networks]
        return frozen(fitted, key), {network.name: network.sha256 for network in fitted}

    def shapes() -> PyTree:
        def drawn(weights, key):
            return frozen([n._replace(params=w) for n, w in zip(networks, weights)], key)

        return jax.eval_shape(drawn, [n.params for n in networks], jax.random.key(0))

    def see(frozen, views):
        # Without the feature term only the discriminator reads the frozen networks.
        readers = ("discriminator", "distance") if weights["feature"] else ("discriminator",)
        read = {name: view for name, view in views.items() if view.reader in readers}
        if codec:
            read = {n: v._replace(images=decoded(frozen, v.images)) for n, v in read.items()}
        return P.apply(frozen["projections"], read) if read else {}

    return LossNetworks(
        init=D.init,
        load=load,
        shapes=shapes,
        see=see,
        discriminate=D.apply,
        distance=functools.partial(weighted_distance, weights, lpips),
        fits={name: planned.recipe for name, planned in unfitted.items()},
    )


def decoded(frozen: PyTree, x: jax.Array) -> jax.Array:
    """The pictures of latents, or of images on pixels as they are."""
    return frozen["codec"].decode(x) if "codec" in frozen else x


def weighted_distance(
    weights: dict[str, float],
    lpips: Callable | None,
    frozen: PyTree,
    f: PyTree,
    g: PyTree,
    x: jax.Array,
    y: jax.Array,
) -> dict[str, jax.Array]:
    """{term: [b]}: the terms of d(x, y) whose weights are not zero; f, g: the maps of x and y."""
    terms = {}
    if weights["feature"]:
        terms["feature"] = weights["feature"] * feature_distance(f, g)
    if lpips:
        seen = (decoded(frozen, images) for images in (x, y))
        terms["lpips"] = weights["lpips"] * lpips(frozen["lpips"], *seen)
    if weights["pixel"]:
        terms["pixel"] = weights["pixel"] * pixel_distance(x, y)
    return terms
