"""What an evaluation measures, on what, and with what: checked before anything is sampled."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.evaluation.coverage import KS
from cheapscale.evaluation.quality import check_resize
from cheapscale.models.features import FeatureNetwork
from cheapscale.stages.image_sets import Images, Pairs

FEATURE_METRICS = ("fd", "kid", "score", "prdc", "memorisation", "floor")
VIEW_METRICS = ("patch", "base")  # the distances once more, on crops and on reduced images
METRICS = (*FEATURE_METRICS, *VIEW_METRICS, "composition", "clip", "reconstruction")


class Settings(NamedTuple):
    """How to measure.

    metrics: some of METRICS. resize: "network", "clean" or "tf1" (evaluation.resize). patch: side
    of the crops. base: resolution of the view "base". num_reference, num_train: at most so many
    real and training images are read. insist: score even with a network that a loss used, and have
    the names say so.
    """

    metrics: tuple[str, ...]
    batch_size: int = 250
    per_shard: int = 1000
    resize: str = "network"
    patch: int = 0
    base: int = 0
    num_reference: int = 50_000
    num_train: int = 50_000
    insist: bool = False

    def views(self) -> tuple[str, ...]:
        """ "" is the whole image."""
        return ("", *(view for view in VIEW_METRICS if view in self.metrics))


class Clip(NamedTuple):
    """CLIP and what turns an image's label or caption into text features.

    texts: sequence of strings -> [n, d]. prompts: one for each class. fingerprint: of vocabulary
    and prompts.
    """

    network: FeatureNetwork
    texts: Callable[[Sequence[str]], np.ndarray]
    prompts: Sequence[str]
    fingerprint: str


class Inputs(NamedTuple):
    """What is measured, and what it is compared with.

    real, train: sources (data.sources), the training images for "memorisation" and "floor".
    references: published or own .npz statistics to use in place of `real`, each of the network it
    names. used_in_loss: {name: sha256} of the networks of the model's losses. clip: for "clip".
    pairs, lpips: what "reconstruction" measures, and VGG16 with heads; without it, no LPIPS.
    """

    generated: Images
    networks: Sequence[FeatureNetwork] = ()
    real: Any = None
    train: Any = None
    references: Sequence[str] = ()
    used_in_loss: dict[str, str] = {}
    clip: Clip | None = None
    pairs: Pairs | None = None
    lpips: FeatureNetwork | None = None


def asked_by(inputs: Inputs) -> str:
    """What a picture of scenes, or a CLIP score, is held to: its "caption", its "label", or ""."""
    if inputs.generated.captions is not None:
        return "caption"
    return "label" if inputs.generated.labelled else ""


def check(inputs: Inputs, settings: Settings) -> None:
    """Refuse metrics that are unknown, or lack what they compare with.

    Raises ValueError, one sentence with the remedy.
    """
    generated, real = inputs.generated, inputs.real
    unknown = sorted(set(settings.metrics) - set(METRICS))
    if unknown or not settings.metrics:
        raise ValueError(f"unknown metrics {unknown}: choose some of {', '.join(METRICS)}")
    if generated.num < 2:
        raise ValueError(f"num is {generated.num}: a distribution needs at least 2 images")
    asked = set(settings.metrics)
    if asked & {*FEATURE_METRICS, *VIEW_METRICS} and not inputs.networks:
        raise ValueError(f"metrics {sorted(asked)} need a feature network: give --network")
    if asked & {"kid", "prdc", "floor", *VIEW_METRICS} and real is None:
        raise ValueError(f"metrics {sorted(asked)} compare with real images: give --data")
    if "fd" in asked and real is None and not inputs.references:
        raise ValueError("fd compares with real images: give --data or --reference")
    if asked & {"memorisation", "floor"} and inputs.train is None:
        raise ValueError("memorisation and floor need training images: give --train_split")
    if real is not None and real.resolution != generated.resolution:
        raise ValueError(
            f"the images are {generated.resolution} px, the real ones {real.resolution}: compare "
            "at one resolution"
        )
    if "prdc" in asked:
        fewest = min(generated.num, len(real), settings.num_reference)
        if fewest <= max(KS):
            raise ValueError(
                f"prdc looks for {max(KS)} neighbours, but there are {fewest} images: give more"
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
    if "reconstruction" in asked and inputs.pairs is None:
        raise ValueError("reconstruction needs images with what they should be: give pairs")
    check_texts(inputs, asked)
    check_networks(inputs, settings)


def check_texts(inputs: Inputs, asked: set[str]) -> None:
    """Refuse "clip" and "composition" where nothing says what the images should show."""
    if "clip" in asked and inputs.clip is None:
        raise ValueError("clip needs a CLIP network: give --clip and --vocabulary")
    kind = asked_by(inputs)
    for metric in sorted(asked & {"clip", "composition"}):
        if not kind:
            raise ValueError(
                f"{metric} compares with what was asked for, and these images have neither labels "
                "nor captions: leave it out, or give an .npz with 'labels' or 'captions'"
            )
    if "clip" in asked and kind == "label" and not inputs.clip.prompts:
        raise ValueError("clip needs the names of the classes: give --data")
    if "composition" in asked and inputs.real is not None and inputs.real.name != "scenes":
        raise ValueError(
            f"composition is known for scenes, not for {inputs.real.name}: leave it out"
        )


def check_networks(inputs: Inputs, settings: Settings) -> None:
    """Refuse networks that measure nothing, twice, or not at these sizes."""
    names = [network.name for network in inputs.networks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--network={name} is given twice: name each network once")
    for network in inputs.networks:
        if network.outputs is None:
            raise ValueError(f"{network.name} has no pooled features: measure with another network")
        check_resize(network, settings.resize)
        for side in sides(inputs.generated.resolution, network, settings):
            outputs_at(network, side)


def sides(resolution: int, network: FeatureNetwork, settings: Settings) -> list[int]:
    """Sides of the images that the network will be given."""
    if settings.resize != "network":
        return [network.input_size]
    of = {"": resolution, "patch": settings.patch, "base": settings.base}
    return [of[view] for view in settings.views()]


def outputs_at(network: FeatureNetwork, side: int) -> dict:
    """Shapes of the network's outputs for two images; what it refuses, it refuses here."""
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    return jax.eval_shape(network.outputs, network.params, x)


def networks_with_logits(inputs: Inputs, settings: Settings) -> tuple[str, ...]:
    """The networks that "score" is computed of, () where it is not asked for; refuses none."""
    if "score" not in settings.metrics:
        return ()
    found = tuple(
        network.name
        for network in inputs.networks
        if "logits" in outputs_at(network, network.input_size or 32)
    )
    if not found:
        raise ValueError(
            f"score needs logits, which {', '.join(n.name for n in inputs.networks)} do not give: "
            "leave it out, or add a classifier such as inception_v3"
        )
    return found
