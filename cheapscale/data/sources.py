"""Image sources by name: procedural scenes, folders, prepared TFDS data sets, and latents.

    open_source("scenes", "train", resolution=16, size=20_000, seed=0)
    open_source("cifar10", "train[:50%]", resolution=16, data_dir="../shared/data/tfds")
    open_source("folder", "train", resolution=64, data_dir="/data/imagenet")
    open_source("latents", "train", resolution=16, data_dir="runs/latents/data")

Every source is a `Source`. Images are resized by `resize.downsample`, and scenes are drawn with
equal block means, so a source opened at two resolutions holds the same pictures in two sizes. TFDS
data sets are read from their ArrayRecord files, without TensorFlow.

A split may carry a slice in percent or in images: "train[:50%]", "train[50%:]", "test[100:200]".
"""

import dataclasses
import io
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cheapscale.data import scenes
from cheapscale.data.content import content_hash
from cheapscale.data.folders import FolderSource
from cheapscale.data.latents import LatentSource
from cheapscale.data.numbers import whole
from cheapscale.data.resize import TOO_SMALL
from cheapscale.data.source import Source, decode, split_name

TEXTS = ("caption", "captions", "text", "description")  # features of TFDS sets
FOLDERS: dict[str, Any] = {"folder": FolderSource, "latents": LatentSource}
SCENE_SIZES = {"train": 20_000, "test": 5_000}


def open_source(
    name: str, split: str, *, resolution: int, data_dir: str | None = None, **options
) -> Source:
    """The source "scenes", "folder", "latents" of stage encode, or a prepared TFDS set ("cifar10"
    or "tfds:cifar10").

    data_dir: for TFDS the folder that holds the data sets (default $TFDS_DATA_DIR, or
    ~/tensorflow_datasets); for "folder" the root of the images. Options of every source:
      cache: keep decoded images in memory; None does so if they take at most 1 GiB.
      unlabelled: ignore the labels.
    Further options: size, seed and single of `SceneSource`; where and allow_upscale of
    `TfdsSource`; allow_upscale, skip_corrupt, probe and train_split of `FolderSource`.
    """
    if name == "scenes" and data_dir:
        raise ValueError(f"scenes are drawn, not read from {data_dir}: leave data_dir out")
    if name == "scenes":
        kind, place = SceneSource, {}
    elif name in ("folder", "latents"):
        kind, place = FOLDERS[name], {"data_dir": data_dir}
    else:
        kind, place = TfdsSource, {"name": name.removeprefix("tfds:"), "data_dir": data_dir}
    allowed = {*kind.__init__.__kwdefaults__, "cache", "unlabelled"} - {"name", "data_dir"}
    if unknown := sorted(set(options) - allowed):
        raise ValueError(
            f"source {name!r} has no option {', '.join(unknown)}: it takes "
            f"{', '.join(sorted(allowed))}"
        )
    return kind(split, resolution, **place, **options)


def open_data(
    data: Mapping[str, Any], *, split: str | None = None, resolution: int | None = None
) -> Source:
    """The source that `config.data` describes, with `split` or `resolution` overridden if given.

    `options.size` is the size of the split `data.split`; other splits have their default size.
    Class folders are numbered by `data.split` in every split.
    """
    options = dict(data["options"])
    if data["name"] == "folder" and data["split"]:
        options.setdefault("train_split", split_name(data["split"]))
    if split not in (None, data["split"]):
        options.pop("size", None)
    if data["name"] == "latents" and data.get("flip"):
        raise ValueError(
            "data.flip is True, but a mirrored latent is not that of the mirrored picture: give "
            "--config.data.flip=False (stage encode stores both, with --config.data.flip=True)"
        )
    return open_source(
        data["name"],
        split or data["split"],
        resolution=resolution or data["resolution"],
        data_dir=data["data_dir"] or None,
        **options,
    )


def open_pictures(
    data: Mapping[str, Any], *, split: str | None = None, resolution: int | None = None
) -> Source:
    """`open_data`, but of latents the pictures behind them; `split` and `resolution` are those of
    the pictures."""
    if data["name"] != "latents":
        return open_data(data, split=split, resolution=resolution)
    return pictures_of(open_data(data), split=split, resolution=resolution)


def pictures_of(
    source: Source, *, split: str | None = None, resolution: int | None = None
) -> Source:
    """The pictures behind latents, at the size that they decode to; another source as it is.

    split: another than that of the latents. Raises ValueError where the pictures are gone.
    """
    if not isinstance(source, LatentSource):
        return source
    data, made = source.manifest["data"], source.manifest["pictures"]["fingerprint"]
    other = split if split_name(split or source.split) != split_name(source.split) else None
    side = resolution or source.resolution * source.codec["factor"]
    found = open_data(data, split=other, resolution=side)
    if not other and found.fingerprint() != made:
        raise ValueError(
            f"the pictures in {data['data_dir']} are not those of the latents in {source.folder}: "
            "encode them again into a new folder"
        )
    return found


