"""The store of data-latent pairs: PaGoDA's inversions, kept on disk (Kim et al., arXiv 2405.14822).

Inversion maps each image x and its mirror image to noise z by the teacher's ODE; distillation and
growth then train on the pairs (x, z). The key of a pair is (image id, flip): the latent of the
mirror image is stored too, because it is not the mirrored latent, as a network is only nearly
symmetric. Images are not stored. `InvertedPairs` reads them again, at the generator's resolution.

    manifest.json        what determines the latents: teacher, images, grid, ... (a JSON object)
    shard-00000.npy      NumPy records (id, flip, label, z [h, w, c]), little-endian
    shard-00000.json     rms of z / sigma_max, and the cost of computing the shard

Record n has the key divmod(n, orientations) and is in shard n // per_shard. With dtype float32 a
record holds z itself, whose standard deviation is about sigma_max. With float16 it holds
z / sigma_max, rounded with a relative error of at most 5e-4, far below the error of the solver. A
store whose manifest names a distribution `omega` has the guidance scale of each record, too. A
shard is renamed to its final name when it is complete and on the disk, so an interrupted inversion
continues with the missing shards.
"""

import collections
import functools
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cheapscale.data.augment import flip as mirror
from cheapscale.data.files import atomic_write, damaged, read_json, write_json
from cheapscale.data.source import Source

FORMAT = "cheapscale-pairs/1"
OPEN_SHARDS = 512  # each memory map holds a file descriptor; systems allow about 1000
Item = dict[str, np.ndarray]


