"""The store of data-latent pairs: what the inversion of every image found, and for which teacher.

PaGoDA inverts each image and its mirror image once (Kim et al. 2024; spec sections 2.2 and 11) and
then trains on the pairs only; sets that are not to be mirrored have one orientation. Key = (image
id, flip); record n = orientations id + flip lies in shard n // per_shard at place n % per_shard, so
that any latent is one seek away. Images are not stored:
`PairSource` reads them again, at whatever resolution the generator has grown to.

    manifest.json              what made the latents; see `LatentWriter` for the keys it must have
    shard-00000.array_record   the records
    shard-00000.json           {label: [count, mean square of z / sigma_max]}, for `rms`

One record, little-endian: id int64, flip int32, label int32, then the latent [h, w, c]; float32
holds z itself at scale sigma_max, float16 holds z / sigma_max. A shard appears under its name
only when it is whole and on the disk: what exists is finished, and a writer may be stopped at any
time and run again. rms(z) / sigma_max below 1 measures how far the teacher is from the data; it is
reported, never normalised away.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from cheapscale.data.augment import flip as mirror
from cheapscale.data.files import whole_or_nothing
from cheapscale.data.random_access import Source
from cheapscale.data.resize import RESIZE_ID

FORMAT = "cheapscale-latents/3"
HEADER = struct.Struct("<qii")
DTYPES = {"float32": "<f4", "float16": "<f2"}
MANIFEST_KEYS = (
    "teacher", "sigma_max", "source", "num_images", "orientations", "shape", "dtype", "per_shard",
)  # fmt: skip
SOURCE_KEYS = ("name", "split", "fingerprint", "num_classes", "resize", "resolution")


def num_records(manifest: Mapping[str, Any]) -> int:
    return manifest["orientations"] * manifest["num_images"]


def record_key(manifest: Mapping[str, Any], n: int) -> tuple[int, int]:
    """(image id, flip) of record n."""
    return divmod(n, manifest["orientations"])


class LatentWriter:
    """Writes a store, shard by shard, in any order and by any number of processes."""

    def __init__(self, folder: str | os.PathLike, manifest: Mapping[str, Any]):
        """A new store, or the one that is there if its manifest is the same; another is refused.

        Nothing is written before `begin`.

        manifest: JSON values. Required: teacher, sigma_max, num_images, orientations (2 with mirror
        images, 1 without), shape [h, w, c] of one latent, dtype "float32" or "float16", per_shard
        (records, one for each orientation of an image), and source
        {name, split, fingerprint, num_classes, resize, resolution}, where resolution is the base
        resolution. Whatever else a latent depends on (grid, clamp, guidance ...) goes here too.
        """
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads(json.dumps({"format": FORMAT, **manifest}))
        _check_manifest(self.manifest)
        self.num_shards = _num_shards(self.manifest)
        self._is_begun()

    def begin(self) -> None:
        """Write the manifest where there is none yet; `write_shard` does it too."""
        if not self._is_begun():
            with whole_or_nothing(self.folder / "manifest.json") as temporary:
                temporary.write_text(json.dumps(self.manifest, indent=1) + "\n")

    def _is_begun(self) -> bool:
        path = self.folder / "manifest.json"
        if not path.exists():
            return False
        found = _read_manifest(self.folder)
        _refuse_difference(path, self.manifest, found)
        _refuse_difference(path, {key: self.manifest.get(key) for key in found}, found)
        return True

    def records(self, shard: int) -> range:
        """The numbers of a shard's records; `record_key` tells whose one is."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard {shard} is outside 0..{self.num_shards - 1} of {self.folder}")
        first, per_shard = shard * self.manifest["per_shard"], self.manifest["per_shard"]
        return range(first, min(first + per_shard, num_records(self.manifest)))

    def is_done(self, shard: int) -> bool:
        """Whether a shard is written; one that is, is whole."""
        return _shard_path(self.folder, shard).exists()

    def payload_bytes(self, shard: int) -> int:
        """Bytes of a shard's records, exactly."""
        values = math.prod(self.manifest["shape"])
        itemsize = np.dtype(DTYPES[self.manifest["dtype"]]).itemsize
        return len(self.records(shard)) * (HEADER.size + values * itemsize)

    def file_bytes(self, shard: int) -> int:
        """At most so many bytes does a shard take: ArrayRecord adds a header and an index entry to
        each record, a header to each block of 64 KiB, and fills up the last two blocks."""
        payload = self.payload_bytes(shard)
        return payload + payload // 1000 + 64 * len(self.records(shard)) + 2 * 2**16

    def write_shard(
        self,
        shard: int,
        z: np.ndarray,
        labels: np.ndarray,
        cost: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """z: [n, h, w, c] at scale sigma_max, labels: [n], in the order of `records(shard)`. cost:
        what the shard took, by unit; `LatentStore.cost` adds the shards up.

        Writes the shard whole or not at all and returns {"rms"} of z / sigma_max, with the lowest
        and highest of any class. A full disk is an OSError that leaves finished shards alone.
        """
        self.begin()
        records, shape = self.records(shard), tuple(self.manifest["shape"])
        z, labels = np.asarray(z, np.float32), np.asarray(labels)
        if z.shape != (len(records), *shape) or labels.shape != (len(records),):
            raise ValueError(
                f"shard {shard} takes {len(records)} latents of shape {shape} and as many labels, "
                f"got {z.shape} and {labels.shape}"
            )
        scaled = z / np.float32(self.manifest["sigma_max"])
        dtype = self.manifest["dtype"]
        values = (z if dtype == "float32" else scaled).astype(DTYPES[dtype])
        finite = np.isfinite(values).all(axis=(1, 2, 3))
        if not finite.all():
            bad = record_key(self.manifest, records[int(np.argmin(finite))])
            raise ValueError(
                f"the latent of image {bad[0]} with flip {bad[1]} is not finite: "
                "check the teacher's weights and the grid before storing latents"
            )
        classes = _mean_squares(scaled, labels)
        path = _shard_path(self.folder, shard)
        try:
            # The statistics first: a shard that exists has them.
            with whole_or_nothing(path.with_suffix(".json")) as temporary:
                kept = {"mean_squares": classes, "cost": dict(cost or {})}
                temporary.write_text(json.dumps(kept) + "\n")
            with whole_or_nothing(path) as temporary:
                writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
                for n, label, value in zip(records, labels.tolist(), values):
                    writer.write(
                        HEADER.pack(*record_key(self.manifest, n), label) + value.tobytes()
                    )
                writer.close()
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"shard {shard} of {self.folder} could not be written ({error}): nothing written "
                "before is lost, so make room and run the same command again"
            ) from error
        total, by_class = _rms([classes])
        return {"rms": total, "rms_min": min(by_class.values()), "rms_max": max(by_class.values())}

    def finish(self) -> dict[str, Any]:
        """The summary of a finished store; refuses one that lacks shards."""
        store = LatentStore.open(self.folder)
        total, by_class = store.rms()
        return {
            "latents": str(self.folder),
            "records": len(store),
            "rms": total,
            "rms_by_class": {str(label): value for label, value in by_class.items()},
            "cost": store.cost(),
        }


