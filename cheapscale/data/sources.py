"""A name, a split and a resolution -> a random-access source of labelled, captioned images.

    open_source("scenes", "train", resolution=16, size=20_000, seed=0)
    open_source("cifar10", "train[:50%]", resolution=16, data_dir="../shared/data/tfds")
    open_source("folder", "train", resolution=64, data_dir="/data/imagenet")

Every source has the same face (`Source`): `source[i]` is {"image": float32 [R, R, 3] in [-1, 1],
"label": int32, "id": int64 = i}. All images, whatever their origin, pass through
`resize.downsample` (scenes are drawn by the same block mean), so the same source opened at two
resolutions gives two sizes of the same pictures. TFDS sets are read from prepared ArrayRecord
files, without TensorFlow.

A split may carry a slice in percent or in images: "train[:50%]", "train[50%:]", "test[100:200]".
The slices [:p%] and [p%:] partition a split.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from cheapscale.data import scenes
from cheapscale.data.random_access import UNREADABLE, Source, decode, split_name
from cheapscale.data.resize import to_rgb

SCENE_SIZES = {"train": 20_000, "test": 5_000}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_source(
    name: str, split: str, *, resolution: int, data_dir: str | None = None, **options
) -> Source:
    """Open "scenes", "folder", or a prepared TFDS set ("cifar10" or "tfds:cifar10").

    data_dir: for TFDS the folder that holds the sets (default $TFDS_DATA_DIR, or
    ~/tensorflow_datasets); for "folder" the root of the images. Options of every kind:
      cache: keep images in memory once read; None does so where that takes at most 1 GiB.
      unlabelled: ignore labels (num_classes 0).
    scenes: size (images in the split), seed. TFDS and folder: allow_upscale (else an image smaller
    than `resolution` is refused). TFDS: where ({field: value}, keep only those records).
    folder: skip_corrupt (leave out, count and name what does not decode), probe (read every header
    at the start, so that a bad file is refused before training).
    """
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    kinds = {"scenes": SceneSource, "folder": FolderSource}
    if name in kinds:
        kind = kinds[name]
        place = {} if name == "scenes" else {"data_dir": data_dir}
    else:
        kind = TfdsSource
        place = {"name": name.removeprefix("tfds:"), "data_dir": data_dir}
    allowed = sorted(set(kind.__init__.__kwdefaults__) - {"data_dir"})
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"source {name!r} has no option {', '.join(unknown)}: it takes {', '.join(allowed)}"
        )
    return kind(split, resolution, **place, **options)


class SceneSource(Source):
    """Procedural scenes (see `scenes`): label = shape of the main object. single: nothing else."""

    def __init__(
        self,
        split: str,
        resolution: int,
        *,
        size: int | None = None,
        seed: int = 0,
        single: bool = False,
        cache: bool | None = None,
        unlabelled: bool = False,
    ):
        base = split_name(split)
        if base not in scenes.SPLITS:
            raise ValueError(f"scenes has no split {base!r}: choose {' or '.join(scenes.SPLITS)}")
        scenes.check_resolution(resolution)
        size = SCENE_SIZES[base] if size is None else size
        if size < 1:
            raise ValueError(f"scenes needs size >= 1 images, got {size}")
        super().__init__(
            "scenes",
            split,
            resolution,
            base_length=size,
            class_names=scenes.SHAPES,
            # Not the size: the first images of a larger set are the same ones.
            identity=[scenes.SCENES_ID, seed] + ["single"] * single,
            cache=cache,
            unlabelled=unlabelled,
        )
        self.seed, self.single = seed, single

    def scene(self, i: int) -> scenes.Scene:
        """Ground and objects of image i."""
        return self._scene(self._span[self._check(i)])

    def truth(self, i: int) -> list[scenes.SceneObject]:
        """The objects of image i, the main one first, in unit coordinates."""
        return list(self.scene(i).objects)

    def _scene(self, base_index: int) -> scenes.Scene:
        whole = scenes.scene(self.seed, split_name(self.split), base_index)
        return dataclasses.replace(whole, objects=whole.objects[:1]) if self.single else whole

    def _load(self, base_index: int) -> tuple[np.ndarray, int]:
        picture = self._scene(base_index)
        return scenes.draw(picture, self.resolution), scenes.label(picture)

    def _label(self, base_index: int) -> int:
        return scenes.label(self._scene(base_index))

    def _caption(self, base_index: int) -> str:
        return scenes.caption(self._scene(base_index))


class TfdsSource(Source):
    """A prepared TFDS set in ArrayRecord files, with features image, and perhaps label, caption."""

    def __init__(
        self,
        split: str,
        resolution: int,
        *,
        name: str,
        data_dir: str | None = None,
        where: Mapping[str, Any] | None = None,
        allow_upscale: bool = False,
        cache: bool | None = None,
        unlabelled: bool = False,
    ):
        import tensorflow_datasets as tfds  # here: scenes and folders need not wait for it

        builder = tfds.builder_from_directory(_tfds_version(name, data_dir))
        features, base = builder.info.features, split_name(split)
        if base not in builder.info.splits:
            raise ValueError(
                f"{name} has no split {base!r}: choose among {', '.join(builder.info.splits)}"
            )
        if "image" not in features:
            raise ValueError(f"{name} has no feature 'image', only {', '.join(features)}")
        height, width, _ = features["image"].shape
        if height and width and min(height, width) < resolution and not allow_upscale:
            raise ValueError(
                f"{name} holds images of {height}x{width}, smaller than resolution {resolution}: "
                "lower the resolution or set allow_upscale=True"
            )
        # Bytes as they were written: one decoder for every kind of source, and labels without it.
        skip = {"image": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(base, decoders=skip)
        self._set, self._where, self._kept = f"{name}:{base}", dict(where or {}), None
        unknown = sorted(set(self._where) - set(features))
        if unknown:
            raise ValueError(
                f"{name} has no field {', '.join(unknown)} to filter by, only {', '.join(features)}"
            )
        if self._where:
            records = (self._record(i) for i in range(len(self._records)))
            keep = [all(_text(r[k]) == v for k, v in self._where.items()) for r in records]
            self._kept = np.flatnonzero(keep)
        short = min(height, width) if height and width else 0
        self._allow_upscale = allow_upscale
        super().__init__(
            name,
            split,
            resolution,
            base_length=len(self._records) if self._kept is None else len(self._kept),
            class_names=tuple(features["label"].names) if "label" in features else (),
            identity=["tfds", str(builder.version), len(self._records), self._where],
            cache=cache,
            unlabelled=unlabelled,
            exact_bytes=short > 0 and (short == resolution or short % resolution > 0),
        )

    def record(self, i: int) -> dict[str, Any]:
        """Every field of image i; the image itself as encoded bytes."""
        return self._record(self._span[self._check(i)])

    def _place(self, base_index: int) -> int:
        return base_index if self._kept is None else int(self._kept[base_index])

    def _here(self, base_index: int) -> str:
        return f"record {self._place(base_index)} of {self._set}"

    def _record(self, base_index: int) -> dict[str, Any]:
        try:
            return self._records[self._place(base_index)]
        except Exception as error:  # whatever the reader raises, the user needs the record's number
            raise ValueError(
                f"{self._here(base_index)} is unreadable ({error}): prepare the set again"
            ) from error

    def _load(self, base_index: int) -> tuple[np.ndarray, int]:
        record, here = self._record(base_index), self._here(base_index)
        data = io.BytesIO(record["image"])
        image = decode(data, here, self.resolution, allow_upscale=self._allow_upscale)
        return image, record.get("label", 0)

    def _label(self, base_index: int) -> int:
        return self._record(base_index)["label"]

    def _caption(self, base_index: int) -> str:
        return _text(self._record(base_index).get("caption", ""))


class FolderSource(Source):
    """Image files. Sub-folders are the classes, in sorted order; a flat folder is unlabelled.

    The split is a sub-folder of data_dir; "all" takes data_dir itself.
    """

    def __init__(
        self,
        split: str,
        resolution: int,
        *,
        data_dir: str | None = None,
        allow_upscale: bool = False,
        skip_corrupt: bool = False,
        probe: bool = True,
        cache: bool | None = None,
        unlabelled: bool = False,
    ):
        root = _split_folder(data_dir, split_name(split))
        files = _image_files(root)
        if not files:
            raise ValueError(f"no image files ({', '.join(IMAGE_SUFFIXES)}) under {root}")
        classes = sorted({path.relative_to(root).parts[0] for path in files if path.parent != root})
        loose = [path for path in files if path.parent == root]
        if loose and classes:
            raise ValueError(
                f"{root} mixes images ({loose[0].name} ...) with class folders ({classes[0]} ...): "
                "move the images into a class folder"
            )
        self._allow_upscale = allow_upscale
        self.skipped: tuple[str, ...] = ()
        if skip_corrupt:
            files = self._without_corrupt(files)
        self._files = files
        self._classes = {name: k for k, name in enumerate(classes)}
        self._root = root
        if probe:
            for path in files:
                _probe(path, resolution, allow_upscale)
        listing = [[str(p.relative_to(root)), p.stat().st_size] for p in files]
        super().__init__(
            "folder",
            split,
            resolution,
            base_length=len(files),
            class_names=tuple(classes),
            identity=["folder", hashlib.sha256(json.dumps(listing).encode()).hexdigest()],
            cache=cache,
            unlabelled=unlabelled,
        )

    def path(self, i: int) -> pathlib.Path:
        """The file of image i."""
        return self._files[self._span[self._check(i)]]

    def _without_corrupt(self, files: list[pathlib.Path]) -> list[pathlib.Path]:
        # A truncated file shows itself only when decoded, and ids may not shift later: one pass.
        good, bad = [], []
        for path in files:
            try:
                with Image.open(path) as image:
                    to_rgb(image)
                good.append(path)
            except UNREADABLE as error:
                bad.append(str(path))
                logging.warning("skipping %s: %s", path, error)
        if bad:
            logging.warning("skipped %d of %d images that do not decode", len(bad), len(files))
        self.skipped = tuple(bad)
        return good

    def _load(self, base_index: int) -> tuple[np.ndarray, int]:
        path, upscale = self._files[base_index], self._allow_upscale
        image = decode(path, str(path), self.resolution, allow_upscale=upscale)
        return image, self._label(base_index)

    def _label(self, base_index: int) -> int:
        return self._classes.get(self._files[base_index].relative_to(self._root).parts[0], 0)


def _probe(path: pathlib.Path, resolution: int, allow_upscale: bool) -> None:
    """Reads the header only: refuses what is no image, or too small."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is not a readable image ({error}): "
            "repair or remove it, or set skip_corrupt=True"
        ) from error
    if min(width, height) < resolution and not allow_upscale:
        raise ValueError(
            f"{path} is {height}x{width}, smaller than resolution {resolution}: "
            "lower the resolution, remove the file or set allow_upscale=True"
        )


