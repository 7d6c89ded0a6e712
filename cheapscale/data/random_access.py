"""What every source of images is: random access with labels, captions, a cache and a fingerprint.

A kind of source (`sources`) says how many images there are and how to load one; everything else
is here, once. Images are float32 [R, R, 3] in [-1, 1].
"""

import abc
import re
from typing import Any

import numpy as np
from PIL import Image

from cheapscale.data.digest import digest
from cheapscale.data.resize import RESIZE_ID, downsample, to_rgb

SOURCE_ID = "source/1"
CACHE_LIMIT = 2**30  # bytes; above it, cache=None keeps nothing
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises


class Source(abc.ABC):
    """Random access to images. A kind of source defines `_load`, `_label` and perhaps `_caption`.

    name, split: as given. resolution: R. class_names: () where unlabelled; num_classes: their
    number, 0 where unlabelled, and then every label is 0.
    """

    def __init__(
        self,
        name: str,
        split: str,
        resolution: int,
        *,
        base_length: int,
        class_names: tuple[str, ...],
        identity: Any,
        cache: bool | None,
        unlabelled: bool,
        exact_bytes: bool = False,
    ):
        """base_length: images in the whole split, before any slice. identity: JSON values that
        tell this content from any other. exact_bytes: every image lies on the 8-bit grid, so that
        the cache may hold bytes."""
        base, span = parse_split(split, base_length)
        if not span:
            raise ValueError(f"{name}:{split} holds no images: choose another split or slice")
        self.name, self.split, self.resolution = name, split, int(resolution)
        self.class_names = () if unlabelled else tuple(class_names)
        self.num_classes = len(self.class_names)
        self._span = span
        identity = [SOURCE_ID, RESIZE_ID, name, base, span.start, span.stop, identity]
        self._fingerprint = digest(identity)
        self._labels = np.full(len(span), -1 if self.num_classes else 0, np.int32)  # -1: not read
        shape = (len(span), self.resolution, self.resolution, 3)
        dtype = np.dtype(np.uint8 if exact_bytes else np.float32)
        if cache is None:
            cache = dtype.itemsize * int(np.prod(shape, dtype=np.int64)) <= CACHE_LIMIT
        # Memory is touched, and so taken, only where an image has been read.
        self._cache = np.empty(shape, dtype) if cache else None
        self._cached = np.zeros(len(span), bool)

    def __len__(self) -> int:
        return len(self._span)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        i = self._check(i)
        image = self.image(i)
        return {"image": image, "label": self._known_label(i), "id": np.int64(i)}

    def image(self, i: int) -> np.ndarray:
        """float32 [R, R, 3] in [-1, 1]; the caller owns the array."""
        i = self._check(i)
        if self._cached[i]:
            kept = self._cache[i]
            if kept.dtype == np.uint8:
                return kept.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
            return kept.copy()
        image, label = self._load(self._span[i])
        self._keep_label(i, label)
        if self._cache is not None:
            exact = self._cache.dtype == np.uint8
            self._cache[i] = np.rint((image + 1) * 127.5) if exact else image
            self._cached[i] = True  # after the pixels: readers may be threads
        return image

    def labels(self) -> np.ndarray:
        """int32 [n], all of them, without decoding an image; zeros where unlabelled."""
        for i in np.flatnonzero(self._labels < 0):
            self._known_label(int(i))
        return self._labels.copy()

    def caption(self, i: int) -> str:
        """The text that comes with image i, "" where there is none."""
        return self._caption(self._span[self._check(i)])

    def fingerprint(self) -> str:
        """A short hash of which images these are and how they are resized: of the name, split,
        length, version and resize operator, but not of the resolution."""
        return self._fingerprint

    def _check(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"no image {i} in {self.name}:{self.split}, which has {len(self)}")
        return int(i)

    def _known_label(self, i: int) -> np.int32:
        if self._labels[i] < 0:
            self._keep_label(i, self._label(self._span[i]))
        return self._labels[i]

    def _keep_label(self, i: int, label: int) -> None:
        if self.num_classes:
            if not 0 <= label < self.num_classes:
                raise ValueError(
                    f"image {i} of {self.name}:{self.split} has label {label}, outside "
                    f"0..{self.num_classes - 1}: open it with unlabelled=True or another split"
                )
            self._labels[i] = label

    @abc.abstractmethod
    def _load(self, base_index: int) -> tuple[np.ndarray, int]:
        """(image float32 [R, R, 3], label) by the index in the unsliced split."""

    @abc.abstractmethod
    def _label(self, base_index: int) -> int:
        """Its label alone, without reading the image where that can be had."""

    def _caption(self, base_index: int) -> str:
        return ""


def split_name(split: str) -> str:
    """ "train[:50%]" -> "train"."""
    return split.partition("[")[0]


def parse_split(split: str, length: int) -> tuple[str, range]:
    """ "train[:50%]", 10 -> ("train", range(0, 5)). Borders in percent are rounded."""
    name = split_name(split)
    if name == split:
        return name, range(length)
    match = re.fullmatch(r"\[(\d*)(%?):(\d*)(%?)\]", split.removeprefix(name))
    if not match:
        raise ValueError(f"split {split!r} is not a name with a slice such as [:50%] or [100:200]")

    def border(number: str, percent: str, default: int) -> int:
        if not number:
            return default
        return min(round(int(number) * length / 100) if percent else int(number), length)

    start = border(match[1], match[2], 0)
    return name, range(start, max(start, border(match[3], match[4], length)))


def decode(file: Any, here: str, resolution: int, *, allow_upscale: bool) -> np.ndarray:
    """One encoded image (path or binary stream) -> float32 [R, R, 3]; errors name `here`."""
    try:
        with Image.open(file) as image:
            pixels = to_rgb(image)
    except UNREADABLE as error:
        raise ValueError(f"{here} does not decode ({error}): repair or remove it") from error
    try:
        return downsample(pixels, resolution, allow_upscale=allow_upscale)
    except ValueError as error:
        raise ValueError(f"{here}: {error}") from error
