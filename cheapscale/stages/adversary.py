"""The two judges of a generator, from plain config values: the discriminator and the distance.

Both look through frozen feature networks. Which networks, and the hash of their weights, goes into
the run's summary: evaluation refuses to score a model with a network that trained it. Nothing is
fitted before the weights are loaded: `make_judges` itself needs only the networks' shapes.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cheapscale.models import features
from cheapscale.models.discriminator import projected_discriminator
from cheapscale.models.distances import feature_distance, lpips_distance, pixel_distance
from cheapscale.training.classifier import Planned, plan_classifier

PyTree = Any


class Judges(NamedTuple):
    """init(key) -> (discriminator params, spectral-norm vectors); discriminate and distance as
    `training.stage.gan_step` calls them; load(key) -> (frozen weights of both, {network: hash}),
    after fitting what `fits` names ({network: how}); shapes() -> those weights as shapes.
    """

    init: Callable
    load: Callable
    shapes: Callable
    discriminate: Callable
    distance: Callable
    fits: dict[str, str]


def load_features(
    settings: dict, source
) -> tuple[list[features.FeatureNetwork], dict[str, Planned]]:
    """(the frozen networks that `config.features` names, those of them still to be fitted).

    "classifier" is the small one for the source's own labels (rotations where it has none), from
    the cache where it is there; every other name is read from the file in `settings["paths"]`
    (several joined by "+"). Raises ValueError where it is missing: there is no silent substitute.
    """
    networks, unfitted = [], {}
    for name in settings["names"]:
        if name == "classifier":
            steps = settings["classifier_steps"] or None
            planned = plan_classifier(source, purpose="loss", steps=steps)
            networks.append(planned.network)
            if planned.recipe:
                unfitted[planned.network.name] = planned
            continue
        path = settings["paths"].get(name, "")
        if not path:
            raise ValueError(
                f"features.names has {name!r}, but features.paths.{name} is empty: give its weight "
                "file, or use features.names=('classifier',) to train a small one on this data"
            )
        networks.append(
            features.load(
                name,
                path,
                sha256=settings["sha256"].get(name) or None,
                input_size=settings["input_size"] or None,
                **({"pooling": settings["lpips_pooling"]} if name == "vgg16_lpips" else {}),
            )
        )
    return networks, unfitted


def read_table(path: str) -> np.ndarray:
    """float32 [classes, any] from an .npy file or an .npz of one array."""
    if not pathlib.Path(path).is_file():
        raise ValueError(f"discriminator.class_table: there is no file {path}")
    stored = np.load(path)
    if hasattr(stored, "files"):
        if len(stored.files) != 1:
            raise ValueError(f"{path} holds {stored.files}: give an .npz of one array")
        stored = stored[stored.files[0]]
    if stored.ndim != 2:
        raise ValueError(f"{path} holds an array of shape {stored.shape}: give [classes, any]")
    return np.asarray(stored, np.float32)


def make_judges(
    source, *, settings: dict, discriminator: dict, distance: str, conditional: bool = True
) -> Judges:
    """The discriminator and the reconstruction distance of one resolution.

    distance: "feature" (the published scripts'), "lpips" (the paper's) or "pixel".
    """
    if distance not in ("feature", "lpips", "pixel"):
        raise ValueError(f"distance {distance!r} is unknown: choose 'feature', 'lpips' or 'pixel'")
    backbones, unfitted = load_features(settings, source)
    networks = list(backbones)
    discriminator = dict(discriminator)
    table = discriminator.pop("class_table", "")
    if table and not conditional:
        raise ValueError(f"discriminator.class_table is {table}, but there are no classes")
    embedding = read_table(table) if table else None
    if distance == "lpips":
        networks += load_features(settings | {"names": ("vgg16_lpips",)}, source)[0]

    def assemble(networks: list[features.FeatureNetwork]) -> tuple:
        judge = projected_discriminator(
            networks[: len(backbones)],
            resolution=source.resolution,
            num_classes=source.num_classes if conditional else 0,
            embedding=embedding,
            **discriminator,
        )
        if distance == "feature":
            width = discriminator["width"]
            return judge, feature_distance(networks, resolution=source.resolution, width=width)
        return judge, lpips_distance(networks[-1]) if distance == "lpips" else pixel_distance()

    judge, metric = assemble(networks)

    def frozen(networks: list[features.FeatureNetwork], key: jax.Array) -> PyTree:
        judge, metric = assemble(networks)
        k_judge, k_metric = jax.random.split(key)  # separate random projections (section 3.2)
        return {
            "discriminator": judge.init_frozen(k_judge),
            "distance": metric.init_frozen(k_metric),
        }

    def load(key: jax.Array) -> tuple[PyTree, dict[str, str]]:
        fitted = [unfitted[n.name].fit().network if n.name in unfitted else n for n in networks]
        return frozen(fitted, key), {network.name: network.sha256 for network in fitted}

    def shapes() -> PyTree:
        def drawn(weights, key):
            return frozen([n._replace(params=w) for n, w in zip(networks, weights)], key)

        return jax.eval_shape(drawn, [n.params for n in networks], jax.random.key(0))

    return Judges(
        init=judge.init,
        load=load,
        shapes=shapes,
        discriminate=lambda params, spectral, frozen, image, label, key: judge.apply(
            params, spectral, frozen["discriminator"], image, label, key
        ),
        distance=lambda frozen, image, target, key: metric.apply(
            frozen["distance"], image, target, key
        ),
        fits={name: planned.recipe for name, planned in unfitted.items()},
    )
