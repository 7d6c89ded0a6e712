"""The interface of every source of images: access by index, labels, captions and a fingerprint.

A subclass (see `sources`) provides the number of images in a split and loads one of them. Images
are float32 [R, R, 3] in [-1, 1].
"""

import abc
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cheapscale.data.digest import digest
from cheapscale.data.resize import RESIZE_ID, downsample, open_rgb
from cheapscale.data.tokens import Tokenise, tokeniser

SOURCE_ID = "source/2"  # part of every fingerprint: change it with any index or pixel
CACHE_LIMIT = 2**30  # bytes of float32 images; larger sources are decoded again in each epoch
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises


class Source(abc.ABC):
    """Images by index: source[i] is {"image" [R, R, 3], "label" int32, "id" int64 = i}.

    After `use_captions` a label is the row of a caption's token numbers, int32 [length], and there
    are no classes.

    name, split: as given to `open_source`. resolution: R. class_names: empty for an unlabelled
    source, whose labels are all 0. num_classes: len(class_names). channels: 3, or those of latents.
    """

    channels = 3

    def __init__(
        self,
        name: str,
        split: str,
        resolution: int,
        *,
        length: int,
        class_names: tuple[str, ...],
        identity: Any,
        cache: bool | None = None,
        unlabelled: bool = False,
    ):
        """length: number of images in the whole split, before slicing. identity: JSON values that
        differ for different contents. cache: keep decoded images in memory; None does so if they
        take at most 1 GiB."""
        base, self._span = parse_split(split, length)
        if not self._span:
            raise ValueError(f"{name}:{split} holds no images: choose another split or slice")
        self.name, self.split, self.resolution = name, split, int(resolution)
        self.class_names = () if unlabelled else tuple(class_names)
        self.num_classes = len(self.class_names)
        self._numbers = list(range(self.num_classes))  # that of each class; see number_classes
        self._tokenise: Tokenise | None = None
        self._words: dict[str, Any] = {}  # what `describe` says of captions
        span = self._span.start, self._span.stop
        self._fingerprint = digest([SOURCE_ID, RESIZE_ID, name, base, *span, identity])
        if cache is None:
            cache = 4 * self.channels * self.resolution**2 * len(self) <= CACHE_LIMIT  # float32
        self._cache: dict[int, tuple[np.ndarray, int]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self._span)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        image, label = self._item(i)
        return {"image": image.copy(), "label": np.int32(label), "id": np.int64(i)}

    def number_classes(self, names: Sequence[str]) -> None:
        """Give every class its place in `names`: the list that a model was trained with.

        Classes are found by name. If one of the lists is only "0", "1", ... as of a label file and
        the other has names, the numbers stand, and the lists must be of one length. Raises
        ValueError for a class that `names` lacks. An unlabelled source stays as it is.
        """
        if not self.num_classes or self.class_names == tuple(names):
            return
        own = [self.class_names[number] for number in self._numbers]
        unknown, where = sorted(set(own) - set(names)), f"{self.name}:{self.split}"
        if not unknown:
            self._numbers = [list(names).index(name) for name in own]
        elif _only_numbers(own) == _only_numbers(names):
            raise ValueError(
                f"{where} has the class {shown(unknown)}, which the model does not know: rename "
                f"it to one of the model's ({shown(names)}), or move it away"
            )
        elif len(own) != len(names):
            raise ValueError(
                f"{where} has {len(own)} classes ({shown(own)}) and the model {len(names)} "
                f"({shown(names)}), and no names match: name its class folders as the model does"
            )
        self.class_names, self.num_classes = tuple(names), len(names)
        if self._cache:
            self._cache.clear()  # it holds labels

    def use_captions(self, vocabulary: str, length: int) -> None:
        """Give every image the token numbers of one of its captions as its label; a random one that
        is always the same. See `tokens.tokeniser`. Raises ValueError where the first images have no
        caption."""
        if not any(self.caption(i) for i in range(min(len(self), 100))):
            raise ValueError(
                f"{self.name}:{self.split} has no captions: put NAME.txt beside NAME.png, or a "
                "captions.jsonl, or write one with launch.recaption"
            )
        self._tokenise, self.num_classes, self.class_names = tokeniser(vocabulary, length), 0, ()
        self._words = {"tokens": length, "vocabulary": digest(vocabulary)}
        if self._cache:
            self._cache.clear()  # it holds labels

    @property
    def captioned(self) -> bool:
        """Whether labels are token numbers."""
        return self._tokenise is not None

    def labels(self) -> np.ndarray:
        """The labels of all images, int32 [n], without decoding an image."""
        return np.array([self._checked_label(i) for i in range(len(self))], np.int32)

    def captions(self, i: int) -> tuple[str, ...]:
        """Every caption of image i: phrasings of one truth, or descriptions by several people."""
        return tuple(self._captions(self._index(i)))

    def caption(self, i: int) -> str:
        """The first caption of image i, or "" if it has none."""
        return next(iter(self.captions(i)), "")

    def reworded(self, item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The item with the token numbers of a random caption of its image; a
        transform of the loader."""
        return {**item, "label": self._tokens(self._index(item["id"]), rng)}

    def _tokens(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """Those of one caption of the image with this index, of the empty one if it has none."""
        captions = self._drawn_from(index, rng)
        chosen = captions[int(rng.integers(len(captions)))] if captions else ""
        return self._tokenise([chosen])[0]

    def _drawn_from(self, index: int, rng: np.random.Generator) -> Sequence[str]:
        """The captions of which one is drawn."""
        return self._captions(index)

    def read(self, ids: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """(images float32 [n, R, R, 3], labels int32 [n]) of the given ids."""
        items = [self[int(i)] for i in ids]
        if not items:
            raise ValueError(f"no ids to read from {self.name}:{self.split}: give at least one")
        images, labels = ([item[name] for item in items] for name in ("image", "label"))
        return np.stack(images), np.asarray(labels, np.int32)

    def class_mix(self, num: int) -> np.ndarray:
        """int32 [num] labels with the class frequencies of the source, equal in every call.

        For an unbalanced data set, samples of uniform labels would have a positive FID even from a
        perfect model.
        """
        pick = np.random.default_rng(0).integers(0, len(self), num)
        return self.labels()[pick]

    def describe(self) -> dict[str, Any]:
        """JSON values that identify these images; checkpoints store them beside the weights."""
        return {
            "name": self.name,
            "split": self.split,
            "resolution": self.resolution,
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "fingerprint": self.fingerprint(),
            "resize": RESIZE_ID,
        } | self._words

    def fingerprint(self) -> str:
        """A hash of the name, split, slice, content and resize operator, but not the resolution."""
        return self._fingerprint

    def _index(self, i: int) -> int:
        """The index of image i in the unsliced split."""
        if not 0 <= i < len(self):
            raise IndexError(f"no image {i} in {self.name}:{self.split}, which has {len(self)}")
        return self._span[int(i)]

    def _item(self, i: int) -> tuple[np.ndarray, int]:
        index = self._index(i)
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        item = self._load(index), self._checked_label(i)
        if self._cache is not None:
            self._cache[index] = item
        return item

    def _checked_label(self, i: int) -> int | np.ndarray:
        if self.captioned:
            index = self._index(i)
            return self._tokens(index, np.random.default_rng(index))
        if not self.num_classes:
            return 0
        label = self._label(self._index(i))
        if not 0 <= label < len(self._numbers):
            raise ValueError(
                f"image {i} of {self.name}:{self.split} has label {label}, outside "
                f"0..{len(self._numbers) - 1}: choose another split, or set "
                "--config.data.options.unlabelled=True"
            )
        return self._numbers[int(label)]

    @abc.abstractmethod
    def _load(self, index: int) -> np.ndarray:
        """The image, float32 [R, R, 3], with this index in the unsliced split."""

    @abc.abstractmethod
    def _label(self, index: int) -> int:
        """The label of the image with this index, without decoding the image."""

    def _captions(self, index: int) -> Sequence[str]:
        """The captions of the image with this index."""
        del index
        return ()


def _only_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(n) for n in range(len(names))]


def shown(names: Sequence[str], most: int = 8) -> str:
    """The first names as a text, and how many there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def split_name(split: str) -> str:
    """The split's name without its slice: "train" for "train[:50%]"."""
    return split.partition("[")[0]


def parse_split(split: str, length: int) -> tuple[str, range]:
    """(name, indices): ("train", range(0, 5)) for "train[:50%]" and length 10."""
    name = split_name(split)
    if name == split:
        return name, range(length)
    match = re.fullmatch(r"\[(\d*)(%?):(\d*)(%?)\]", split.removeprefix(name))
    if not match:
        raise ValueError(f"split {split!r} is not a name with a slice such as [:50%] or [100:200]")

    def border(number: str, percent: str, default: int) -> int:
        if not number:
            return default
        if percent and int(number) > 100:
            raise ValueError(f"split {split!r} goes beyond 100%: give percents from 0 to 100")
        return min(round(int(number) * length / 100) if percent else int(number), length)

    start = border(match[1], match[2], 0)
    return name, range(start, max(start, border(match[3], match[4], length)))


def read_picture(file: Any, place: str, fix: str = "repair or remove it") -> np.ndarray:
    """uint8 [h, w, 3] of one encoded picture, upright; ValueError, which names `place`, if it does
    not decode (with the remedy `fix`)."""
    try:
        return open_rgb(file)
    except UNREADABLE as error:
        raise ValueError(f"{place} does not decode ({error}): {fix}") from error


def decode(
    file: Any,
    place: str,
    resolution: int,
    *,
    allow_upscale: bool,
    fix: str = "repair or remove it",
) -> np.ndarray:
    """One encoded image, a path or a binary stream, as float32 [R, R, 3] in [-1, 1].

    Raises ValueError, which names `place`, if it does not decode (with the remedy `fix`) or is too
    small.
    """
    pixels = read_picture(file, place, fix)
    try:
        return downsample(pixels, resolution, allow_upscale=allow_upscale)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
