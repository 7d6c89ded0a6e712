"""The request of an evaluation: images, metrics and networks, checked before sampling."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.data.content import content_hash
from cheapscale.evaluation import measure
from cheapscale.evaluation.coverage import KS
from cheapscale.evaluation.embedding import check_network
from cheapscale.evaluation.image_sets import Images, Pairs, choice, chosen_images
from cheapscale.evaluation.patches import CROPS
from cheapscale.evaluation.statistics import Identity, Statistics, check_match, load_statistics
from cheapscale.features import FeatureNetwork

FEATURE_METRICS = measure.METRICS
VIEW_METRICS = ("patch", "base")  # the distances on crops and on reduced images
METRICS = (*FEATURE_METRICS, *VIEW_METRICS, "composition", "clip", "reconstruction")
GENERATED, REAL, TRAIN, PAIRS = "generated", "real", "train", "pairs"


class Clip(NamedTuple):
    """A CLIP network with its text tower.

    texts: function from a sequence of strings to text features [n, d]. prompts: one text for each
    class. fingerprint: hash of vocabulary and prompts. metric: what its number is called.
    """

    network: FeatureNetwork
    texts: Callable[[Sequence[str]], np.ndarray]
    prompts: Sequence[str]
    fingerprint: str
    metric: str = "clip_score"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The generated images, the metrics, and everything that the metrics need.

    metrics: some of METRICS.
    real, train: sources (data.sources); the training images are for "memorisation" and "floor".
    references: .npz files of statistics that replace `real`, each for the network that it names.
    used_in_loss: {name: sha256} of the networks in the model's losses. insist: use such a network
      anyway, and mark it in the metric names.
    clip: for "clip". pairs: for "reconstruction". lpips: VGG16 with LPIPS weights, for the LPIPS of
      "reconstruction".
    resize: "network" or "clean", see `embedding.outputs`. patch: side of the crops. base:
      resolution of the view "base". num_reference, num_train: limits of the images that are read.
    """

    generated: Images
    metrics: tuple[str, ...]
    networks: Sequence[FeatureNetwork] = ()
    real: Any = None
    train: Any = None
    references: Sequence[str] = ()
    used_in_loss: Mapping[str, str] = dataclasses.field(default_factory=dict)
    insist: bool = False
    clip: Clip | None = None
    pairs: Pairs | None = None
    lpips: FeatureNetwork | None = None
    resize: str = "network"
    patch: int = 0
    base: int = 0
    num_reference: int = 50_000
    num_train: int = 50_000
    batch_size: int = 250
    per_shard: int = 1000

    @property
    def views(self) -> tuple[str, ...]:
        """The views of an image: "" (the whole image), "patch", "base"."""
        return ("", *(view for view in VIEW_METRICS if view in self.metrics))

    @property
    def condition(self) -> str:
        """The condition that "composition" and "clip" compare with: "caption", "label" or ""."""
        if self.generated.captions is not None:
            return "caption"
        return "label" if self.generated.labelled else ""

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """{network: its name in metrics}; raises ValueError for a network that a loss used."""
        networks = [*self.networks, self.lpips, self.clip and self.clip.network]
        return {
            network.name: measure.checked_name(network, self.used_in_loss, insist=self.insist)
            for network in filter(None, networks)
        }

    @functools.cached_property
    def sets(self) -> dict[str, Images | Pairs]:
        """{name: set of images} for all sets that the metrics need."""
        found: dict[str, Images | Pairs] = {}
        if set(self.metrics) != {"reconstruction"}:
            found[GENERATED] = self.generated
            counts = ((REAL, self.real, self.num_reference), (TRAIN, self.train, self.num_train))
            for name, source, num in counts:
                if source is not None:
                    found[name] = chosen_images(source, choice(len(source), num))
        if "reconstruction" in self.metrics:
            found[PAIRS] = self.pairs
        return found

    @functools.cached_property
    def given(self) -> dict[tuple[str, str], Statistics]:
        """{(network, ""): statistics} from `references`; ValueError if they do not match."""
        found = {}
        networks = {network.name: network for network in self.networks}
        for path in self.references:
            statistics = load_statistics(path)
            name = statistics.identity.network if statistics.identity else "inception_v3"
            if name not in networks:
                raise ValueError(
                    f"{path} holds statistics of {name}, but the networks are "
                    f"{', '.join(networks) or 'none'}: add --network={name}=FILE"
                )
            check_match(
                statistics,
                sha256=networks[name].sha256,
                resolution=self.generated.resolution,
                resize=resize_name(networks[name], self.resize),
            )
            found[name, ""] = statistics
        return found

    @functools.cached_property
    def wanted(self) -> dict[tuple[str, str, str], Identity]:
        """{(set, network, view): identity of the statistics to compute}, without those given."""
        patch = f"patch {self.patch} x {CROPS} seed 0"
        variants = {"": "", "patch": patch, "base": f"base {self.base}"}
        return {
            (name, network.name, view): Identity(
                data=source.fingerprint(),
                split=source.split,
                resolution=self.sets[name].resolution,
                num=self.sets[name].num * (CROPS if view == "patch" else 1),
                network=network.name,
                sha256=network.sha256,
                resize=resize_name(network, self.resize),
                variant=variants[view],
            )
            for name, source in ((REAL, self.real), (TRAIN, self.train))
            if name in self.sets
            for network in self.networks
            for view in (self.views if name == REAL else ("",))
            if name == TRAIN or (network.name, view) not in self.given
        }

    @functools.cached_property
    def with_logits(self) -> tuple[str, ...]:
        """The names of the networks whose logits "score" uses."""
        if "score" not in self.metrics:
            return ()
        return tuple(n.name for n in self.networks if "logits" in _shapes(n, n.input_size or 32))


