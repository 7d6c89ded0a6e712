"""How good a set of images is, measured in the features of one frozen network.

`reference` reads the real images once; `quality` compares generated ones with them and returns a
flat dict of numbers named after the network: fd_classifier, kd_classifier, fd_mobilenetv2 ...
The network must not have been part of a training loss: a generator trained against it can please
it without looking any better, so `quality` refuses one that the run lists (or, where the user
insists, says so in the metric's name).
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cheapscale.evaluation.coverage import precision_recall
from cheapscale.evaluation.fid import frechet_distance, kernel_distance
from cheapscale.evaluation.memorisation import nearest_features, nearest_pixels
from cheapscale.evaluation.pixels import check_images, to_uint8
from cheapscale.evaluation.resize import MODES
from cheapscale.evaluation.resize import resize as resized
from cheapscale.models.features.network import FeatureNetwork
from cheapscale.training.sharding import in_batches


class Reference(NamedTuple):
    """Real images of one source in the features of one network.

    features, images: [n, d] and uint8 [n, R, R, 3], held out from training where `train_*` is
    given; `train_*` the same of training images, else None.
    floor_features: two sets of real images; their distance is what a perfect generator scores.
    """

    network: FeatureNetwork
    features: np.ndarray
    images: np.ndarray
    train_features: np.ndarray | None
    train_images: np.ndarray | None
    floor_features: tuple[np.ndarray, np.ndarray]

    def floor(self, num: int) -> tuple[float, float]:
        """Frechet and kernel distance between reals, the first set no larger than `num`.

        The bias of a Frechet distance depends on the sizes: the floor is for as many images as
        were generated, as far as there are so many.
        """
        first, second = self.floor_features
        return frechet_distance(first[:num], second), kernel_distance(first[:num], second)

    def above_floor(self, features: np.ndarray) -> float:
        """Frechet distance of generated features minus the floor, both for equally many images."""
        num = min(len(features), len(self.floor_features[0]))
        return frechet_distance(features[:num], self.features) - self.floor(num)[0]


def embed(
    network: FeatureNetwork,
    images: np.ndarray,
    *,
    batch_size: int = 250,
    resize: str = "network",
) -> np.ndarray:
    """Pooled features, float32 [n, d], of uint8 images [n, R, R, 3]; see `outputs`."""
    return outputs(network, images, batch_size=batch_size, resize=resize)["features"]


def outputs(
    network: FeatureNetwork,
    images: np.ndarray,
    *,
    batch_size: int = 250,
    resize: str = "network",
    logits: bool = False,
) -> dict[str, np.ndarray]:
    """{"features" [n, d], and with `logits` "logits" [n, classes]}, float32, of uint8 images
    [n, R, R, 3], split over the devices.

    resize: "network" leaves it to the network to bring images to its input size, "clean" and "tf1"
    (evaluation.resize) do it here.
    """
    if network.outputs is None:
        raise ValueError(f"{network.name} has no pooled features: measure with another network")
    if images.dtype != np.uint8:
        raise ValueError(f"embed takes uint8 images, got {images.dtype}: apply pixels.to_uint8")
    check_images(images)
    check_resize(network, resize)
    prepare = None
    if resize != "network":
        prepare = functools.partial(resized, size=network.input_size, mode=resize)
    keys = ("features", "logits") if logits else ("features",)
    run = _program(network.outputs, keys, network.name)
    return in_batches(run, network.params, images, batch_size=batch_size, prepare=prepare)


def check_resize(network: FeatureNetwork, resize: str) -> None:
    """Refuse to resize for a network that takes images of any size, or in an unknown way."""
    if resize != "network" and resize not in MODES:
        raise ValueError(f"resize is {resize!r}: choose network, {' or '.join(MODES)}")
    if resize != "network" and not network.input_size:
        raise ValueError(
            f"{network.name} takes images of any size, so there is none to resize to: use "
            "resize='network'"
        )


def reference(
    network: FeatureNetwork,
    source: Any,
    *,
    train_source: Any = None,
    num: int = 5000,
    num_train: int = 10_000,
    batch_size: int = 250,
) -> Reference:
    """Reads and embeds up to `num` images (a fixed random choice) of a source.

    Args:
        source: images to compare with, by preference a held-out split.
        train_source: the training split. With it the floor is training images against `source`,
            and memorisation can be measured; without it, one half of `source` against the other.
        num_train: at most so many training images are read; a memorised image that is not among
            them is not found.
    """
    images, _ = read_images(source, num)
    if len(images) < 4:
        raise ValueError(f"{len(images)} images of {source.name!r} are too few to compare with")
    features = embed(network, images, batch_size=batch_size)
    if train_source is None:
        half = len(features) // 2
        pair = features[:half], features[half:]
        return Reference(network, features, images, None, None, pair)
    train_images, ids = read_images(train_source, num_train)
    train_features = embed(network, train_images, batch_size=batch_size)
    unseen = train_features[unseen_by_classifier(ids)]
    if len(unseen) < 2:
        raise ValueError(f"{len(ids)} images of {train_source.name!r} are too few for a floor")
    return Reference(network, features, images, train_features, train_images, (unseen, features))


def quality(
    reference: Reference,
    images: np.ndarray | jax.Array | Iterable[Any],
    *,
    features: np.ndarray | None = None,
    used_in_loss: Iterable[str] | Mapping[str, str] = (),
    insist: bool = False,
    k: int = 3,
    num_nearest: int = 500,
    batch_size: int = 250,
) -> dict[str, float]:
    """Metrics of generated images against a reference.

    Args:
        images: float [n, R, R, 3] in [-1, 1], or an iterable of such batches. They are truncated to
            eight bits, as the real ones are stored.
        features: what `embed` gave of them, where the caller has it already.
        used_in_loss: networks of the training loss as the run's summary lists them: names, or
            name -> sha256. A match of either with the reference's network is refused, or with
            `insist` marked in the metrics' names.
        num_nearest: how many images the pixel-space neighbour search takes.

    Returns:
        num, num_real; fd_<network>, floor, fd_minus_floor; kd_<network>, kd_floor (unbiased: use
        these on small sets); precision, recall (k neighbours). With training images in the
        reference also the mean distance to the nearest of them, nn_features and nn_pixels (per
        pixel rms, [-1, 1] units), each with its value for real held-out images, *_real: a
        generator that memorises falls far below it.
    """
    name = checked_name(reference.network, used_in_loss, insist=insist)
    images = _gather(images)
    if images.shape[1:] != reference.images.shape[1:]:
        raise ValueError(
            f"generated images are {images.shape[1:]}, real ones {reference.images.shape[1:]}: "
            "compare at one resolution"
        )
    if features is None:
        features = embed(reference.network, images, batch_size=batch_size)
    distance = frechet_distance(features, reference.features)
    floor, kd_floor = reference.floor(len(features))
    neighbours = min(k, len(features) - 1, len(reference.features) - 1)
    coverage = precision_recall(reference.features, features, k=neighbours)
    result = {
        "num": len(features),
        "num_real": len(reference.features),
        f"fd_{name}": distance,
        "floor": floor,
        "fd_minus_floor": reference.above_floor(features),
        f"kd_{name}": kernel_distance(features, reference.features),
        "kd_floor": kd_floor,
        "precision": coverage.precision,
        "recall": coverage.recall,
    }
    if reference.train_features is not None:
        for suffix, queries, pixels in (
            ("", features, images),
            ("_real", reference.features, reference.images),
        ):
            in_features = nearest_features(queries, reference.train_features)
            in_pixels = nearest_pixels(pixels[:num_nearest], reference.train_images)
            result["nn_features" + suffix] = float(in_features.distance.mean())
            result["nn_pixels" + suffix] = float(in_pixels.distance.mean())
    return result


def checked_name(
    network: FeatureNetwork,
    used_in_loss: Iterable[str] | Mapping[str, str],
    *,
    insist: bool = False,
) -> str:
    """The network's name in metrics; raises ValueError if a loss used the network."""
    hashes = dict(used_in_loss) if isinstance(used_in_loss, Mapping) else {}
    same_weights = network.sha256 and network.sha256 in hashes.values()
    if network.name not in set(used_in_loss) and not same_weights:
        return network.name
    if insist:
        return f"{network.name}(used in the loss)"
    raise ValueError(
        f"{network.name} was part of this run's training loss, so it cannot measure it: use "
        "another network, or insist and have the metric's name say so"
    )


