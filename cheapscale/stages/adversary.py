"""The two judges of a generator, from plain config values: the discriminator and the distance.

Both look through frozen feature networks. Which networks, and the hash of their weights, goes into
the run's summary: evaluation refuses to score a model with a network that trained it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from cheapscale.models import features
from cheapscale.models.discriminator import projected_discriminator
from cheapscale.models.distances import feature_distance, lpips_distance, pixel_distance
from cheapscale.training.classifier import fit_classifier

PyTree = Any


class Judges(NamedTuple):
    """init(key) -> (discriminator params, spectral-norm vectors); load(key) -> frozen weights of
    both; discriminate and distance as `training.stage.gan_step` calls them; networks: {name: hash}.
    """

    init: Callable
    load: Callable
    discriminate: Callable
    distance: Callable
    networks: dict[str, str]


def load_features(settings: dict, source) -> list[features.FeatureNetwork]:
    """The frozen networks that `config.features` names.

    "classifier" is fitted here to the source's own labels (rotations where it has none) and cached;
    every other name is read from the file in `settings["paths"]` (several joined by "+"). Raises
    ValueError where it is missing: there is no silent substitute.
    """
    networks = []
    for name in settings["names"]:
        if name == "classifier":
            steps = settings["classifier_steps"] or None
            networks.append(fit_classifier(source, purpose="loss", steps=steps).network)
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
                path.split("+"),
                sha256=settings["sha256"].get(name) or None,
                input_size=settings["input_size"] or None,
            )
        )
    return networks


def make_judges(
    source, *, settings: dict, discriminator: dict, distance: str, conditional: bool = True
) -> Judges:
    """The discriminator and the reconstruction distance of one resolution.

    distance: "feature" (the published scripts'), "lpips" (the paper's) or "pixel".
    """
    networks = load_features(settings, source)
    judge = projected_discriminator(
        networks,
        resolution=source.resolution,
        num_classes=source.num_classes if conditional else 0,
        **discriminator,
    )
    judged = list(networks)
    if distance == "feature":
        metric = feature_distance(
            networks, resolution=source.resolution, width=discriminator["width"]
        )
    elif distance == "lpips":
        judged += (vgg := load_features(settings | {"names": ("vgg16_lpips",)}, source))
        metric = lpips_distance(vgg[0])
    elif distance == "pixel":
        metric = pixel_distance()
    else:
        raise ValueError(f"distance {distance!r} is unknown: choose 'feature', 'lpips' or 'pixel'")

    def load(key: jax.Array) -> PyTree:
        k_judge, k_metric = jax.random.split(key)  # separate random projections (section 3.2)
        return {
            "discriminator": judge.init_frozen(k_judge),
            "distance": metric.init_frozen(k_metric),
        }

    return Judges(
        init=judge.init,
        load=load,
        discriminate=lambda params, spectral, frozen, image, label, key: judge.apply(
            params, spectral, frozen["discriminator"], image, label, key
        ),
        distance=lambda frozen, image, target, key: metric.apply(
            frozen["distance"], image, target, key
        ),
        networks={network.name: network.sha256 for network in judged},
    )
