"""A data set of latents, which stage `encode` writes, as a source of "images" [R, R, c].

    DIR/autoencoder.safetensors     what decodes them, with the scale of the latents
    DIR/manifest.json               pictures, autoencoder, sides, orientations (a JSON object)
    DIR/about.json                  labels and captions of the pictures
    DIR/16/shard-00000.npy          float32 [n, 16, 16, c], for each side

Latent n is that of picture n // orientations, mirrored if n is odd and orientations is 2: the
latent of a mirror image is not the mirrored latent. Every side has the latents of the pictures at
that size, not reduced latents, which an autoencoder would not give.
"""

import functools
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cheapscale.data.files import atomic_write, damaged, read_json
from cheapscale.data.source import Source, split_name

FORMAT = "cheapscale-latents/1"
CODEC, MANIFEST, ABOUT = "autoencoder.safetensors", "manifest.json", "about.json"


class LatentSource(Source):
    """Latents at one side of a data set of `encode`. fingerprint: that of pictures, autoencoder and
    scale; equal at every side."""

    def __init__(self, split: str, resolution: int, *, data_dir: str | None = None, **options: Any):
        self.folder = pathlib.Path(data_dir or "")
        if not data_dir or not (self.folder / MANIFEST).is_file():
            raise ValueError(
                f"no latents in {data_dir!r}: run stage encode with --config.encode.folder=DIR, "
                "and give that folder as --config.data.data_dir=DIR"
            )
        self.manifest = read_manifest(self.folder)
        with damaged(self.folder / MANIFEST):
            self.codec = self.manifest["codec"]
            self.channels, sides = self.manifest["channels"], self.manifest["sides"]
            pictures, each = self.manifest["pictures"], self.manifest["orientations"]
        own = split_name(pictures["split"])
        if split_name(split) != own:
            raise ValueError(
                f"{data_dir} holds latents of the split {own}, not {split_name(split)}: give "
                f"--config.data.split={own}, or encode that one into another folder"
            )
        if resolution not in sides:
            raise ValueError(
                f"{data_dir} holds latents of {' and '.join(map(str, sides))} a side, not "
                f"{resolution}: give --config.data.resolution={sides[0]}"
            )
        check_complete(self.folder, self.manifest, resolution)
        about = read_json(self.folder / ABOUT, "labels")
        self._labels_of, self._texts = about["labels"], about.get("captions")
        self._each, self._size = each, self.manifest["per_shard"]
        self._shard = functools.lru_cache(512)(self._read)
        super().__init__(
            "latents",
            split,
            resolution,
            length=self.manifest["num_images"] * each,
            class_names=tuple(pictures["class_names"]),
            identity=[pictures["fingerprint"], self.codec["sha256"], each],
            **options,
        )

    def describe(self) -> dict[str, Any]:
        """The same with data.codec: what decodes the latents."""
        codec = self.codec | {"path": str((self.folder / CODEC).resolve())}
        return super().describe() | {"codec": codec}

    def _read(self, shard: int) -> np.ndarray:
        return np.load(shard_path(self.folder, self.resolution, shard), mmap_mode="r")

    def _load(self, index: int) -> np.ndarray:
        shard, place = divmod(index, self._size)
        return np.asarray(self._shard(shard)[place], np.float32)

    def _label(self, index: int) -> int:
        return self._labels_of[index // self._each]

    def _captions(self, index: int) -> Sequence[str]:
        return self._texts[index // self._each] if self._texts else ()


def shard_path(folder: pathlib.Path, side: int, shard: int) -> pathlib.Path:
    """The file of one shard at one side."""
    return folder / str(side) / f"shard-{shard:05d}.npy"


def num_shards(manifest: dict[str, Any]) -> int:
    """Shards of each side."""
    return math.ceil(manifest["num_images"] * manifest["orientations"] / manifest["per_shard"])


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a folder; ValueError for another format."""
    manifest = read_json(folder / MANIFEST, "format")
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{folder} holds format {manifest['format']!r:.60}, this version reads {FORMAT!r}: "
            "encode again into a new folder"
        )
    return manifest


def check_complete(folder: pathlib.Path, manifest: dict[str, Any], side: int) -> None:
    """Raises ValueError where a shard is missing."""
    count = num_shards(manifest)
    missing = [n for n in range(count) if not shard_path(folder, side, n).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {count} shards of {side} latents a side: run stage "
            "encode again, which makes only these"
        )


def write_about(folder: str | os.PathLike, source: Source) -> None:
    """Write the labels of the pictures, and their captions if they have any."""
    about: dict[str, Any] = {"labels": source.labels().tolist()}
    if source.caption(0):
        about["captions"] = [list(source.captions(i)) for i in range(len(source))]
    with atomic_write(pathlib.Path(folder) / ABOUT) as temporary:
        temporary.write_text(json.dumps(about))