def choice(length: int, num: int) -> np.ndarray:
    """The fixed random choice of at most `num` of `length` images that statistics are made of."""
    return np.random.default_rng(0).permutation(length)[:num]


def unseen_by_classifier(ids: np.ndarray) -> np.ndarray:
    """Which training images the metric classifier was not fitted on, boolean.

    It saw those of even id (training/classifier.py) and tells them from held-out ones; neither
    held-out nor generated images were part of its fit.
    """
    return ids % 2 == 1


def read_images(source: Any, num: int) -> tuple[np.ndarray, np.ndarray]:
    """A fixed random choice of at most `num` images: uint8 [n, R, R, 3], and their ids [n]."""
    ids = choice(len(source), num)
    return _gather(np.asarray(source[int(i)]["image"])[None] for i in ids), ids


def _gather(images):
    batches = [images] if hasattr(images, "ndim") else images
    return np.concatenate([to_uint8(check_images(np.asarray(batch))) for batch in batches])


@functools.lru_cache(maxsize=32)
def _program(apply, keys, name):
    """(params, images in levels) -> the outputs `keys`: one function, compiled once."""

    def run(params, x):
        out = apply(params, x.astype(jnp.float32) / 127.5 - 1.0)
        missing = [key for key in keys if key not in out]
        if missing:
            raise ValueError(f"{name} has no {missing[0]}: leave out 'score'")
        return {key: out[key].astype(jnp.float32) for key in keys}

    return run