class LatentStore:
    """A finished store, read at random. `open` it."""

    def __init__(self, folder: pathlib.Path, manifest: dict[str, Any], in_memory: bool):
        self.folder, self.manifest = folder, manifest
        self.sigma_max = manifest["sigma_max"]
        self._shape, self._dtype = tuple(manifest["shape"]), np.dtype(DTYPES[manifest["dtype"]])
        self._readers: dict[int, ArrayRecordReader] = {}
        self._memory: list[bytes] | None = None
        if in_memory:
            self._memory = []
            for shard in range(_num_shards(manifest)):
                self._memory += self._reader(shard).read_all()
            self._readers.clear()

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        expect: Mapping[str, Any] | None = None,
        *,
        in_memory: bool = False,
    ) -> "LatentStore":
        """Refuses a store that is not finished, or whose manifest differs from `expect` in one of
        the keys named there. in_memory: hold every record in RAM."""
        folder = pathlib.Path(folder)
        if not (folder / "manifest.json").exists():
            raise ValueError(f"no latent store in {folder}: run the stage 'invert' first")
        manifest = _read_manifest(folder)
        _refuse_difference(folder / "manifest.json", dict(expect or {}), manifest)
        count = _num_shards(manifest)
        missing = [n for n in range(count) if not _shard_path(folder, n).exists()]
        if missing:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise ValueError(
                f"the latent store {folder} lacks {len(missing)} of {count} shards ({shown}): "
                "run the stage 'invert' again, it writes only these"
            )
        return cls(folder, manifest, in_memory)

    def __len__(self) -> int:
        return num_records(self.manifest)

    def latent(self, id: int, flip: int) -> np.ndarray:
        """z of one key: float32 [h, w, c] at scale sigma_max."""
        return self.record(id, flip)[1]

    def record(self, id: int, flip: int) -> tuple[int, np.ndarray]:
        """(label, z) of one key."""
        orientations = self.manifest["orientations"]
        n = orientations * int(id) + int(flip)
        if flip not in range(orientations) or not 0 <= n < len(self):
            raise KeyError(
                f"no latent for image {id} with flip {flip} in {self.folder}, which holds images "
                f"0..{self.manifest['num_images'] - 1} with flip 0{' and 1' * (orientations == 2)}"
            )
        shard, place = divmod(n, self.manifest["per_shard"])
        try:
            data = self._memory[n] if self._memory else self._reader(shard).read([place])[0]
            found_id, found_flip, label = HEADER.unpack_from(data)
        except (RuntimeError, IndexError, struct.error) as error:
            raise ValueError(
                f"{_shard_path(self.folder, shard)} is damaged ({error}): delete it and run the "
                "stage 'invert' again, it writes only this shard"
            ) from error
        if (found_id, found_flip) != (id, flip):
            raise ValueError(
                f"record {place} of {_shard_path(self.folder, shard)} is of image {found_id} with "
                f"flip {found_flip}, not {id} with {flip}: delete the shard and invert again"
            )
        z = np.frombuffer(data, self._dtype, offset=HEADER.size).reshape(self._shape)
        z = z.astype(np.float32)
        if self.manifest["dtype"] == "float16":
            z *= np.float32(self.sigma_max)
        return label, z

    def rms(self) -> tuple[float, dict[int, float]]:
        """rms(z) / sigma_max over the whole store, and by label: the teacher-data mismatch."""
        return _rms([kept["mean_squares"] for kept in self._kept()])

    def cost(self) -> dict[str, float]:
        """What making the store took, by unit ("flops", "device_seconds"), all shards together."""
        total: dict[str, float] = {}
        for kept in self._kept():
            for unit, amount in kept["cost"].items():
                total[unit] = total.get(unit, 0.0) + amount
        return total

    def _kept(self) -> list[dict[str, Any]]:
        paths = (_shard_path(self.folder, n) for n in range(_num_shards(self.manifest)))
        return [json.loads(path.with_suffix(".json").read_text()) for path in paths]

    def _reader(self, shard: int) -> ArrayRecordReader:
        # Two threads may open the same shard at once; either reader serves.
        if shard not in self._readers:
            path = str(_shard_path(self.folder, shard))
            options = "readahead_buffer_size:0,max_parallelism:0"  # the advice for random access
            self._readers[shard] = ArrayRecordReader(path, options)
        return self._readers[shard]