class PairStore:
    """A folder of latents: `create` starts or continues a store, `open` reads a complete one."""

    def __init__(self, folder: str | os.PathLike, manifest: Mapping[str, Any]):
        if "://" in str(folder):
            raise ValueError(
                f"{folder} is not a local path: give --config.latents=DIR on a mounted disk"
            )
        self.folder, self.manifest = pathlib.Path(folder), dict(manifest)
        self.sigma_max = np.float32(manifest["sigma_max"])
        # z = scale * (stored value). float16 stores z / sigma_max: the largest float16 is 65504 and
        # its precision falls below 6e-5, so values near 1 are the safe range for any sigma_max.
        self._scale = self.sigma_max if manifest["dtype"] == "float16" else np.float32(1)
        self.orientations = manifest["orientations"]
        least = min(manifest["num_images"], manifest["per_shard"], *manifest["shape"])
        if self.orientations not in (1, 2) or least < 1:
            raise ValueError(
                f"{folder} is no store of latents: its manifest has orientations="
                f"{self.orientations} and sizes of {least}: invert again into a new folder"
            )
        self.num_shards = math.ceil(len(self) / manifest["per_shard"])
        latent = ("z", np.dtype(manifest["dtype"]).newbyteorder("<"), tuple(manifest["shape"]))
        tokens = manifest.get("source", {}).get("tokens")  # of a caption, in place of a class
        label = ("label", "<i4", (tokens,)) if tokens else ("label", "<i4")
        conditions = [label] + [("omega", "<f4")] * ("omega" in manifest)
        self._record = np.dtype([("id", "<i8"), ("flip", "<i4"), *conditions, latent])
        self._shard = functools.lru_cache(OPEN_SHARDS)(self._read_shard)

    @classmethod
    def create(cls, folder: str | os.PathLike, manifest: Mapping[str, Any]) -> "PairStore":
        """A new store, or the store in `folder` if its manifest is equal; else ValueError.

        Nothing is written before `begin`.

        manifest: JSON values. Required: teacher (fingerprint), sigma_max, num_images, orientations
        (2 with mirror images, else 1), shape [h, w, c] of a latent, dtype "float32" or "float16",
        per_shard (latents in a shard) and source, the description of the images at the base
        resolution. Add everything else that changes a latent (grid, clipping, guidance).
        """
        store = cls(folder, json.loads(json.dumps({"format": FORMAT, **manifest})))
        if (store.folder / "manifest.json").exists():
            found = _read_manifest(store.folder)
            # The union of the keys, so that a key which only the existing store has is compared.
            _refuse_difference(store.folder, dict.fromkeys(found) | store.manifest, found)
        return store

    @classmethod
    def open(
        cls, folder: str | os.PathLike, expect: Mapping[str, Any] | None = None
    ) -> "PairStore":
        """The complete store in `folder`; ValueError if shards are missing or its manifest differs
        from a value in `expect`."""
        if not (pathlib.Path(folder) / "manifest.json").exists():
            raise ValueError(f"no pair store in {folder}: run the stage 'invert' first")
        manifest = _read_manifest(pathlib.Path(folder))
        with damaged(pathlib.Path(folder) / "manifest.json"):
            store = cls(folder, manifest)
        _refuse_difference(store.folder, expect or {}, store.manifest)
        numbers = (path.stem[6:] for path in store.folder.glob("shard-*.npy"))
        held = {int(n) for n in numbers if n.isdecimal() and int(n) < store.num_shards}
        if len(held) < store.num_shards:
            absent = (n for n in range(store.num_shards) if n not in held)
            missing = list(itertools.islice(absent, 9))
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise ValueError(
                f"the pair store {folder} lacks {store.num_shards - len(held)} of "
                f"{store.num_shards} shards ({shown}): run the stage 'invert' again, which makes "
                "only these"
            )
        return store

    def __len__(self) -> int:
        return self.orientations * self.manifest["num_images"]

    def key(self, n: int) -> tuple[int, int]:
        """(image id, flip) of record n."""
        return divmod(n, self.orientations)

    # Writing

    def begin(self) -> None:
        """Write the manifest unless it exists; `write_shard` calls this."""
        if not (self.folder / "manifest.json").exists():
            write_json(self.folder / "manifest.json", self.manifest)

    def records(self, shard: int) -> range:
        """The numbers n of a shard's records."""
        size = self.manifest["per_shard"]
        return range(len(self))[shard * size : (shard + 1) * size]

    def is_done(self, shard: int) -> bool:
        """Whether a shard is on the disk; shards are written atomically, so it is then complete."""
        return self._path(shard).exists()

    def shard_bytes(self, shard: int) -> int:
        """Upper bound of a shard's size in bytes: its records, a header and the statistics."""
        return len(self.records(shard)) * self._record.itemsize + 2**16

    def write_shard(
        self,
        shard: int,
        z: np.ndarray,
        labels: np.ndarray,
        cost: Mapping[str, float] | None = None,
        omega: np.ndarray | None = None,
    ) -> dict[str, float]:
        """{"rms": rms of z / sigma_max}; writes the latents of `records(shard)` atomically.

        z: [n, h, w, c] with standard deviation about sigma_max. labels: int [n], or token numbers
        [n, tokens]. cost: {unit: amount} that the computation took. omega: guidance scales [n], if
        the store has them. A full disk raises OSError; complete shards stay intact.
        """
        self.begin()
        numbers = self.records(shard)
        if z.shape != (len(numbers), *self.manifest["shape"]) or len(labels) != len(numbers):
            raise ValueError(
                f"shard {shard} takes {len(numbers)} latents of shape {self.manifest['shape']} and "
                f"as many labels, got {z.shape} and {len(labels)}"
            )
        z = np.asarray(z, np.float32)
        records = np.empty(len(numbers), self._record)
        records["id"], records["flip"] = self.key(np.asarray(numbers))
        records["label"] = labels
        if "omega" in self.manifest:
            records["omega"] = omega
        records["z"] = z / self._scale
        finite = np.isfinite(records["z"]).reshape(len(numbers), -1).all(axis=1)
        if not finite.all():
            image, flip = self.key(numbers[int(np.argmin(finite))])
            raise ValueError(
                f"the latent of image {image} with flip {flip} is not finite: check the teacher's "
                "weights, or invert with more levels (--config.invert.nodes)"
            )
        rms = float(np.sqrt(np.mean(np.square(z / self.sigma_max, dtype=np.float64))))
        try:
            # The statistics are written first, so that every existing shard has them.
            with atomic_write(self._path(shard).with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps({"rms": rms, "cost": dict(cost or {})}) + "\n")
            with atomic_write(self._path(shard)) as temporary, temporary.open("wb") as file:
                np.save(file, records)
        except OSError as error:
            raise OSError(
                f"shard {shard} of {self.folder} could not be written ({error}): complete shards "
                "are safe, so make room and run the same command again"
            ) from error
        return {"rms": rms}

    # Reading

    def record(self, id: int, flip: int) -> Item:
        """{label, z[, omega]} of one key, z float32 [h, w, c] with deviation about sigma_max."""
        n = self.orientations * int(id) + int(flip)
        if flip not in range(self.orientations) or not 0 <= n < len(self):
            raise ValueError(
                f"no latent of image {id} with flip {flip} in {self.folder}, which holds images "
                f"0..{self.manifest['num_images'] - 1} with flips 0..{self.orientations - 1}"
            )
        shard, place = divmod(n, self.manifest["per_shard"])
        try:
            record = self._shard(shard)[place]
            right = record.dtype == self._record and (record["id"], record["flip"]) == (id, flip)
        except (OSError, ValueError, EOFError, IndexError):
            right = False
        if not right:
            raise ValueError(
                f"{self._path(shard)} is damaged, or is another shard: delete it and run the stage "
                "'invert' again, which makes only this shard"
            )
        conditions = {name: record[name] for name in record.dtype.names[2:-1]}
        return conditions | {"z": self._scale * record["z"].astype(np.float32)}

    def latent(self, id: int, flip: int) -> np.ndarray:
        """z of one key: float32 [h, w, c] with standard deviation about sigma_max."""
        return self.record(id, flip)["z"]

    def inversion(self, rescale: bool = False) -> dict[str, Any]:
        """How a generator's latents are made from images, for its checkpoint: nodes, noise, level
        and clip of the store, and the factor `scale` of z. rescale: as in `InvertedPairs`."""
        made = ("nodes", "noise", "level", "clip")
        how = {name: self.manifest[name] for name in made if name in self.manifest}
        return how | {"scale": 1 / self.rms() if rescale else 1.0}

    def rms(self) -> float:
        """rms(z) / sigma_max over the whole store.

        Noise of the prior has the value 1. A lower value shows that the teacher's distribution
        differs from the data.
        """
        counts = [len(self.records(shard)) for shard in range(self.num_shards)]
        squares = [kept["rms"] ** 2 for kept in self._statistics()]
        return math.sqrt(np.average(squares, weights=counts))

    def cost(self) -> dict[str, float]:
        """{unit: amount}, such as "flops": the cost of the store, summed over its shards."""
        total = collections.Counter()
        for kept in self._statistics():
            total.update(kept["cost"])
        return dict(total)

    def summary(self) -> dict[str, Any]:
        """JSON values about a complete store."""
        kept = {"latents": str(self.folder), "records": len(self)}
        return kept | {"rms": self.rms(), "cost": self.cost()}

    def _path(self, shard: int) -> pathlib.Path:
        return self.folder / f"shard-{shard:05d}.npy"

    def _read_shard(self, shard: int) -> np.ndarray:
        """The records of a shard, memory-mapped: reading one record loads only its own pages."""
        return np.load(self._path(shard), mmap_mode="r")

    def _statistics(self) -> Iterator[dict[str, Any]]:
        for shard in range(self.num_shards):
            yield read_json(self._path(shard).with_suffix(".json"), "rms", "cost")