class SceneSource(Source):
    """Procedural scenes (see `scenes`); the label is the shape of the main object.

    size: number of images in the split. single: draw only the main object.
    """

    def __init__(
        self,
        split: str,
        resolution: int,
        *,
        size: int | None = None,
        seed: int = 0,
        single: bool = False,
        **options,
    ):
        base = split_name(split)
        if base not in scenes.SPLITS:
            raise ValueError(f"scenes has no split {base!r}: choose {' or '.join(scenes.SPLITS)}")
        scenes.check_resolution(resolution)
        self.seed, self.single = whole(seed, "seed"), single
        super().__init__(
            "scenes",
            split,
            resolution,
            length=whole(SCENE_SIZES[base] if size is None else size, "size", 1),
            class_names=scenes.SHAPES,
            # The size is left out: a larger set begins with the same images.
            identity=[scenes.SCENES_ID, seed] + ["single"] * single,
            **options,
        )

    def scene(self, i: int) -> scenes.Scene:
        """The ground and the objects of image i, the main object first."""
        return self._scene(self._index(i))

    def _scene(self, index: int) -> scenes.Scene:
        whole = scenes.scene(self.seed, split_name(self.split), index)
        return dataclasses.replace(whole, objects=whole.objects[:1]) if self.single else whole

    def _load(self, index: int) -> np.ndarray:
        return scenes.draw(self._scene(index), self.resolution)

    def _label(self, index: int) -> int:
        return scenes.label(self._scene(index))

    def _captions(self, index: int) -> tuple[str, ...]:
        return scenes.captions(self._scene(index))


class TfdsSource(Source):
    """A prepared TFDS set in ArrayRecord files with the feature "image", and optionally "label" and
    one of TEXTS: a text or several, or, as in coco_captions, records with a text.

    where: {field: value}; only records with these values are kept.
    """

    def __init__(
        self,
        split: str,
        resolution: int,
        *,
        name: str,
        data_dir: str | None = None,
        where: Mapping[str, Any] | None = None,
        allow_upscale: bool = False,
        **options,
    ):
        import tensorflow_datasets as tfds  # a slow import, which other sources do not need

        builder = tfds.builder_from_directory(_newest_version(name, data_dir))
        features, base, where = builder.info.features, split_name(split), dict(where or {})
        for what, wanted, found in (
            ("split", [base], builder.info.splits),
            ("feature", ["image", *where], features),
        ):
            if missing := sorted(set(wanted) - set(found)):
                raise ValueError(
                    f"{name} has no {what} {', '.join(missing)}: it has {', '.join(sorted(found))}"
                )
        height, width, _ = features["image"].shape  # None where images differ in size
        if height and width and min(height, width) < resolution and not allow_upscale:
            raise ValueError(
                f"{name} holds images of {height}x{width}, smaller than resolution {resolution}: "
                f"{TOO_SMALL}"
            )
        # Images stay encoded, so that labels are read without decoding; `decode` decodes them.
        decoders = {"image": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(base, decoders=decoders)
        self._set, self._upscale = f"{name}:{base}", allow_upscale
        self._kept: Any = range(len(self._records))
        if where:
            self._kept = [i for i in self._kept if _matches(self._record(i), where)]
        files = [pathlib.Path(file) for file in builder.info.splits[base].filepaths]
        super().__init__(
            name,
            split,
            resolution,
            length=len(self._kept),
            class_names=tuple(features["label"].names) if "label" in features else (),
            identity=["tfds", content_hash(files, [file.name for file in files]), where],
            **options,
        )

    def record(self, i: int) -> dict[str, Any]:
        """All fields of image i; the image is in encoded bytes."""
        return self._record(self._kept[self._index(i)])

    def _record(self, place: int) -> dict[str, Any]:
        try:
            return self._records[place]
        except Exception as error:  # the reader raises many types of errors
            raise ValueError(
                f"record {place} of {self._set} is unreadable ({error}): prepare the set again"
            ) from error

    def _load(self, index: int) -> np.ndarray:
        place = self._kept[index]
        file = io.BytesIO(self._record(place)["image"])
        name = f"record {place} of {self._set}"
        return decode(file, name, self.resolution, allow_upscale=self._upscale)

    def _label(self, index: int) -> int:
        return self._record(self._kept[index])["label"]

    def _captions(self, index: int) -> list[str]:
        record = self._record(self._kept[index])
        found = next((record[name] for name in TEXTS if name in record), [])
        found = found["text"] if isinstance(found, Mapping) else found
        texts = [found] if isinstance(found, (bytes, str)) else found
        return [text for text in map(_text, texts) if text]


def _newest_version(name: str, data_dir: str | None) -> pathlib.Path:
    """The folder of the newest prepared version of a TFDS set."""
    folder = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    root = pathlib.Path(folder).expanduser()
    versions = [path.parent for path in root.glob(f"{name}/**/dataset_info.json")]
    if not versions:
        found = {path.relative_to(root).parts[0] for path in root.glob("*/**/dataset_info.json")}
        raise ValueError(
            f"no data set {name!r} in {root}, where {', '.join(sorted(found)) or 'nothing'} is "
            "prepared: give --config.data.data_dir=DIR, its folder (--data_dir=DIR in "
            "launch.evaluate), or --config.data.name=scenes"
        )
    return max(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def _matches(record: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(_text(record[field]) == value for field, value in where.items())


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