class PairSource:
    """Pairs (image, latent) at the source's resolution; itself a source for `loader.batches`.

    Item: {"image" [R, R, 3], mirrored where flip = 1, "label", "flip", "id", "z" [h, w, c]}.
    Item j is image ids[j // 2] with flip j % 2; without `flips` it is image ids[j] as it stands.
    proportion p keeps the first p n images of each class of n, at least one ("1 % of the pairs",
    spec 3.3).
    """

    def __init__(
        self, source: Source, store: LatentStore, proportion: float = 1.0, flips: bool = True
    ):
        self.orientations = 2 if flips else 1
        if self.orientations > store.manifest["orientations"]:
            raise ValueError(
                f"{store.folder} holds no latents of mirror images: set data.flip to False, or "
                "invert again with it"
            )
        if not 0 < proportion <= 1:
            raise ValueError(f"proportion of the pairs must lie in (0, 1], got {proportion}")
        made_from = {
            "name": source.name,
            "split": source.split,
            "fingerprint": source.fingerprint(),
            "num_classes": source.num_classes,
            "resize": RESIZE_ID,
        }
        wanted = {"source": made_from, "num_images": len(source)}
        _refuse_difference(store.folder / "manifest.json", wanted, store.manifest)
        base = store.manifest["source"]["resolution"]
        if source.resolution % base:
            raise ValueError(
                f"images of {source.resolution} px cannot pair with latents of {base} px: "
                f"use a multiple of {base}"
            )
        self.source, self.store = source, store
        self.resolution, self.num_classes = source.resolution, source.num_classes
        if proportion == 1:
            self.ids = np.arange(len(source))
        else:
            labels = source.labels()
            groups = [np.flatnonzero(labels == c) for c in np.unique(labels)]
            kept = [g[: max(1, int(proportion * len(g) + 1e-9))] for g in groups]
            self.ids = np.sort(np.concatenate(kept))

    def __len__(self) -> int:
        return self.orientations * len(self.ids)

    def __getitem__(self, j: int) -> dict[str, np.ndarray]:
        if not 0 <= j < len(self):
            raise IndexError(f"no pair {j} among {len(self)}")
        index, flip = divmod(j, self.orientations)
        id = int(self.ids[index])
        item = self.source[id]
        label, z = self.store.record(id, flip)
        if label != item["label"]:
            raise ValueError(
                f"image {id} has label {item['label']} but its latent was made with {label}: "
                f"invert again, {self.store.folder} belongs to other labels"
            )
        image = mirror(item["image"]) if flip else item["image"]
        return {**item, "image": image, "flip": np.int32(flip), "z": z}