class InvertedPairs:
    """Pairs (image, inverted latent) at the source's resolution, as a source for the loader.

    Item j has the key divmod(j, 2): {"image" [R, R, 3], mirrored if flip = 1, "label", "flip",
    "id", "z" [h, w, c]}. Without `flips` item j is image j, not mirrored. proportion: p in (0, 1]
    keeps the first p n of the n images of each class, at least one; PaGoDA reports that 1 % of the
    pairs is enough for L_rec (arXiv 2405.14822, section 3.3). rescale: divide
    every z by `store.rms()`, so that the latents have the size of the prior's noise.
    """

    def __init__(
        self,
        source: Source,
        store: PairStore,
        proportion: float = 1.0,
        flips: bool = True,
        rescale: bool = False,
    ):
        self.orientations = 2 if flips else 1
        if self.orientations > store.orientations:
            raise ValueError(
                f"{store.folder} holds no latents of mirror images: give --config.data.flip=False, "
                "or invert again with --config.data.flip=True"
            )
        same = ("name", "split", "fingerprint", "num_classes", "resize")
        wanted = {name: value for name, value in source.describe().items() if name in same}
        _refuse_difference(
            store.folder, {"source": wanted, "num_images": len(source)}, store.manifest
        )
        base = store.manifest["source"]["resolution"]
        if source.resolution % base:
            raise ValueError(
                f"images of {source.resolution} px cannot pair with latents of {base} px: give "
                f"--config.data.resolution a multiple of {base}"
            )
        self.source, self.store = source, store
        self.scale = np.float32(store.inversion(rescale)["scale"])
        self.ids = np.arange(len(source))
        if proportion < 1:
            labels = source.labels() if source.num_classes else np.zeros(len(source))
            classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
            # The 1e-9 guards against rounding: 0.29 * 100 is 28.999... in floating point.
            kept = [ids[: max(1, int(proportion * len(ids) + 1e-9))] for ids in classes]
            self.ids = np.sort(np.concatenate(kept))

    def __len__(self) -> int:
        return self.orientations * len(self.ids)

    def __getitem__(self, j: int) -> Item:
        index, flip = divmod(j, self.orientations)
        id = int(self.ids[index])
        item = self.source[id]
        record = self.store.record(id, flip)
        # Another caption is as true, and the one of the latent is used.
        if not self.source.captioned and record["label"] != item["label"]:
            raise ValueError(
                f"image {id} has label {item['label']} but its latent in {self.store.folder} was "
                f"made with {record['label']}: invert again with these labels"
            )
        image = mirror(item["image"]) if flip else item["image"]
        more = {"image": image, "flip": np.int32(flip), "z": self.scale * record["z"]}
        return item | record | more