def _split_folder(data_dir: str | None, split: str) -> pathlib.Path:
    if data_dir is None:
        raise ValueError("an image folder needs data_dir: the folder that holds the images")
    root = pathlib.Path(data_dir)
    if not root.is_dir():
        raise ValueError(f"data_dir {root} is not a folder")
    if split == "all":
        return root
    if (root / split).is_dir():
        return root / split
    found = sorted(p.name for p in root.iterdir() if p.is_dir())
    raise ValueError(
        f"{root} has no split {split!r}: its sub-folders are {', '.join(found) or 'none'}, "
        "and split 'all' reads the whole folder"
    )


def _image_files(root: pathlib.Path) -> list[pathlib.Path]:
    names = [pathlib.Path(folder, f) for folder, _, files in os.walk(root) for f in files]
    return sorted(p for p in names if p.suffix.lower() in IMAGE_SUFFIXES)


def _tfds_version(name: str, data_dir: str | None) -> pathlib.Path:
    """The newest prepared version of a set."""
    folder = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    root = pathlib.Path(folder).expanduser()
    versions = [p.parent for p in root.glob(f"{name}/**/dataset_info.json")]
    if not versions:
        found = sorted({p.relative_to(root).parts[0] for p in root.glob("*/**/dataset_info.json")})
        raise ValueError(
            f"no data set {name!r} in {root}, where {', '.join(found) or 'nothing'} is prepared: "
            "name the folder that holds it with data_dir=DIR (other sources: 'scenes', 'folder')"
        )
    return max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