def _mean_squares(scaled: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    squares = np.square(scaled, dtype=np.float64).mean(axis=(1, 2, 3))
    groups = {int(label): squares[labels == label] for label in np.unique(labels)}
    return {str(label): [len(values), float(values.mean())] for label, values in groups.items()}


def _rms(shards: list[dict[str, list[float]]]) -> tuple[float, dict[int, float]]:
    """Root mean squares, overall and by label, of what `_mean_squares` gave for each shard."""
    sums: dict[int, np.ndarray] = {}
    for classes in shards:
        for label, (count, mean) in classes.items():
            sums[int(label)] = sums.get(int(label), np.zeros(2)) + (count, count * mean)
    count, square = sum(sums.values())
    by_label = {label: float(np.sqrt(s / n)) for label, (n, s) in sorted(sums.items())}
    return float(np.sqrt(square / count)), by_label


def _num_shards(manifest: Mapping[str, Any]) -> int:
    return -(-num_records(manifest) // manifest["per_shard"])


def _shard_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
    return folder / f"shard-{shard:05d}.array_record"


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder} holds format {manifest.get('format')!r}, this code reads {FORMAT!r}: "
            "invert again into a new folder"
        )
    return manifest


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    missing += [f"source.{k}" for k in SOURCE_KEYS if k not in manifest.get("source", {})]
    if missing:
        raise ValueError(f"the manifest of a latent store lacks {', '.join(missing)}")
    if manifest["dtype"] not in DTYPES:
        raise ValueError(
            f"latents are stored as {' or '.join(DTYPES)}, not as {manifest['dtype']!r}"
        )
    if manifest["orientations"] not in (1, 2):
        raise ValueError(f"orientations is {manifest['orientations']}: choose 1, or 2 for mirrors")
    for key in ("per_shard", "num_images", "sigma_max"):
        if not manifest[key] > 0:
            raise ValueError(f"{key} of a latent store must be positive, got {manifest[key]}")


def _refuse_difference(
    path: pathlib.Path, wanted: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    """Every key of `wanted`, nested ones too, must be in `found` with an equal value; what was
    paid for the teacher changes no latent."""
    wanted = {key: value for key, value in wanted.items() if key != "paid"}
    differing = list(_differences(json.loads(json.dumps(wanted)), found))  # tuples become lists
    if differing:
        raise ValueError(
            f"{path} was made for something else ({'; '.join(differing)}): "
            "choose another folder, or delete this one and invert again"
        )


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any], prefix: str = ""):
    for key, value in wanted.items():
        other = found.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(value, other, f"{prefix}{key}.")
        elif key not in found or other != value:
            yield f"{prefix}{key}: stored {other!r}, wanted {value!r}"