class SampledPairs:
    """Pairs (teacher sample, its noise) from a store made with `invert.direction` "sample".

    They feed L_dstl, the loss of plain distillation that PaGoDA compares with (arXiv 2405.14822,
    section 3.2). The records of such a store hold the samples; `drawn_latent` gives the noise.
    """

    def __init__(self, store: PairStore):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, n: int) -> Item:
        record = self.store.record(*self.store.key(n))
        z = drawn_latent(self.store.manifest, n)
        return record | {"image": record["z"], "z": z, "id": np.int64(n)}


def drawn_latent(manifest: Mapping[str, Any], n: int) -> np.ndarray:
    """z ~ N(0, sigma_max^2 I) of sample n, float32 [h, w, c]; recomputed from (seed, n)."""
    rng = np.random.default_rng((manifest["seed"], n))
    z = rng.standard_normal(manifest["shape"], dtype=np.float32)
    return np.float32(manifest["sigma_max"]) * z


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    manifest = read_json(folder / "manifest.json")
    found = manifest.get("format")
    if found != FORMAT:
        raise ValueError(
            f"{folder} holds format {found!r:.60}, this version reads {FORMAT!r}: "
            "invert again into a new folder"
        )
    return manifest


def _refuse_difference(
    folder: pathlib.Path, wanted: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    """Raise ValueError unless `found` has every value of `wanted`, including nested ones.

    The teacher's cost, "extra_cost", may differ, since it changes no latent.
    """
    wanted = {key: value for key, value in wanted.items() if key != "extra_cost"}
    differing = list(_differences(json.loads(json.dumps(wanted)), found))  # tuples become lists
    if differing:
        raise ValueError(
            f"the pair store {folder} was made for something else ({'; '.join(differing)}): give "
            "another folder as --config.latents, or delete this one and invert again"
        )


def _differences(
    wanted: Mapping[str, Any], found: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """One text for each value of `wanted` that `found` lacks or has otherwise."""
    for key, value in wanted.items():
        if key == "path":  # of an autoencoder, which its SHA-256 identifies
            continue
        other = found.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(value, other, f"{prefix}{key}.")
        elif key not in found or other != value:
            yield f"{prefix}{key}: stored {other!r}, wanted {value!r}"
