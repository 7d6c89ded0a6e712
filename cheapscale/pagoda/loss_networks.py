"""The networks of both losses, built from config values: the discriminator and the distance d.

Both use frozen feature networks. The run's summary records the networks' names and the hashes of
their weights, because evaluation refuses to measure a model with a network that trained it.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cheapscale import features
from cheapscale.data.arrays import read_npz
from cheapscale.features.distances import feature_distance, lpips_distance, pixel_distance
from cheapscale.features.fitted import LazyClassifier, lazy_classifier
from cheapscale.features.weights import check_finite
from cheapscale.pagoda.discriminator import projected_discriminator

PyTree = Any


class LossNetworks(NamedTuple):
    """The functions that a GAN stage needs.

    init: key -> (discriminator params, spectral-norm vectors).
    load: key -> (frozen weights of both networks, {network: hash}); fits the classifiers in `fits`.
    shapes: () -> the frozen weights as shapes.
    discriminate, distance: as `gan.gan_step` calls them.
    fits: {network: description} of the classifiers that `load` will fit.
    """

    init: Callable
    load: Callable
    shapes: Callable
    discriminate: Callable
    distance: Callable
    fits: dict[str, str]


def load_features(
    settings: dict, source
) -> tuple[list[features.FeatureNetwork], dict[str, LazyClassifier]]:
    """(the frozen networks that `config.features` names, {name: network that must be fitted}).

    "classifier" is the small classifier of the source's labels, or of rotations if there are none,
    read from the cache if it is there. Every other network is read from the files that
    `settings["paths"]` names (several joined by "+"). Raises ValueError if a file is missing.
    """
    networks, unfitted = [], {}
    for name in settings["names"]:
        if name == "classifier":
            steps = settings["fit_steps"] or None
            planned = lazy_classifier(source, purpose="loss", steps=steps)
            networks.append(planned.network)
            if planned.recipe:
                unfitted[planned.network.name] = planned
            continue
        path = settings["paths"].get(name, "")
        if not path:
            raise ValueError(
                f"features.names has {name!r}, but features.paths.{name} is empty: give "
                f"--config.features.paths.{name}=FILE, or --config.features.names=classifier to "
                "train a small one on this data"
            )
        # The published code's LPIPS pools by averages (piq's variant), LPIPS itself by maxima.
        pooling = {"pooling": "avg"} if name == "vgg16_lpips" else {}
        networks.append(
            features.load(
                name,
                path,
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


def make_loss_networks(
    source, *, settings: dict, discriminator: dict, distance: str, conditional: bool = True
) -> LossNetworks:
    """The discriminator and the reconstruction distance for one resolution, before any fitting.

    distance: "feature" as in PaGoDA's published scripts, "lpips" as in the paper, or "pixel".
    """
    backbones, unfitted = load_features(settings, source)
    networks = list(backbones)
    discriminator = dict(discriminator)
    table = discriminator.pop("class_table", "")
    if table and not conditional:
        raise ValueError(
            f"discriminator.class_table is {table}, but the data have no classes: leave it empty"
        )
    embedding = read_table(table) if table else None
    if distance == "lpips":
        networks += load_features(settings | {"names": ("vgg16_lpips",)}, source)[0]

    def assemble(networks: list[features.FeatureNetwork]) -> tuple:
        """(discriminator, distance) on these feature networks."""
        D = projected_discriminator(
            networks[: len(backbones)],
            resolution=source.resolution,
            num_classes=source.num_classes if conditional else 0,
            embedding=embedding,
            **discriminator,
        )
        if distance == "feature":
            width = discriminator["width"]
            return D, feature_distance(networks, resolution=source.resolution, width=width)
        return D, lpips_distance(networks[-1]) if distance == "lpips" else pixel_distance()

    D, d = assemble(networks)

    def frozen(networks: list[features.FeatureNetwork], key: jax.Array) -> PyTree:
        D, d = assemble(networks)
        k_D, k_d = jax.random.split(key)  # separate random projections
        return {"discriminator": D.init_frozen(k_D), "distance": d.init_frozen(k_d)}

    def load(key: jax.Array) -> tuple[PyTree, dict[str, str]]:
        fitted = [unfitted[n.name].fit() if n.name in unfitted else n for n in networks]
        return frozen(fitted, key), {network.name: network.sha256 for network in fitted}

    def shapes() -> PyTree:
        def drawn(weights, key):
            return frozen([n._replace(params=w) for n, w in zip(networks, weights)], key)

        return jax.eval_shape(drawn, [n.params for n in networks], jax.random.key(0))

    def discriminate(params, spectral, frozen, image, label, key):
        return D.apply(params, spectral, frozen["discriminator"], image, label, key)

    return LossNetworks(
        init=D.init,
        load=load,
        shapes=shapes,
        discriminate=discriminate,
        distance=lambda frozen, x, y, key: d.apply(frozen["distance"], x, y, key),
        fits={name: planned.recipe for name, planned in unfitted.items()},
    )