def mistakes(e: Evaluation) -> Iterator[str]:
    """One sentence with its remedy for each mistake in an evaluation; may also raise ValueError."""
    asked, size = set(e.metrics), e.generated.resolution
    if (unknown := sorted(asked - set(METRICS))) or not asked:
        yield f"unknown metrics {unknown}: choose some of {', '.join(METRICS)}"
    if e.generated.num < 2:
        yield f"num is {e.generated.num}: a distribution needs at least 2 images"
    if asked & {*FEATURE_METRICS, *VIEW_METRICS} and not e.networks:
        yield (
            f"metrics {sorted(asked)} need a feature network: give --network=NAME=FILE, or --data: "
            "a data set, on which a small classifier is fitted"
        )
    if asked & {"kid", "prdc", "floor", *VIEW_METRICS} and e.real is None:
        yield f"metrics {sorted(asked)} compare with real images: give --data"
    if "fd" in asked and e.real is None and not e.references:
        yield "fd compares with real images: give --data or --reference"
    if asked & {"memorisation", "floor"} and e.train is None:
        yield "memorisation and floor need training images: give --train_split"
    if e.real is not None and e.real.resolution != size:
        yield (
            f"the images are {size} px, the real ones {e.real.resolution}: compare at one "
            "resolution"
        )
    if "prdc" in asked:
        fewest = min(e.generated.num, len(e.real), e.num_reference)
        if fewest <= max(KS):
            yield f"prdc looks for {max(KS)} neighbours, but there are {fewest} images: give more"
    if "patch" in asked and not 1 <= e.patch <= size:
        yield f"patch is {e.patch}, the images are {size} px: choose a side between 1 and that"
    if "base" in asked and (e.base < 1 or size % e.base):
        yield f"base is {e.base}: it has to divide the images' {size} px"
    if "reconstruction" in asked and e.pairs is None:
        yield "reconstruction needs images with their targets: give pairs"
    if "clip" in asked and e.clip is None:
        yield "clip needs a CLIP network: give --clip and --vocabulary, or --clip=contrastive"
    for metric in sorted(asked & {"clip", "composition"}) if not e.condition else ():
        yield (
            f"{metric} compares images with their labels or captions, and these images have "
            "neither: leave it out, or give an .npz with 'labels' or 'captions'"
        )
    if "clip" in asked and e.condition == "label" and not e.clip.prompts:
        yield "clip needs the names of the classes: give --data"
    if "composition" in asked and e.real is not None and e.real.name != "scenes":
        yield f"composition is known for scenes, not for {e.real.name}: leave it out"
    names = [network.name for network in e.networks]
    for name in names:
        if names.count(name) > 1:
            yield f"--network={name} is given twice: name each network once"
    for network in e.networks:
        check_network(network, e.resize)
        sides = {"": size, "patch": e.patch, "base": e.base}
        for view in e.views:  # a network raises ValueError for an input size that it cannot take
            _shapes(network, network.input_size if e.resize != "network" else sides[view])
    if "score" in asked and not e.with_logits:
        yield (
            f"score needs logits, which {', '.join(names)} do not give: leave it out, or add a "
            "classifier such as inception_v3"
        )
    e.names  # raises ValueError for a network of the loss  # noqa: B018
    needing = sorted({"kid", "prdc", "floor"} & asked)
    for statistics in e.given.values():
        if needing and statistics.features is None:
            yield (
                f"metrics {needing} need the features of real images and {statistics.path} holds "
                "moments only: leave it out and compare with --data, or ask for fd"
            )


def resize_name(network: FeatureNetwork, resize: str) -> str:
    """The entry `resize` of an identity: the resizing, the network's variant and input size."""
    return f"{resize} {network.variant} {network.input_size or ''}".strip()


def _shapes(network: FeatureNetwork, side: int) -> dict:
    """The shapes of the network's outputs for two images of side x side pixels."""
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    return jax.eval_shape(network.outputs, network.params, x)


def identity(e: Evaluation) -> dict:
    """Everything that the numbers depend on, as plain values; a work directory records it."""
    plain = {
        f.name: getattr(e, f.name) for f in dataclasses.fields(e) if f.type in (int, str, bool)
    }
    return plain | {
        "metrics": list(e.metrics),
        "generated": e.generated.fingerprint,
        "num": e.generated.num,
        "networks": {n.name: f"{n.sha256} {n.variant} {n.input_size}" for n in e.networks},
        "real": e.real is not None and e.real.fingerprint(),
        "train": e.train is not None and e.train.fingerprint(),
        "references": [content_hash([pathlib.Path(path)], [""]) for path in e.references],
        "clip": e.clip and f"{e.clip.network.sha256} {e.clip.fingerprint}",
        "pairs": e.pairs and e.pairs.fingerprint,
        "lpips": e.lpips and e.lpips.sha256,
    }
